"""The result file: every run with the command, versions and machine; each finished run is written at once."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from study.training import Record, Spec
from timm_decor import DecorConfig
from timm_decor.config import REMOVED_DEFAULTS
from timm_decor.errors import UserError, first_line
from timm_decor.training.runtime import available_cpus, cpu_name, versions

FORMAT = 1
RESULTS = Path(__file__).resolve().parents[1] / "results" / "time_to_accuracy"


def session(device: torch.device, threads: int | None, workers: int) -> dict[str, Any]:
    """How and where runs are made: the command, versions, commit and hardware; nothing that says whose it is."""
    words = [Path(sys.argv[0]).name, *(Path(w).name if os.path.isabs(w) else w for w in sys.argv[1:])]
    on_gpu = device.type == "cuda"
    return {
        "command": shlex.join(["python", "benchmarks/" + words[0], *words[1:]]),
        "versions": versions(),
        "commit": commit_of(Path(__file__).parent),
        "machine": {
            "processor": cpu_name(),
            "cores": available_cpus(),
            "threads": threads or torch.get_num_threads(),
            "workers": workers,
            "accelerator": torch.cuda.get_device_name(device) if on_gpu else None,
        },
    }


def replace_text(path: Path, text: str) -> None:
    """Write a file at once: whoever is killed meanwhile leaves what was there.

    Raises:
        UserError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def commit_of(folder: Path) -> str | None:
    """A checkout's commit, with a + where files differ from it; None outside a checkout."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        asked = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
        return subprocess.run(asked, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
    return None


@dataclass
class Results:
    """Runs of one preset and data set, in a JSON file that several processes may add to.

    Attributes:
        path: the file.
        settings: what all runs have in common; a file of other settings is refused.
        sessions: see `session`.
        records: every run.
    """

    path: Path
    settings: dict[str, Any]
    sessions: list[dict[str, Any]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Results:
        """A file that exists.

        Raises:
            UserError: it does not, or is no result file.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise UserError(f"{path} is of format {values['format']}; this script reads {FORMAT}")
            records = [Record.from_json(run, values["arms"][run["arm"]]) for run in values["runs"]]
            return cls(path, values["settings"], values["sessions"], records)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read results from {path}: {first_line(error)}") from error

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> Results:
        """A file to add to, new or of the same settings.

        Raises:
            UserError: it holds runs of other settings, or cannot be read.
        """
        if not path.is_file():
            return cls(path, settings)
        results = cls.read(path)
        for key, wanted in json.loads(json.dumps(settings)).items():
            if results.settings.get(key) != wanted:
                has = results.settings.get(key)
                raise UserError(f"{path} holds runs with {key} {has}, not {wanted}: name another --json, or remove it")
        return results

    def find(self, spec: Spec) -> Record | None:
        """The run of a spec, the latest if there are several."""
        return next((record for record in reversed(self.records) if same(record.spec, spec)), None)

    def add(self, record: Record, made_by: dict[str, Any]) -> None:
        """Write a finished run, in place of an earlier one of the same spec. Safe among processes."""
        with self._locked():
            if self.path.is_file():
                current = Results.read(self.path)
                self.sessions, self.records = current.sessions, current.records
            if made_by not in self.sessions:
                self.sessions.append(made_by)
            record.session = self.sessions.index(made_by)
            self.records = [old for old in self.records if not same(old.spec, record.spec)] + [record]
            self._check_arm(record.spec)
            self._write()

    def drop(self, stale: list[Record]) -> None:
        """Remove runs, such as those of an arm whose configuration is another one now."""
        with self._locked():
            self.records = [record for record in self.records if record not in stale]
            self._write()

    def _check_arm(self, spec: Spec) -> None:
        """An arm has one configuration in a file, or its runs would not belong together."""
        mine = [record.spec.config for record in self.records if record.spec.arm == spec.arm]
        if not all(same_config(spec.config, config) for config in mine):
            raise UserError(f"{self.path} has arm {spec.arm} with another configuration; give this one another name")

    def _write(self) -> None:
        order = sorted(self.records, key=lambda r: (r.spec.opt, r.spec.arm, r.spec.lr, r.spec.steps, r.spec.seed))
        arms = {record.spec.arm: record.spec.config and json.loads(record.spec.config) for record in order}
        head = {"format": FORMAT, "settings": self.settings, "arms": arms, "sessions": self.sessions}
        text = json.dumps(head, indent=1)[:-2]  # runs a line each: a result file is read by people, too
        runs = ",\n".join("  " + json.dumps(record.as_json()) for record in order)
        replace_text(self.path, f'{text},\n "runs": [\n{runs}\n ]\n}}\n')

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f".{self.path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def same(one: Spec, other: Spec) -> bool:
    """Whether two specs ask for the same run."""
    bare = dataclasses.replace(one, config=None) == dataclasses.replace(other, config=None)
    return bare and same_config(one.config, other.config)


def same_config(one: str | None, other: str | None) -> bool:
    """Whether two configurations decorrelate alike; a field that one of them does not know yet is at its default."""
    return _filled(one) == _filled(other)


def _filled(config: str | None) -> dict[str, Any] | None:
    if not config:
        return None
    values = json.loads(config)
    removed = [name for name, default in REMOVED_DEFAULTS.items() if values.get(name, default) == default]
    return {**DecorConfig().to_dict(), **{name: value for name, value in values.items() if name not in removed}}
