"""Single trainings at plain training's own learning rate, on held-out images: a row each in a result file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from study.images import Split
from study.presets import OPTIMIZERS, Preset
from study.protocol import budget_steps
from study.results import session
from study.stages import load_split
from study.training import Run, Spec
from timm_decor import DecorConfig


class Trials:
    """A result file that grows by a row a training; one that is there already is not made again.

    Args:
        path: the file.
        preset: the setting.
        data_dir: with train*.parquet.
    """

    def __init__(self, path: Path, preset: Preset, data_dir: Path) -> None:
        self.path, self.preset = path, preset
        if preset.threads:
            torch.set_num_threads(preset.threads)
        self._data_dir = data_dir
        self._split: Split | None = None

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The rows so far."""
        return json.loads(self.path.read_text(encoding="utf-8"))["runs"] if self.path.is_file() else []

    def make(
        self,
        variant: str,
        opt: str,
        seed: int,
        config: DecorConfig | None,
        budget: float = 1.0,
    ) -> None:
        """Train, if it is not there yet.

        Args:
            variant: its name in the file.
            opt: of presets.OPTIMIZERS.
            seed: of weights and batches.
            config: None for plain training.
            budget: share of the preset's epochs.
        """
        if self._split is None:
            self._split = load_split(self.preset, self._data_dir, True)
        whole = round(self.preset.epochs * (len(self._split.train) // self.preset.batch_size))
        steps = budget_steps(budget, whole)
        key = {"opt": opt, "variant": variant, "seed": seed, "steps": steps}
        if any(key.items() <= row.items() for row in self.runs):
            return
        settings = OPTIMIZERS[opt]
        text = None if config is None else config.to_json()
        spec = Spec(opt, variant, text, settings.plain_lr, settings.weight_decays[0], seed, steps)
        run = Run(spec, dataclasses.replace(self.preset, turn=whole), self._split, variant)
        while not run.is_done:
            run.advance()
        row = {**key, "lr": spec.lr, "top1": run.record.final, "loss": run.record.loss}
        row["scale"] = None if run.handle is None else run.handle.scale
        made_by = session(torch.device("cpu"), self.preset.threads, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"made_by": made_by, "runs": [*self.runs, row]}, indent=1) + "\n"
        self.path.write_text(text, encoding="utf-8")
