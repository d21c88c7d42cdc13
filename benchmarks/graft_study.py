"""Which step length to keep, and how to measure it: variants of engine/length.py, on held-out images of CIFAR-10.

    python benchmarks/graft_study.py --data-dir ../shared/data/cifar10 --json benchmarks/results/graft/variants.json

Every variant trains decorrelated at plain training's own learning rate (presets.OPTIMIZERS), in the setting of
time_to_accuracy's cpu preset:

    network    one factor for the network, from the norms of the steps: what the engine does
    layer      a factor for each layer, from the norms of its own steps
    refresh    as network, measured at each refresh on the batch that R is made from, not on the next one
    none       no scale: a step is as short as whitening makes it
    plain      plain training

SGD and AdamW, and Muon to see what decorrelation does to it. `--budgets 0.5` is half of the preset's epochs.

Runs are added to the file; one that is there already is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from study.presets import OPTIMIZERS
from study.trials import add_arguments, from_arguments
from timm_decor import DecorConfig
from timm_decor.engine.flight import StepInFlight
from timm_decor.engine.handle import DecorHandle
from timm_decor.engine.length import scale
from timm_decor.errors import exit_code


def layer(monkey: ExitStack) -> None:
    def found(self: Any, lengths: Any) -> Any:
        total = self.groups[0].weights[0].total
        return torch.stack([scale([each], self._power, total) for each in lengths])

    def rescale(self: Any, scales: Any) -> None:
        for group, c in zip(self._groups, scales, strict=True):  # on a CPU a group is one layer
            if self._counted > self.config.every + 1:
                c = (c * group.scales()[0]).sqrt()
            group.rescale(c)

    monkey.enter_context(mock.patch.object(StepInFlight, "_found", found))
    monkey.enter_context(mock.patch.object(DecorHandle, "_rescale", rescale))


def refresh(monkey: ExitStack) -> None:
    monkey.enter_context(mock.patch.object(DecorHandle, "_measure_due", False))
    monkey.enter_context(mock.patch.object(DecorHandle, "_has_refreshed", False))


VARIANTS: dict[str, Any] = {"network": None, "layer": layer, "refresh": refresh, "none": None, "plain": None}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(seeds=[0, 1, 2])
    parser.add_argument("--opt", nargs="+", default=["sgd", "adamw"], choices=OPTIMIZERS)
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0], help="shares of the preset's epochs")
    args = parser.parse_args(argv)
    trials = from_arguments(args)
    for seed, budget, opt, variant in itertools.product(args.seeds, args.budgets, args.opt, args.variant):
        with ExitStack() as monkey:
            if change := VARIANTS[variant]:
                change(monkey)
            config = None if variant == "plain" else DecorConfig(graft=variant != "none")
            trials.make(variant, opt, seed, config, budget)


if __name__ == "__main__":
    sys.exit(exit_code("graft_study.py", main))
