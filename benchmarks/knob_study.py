"""What each knob's default rests on: one knob at a time, at plain training's own learning rate, on held-out images.

    python benchmarks/knob_study.py --data-dir ../shared/data/cifar10 --json benchmarks/results/knobs/sgd.json --opt sgd

The setting is that of time_to_accuracy's cpu preset. `--knob every=5 damping=0.3` tries those alone. Seeds differ
by about half a point, so three before a default moves. Runs are added to the file; one that is there already is not
made again.
"""

from __future__ import annotations

import argparse
import ast
import sys
from typing import Any

from study.presets import OPTIMIZERS
from study.trials import add_arguments, from_arguments
from timm_decor import DecorConfig
from timm_decor.errors import exit_code

KNOBS = (
    "default", "every=10", "every=40", "damping=0.5", "damping=2.0", "rank=16", "rank=128", "stat_decay=0.8",
    "output_damping=0.5", "output_damping=2.0", "output_decay=0.95", "center=False", "sample=1.0", "sides='input'",
    "sides='both'", "structure='space'", "preserve_function=False", "output_every=1", "output_every=16",
    "max_rows=2048",
)  # fmt: skip


def config_of(knob: str) -> DecorConfig:
    """`name=value`, or several with commas between them, as a config; `default` as it is."""
    pairs = [part.partition("=") for part in knob.split(",") if "=" in part]
    return DecorConfig(**{name: ast.literal_eval(value) for name, _, value in pairs})


def differs(knob: str, opt: str) -> bool:
    """Whether a knob does anything with the optimizer: only SGD has an output side by default."""
    asked: dict[str, Any] = {"sgd": "sides='both'"}
    return knob != asked.get(opt, "sides='input'") and (opt == "sgd" or not knob.startswith("output_"))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--opt", required=True, choices=OPTIMIZERS)
    parser.add_argument("--knob", nargs="+", default=list(KNOBS), help="NAME=VALUE, or default")
    args = parser.parse_args(argv)
    configs = {knob: config_of(knob) for knob in args.knob if differs(knob, args.opt)}
    trials = from_arguments(args)
    for seed in args.seeds:
        for knob, config in configs.items():
            trials.make(knob, args.opt, seed, config)


if __name__ == "__main__":
    sys.exit(exit_code("knob_study.py", main))
