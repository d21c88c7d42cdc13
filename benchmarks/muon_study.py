"""What would bring decorrelated SGD level with plain Muon: one change at a time, on held-out images of CIFAR-10.

    python benchmarks/muon_study.py --data-dir ../shared/data/cifar10 --json benchmarks/results/muon/sgd.json --epochs 6

The setting is that of time_to_accuracy's cpu preset with more epochs, SGD at plain training's own learning rate there.
`--variant` takes some of the list below, several joined by +, and `--plain muon:0.05 sgd:0.2` trains these plain. Runs
are added to the file; one that is there already is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from study.presets import OPTIMIZERS
from study.training import Run
from study.trials import add_arguments, from_arguments
from timm_decor import DecorConfig
from timm_decor.errors import UserError, exit_code
from timm_decor.text import near

Between = Callable[[Run], None]


def damping_to(last: float) -> Between:
    """Damping that moves from its default to `last` with the run, by equal factors."""

    def between(run: Run) -> None:
        assert run.handle is not None
        share = run.step / run.spec.steps
        for group in run.handle._groups:
            first = run.handle.config.damping
            config = dataclasses.replace(run.handle.config, damping=first * (last / first) ** share)
            group._rule.config = config

    return between


def until(share: float) -> Between:
    """Decorrelation for the first part of the run; plain training after it."""

    def between(run: Run) -> None:
        if run.handle is not None and run.step >= share * run.spec.steps:
            run.handle.detach()
            run.handle = None

    return between


def whitened_stem(run: Run) -> None:
    """The first convolution starts with filters that whiten patches of the training images, and minus those."""
    if run.step:
        return
    stem: Any = next(module for module in run.model.modules() if isinstance(module, torch.nn.Conv2d))
    patches = F.unfold(run.split.train.normalized(slice(0, 2000)), stem.kernel_size, stride=2)
    rows = patches.transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    filters = (vectors / (values + 1e-2).sqrt()).T.flip(0)
    filters = torch.cat((filters, -filters))[: stem.out_channels].view_as(stem.weight)
    with torch.no_grad():
        stem.weight.copy_(filters * (stem.weight.norm() / filters.norm()))


@dataclass(frozen=True)
class Variant:
    """What differs from decorrelated SGD as it comes.

    Attributes:
        decor: DecorConfig's fields.
        opt: timm's optimizer.
        kwargs: of the optimizer.
        lr: factor of the learning rate.
        decay: factor of the weight decay.
        between: see Trials.make.
    """

    decor: dict[str, Any] = field(default_factory=dict)
    opt: str = "sgd"
    kwargs: dict[str, Any] = field(default_factory=dict)
    lr: float = 1.0
    decay: float = 1.0
    between: Between | None = None

    def __add__(self, other: Variant) -> Variant:
        opt = other.opt if other.opt != "sgd" else self.opt
        return Variant(
            self.decor | other.decor,
            opt,
            self.kwargs | other.kwargs,
            self.lr * other.lr,
            self.decay * other.decay,
            self.between or other.between,
        )


VARIANTS = {
    "base": Variant(),
    "lr x2": Variant(lr=2),
    "lr x0.5": Variant(lr=0.5),
    "decay x2": Variant(decay=2),
    "decay x4": Variant(decay=4),
    "decay x10": Variant(decay=10),
    "without nesterov": Variant(opt="momentum"),  # timm's sgd is nesterov
    "momentum 0.95": Variant(kwargs={"momentum": 0.95}, lr=0.5),
    "momentum 0.8": Variant(kwargs={"momentum": 0.8}, lr=2),
    "damping 1": Variant({"damping": 1.0}),
    "damping 4": Variant({"damping": 4.0}),
    "damping to 0.5": Variant(between=damping_to(0.5)),
    "damping to 8": Variant(between=damping_to(8.0)),
    "statistics x4": Variant({"stat_decay": 0.9}),
    "output statistics x4": Variant({"output_decay": 0.95}),
    "every 5": Variant({"every": 5}),
    "full rank": Variant({"rank": 128}),
    "full": Variant({"structure": "full", "rank": 128}),
    "until half": Variant(between=until(0.5)),
    "until three quarters": Variant(between=until(0.75)),
    "whitened stem": Variant(between=whitened_stem),
}


def variant_of(text: str) -> Variant:
    """`a+b` as one variant."""
    found = Variant()
    for name in text.split("+"):
        if name not in VARIANTS:
            raise UserError(f"no variant {name!r}{near(name, VARIANTS)}; there are {', '.join(VARIANTS)}")
        found = found + VARIANTS[name]
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, epochs=6)
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), help="of " + ", ".join(VARIANTS))
    parser.add_argument("--plain", nargs="*", default=[], metavar="OPT:LR", help="trained plain, as muon:0.05")
    args = parser.parse_args(argv)
    chosen = {name: variant_of(name) for name in args.variant}
    plain = [(opt, float(lr)) for opt, _, lr in (text.partition(":") for text in args.plain)]
    trials = from_arguments(args)
    base = OPTIMIZERS["sgd"]
    for seed in args.seeds:
        for opt, lr in plain:
            trials.make(f"plain, {lr:g}", opt, seed, None, settings=dataclasses.replace(OPTIMIZERS[opt], lrs=(0, lr)))
        for name, variant in chosen.items():
            settings = dataclasses.replace(
                base,
                name=variant.opt,
                kwargs=base.kwargs | variant.kwargs,
                weight_decays=(base.weight_decays[0] * variant.decay,),
                lrs=tuple(lr * variant.lr for lr in base.lrs),
            )
            config = DecorConfig(**variant.decor)
            trials.make(name, "sgd", seed, config, settings=settings, between=variant.between)


if __name__ == "__main__":
    sys.exit(exit_code("muon_study.py", main))
