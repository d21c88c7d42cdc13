"""The last lines of a run: where everything is, and what can be done with it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_decor.text import wrapped
from timm_decor.training.keeping.folder import COMPARISON_FILES, REPORT_FILE, RESULTS_FILE
from timm_decor.training.options import DataOptions

_KEPT = {"best": "best.safetensors", "last": "last.safetensors", "results": RESULTS_FILE}
_WIDTH = len("results") + 2


def here(path: Path) -> str:
    """A path as it is typed from the current folder."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def whereabouts(folder: Path, sides: Mapping[str, Path], data: DataOptions, split: str, averaged: bool) -> str:
    """Where a run's files are, a line each, and the commands that evaluate and publish its best weights.

    Args:
        folder: of the run.
        sides: the folder of each model, by what to call it; "" for the only one.
        data: that it was trained on.
        split: that it was evaluated on.
        averaged: whether it has averaged weights.
    """
    text = _lines({"report": folder / REPORT_FILE, "compare": folder / COMPARISON_FILES[-1]})
    for side, path in sides.items():
        text += [f"{side}:"] if side else []
        text += _lines({name: path / file for name, file in _KEPT.items()})
    chosen = next((path for path in sides.values() if (path / _KEPT["best"]).is_file()), None)
    if chosen is not None:
        evaluate = ["timm-decor", "validate", *_data(data, split), "--checkpoint", here(chosen / _KEPT["best"])]
        evaluate += ["--use-ema"] if averaged else []  # it is their accuracy that made it the best
        publish = ["timm-decor", "publish", here(chosen), "--repo-id", "YOU/NAME", "--dry-run", "staged"]
        text += ["validate:", _command(evaluate), "publish (it uploads without --dry-run FOLDER):", _command(publish)]
    return "\n".join(text)


def whereabouts_of_report(folder: Path) -> str:
    """The first of those lines, for a run that has nothing else yet."""
    return "\n".join(_lines({"report": folder / REPORT_FILE}))


def _lines(places: Mapping[str, Path]) -> list[str]:
    return [f"{name:<{_WIDTH}}{here(path)}" for name, path in places.items() if path.is_file()]


def _data(data: DataOptions, split: str) -> list[str]:
    """What validate.py cannot read from a checkpoint: which images."""
    words = []
    for name, value in (("dataset", data.dataset), ("data-dir", data.data_dir), ("class-map", data.class_map),
                        ("input-key", data.input_key), ("target-key", data.target_key)):  # fmt: skip
        if value:
            words += [f"--{name}", value]
    return words + (["--split", split] if split != "validation" else [])


def _command(words: Sequence[str]) -> str:
    """A command that can be copied, whose lines end in a backslash where 80 columns are not enough."""
    lines = wrapped("  " + shlex.join(words), "    ").splitlines()
    return " \\\n".join(lines)
