"""Short training runs in this process, for the tests of training and of the command lines."""

from __future__ import annotations

import contextlib
import csv
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils.data import DataLoader

from timm_decor.training import build
from timm_decor.training.data.datasets import open_source
from timm_decor.training.data.loaders import train_loader
from timm_decor.training.data.progressive import Progression
from timm_decor.training.options import TrainOptions
from timm_decor.training.results import report
from timm_decor.training.run import main, parse
from timm_decor.training.runtime import follow_launcher, make_accelerator

ROOT = Path(__file__).resolve().parents[1]

# timm's smallest ResNet on 128 digits: an epoch takes a second or so.
TINY = shlex.split(
    "--model test_resnet --dataset digits --train-split train[:128] --val-split test[:70] --img-size 32 --crop-pct 1 "
    "-b 32 --lr 0.05 --warmup-epochs 0 --hflip 0 --color-jitter 0 --scale 0.8 1.0 --smoothing 0 -j 0 --device cpu"
)
DECOR = ["--decor", "--decor-every", "3", "--decor-sample", "0.5"]


def reset_accelerate() -> None:
    """Let the next Accelerator choose its own precision: Accelerate keeps the first one's for the whole process."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def options(*words: Any, base: list[str] = TINY) -> TrainOptions:
    """train.py's options for arguments on top of `base`."""
    args = parse([*base, *map(str, words)])
    follow_launcher(args)
    return TrainOptions.of(args)


def created(given: TrainOptions, classes: int = 10, channels: int = 3) -> nn.Module:
    """The model that train.py would begin with."""
    return build.create_to_train(given.model, given.create, given.start, given.layer, given.decor, classes, channels)


def training_batches(given: TrainOptions, config: dict[str, Any]) -> DataLoader[Any]:
    """train.py's loader for digits, of which there are ten."""
    reset_accelerate()
    source = open_source(given.data, given.split.train_split, "RGB")
    accelerator = make_accelerator("cpu", False, "float16")
    sizes = Progression.of(given.augment.progressive_size, config["input_size"], given.schedule.epochs)
    return train_loader(given.loader, given.augment, given.label, source, config, sizes, 10, given.seed, accelerator)


_draws_reports = False


@contextlib.contextmanager
def drawn_reports() -> Iterator[None]:
    """Let `train` draw the report of a run."""
    global _draws_reports
    _draws_reports, before = True, _draws_reports
    try:
        yield
    finally:
        _draws_reports = before


def train(folder: Path, *words: Any, base: list[str] = TINY) -> Path:
    """Run train.py in this process. Its report is an empty file, but within `drawn_reports`: it takes half of the time.

    Args:
        folder: the run's folder.
        words: arguments on top of `base`.
        base: arguments.

    Returns:
        The run's folder.
    """
    reset_accelerate()
    with contextlib.nullcontext() if _draws_reports else mock.patch.object(report, "render", lambda *_: ""):
        main([*base, "--output", str(folder.parent), "--experiment", folder.name, *map(str, words)])
    return folder


def history(folder: Path) -> list[dict[str, float]]:
    """summary.csv's rows as numbers."""
    with open(folder / "summary.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def untimed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rows without what depends on the clock."""
    return [{key: value for key, value in row.items() if "second" not in key and key != "images_per_s"} for row in rows]
