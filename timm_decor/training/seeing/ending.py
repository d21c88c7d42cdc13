"""The last lines of a run: where everything is, and what can be done with it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_decor.text import wrapped
from timm_decor.training.keeping.folder import COMPARISON_FILES, REPORT_FILE, RESULTS_FILE

_KEPT = {"best": "best.safetensors", "last": "last.safetensors", "results": RESULTS_FILE}
_WIDTH = len("results") + 2


def here(path: Path) -> str:
    """A path as it is typed from the current folder."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def whereabouts(folder: Path, sides: Mapping[str, Path], args: argparse.Namespace) -> str:
    """Where a run's files are, a line each, and the commands that evaluate and publish its best weights.

    Args:
        folder: of the run.
        sides: the folder of each model, by what to call it; "" for the only one.
        args: train.py's.
    """
    text = _lines({"report": folder / REPORT_FILE, "compare": folder / COMPARISON_FILES[-1]})
    for side, path in sides.items():
        text += [f"{side}:"] if side else []
        text += _lines({name: path / file for name, file in _KEPT.items()})
    chosen = next((path for path in sides.values() if (path / _KEPT["best"]).is_file()), None)
    if chosen is not None:
        evaluate = ["python", "validate.py", *_data(args), "--checkpoint", here(chosen / _KEPT["best"])]
        evaluate += ["--use-ema"] if args.model_ema else []  # it is their accuracy that made it the best
        publish = ["python", "-m", "hub.publish", here(chosen), "--repo-id", "YOU/NAME", "--dry-run", "staged"]
        text += ["validate:", _command(evaluate), "publish (it uploads without --dry-run FOLDER):", _command(publish)]
    return "\n".join(text)


def _lines(places: Mapping[str, Path]) -> list[str]:
    return [f"{name:<{_WIDTH}}{here(path)}" for name, path in places.items() if path.is_file()]


def _data(args: argparse.Namespace) -> list[str]:
    """What validate.py cannot read from a checkpoint: which images."""
    words = []
    for name, value in (("dataset", args.dataset), ("data-dir", args.data_dir), ("class-map", args.class_map),
                        ("input-key", args.input_key), ("target-key", args.target_key)):  # fmt: skip
        if value:
            words += [f"--{name}", value]
    return words + (["--split", args.val_split] if args.val_split != "validation" else [])


def _command(words: Sequence[str]) -> str:
    """A command that can be copied, whose lines end in a backslash where 80 columns are not enough."""
    lines = wrapped("  " + shlex.join(words), "    ").splitlines()
    return " \\\n".join(lines)
