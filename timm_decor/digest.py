"""Files of weights are those that were written: their SHA-256 stands in results.json beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from timm_decor.errors import UserError

RESULTS_FILE = "results.json"


def sha256(path: Path) -> str:
    """A file's digest, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_digest(path: Path) -> None:
    """Refuse a file of weights that is not the one that the results.json beside it speaks of; others are let through.

    Raises:
        UserError: it is damaged, or was replaced.
    """
    results = path.parent / RESULTS_FILE
    try:
        known = json.loads(results.read_text(encoding="utf-8"))["sha256"][path.name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if known != sha256(path):
        raise UserError(f"{path} is damaged, or was replaced: its SHA-256 is not the one in {results.name}")
