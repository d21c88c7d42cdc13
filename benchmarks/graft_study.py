"""Which step length to keep, and how to measure it: variants of engine/length.py, on held-out images of CIFAR-10.

    python benchmarks/graft_study.py --data-dir ../shared/data/cifar10 --json benchmarks/results/graft/variants.json

Every variant trains decorrelated at plain training's own learning rate (presets.OPTIMIZERS), in the setting of
time_to_accuracy's cpu preset:

    network    one factor for the network from the norms of the steps, at each refresh: what the engine does
    layer      a factor for each layer, from the norms of its own steps
    outputs    one factor, from the norms of the change that the steps make in the layers' outputs
    smoothed   as network, with a running average over refreshes (half of the old one's logarithm)
    none       no scale: a step is as short as whitening makes it
    plain      plain training

SGD and AdamW, and Muon to see what decorrelation does to it. `--budgets 0.5` is half of the preset's epochs.

Runs are added to the file; one that is there already is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from study.presets import OPTIMIZERS, PRESETS
from study.protocol import budget_steps
from study.results import session
from study.stages import load_split
from study.training import Run, Spec
from timm_decor import DecorConfig
from timm_decor.engine import flight
from timm_decor.engine.coordinates import squared, transformed
from timm_decor.engine.length import scale
from timm_decor.errors import exit_code
from timm_decor.structures import SCALE, Sides

_network = flight.StepInFlight._scaled
_lengths = flight.StepInFlight._lengths


def layer(self: Any, sides: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    for number, step in self._steps.items():  # on a CPU every group is one layer
        new = self.groups[number].sides_of(self.active[number], sides[number]).unit
        sides[number][SCALE] = torch.full_like(sides[number][SCALE], float(scale([step.lengths(new)], self._power)))
    return sides


def of_outputs(step: Any, sides: Sides, moments: dict[str, Tensor], power: Any) -> tuple[Tensor, Tensor]:
    """As `StepOnW.lengths`, of (step) Sigma^1/2, by R^T R = (Sigma / mean + damping)^-1, rows x Sigma x^T = |x R^-1|^2
    - damping |x|^2, in units that are the same for both."""
    damping, count = DecorConfig().damping, len(step.layers)
    sources = step.gradients if power.gradient else step._moved
    plain = transformed(step.layers, lambda rows: rows, sources)
    own = transformed(step.layers, sides.apply_gram if power.gradient else sides.apply, sources)

    def change(rows: Tensor) -> Tensor:
        return squared(sides.inputs.apply_inverse(rows), count) - damping * squared(rows, count)

    return change(plain), change(own)


def outputs(self: Any, sides: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    self._lengths = lambda new: [
        of_outputs(step, self.groups[i].sides_of(self.active[i], new[i]).unit, self._moments(i), self._power)
        for i, step in self._steps.items()
    ]
    return _network(self, sides)


def smoothed(self: Any, sides: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    old = [each[SCALE].clone() for each in sides]
    new = _network(self, sides)
    for before, each in zip(old, new, strict=True):
        started = before != 1
        each[SCALE] = torch.where(started, (before * each[SCALE]).sqrt(), each[SCALE])
    return new


VARIANTS = {"network": _network, "layer": layer, "outputs": outputs, "smoothed": smoothed, "none": None, "plain": None}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with train*.parquet")
    parser.add_argument("--json", type=Path, required=True, help="result file, to add to")
    parser.add_argument("--opt", nargs="+", default=["sgd", "adamw"], choices=OPTIMIZERS)
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0], help="shares of the preset's epochs")
    args = parser.parse_args(argv)
    preset = PRESETS["cpu"]
    if preset.threads:
        torch.set_num_threads(preset.threads)
    split = load_split(preset, args.data_dir, True)
    whole = round(preset.epochs * (len(split.train) // preset.batch_size))
    wanted = itertools.product(args.seeds, args.budgets, args.opt, args.variant)
    for seed, budget, opt, variant in wanted:
        key = {"opt": opt, "variant": variant, "seed": seed, "steps": budget_steps(budget, whole)}
        if any(key.items() <= run.items() for run in read(args.json)):
            continue
        flight.StepInFlight._scaled = VARIANTS[variant] or _network  # type: ignore[method-assign]
        config = None if variant == "plain" else DecorConfig(graft=variant != "none").to_json()
        settings = OPTIMIZERS[opt]
        spec = Spec(opt, variant, config, settings.plain_lr, settings.weight_decays[0], seed, key["steps"])
        run = Run(spec, dataclasses.replace(preset, turn=whole), split, variant)
        while not run.is_done:
            run.advance()
        row = {**key, "lr": spec.lr, "top1": run.record.final, "loss": run.record.loss}
        made_by = session(torch.device("cpu"), preset.threads, 1)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"made_by": made_by, "runs": [*read(args.json), row]}, indent=1) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The runs in a result file."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []


if __name__ == "__main__":
    sys.exit(exit_code("graft_study.py", main))
