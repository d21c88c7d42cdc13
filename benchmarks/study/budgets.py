"""What budget_curve.py runs, and what its result files hold: learning rates at two lengths, curves, costs of a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from study import curve, protocol
from study.presets import OPTIMIZERS, PRESETS, Preset
from study.results import RESULTS as TIME_TO_ACCURACY
from study.results import Results
from study.stages import grids, read_table
from study.training import PLAIN
from timm_decor import DecorConfig

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
