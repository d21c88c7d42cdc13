"""A result file that grows by a row a training; what is in it already is not made again."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import torch

from study.results import replace_text, same_config, session
from timm_decor import DecorConfig
from timm_decor.errors import UserError


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

    def find(self, key: dict[str, Any], config: DecorConfig | None = None) -> dict[str, Any] | None:
        """The row that has all of these values; None where there is none yet.

        Args:
            key: values.
            config: what a decorrelated training is asked for with. Rows of before it was kept are taken as they are.

        Raises:
            UserError: the row is of another configuration: it would stand for one that nobody trained.
        """
        found = next((row for row in self.rows if key.items() <= row.items()), None)
        if found and config and not same_config(json.dumps(found.get("config", config.to_dict())), config.to_json()):
            raise UserError(f"{self.path} has {key} of another configuration: remove it, or name another --json")
        return found

    def add(self, row: dict[str, Any]) -> None:
        """Write one more."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f".{self.path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            made_by = session(torch.device("cpu"), self._threads, 1)
            row = {**row, "command": made_by["command"], "commit": made_by["commit"]}
            replace_text(self.path, json.dumps({"made_by": made_by, "runs": [*self.rows, row]}, indent=1) + "\n")
