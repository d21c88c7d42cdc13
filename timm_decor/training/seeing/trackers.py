"""Experiment trackers through Accelerate: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

from timm_decor.errors import UserError, first_line
from timm_decor.training.options import WatchOptions

NAMES = ("tensorboard", "wandb", "trackio")


def check_available(names: list[str]) -> None:
    """Refuse to begin what could not be logged.

    Raises:
        UserError: a tracker's package is not installed, or Accelerate does not know it.
    """
    for name in names:
        if find_spec(name) is None and not (name == "tensorboard" and find_spec("tensorboardX")):
            raise UserError(f"--log-with {name}: it is not installed: pip install 'timm-decor[{name}]'")
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"--log-with {name}: this Accelerate is too old for it: pip install 'timm-decor[{name}]'")


def start(
    accelerator: Accelerator, options: WatchOptions, config: dict[str, Any], folder: Path, sides: tuple[str, ...]
) -> None:
    """Start the trackers of --log-with: one run for a training, or for both sides of a comparison.

    Args:
        accelerator: starts them, on its main process.
        options: which trackers, and their project.
        config: what they get to know of the arguments.
        folder: for the files that TensorBoard and W&B write.
        sides: the sides of a comparison, whose figures get these names in front; empty otherwise.

    Raises:
        UserError: a tracker cannot start, such as W&B without a login.
    """
    if not options.log_with:
        return
    accelerator.project_configuration.logging_dir = str(folder)
    accelerator.log_with = filter_trackers(options.log_with, str(folder))
    kwargs = {"wandb": {"name": folder.name, "dir": str(folder)}, "trackio": {"name": folder.name}}
    try:
        accelerator.init_trackers(options.project_name, _flat(config), kwargs)
    except Exception as error:  # each has its own
        hint = "; WANDB_MODE=offline keeps it on this machine" if "wandb" in options.log_with else ""
        raise UserError(f"--log-with {' '.join(options.log_with)}: cannot start: {first_line(error)}{hint}") from error
    if sides and accelerator.is_main_process and "wandb" in options.log_with:
        for side in sides:
            accelerator.get_tracker("wandb", unwrap=True).define_metric(f"{side}/*", step_metric=f"{side}/step")


def log(accelerator: Accelerator, side: str, values: Mapping[str, Any], step: int) -> None:
    """Log an arm's figures.

    Args:
        accelerator: the one that `start` got.
        side: in front of each name in a comparison, "" otherwise. Two arms take turns, and W&B and trackio refuse
            steps that go back, so a comparison's step is a figure like the others there.
        values: numbers by name.
        step: the arm's updates so far.
    """
    if not side:
        accelerator.log(dict(values), step=step)
        return
    named = {f"{side}/{name}": value for name, value in values.items()}
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log(named, step=step)
        else:
            tracker.log({**named, f"{side}/step": step})


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """TensorBoard takes nothing but numbers and text."""
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in config.items()}
