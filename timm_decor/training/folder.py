"""The output folder of a run. Every file is written under a temporary name and renamed, so none is ever half there."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from timm_decor.training.build import EMA_SUFFIX
from timm_decor.training.errors import UserError, first_line, load_failure

RESUME_FILE = "resume.pt"
ARGS_FILE = "args.yaml"
SUMMARY_FILE = "summary.csv"


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
        if writes:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make output folder {path}: {error.strerror}") from error
            self._write(".writable", lambda file: file.touch())
            (path / ".writable").unlink()

    @classmethod
    def fresh(cls, path: Path, writes: bool = True) -> RunFolder:
        """A folder that nobody had before: `path`, or with -2, -3, ... behind it where that exists.

        Raises:
            UserError: the folder cannot be made or written.
        """
        if not writes:
            return cls(path, writes)
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
        return cls(folder)

    def write_args(self, recipe: Mapping[str, Any]) -> None:
        """args.yaml, which `-c` reads back."""
        self.write_text(ARGS_FILE, yaml.safe_dump(dict(recipe), sort_keys=True))

    def write_json(self, name: str, value: Any) -> None:
        """A JSON file."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

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
        # a fresh copy of each, because safetensors refuses other memory formats and tensors that share memory
        tensors = {key: value.detach().to("cpu").clone(memory_format=torch.contiguous_format) for key, value in
                   weights.items()}  # fmt: skip
        self._write(f"{name}.safetensors", lambda file: save_file(tensors, file, {"format": "pt", **metadata}))

    def link_weights(self, name: str, other: str) -> None:
        """Let `<other>.safetensors` be what `<name>.safetensors` is now (a hard link, or a copy where there are none).

        The averaged weights follow, where there are any.
        """
        for suffix in ("", EMA_SUFFIX):
            source = self.path / f"{name}{suffix}.safetensors"
            if self._writes and source.is_file():
                self._write(f"{other}{suffix}.safetensors", partial(_link, source))

    def keep_epochs(self, epochs: set[int]) -> None:
        """Remove the `checkpoint-<epoch>` files of all other epochs."""
        if not self._writes:
            return
        for file in self.path.glob("checkpoint-*.safetensors"):
            number = file.stem.removeprefix("checkpoint-").removesuffix(EMA_SUFFIX)
            if number.isdigit() and int(number) not in epochs:
                file.unlink()

    def write_resume(self, state: Mapping[str, Any]) -> None:
        """resume.pt: all that training needs to go on, in one file, so that its parts always belong together."""
        self._write(RESUME_FILE, lambda file: torch.save(dict(state), file))

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        if not self._writes:
            return
        target = self.path / name
        unfinished = target.with_name(f".{name}.unfinished")
        try:
            unfinished.unlink(missing_ok=True)
            write(unfinished)
            os.replace(unfinished, target)
        except (OSError, RuntimeError, SafetensorError) as error:
            # a full disk is a RuntimeError from torch.save and a SafetensorError, which is neither, from save_file
            raise UserError(f"cannot write {target}: {first_line(error)}") from error


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def holds_run(path: Path) -> bool:
    """Whether a run has left its files in this folder."""
    return any((path / name).is_file() for name in (RESUME_FILE, SUMMARY_FILE))


def read_resume(path: Path) -> dict[str, Any]:
    """What `write_resume` wrote.

    Args:
        path: the file, or the run folder that holds it.

    Raises:
        UserError: there is none, or it is something else.
    """
    file = path / RESUME_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"nothing to resume: {file} does not exist")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on arbitrary bytes the weights-only unpickler raises whatever it stumbles over
        raise UserError(f"cannot resume from {file}: {load_failure(error)}") from error
    if not isinstance(state, dict) or not {"state_dict", "optimizer", "history"} <= state.keys():
        raise UserError(f"cannot resume from {file}: it is no {RESUME_FILE} of train.py")
    return state
