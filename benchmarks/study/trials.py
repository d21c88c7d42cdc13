"""Single trainings at plain training's own learning rate, on held-out images: a row each in a result file."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from study.images import Split
from study.presets import OPTIMIZERS, PRESETS, Optimizer, Preset
from study.protocol import budget_steps
from study.rows import Rows
from study.stages import load_split
from study.training import Run, Spec
from timm_decor import DecorConfig
from timm_decor.errors import UserError


class Trials:
    """A result file that grows by a row a training; one that is there already is not made again.

    Args:
        path: the file.
        preset: the setting.
        data_dir: with train*.parquet; a preset of generated images needs none.
    """

    def __init__(self, path: Path, preset: Preset, data_dir: Path | None) -> None:
        self.preset, self._rows = preset, Rows(path, preset.threads)
        if preset.threads:
            torch.set_num_threads(preset.threads)
        self._data_dir = data_dir
        self._split: Split | None = None

    def make(
        self,
        variant: str,
        opt: str,
        seed: int,
        config: DecorConfig | None,
        budget: float = 1.0,
        settings: Optimizer | None = None,
        between: Callable[[Run], None] | None = None,
    ) -> None:
        """Train, if it is not there yet.

        Args:
            variant: its name in the file.
            opt: of presets.OPTIMIZERS.
            seed: of weights and batches.
            config: None for plain training.
            budget: share of the preset's epochs.
            settings: in place of those of `opt`.
            between: called before the first step, and after each twelfth of the run.
        """
        if self._split is None:
            self._split = load_split(self.preset, self._data_dir, True)
        whole = round(self.preset.epochs * (len(self._split.train) // self.preset.batch_size))
        steps = budget_steps(budget, whole)
        key = {"opt": opt, "variant": variant, "seed": seed, "steps": steps}
        if self._rows.find(key, config):
            return
        settings = settings or OPTIMIZERS[opt]
        text = None if config is None else config.to_json()
        spec = Spec(opt, variant, text, settings.plain_lr, settings.weight_decays[0], seed, steps)
        run = Run(spec, dataclasses.replace(self.preset, turn=-(-steps // 12)), self._split, variant, settings)
        while not run.is_done:
            if between is not None:
                between(run)
            run.advance()
        row = {**key, "lr": spec.lr, "top1": run.record.final, "loss": run.record.loss}
        row["config"] = None if config is None else config.to_dict()
        row["scale"] = None if run.handle is None else run.handle.scale
        self._rows.add(row)


def add_arguments(parser: argparse.ArgumentParser, epochs: float | None = None) -> None:
    """The arguments from which `from_arguments` makes trials.

    Args:
        parser: to add to.
        epochs: where they are not the preset's.
    """
    parser.add_argument("--data-dir", type=Path, help="folder with train*.parquet")
    parser.add_argument("--json", type=Path, required=True, help="result file, to add to")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="the setting (default: cpu)")
    parser.add_argument("--epochs", type=float, default=epochs, help="in place of the preset's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])


def from_arguments(args: argparse.Namespace) -> Trials:
    """Trials as the command line describes them.

    Raises:
        UserError: the preset needs a folder.
    """
    preset = PRESETS[args.preset]
    if not preset.generated and args.data_dir is None:
        raise UserError(f"preset {args.preset} needs --data-dir, a folder with train*.parquet")
    return Trials(args.json, dataclasses.replace(preset, epochs=args.epochs or preset.epochs), args.data_dir)
