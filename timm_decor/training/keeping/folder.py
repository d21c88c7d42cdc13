"""The output folder of a run.

Every file is written in a folder of its own, brought to the disk and renamed, so none is ever half there, and what a
killed run leaves, whoever wrote it, lies in one place. While a run lasts, resume.pt has one generation before it, for
the day on which the disk itself spoils the newest; and the last epoch's end stays, which any number of processes can go
on from.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from timm_decor.digest import RESULTS_FILE, sha256
from timm_decor.errors import UserError, first_line, load_failure
from timm_decor.training.keeping.lock import LOCK_FILE, locked
from timm_decor.training.keeping.starts import Start, with_start

RESUME_FILE = "resume.pt"
PREVIOUS_FILE = "resume-previous.pt"
EPOCH_FILE = "resume-epoch.pt"
DAMAGED_FILE = "resume-damaged.pt"
RESUME_FILES = (RESUME_FILE, PREVIOUS_FILE, EPOCH_FILE, DAMAGED_FILE)
ARGS_FILE = "args.yaml"
CHANGES_FILE = "changes.json"  # what was changed on the way, by resuming with other arguments
STARTS_FILE = "starts.json"  # on which machines the run was trained
SUMMARY_FILE = "summary.csv"
REPORT_FILE = "report.html"
COMPARISON_FILES = ("compare.json", "compare.md", "compare.png")
_UNFINISHED = ".unfinished-"  # begins the name of a folder; a file is renamed out of it
EMA_SUFFIX = "-ema"  # last.safetensors has its averaged weights in last-ema.safetensors


class RunFolder:
    """A folder of results; made, and tested for writing, when it is opened.

    Args:
        path: the folder.
        writes: false on every process but the main one, where all methods that write do nothing.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self._writes = writes
        self._is_new = False
        if writes:
            try:
                self._is_new = not path.exists()
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make output folder {path}: {error.strerror}") from error
            self._write(".writable", lambda file: file.touch())
            (path / ".writable").unlink(missing_ok=True)

    @classmethod
    def fresh(cls, path: Path) -> RunFolder:
        """A folder that nobody had before: `path`, or with -2, -3, ... behind it where that exists.

        Raises:
            UserError: the folder cannot be made or written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for number in itertools.count(1):
                folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
                try:
                    folder.mkdir()  # not asked for before: another run may begin in the same second
                    break
                except FileExistsError:
                    continue
        except OSError as error:
            raise UserError(f"cannot make output folder {path}: {error.strerror}") from error
        made = cls(folder)
        made._is_new = True
        return made

    def remove_if_empty(self) -> None:
        """Remove the folder if it was made here and holds nothing but empty ones."""
        found = list(self.path.rglob("*")) if self._is_new else []
        if self._is_new and all(path.is_dir() or path.name == LOCK_FILE for path in found):
            with contextlib.suppress(OSError):
                shutil.rmtree(self.path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other run out of the folder in here. The system lets go of it when the process ends, however.

        Raises:
            UserError: another run is in it.
        """
        if not self._writes:
            yield
            return
        with locked(self.path) as is_ours:
            if not is_ours:
                raise UserError(f"another run is at work in {self.path}: take another --experiment, or wait")
            yield

    def write_args(self, recipe: Mapping[str, Any]) -> None:
        """args.yaml, which `-c` reads back."""
        self.write_text(ARGS_FILE, yaml.safe_dump(dict(recipe), sort_keys=True))

    def changes(self) -> list[dict[str, Any]]:
        """What `note_changes` wrote: `steps`, and `changed`, which has [before, now] by argument."""
        return self._noted(CHANGES_FILE)

    def note_changes(self, steps: int, changed: Mapping[str, tuple[str, str]]) -> None:
        """Keep that the run goes on with other arguments after so many updates.

        Args:
            steps: updates.
            changed: (before, now) by argument; none may be left.
        """
        known = self.changes()
        done = [change for change in known if change["steps"] < steps]
        # nothing was trained in between: of two changes at one place, what was before the first and after the second
        here: dict[str, list[str]] = next((change["changed"] for change in known if change["steps"] == steps), {})
        ways = {**here, **{name: [here.get(name, pair)[0], pair[1]] for name, pair in changed.items()}}
        ways = {name: pair for name, pair in ways.items() if pair[0] != pair[1]}
        found = [*done, {"steps": steps, "changed": ways}] if ways else done
        if found != known:
            self.write_json(CHANGES_FILE, found)

    def note_start(self, steps: int, machine: Mapping[str, Any], versions: Mapping[str, str]) -> list[Start]:
        """Keep where the run goes on after so many updates, or begins; returns all of its starts, see `with_start`."""
        known = self._noted(STARTS_FILE)
        found = with_start(known, steps, machine, versions)
        if found != known:
            self.write_json(STARTS_FILE, found)
        return found

    def _noted(self, name: str) -> list[dict[str, Any]]:
        """A file with a list of what came about on the way; a run need not have it."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return found if isinstance(found, list) else []

    def write_json(self, name: str, value: Any) -> None:
        """A JSON file."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_bytes(self, name: str, data: bytes) -> None:
        """A file of any kind."""
        self._write(name, lambda file: file.write_bytes(data))

    def write_text(self, name: str, text: str) -> None:
        """A text file in UTF-8."""
        self._write(name, lambda file: file.write_text(text, encoding="utf-8"))

    def write_summary(self, history: list[dict[str, Any]]) -> None:
        """summary.csv: a row an epoch."""
        names = list(dict.fromkeys(name for row in history for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        self.write_text(SUMMARY_FILE, text.getvalue())

    def write_weights(self, name: str, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """`<name>.safetensors`: weights under the keys of the plain timm model, as contiguous CPU tensors."""
        if not self._writes:
            return
        # a fresh copy of each, because safetensors refuses other memory formats and tensors that share memory
        tensors = {key: value.detach().to("cpu").clone(memory_format=torch.contiguous_format) for key, value in
                   weights.items()}  # fmt: skip
        self._write(f"{name}.safetensors", lambda file: save_file(tensors, file, {"format": "pt", **metadata}))

    def link_weights(self, name: str, other: str) -> None:
        """Let `<other>.safetensors` be what `<name>.safetensors` is now (a hard link, or a copy where there are none).

        The averaged weights follow; where there are none, those of before go.
        """
        for suffix in ("", EMA_SUFFIX):
            source = self.path / f"{name}{suffix}.safetensors"
            if self._writes and source.is_file():
                self._write(f"{other}{suffix}.safetensors", partial(_link, source))
            elif suffix:
                self._remove(f"{other}{suffix}.safetensors")

    def forget_average(self, name: str) -> None:
        """Remove `<name>-ema.safetensors`: what was averaged before is no average of what is written now."""
        self._remove(f"{name}{EMA_SUFFIX}.safetensors")

    def epoch_of(self, name: str) -> int | None:
        """After which epoch `<name>.safetensors` was written, from 1; None where nothing says it."""
        try:
            with safe_open(self.path / f"{name}.safetensors", framework="pt") as file:
                return int((file.metadata() or {})["epoch"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def forget_epochs(self, epochs: Iterable[int]) -> None:
        """Remove the `checkpoint-<epoch>` files of these epochs."""
        for epoch in epochs:
            for suffix in ("", EMA_SUFFIX):
                self._remove(f"checkpoint-{epoch}{suffix}.safetensors")

    def forget_results(self) -> None:
        """Remove what a finished run wrote of itself: it is about to be another run."""
        for name in (RESULTS_FILE, REPORT_FILE, *COMPARISON_FILES):
            self._remove(name)

    def forget_previous(self) -> None:
        """Remove the resume states before the last: a finished run will not need them."""
        self._remove(PREVIOUS_FILE)
        self._remove(EPOCH_FILE)

    def digests(self) -> dict[str, str]:
        """SHA-256 of `last` and `best`, and of their averages, by file name."""
        names = [f"{name}{suffix}.safetensors" for name in ("best", "last") for suffix in ("", EMA_SUFFIX)]
        return {name: sha256(self.path / name) for name in names if self._writes and (self.path / name).is_file()}

    def write_resume(self, state: Mapping[str, Any]) -> None:
        """resume.pt: all that training needs to go on, in one file, so that its parts always belong together.

        The one that was there becomes resume-previous.pt.
        """

        def write(path: Path) -> None:
            with open(path, "wb") as file:  # not torch's own, which hides the system's reason when a write fails
                torch.save(dict(state), file)

        self._write(RESUME_FILE, write, keep=PREVIOUS_FILE)

    def keep_epoch(self, file: str = RESUME_FILE) -> None:
        """Let resume-epoch.pt be what a state of an epoch's end is now (a hard link, or a copy without them)."""
        self._write(EPOCH_FILE, partial(_link, self.path / file))

    def set_aside_damaged(self) -> None:
        """Rename a resume.pt that cannot be used, or the next write would make it the previous one."""
        if self._writes and (self.path / RESUME_FILE).is_file():
            os.replace(self.path / RESUME_FILE, self.path / DAMAGED_FILE)

    def remove_unfinished(self) -> None:
        """Remove what a killed run left half-written."""
        if self._writes:
            for room in self.path.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(room, ignore_errors=True)

    def _write(self, name: str, write: Callable[[Path], Any], keep: str | None = None) -> None:
        if not self._writes:
            return
        target = self.path / name
        room = self.path / f"{_UNFINISHED}{uuid.uuid4().hex[:12]}"
        unfinished = room / name
        try:
            room.mkdir()
            write(unfinished)
            # safetensors gives its files to their owner alone; the folder's own rights are as the umask has them
            unfinished.chmod(room.stat().st_mode & 0o666)
            _to_disk(unfinished)
            if keep and target.is_file():
                _link(target, room / keep)
                os.replace(room / keep, self.path / keep)
            os.replace(unfinished, target)
            with contextlib.suppress(OSError):  # not every file system has it for folders
                _to_disk(self.path)
        except (OSError, RuntimeError, SafetensorError) as error:
            # a full disk is a RuntimeError from torch.save and a SafetensorError, which is neither, from save_file
            raise UserError(f"cannot write {target}: {_reason(error)}") from error
        finally:
            # with what renaming leaves: it does nothing where both are names of one file already
            shutil.rmtree(room, ignore_errors=True)

    def _remove(self, name: str) -> None:
        if self._writes:
            (self.path / name).unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Wait until a file's bytes (of a folder: its names) would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The system's reason, which torch.save buries under its own complaint."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.strerror:
            return below.strerror
        below = below.__cause__ or below.__context__
    return first_line(error)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def holds_run(path: Path) -> bool:
    """Whether a run has left its files in this folder."""
    try:
        return any((path / name).is_file() for name in (RESUME_FILE, PREVIOUS_FILE, SUMMARY_FILE))
    except OSError:  # a name that the file system does not take
        return False


def find_resume(folder: Path) -> tuple[Path | None, str, dict[str, Any]]:
    """The newest usable resume file of a run folder.

    Returns:
        The file, None where there is none; what is wrong with a newer one, empty where nothing is; and what the file
        holds.

    Raises:
        UserError: there is one, but none that can be used.
    """
    wrong: list[str] = []
    for file in (folder / RESUME_FILE, folder / PREVIOUS_FILE):
        if file.is_file():
            try:
                return file, "; ".join(wrong), read_resume(file)
            except UserError as error:
                wrong.append(str(error))
    if wrong:
        raise UserError("; ".join(wrong))
    return None, "", {}


def read_resume(file: Path) -> dict[str, Any]:
    """What `write_resume` wrote.

    Raises:
        UserError: there is no such file, it is damaged, or it is something else.
    """
    if not file.is_file():
        raise UserError(f"nothing to resume: {file} does not exist")
    try:
        # torch writes a checksum of each record, as zip files have them, but does not look at it when it reads
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"cannot resume from {file}: it is damaged ({damaged} does not match its checksum)")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # on arbitrary bytes the weights-only unpickler raises whatever it stumbles over
        raise UserError(f"cannot resume from {file}: it is damaged or no checkpoint ({load_failure(error)})") from error
    if not isinstance(state, dict) or not {"state_dict", "optimizer", "history"} <= state.keys():
        raise UserError(f"cannot resume from {file}: it is no {RESUME_FILE} of train.py")
    return state
