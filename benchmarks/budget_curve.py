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

from study import curve, curve_pages, pictures, protocol
from study.presets import OPTIMIZERS, PRESETS, Preset
from study.results import RESULTS as TIME_TO_ACCURACY
from study.results import Results
from study.stages import Bench, grids, open_bench, read_table
from study.training import PLAIN, Spec
from timm_decor import DecorConfig
from timm_decor.errors import UserError, exit_code
from timm_decor.text import text_table

RESULTS = TIME_TO_ACCURACY.parent / "budget_curve"
SHORT_TUNED = TIME_TO_ACCURACY / "cpu_cifar10_tune.json"
EPOCHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
TUNED_AT = (2.0, 8.0)
SEEDS = 2
CONFIG = {PLAIN: None, curve.DECORRELATED: DecorConfig().to_json()}


def arms_of(opt: str, preset: Preset) -> list[str]:
    """The arms whose rates are tuned."""
    return [PLAIN] if opt == preset.rival else list(CONFIG)


def short_tuned(opts: Sequence[str], path: Path, preset: Preset) -> curve.Rates:
    """Learning rates at the shorter length, from time_to_accuracy's tune file.

    Raises:
        UserError: it is not there, or something was not tuned.
    """
    results = Results.read(path)
    rates = {}
    for opt in opts:
        for arm, measured in grids(results.records, opt, arms_of(opt, preset), results.settings["steps"]).items():
            rates[opt, arm] = {TUNED_AT[0]: protocol.chosen(measured, f"{opt} {arm}")[0]}
    return rates


def tune(bench: Bench, opts: Sequence[str], short: curve.Rates) -> None:
    """Find each arm's learning rate at the longer length."""

    def score(opt: str, arm: str, lr: float) -> float:
        spec = Spec(opt, arm, CONFIG[arm], lr, OPTIMIZERS[opt].weight_decays[0], 0, bench.whole)
        if bench.results.find(spec) is None:
            bench.run([[spec]])
        record = bench.results.find(spec)
        assert record is not None
        return record.final

    for opt in opts:
        for arm in arms_of(opt, bench.preset):
            start = short[opt, arm][TUNED_AT[0]]
            best = protocol.best_rate((start / 2, start, start * 2), partial(score, opt, arm))
            print(f"{opt}, {arm}: {best:g}", flush=True)


def all_rates(opts: Sequence[str], short: curve.Rates, path: Path, preset: Preset) -> curve.Rates:
    """Learning rates at both lengths.

    Raises:
        UserError: something was not tuned.
    """
    results = Results.read(path)
    rates = {}
    for opt in opts:
        for arm, measured in grids(results.records, opt, arms_of(opt, preset), results.settings["steps"]).items():
            long = protocol.chosen(measured, f"{opt} {arm} at {TUNED_AT[1]:g} epochs")[0]
            rates[opt, arm] = {**short[opt, arm], TUNED_AT[1]: long}
    return rates


def report(
    bench: Bench, opts: Sequence[str], rates: curve.Rates, budgets: Sequence[float], seeds: Sequence[int]
) -> None:
    """Make the runs that are missing, the short ones first."""
    per_epoch = bench.whole / bench.preset.epochs
    wanted = {
        Spec(
            opt, arm, CONFIG[arm], curve.rate_of(rates, opt, role, epochs), OPTIMIZERS[opt].weight_decays[0], seed,
            round(epochs * per_epoch),
        ): None
        for epochs in budgets
        for seed in seeds
        for opt in opts
        for role in curve.roles(opt, bench.preset.rival)
        for arm in [PLAIN if role == PLAIN else curve.DECORRELATED]
    }  # fmt: skip
    bench.run([[spec] for spec in wanted if bench.results.find(spec) is None])


def read(path: Path, tuned: Path, short: Path) -> tuple[list[curve.Curve], dict[tuple[str, str], float]]:
    """The curves of a result file, and what a step of each arm costs.

    Args:
        path: report's file.
        tuned: tune's.
        short: time_to_accuracy's tune file; its report lies beside it.
    """
    results, preset = Results.read(path), PRESETS["cpu"]
    opts = [opt for opt in OPTIMIZERS if any(record.spec.opt == opt for record in results.records)]
    rates = all_rates(opts, short_tuned(opts, short, preset), tuned, preset)
    per_epoch = round(results.settings["steps"] / results.settings["epochs"])
    found = curve.curves(results.records, rates, per_epoch, SEEDS, preset.rival, EPOCHS)
    report_file = short.with_name(short.name.replace("_tune", ""))
    return found, curve.costs(read_table(report_file))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tune", "report", "table"), help="table: print what the result files hold")
    parser.add_argument("--preset", choices=("cpu", "smoke"), default="cpu", help="smoke: generated images, for tests")
    parser.add_argument("--data-dir", type=Path, help="folder with train*.parquet and test*.parquet")
    parser.add_argument("--opt", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS, help="(default: all)")
    parser.add_argument("--epochs", type=float, nargs="+", default=list(EPOCHS), help="budgets of report")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument("--json", type=Path, default=RESULTS / "cifar10.json", help="report's result file")
    parser.add_argument("--tune-json", type=Path, default=RESULTS / "cifar10_tune.json", help="tune's")
    parser.add_argument("--short-json", type=Path, default=SHORT_TUNED, help="time_to_accuracy's tune")
    args = parser.parse_args(argv)
    preset = dataclasses.replace(PRESETS[args.preset], workers=1)
    if args.stage == "table":
        found, costs = read(args.json, args.tune_json, args.short_json)
        print(text_table(*curve_pages.score_table(found)))
        print()
        print(text_table(*curve_pages.speedup_table(found, costs)))
        pictures.budget_curve_picture(found, costs, args.json.with_suffix(".png"))
        return
    short = short_tuned(args.opt, args.short_json, preset)
    if args.stage == "tune":
        tuning = dataclasses.replace(preset, epochs=TUNED_AT[1])
        tune(open_bench(tuning, args.preset, "tune", args.data_dir, args.tune_json), args.opt, short)
        return
    rates = all_rates(args.opt, short, args.tune_json, preset)
    if unknown := [epochs for epochs in args.epochs if epochs not in EPOCHS]:
        raise UserError(f"budgets are {', '.join(f'{e:g}' for e in EPOCHS)} epochs, not {unknown[0]:g}")
    whole = dataclasses.replace(preset, epochs=EPOCHS[-1], train_images=None if args.data_dir else preset.train_images)
    bench = open_bench(whole, args.preset, "report", args.data_dir, args.json)
    report(bench, args.opt, rates, args.epochs, args.seeds)


if __name__ == "__main__":
    sys.exit(exit_code("budget_curve.py", main))
