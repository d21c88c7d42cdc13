"""train.py as a study runs it: a command in a folder that it is gone on with."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_decor.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def run_train(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train, or go on with what the folder holds of the same command.

    Args:
        words: train.py's arguments, without those of the folder.
        folder: the run's; it stays.

    Returns:
        results.json.

    Raises:
        UserError: train.py's last line.
    """
    command = [sys.executable, str(ROOT / "train.py"), *words, "--output", str(folder.parent)]
    command += ["--experiment", folder.name, "--resume", "auto"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def accuracies(folder: Path, column: str) -> list[float]:
    """A column of summary.csv, an epoch each; epochs without it are left out."""
    with open(folder / "summary.csv", encoding="utf-8", newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]
