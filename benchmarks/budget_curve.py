"""Does the gain last? Accuracy against budget: half an epoch to 16 of CIFAR-10, each with a schedule of its own.

    python benchmarks/budget_curve.py tune   --data-dir ../shared/data/cifar10
    python benchmarks/budget_curve.py report --data-dir ../shared/data/cifar10
    python benchmarks/budget_curve.py table

The setting is that of time_to_accuracy's cpu preset with all 50 000 training images. The arms: SGD and AdamW, plain,
decorrelated at plain's learning rate and at their own; and Muon, plain. Learning rates are chosen on 10 000 training
images held out, at 2 epochs (time_to_accuracy's tune file) and by `tune` at 8, where a grid begins round the best of 2
epochs and grows until its best lies inside; a budget takes the rate that was tuned at the length nearest to its own.

`report` measures on the test images. Steps to a level of accuracy are read off the curves, between two budgets along a
line over their logarithms; seconds are steps times the cost of a step, which time_to_accuracy's report measured, with
the same network, in turns. Every finished run is in the result file at once, and a rerun skips it; several commands
with other --opt, --seeds or --epochs may work on one file.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from study import budgets, curve, curve_pages, pictures, protocol
from study.presets import OPTIMIZERS, PRESETS
from study.results import RESULTS as TIME_TO_ACCURACY
from study.stages import Bench, open_bench
from study.training import PLAIN, Spec
from timm_decor.errors import UserError, exit_code
from timm_decor.text import text_table

RESULTS = TIME_TO_ACCURACY.parent / "budget_curve"


def tune(bench: Bench, opts: Sequence[str], short: curve.Rates) -> None:
    """Find each arm's learning rate at the longer length."""

    def score(opt: str, arm: str, lr: float) -> float:
        spec = Spec(opt, arm, budgets.CONFIG[arm], lr, OPTIMIZERS[opt].weight_decays[0], 0, bench.whole)
        if bench.results.find(spec) is None:
            bench.run([[spec]])
        record = bench.results.find(spec)
        assert record is not None
        return record.final

    for opt in opts:
        for arm in budgets.arms_of(opt, bench.preset):
            start = short[opt, arm][budgets.TUNED_AT[0]]
            best = protocol.best_rate((start / 2, start, start * 2), partial(score, opt, arm))
            print(f"{opt}, {arm}: {best:g}", flush=True)


def report(
    bench: Bench, opts: Sequence[str], rates: curve.Rates, lengths: Sequence[float], seeds: Sequence[int]
) -> None:
    """Make the runs that are missing, the short ones first."""
    per_epoch = bench.whole / bench.preset.epochs
    wanted = {
        Spec(
            opt, arm, budgets.CONFIG[arm], curve.rate_of(rates, opt, role, epochs), OPTIMIZERS[opt].weight_decays[0],
            seed, round(epochs * per_epoch),
        ): None
        for epochs in lengths
        for seed in seeds
        for opt in opts
        for role in curve.roles(opt, bench.preset.rival)
        for arm in [PLAIN if role == PLAIN else curve.DECORRELATED]
    }  # fmt: skip
    bench.run([[spec] for spec in wanted if bench.results.find(spec) is None])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tune", "report", "table"), help="table: print what the result files hold")
    parser.add_argument("--preset", choices=("cpu", "smoke"), default="cpu", help="smoke: generated images, for tests")
    parser.add_argument("--data-dir", type=Path, help="folder with train*.parquet and test*.parquet")
    parser.add_argument("--opt", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS, help="(default: all)")
    parser.add_argument("--epochs", type=float, nargs="+", default=list(budgets.EPOCHS), help="budgets of report")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(budgets.SEEDS)))
    parser.add_argument("--json", type=Path, default=RESULTS / "cifar10.json", help="report's result file")
    parser.add_argument("--tune-json", type=Path, default=RESULTS / "cifar10_tune.json", help="tune's")
    parser.add_argument("--short-json", type=Path, default=budgets.SHORT_TUNED, help="time_to_accuracy's tune")
    args = parser.parse_args(argv)
    preset = dataclasses.replace(PRESETS[args.preset], workers=1)
    if args.stage == "table":
        found, costs = budgets.read(args.json, args.tune_json, args.short_json)
        print(text_table(*curve_pages.score_table(found)))
        print()
        print(text_table(*curve_pages.speedup_table(found, costs)))
        pictures.budget_curve_picture(found, costs, args.json.with_suffix(".png"))
        return
    short = budgets.short_tuned(args.opt, args.short_json, preset)
    if args.stage == "tune":
        tuning = dataclasses.replace(preset, epochs=budgets.TUNED_AT[1])
        tune(open_bench(tuning, args.preset, "tune", args.data_dir, args.tune_json), args.opt, short)
        return
    rates = budgets.all_rates(args.opt, short, args.tune_json, preset)
    if unknown := [epochs for epochs in args.epochs if epochs not in budgets.EPOCHS]:
        raise UserError(f"budgets are {', '.join(f'{e:g}' for e in budgets.EPOCHS)} epochs, not {unknown[0]:g}")
    whole = dataclasses.replace(
        preset, epochs=budgets.EPOCHS[-1], train_images=None if args.data_dir else preset.train_images
    )
    bench = open_bench(whole, args.preset, "report", args.data_dir, args.json)
    report(bench, args.opt, rates, args.epochs, args.seeds)


if __name__ == "__main__":
    sys.exit(exit_code("budget_curve.py", main))
