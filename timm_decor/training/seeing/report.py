"""report.html: one page of a finished run that opens offline, for one arm or for both sides of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from timm_decor.training.args import train_parser
from timm_decor.training.seeing import charts
from timm_decor.training.seeing.clock import PHASES
from timm_decor.training.seeing.compare import Side, figures, verdict

_PARTS = (*PHASES, "refresh", "other")


@dataclass(frozen=True)
class Seen:
    """One arm of the run.

    Attributes:
        side: its history and names.
        observed: what `Observer.record` returned.
        layers: names of the decorrelated layers; empty without.
    """

    side: Side
    observed: dict[str, Any]
    layers: tuple[str, ...]


def render(arms: Sequence[Seen], title: str, command: str, context: dict[str, Any]) -> str:
    """The page.

    Args:
        arms: one, or the two of a comparison.
        title: the page's.
        command: the command line, fit to be published.
        context: `config`, `versions` and `machine`, as in results.json.
    """
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("timm_decor.training.seeing", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    sides = [arm.side for arm in arms]
    drawn = [arm for arm in arms if arm.side.history]
    machine = context["machine"]
    device = machine["gpu"] or machine["cpu"]
    return environment.get_template("report.html.jinja").render(
        title=title,
        subtitle=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {machine['processes']} x {device}",
        failures=[side.failure for side in sides if side.failure],
        words=_words(sides),
        names=[side.name for side in sides],
        figures=[*_figures(sides), ("peak memory, MiB", [_mebibytes(arm.observed) for arm in arms])],
        curves=_curves(drawn),
        thin=any(arm.observed["curve"] for arm in drawn),
        heat_maps=_heat_maps(arms),
        **_time(arms),
        epochs=[_epochs(side) for side in sides],
        command=command,
        facts=_facts(context),
        settings=_settings(context["config"]),
    )


def _words(sides: Sequence[Side]) -> str:
    if len(sides) == 2 and all(side.evaluated for side in sides):
        return verdict((sides[0], sides[1]))
    side = sides[0]
    if not side.evaluated:
        return f"{side.name} was not evaluated."
    best = side.best
    return (
        f"{side.name} is best in epoch {best['epoch']} of {side.epochs}: {best['eval_top1']:.2f} % top-1, after "
        f"{best['seconds']:.1f} s of training."
    )


def _figures(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """The comparison's table; of a single arm those rows that do not compare."""
    return figures(sides) if all(side.evaluated for side in sides) else []


def _curves(arms: Sequence[Seen]) -> list[str]:
    two = len(arms) == 2

    def of_history(key: str, column: str) -> list[charts.Line]:
        made = []
        for number, arm in enumerate(arms):
            rows = [row for row in arm.side.history if math.isfinite(row.get(column, math.nan))]
            made.append(charts.Line(arm.side.name, [r[key] for r in rows], [r[column] for r in rows], number))
        return [line for line in made if line.x]

    def of_batches(index: int, faint: bool) -> list[charts.Line]:
        made = []
        for number, arm in enumerate(arms):
            rows = [row for row in arm.observed["curve"] if math.isfinite(row[1])]
            made.append(charts.Line(arm.side.name, [r[0] for r in rows], [r[index] for r in rows], number, faint))
        return [line for line in made if line.x]

    result = []
    for key, label in (("steps", "optimizer steps"), ("seconds", "seconds of training")):
        shown = of_history(key, "eval_top1")
        if shown:
            result.append(charts.lines(f"evaluation top-1 accuracy (%) against {label}", label, shown, legend=two))
    shown = [*of_batches(1, faint=True), *of_history("steps", "train_loss")]
    if shown:
        result.append(charts.lines("training loss", "optimizer steps", shown, legend=two))
    shown = of_batches(2, faint=False) or of_history("steps", "lr")
    if shown:
        result.append(charts.lines("learning rate", "optimizer steps", shown, legend=two))
    return result


def _heat_maps(arms: Sequence[Seen]) -> list[str]:
    for arm in arms:
        looks = arm.observed["correlations"]
        if not looks:
            continue
        values = {
            name: np.array([[math.nan if v is None else v for v in look[name]] for look in looks], dtype=float).T
            for name in ("before", "after")
        }
        top = float(np.nanmax(values["before"])) if np.isfinite(values["before"]).any() else 1.0
        steps = [look["step"] for look in looks]
        titles = {"before": "before R: x", "after": "after R: z = R x"}
        return [charts.heat_map(titles[name], arm.layers, steps, values[name], top or 1.0) for name in titles]
    return []


def _time(arms: Sequence[Seen]) -> dict[str, Any]:
    names, bars, average = [], [], []
    for arm in arms:
        parts = arm.observed["ms_per_update"]
        if not parts or not arm.side.history:
            continue
        whole = 1000 * arm.side.history[-1]["seconds"] / arm.side.history[-1]["steps"]
        names.append(arm.side.name)
        average.append(f"{whole:.2f}")
        bars.append({**parts, "other": max(0.0, whole - sum(parts.values()))})
    if not bars:
        return {"time_chart": None}
    used = [part for part in _PARTS if any(bar.get(part) for bar in bars)]
    colours = {part: colour for part, colour in zip(_PARTS, charts.PHASES, strict=True) if part in used}
    rows = [(part, ["-" if part not in bar else f"{bar[part]:.2f}" for bar in bars]) for part in used]
    rows.append(("an update took, on average", average))
    return {
        "time_chart": charts.stacked_bars("milliseconds an update", names, bars, colours),
        "time_key": [(part, f"var(--phase{_PARTS.index(part)})") for part in used],
        "time_names": names,
        "time_rows": rows,
    }


def _epochs(side: Side) -> tuple[str, list[str], list[list[str]]]:
    columns = list(dict.fromkeys(name for row in side.history for name in row))

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)

    return side.name, columns, [[cell(row.get(column)) for column in columns] for row in side.history]


def _facts(context: dict[str, Any]) -> list[tuple[str, str]]:
    machine = {key: value for key, value in context["machine"].items() if value}
    versions = ", ".join(f"{name} {version}" for name, version in context["versions"].items())
    return [("versions", versions), *((key.replace("_", " "), str(value)) for key, value in machine.items())]


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    defaults = vars(train_parser().parse([]))
    changed = {key: value for key, value in config.items() if value != defaults.get(key)}
    return [("--" + key.replace("_", "-"), str(value)) for key, value in changed.items()]


def _mebibytes(observed: dict[str, Any]) -> str:
    peak = observed["peak_memory_bytes"]
    return "-" if peak is None else f"{peak / 2**20:.0f}"
