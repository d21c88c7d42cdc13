"""The last lines of a run: where everything is, and what can be done with it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_decor.text import wrapped
from timm_decor.training.keeping.folder import EMA_SUFFIX, SUMMARY_FILE

RESULTS_FILE = "results.json"
_KEPT = {  # name in the block, files
    "best": ("best.safetensors", f"best{EMA_SUFFIX}.safetensors"),
    "last": ("last.safetensors", f"last{EMA_SUFFIX}.safetensors"),
    "results": (RESULTS_FILE, SUMMARY_FILE),
}


def here(path: Path) -> str:
    """A path as it is typed from the current folder."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def whereabouts(folder: Path, sides: Mapping[str, Path], args: argparse.Namespace) -> str:
    """Where a run's files are, a line each, and the commands that evaluate and publish its best weights.

    Args:
        folder: of the run.
        sides: the folder of each model, by what to call it; of a single one, whose name is not shown, the run's own.
        args: train.py's.
    """
    places = {"report": folder / "report.html", "comparison": folder / "compare.png"}
    lines = [(name, here(path)) for name, path in places.items() if path.is_file()]
    for side, path in sides.items():
        for name, files in _KEPT.items():
            there = [here(path / file) for file in files[:1] if (path / file).is_file()]
            there += [file for file in files[1:] if (path / file).is_file()]
            if there:
                lines.append((f"{name}, {side}" if len(sides) > 1 else name, ", ".join(there)))
    width = max(len(name) for name, _ in lines)
    text = [f"{name:<{width}}  {places}" for name, places in lines]
    chosen = next((path for path in sides.values() if (path / "best.safetensors").is_file()), None)
    if chosen is not None:
        weights = here(chosen / "best.safetensors")
        evaluate = ["python", "validate.py", *_data(args), "--checkpoint", weights]
        publish = ["python", "-m", "hub.publish", here(chosen), "--repo-id", "YOU/NAME", "--dry-run", "staged"]
        text += ["validate:", _command(evaluate), "publish (without --dry-run FOLDER it uploads):", _command(publish)]
    return "\n".join(text)


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
