"""How much accuracy depends on the learning rate: from half of plain training's best to sixteen times.

    python benchmarks/lr_sensitivity.py --preset cpu --data-dir ../shared/data/cifar10
    python benchmarks/lr_sensitivity.py --preset cpu --table benchmarks/results/time_to_accuracy/cpu_cifar10_tune.json

SGD and AdamW, plain and decorrelated with the defaults, and plain Muon, which people would use instead. Measured on
training images that are held out, two seeds. The runs are those of `time_to_accuracy.py tune` at N epochs, on its grid
and in its file: whichever comes first, the other goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from study import pictures, sensitivity
from study.presets import OPTIMIZERS, PRESETS
from study.protocol import budget_steps
from study.results import Results
from study.sensitivity import DECORRELATED
from study.stages import Bench, arms_of, open_bench
from study.training import PLAIN, Spec
from timm_decor import DecorConfig
from timm_decor.errors import UserError, exit_code
from timm_decor.text import text_table

ARMS: dict[str, str | None] = {PLAIN: None, DECORRELATED: DecorConfig().to_json()}
SEEDS = 2


def train(bench: Bench, opts: Sequence[str], seeds: int) -> None:
    """Make the runs that are missing, a seed after the other."""
    for seed in range(seeds):
        wanted = [
            Spec(opt, arm, config, lr, OPTIMIZERS[opt].weight_decays[0], seed, budget_steps(1.0, bench.whole))
            for opt in opts
            for lr in OPTIMIZERS[opt].lrs
            for arm, config in arms_of(opt, ARMS, bench.preset).items()
        ]
        bench.run([[spec] for spec in wanted if bench.results.find(spec) is None])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True, help="the setting")
    parser.add_argument("--data-dir", type=Path, help="folder with train*.parquet")
    parser.add_argument("--opt", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS, help="(default: all)")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--json", type=Path, help="result file (default: that of time_to_accuracy's tune)")
    parser.add_argument("--table", type=Path, metavar="JSON", help="train nothing: print what a result file holds")
    parser.add_argument("--device", default="", help="default: cuda for the gpu preset, else cpu")
    args = parser.parse_args(argv)
    if args.table:
        results = Results.read(args.table)
        if results.settings["stage"] != "tune":
            raise UserError(f"{args.table} is a report; the learning rates that were tried are in the tune file")
    else:
        preset = dataclasses.replace(PRESETS[args.preset], seeds=args.seeds)
        bench = open_bench(preset, args.preset, "tune", args.data_dir, args.json, args.device)
        train(bench, args.opt, args.seeds)
        results = bench.results
    found = sensitivity.curves(results.records, results.settings["steps"])
    print(text_table(*sensitivity.table(found)))
    if args.table:
        pictures.lr_sensitivity_picture(found, args.table.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(exit_code("lr_sensitivity.py", main))
