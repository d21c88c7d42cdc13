"""A result file that grows by a row a training; what is in it already is not made again."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import torch

from study.results import replace_text, session


class Rows:
    """Rows in a JSON file, each with its command and commit, beside how and where the last of them was made.

    Args:
        path: the file; made with the first row. Several processes may add to it.
        threads: of a training.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        self.path, self._threads = path, threads

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows so far."""
        return json.loads(self.path.read_text(encoding="utf-8"))["runs"] if self.path.is_file() else []

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The row that has all of these values; None where there is none yet."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """Write one more."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f".{self.path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            made_by = session(torch.device("cpu"), self._threads, 1)
            row = {**row, "command": made_by["command"], "commit": made_by["commit"]}
            replace_text(self.path, json.dumps({"made_by": made_by, "runs": [*self.rows, row]}, indent=1) + "\n")
