"""report.html: one page of a finished run that opens offline, for one arm or for both sides of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from timm_decor.training.args import train_parser
from timm_decor.training.keeping.starts import trained_on, versions_used
from timm_decor.training.seeing import charts
from timm_decor.training.seeing.clock import PHASES
from timm_decor.training.seeing.compare import Side, figures, verdict
from timm_decor.training.seeing.mistakes import MOST_NUMBERS, Mistakes, confused_pairs, right_of

_PARTS = (*PHASES, "refresh", "other")
_MOST_PAIRS = 20  # of classes that are confused


@dataclass(frozen=True)
class Seen:
    """One arm of the run.

    Attributes:
        side: its history and names.
        observed: what `Observer.record` returned.
        layers: names of the decorrelated layers; empty without.
        mistakes: of its best checkpoint, or None.
    """

    side: Side
    observed: dict[str, Any]
    layers: tuple[str, ...]
    mistakes: Mistakes | None = None


@dataclass(frozen=True)
class _Chart:
    """Attributes:
    title: says what is drawn, with its unit.
    svg: the chart.
    """

    title: str
    svg: str


def render(arms: Sequence[Seen], title: str, command: str, context: dict[str, Any], unfinished: str = "") -> str:
    """The page.

    Args:
        arms: one, or the two of a comparison.
        title: the page's.
        command: the command line, fit to be published.
        context: `config`, `versions`, `machine` and `starts`, as in results.json.
        unfinished: of a run that ended early, how far it came, in place of who won.
    """
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("timm_decor.training.seeing", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    sides = [arm.side for arm in arms]
    machine, steps = context["machine"], max((side.history[-1]["steps"] for side in sides if side.history), default=0)
    device = machine["gpu"] or machine["cpu"]
    return environment.get_template("report.html.jinja").render(
        title=title,
        subtitle=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {machine['processes']} x {device}",
        failures=[side.failure for side in sides if side.failure],
        words=unfinished or _words(sides),
        names=[side.name for side in sides],
        figures=[*_figures(sides), *_memory(arms, on_gpu=bool(machine["gpu"]))],
        curves=_curves(arms),
        thin=any(arm.observed["curve"] for arm in arms),
        **_correlations(arms),
        mistakes=[_of_mistakes(arm.side.name, arm.mistakes) for arm in arms if arm.mistakes],
        mistakes_later=bool(unfinished),
        **_time(arms),
        epochs=[_epochs(side) for side in sides],
        command=command,
        facts=_facts(context, steps),
        settings=_settings(context["config"]),
    )


def _words(sides: Sequence[Side]) -> str:
    if len(sides) == 2 and all(side.evaluated for side in sides):
        return verdict((sides[0], sides[1]))
    side = next((side for side in sides if side.evaluated), sides[0])
    if not side.evaluated:
        return f"{side.name} was not evaluated."
    best = side.picked
    whose = " of the averaged weights" if side.is_averaged else ""
    why = f" by {side.metric}" if side.metric != side.accuracy else ""
    return (
        f"{side.name} is best{why} in epoch {best['epoch']} of {side.epochs}: {best[side.accuracy]:.2f} % top-1"
        f"{whose}, after {best['seconds']:.1f} s of training."
    )


def _figures(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """The comparison's table; of a single arm, or of the one that came so far, those rows that do not compare."""
    evaluated = [side for side in sides if side.evaluated]
    if len(evaluated) == len(sides):
        return figures(sides)
    if not evaluated:
        return []
    rows = [(label, cells[0]) for label, cells in figures(evaluated)]
    return [(label, [cell if side.evaluated else "-" for side in sides]) for label, cell in rows]


def _memory(arms: Sequence[Seen], on_gpu: bool) -> list[tuple[str, list[str]]]:
    """A row of the table, where it says something: the peak of a process that trained both tells nothing of either."""
    peaks = [arm.observed["peak_memory_bytes"] for arm in arms]
    if None in peaks or (len(arms) == 2 and not on_gpu):
        return []
    whose = "GPU memory" if on_gpu else "memory of the process"
    held = ", the other model held beside" if len(arms) == 2 else ""
    return [(f"peak {whose}{held}, MiB", [f"{peak / 2**20:.0f}" for peak in peaks])]


def _curves(arms: Sequence[Seen]) -> list[_Chart]:
    def of_history(key: str, column: str | None = None) -> list[charts.Line]:
        made = []
        for number, arm in enumerate(arms):
            its = column or arm.side.accuracy
            rows = [row for row in arm.side.history if math.isfinite(row.get(its, math.nan))]
            made.append(charts.Line([r[key] for r in rows], [r[its] for r in rows], number))
        return [line for line in made if line.x]

    def of_batches(index: int, faint: bool) -> list[charts.Line]:
        made = []
        for number, arm in enumerate(arms):
            rows = [row for row in arm.observed["curve"] if math.isfinite(row[1])]
            made.append(charts.Line([r[0] for r in rows], [r[index] for r in rows], number, faint))
        return [line for line in made if line.x]

    steps, seconds = "optimizer steps", "seconds of training"
    whose = " of the averaged weights" if any(arm.side.is_averaged for arm in arms) else ""
    found = [
        (f"Evaluation top-1{whose} (%) against steps", steps, of_history("steps")),
        (f"Evaluation top-1{whose} (%) against time", seconds, of_history("seconds")),
        ("Training loss", steps, [*of_batches(1, faint=True), *of_history("steps", "train_loss")]),
        ("Learning rate", steps, of_batches(2, faint=False) or of_history("steps", "lr")),
    ]
    return [
        _Chart(title, charts.lines(title, label, shown, whole_x=label == steps))
        for title, label, shown in found
        if shown
    ]


def _correlations(arms: Sequence[Seen]) -> dict[str, Any]:
    """Heat maps of the decorrelated arm, both by one scale, and the last look as numbers."""
    arm = next((arm for arm in arms if arm.observed["correlations"]), None)
    if arm is None:
        return {"heat_maps": []}
    looks = arm.observed["correlations"]
    before, after = (
        np.array([[math.nan if v is None else v for v in look[name]] for look in looks], dtype=float).T
        for name in ("before", "after")
    )
    steps, ticks = [look["step"] for look in looks], charts.ratio_ticks(np.concatenate([before, after]))
    maps = [
        _Chart(title, charts.heat_map(title, arm.layers, steps, values, ticks))
        for title, values in (("Before R: x", before), ("After R: z = R x", after))
    ]
    last = zip(arm.layers, before[:, -1], after[:, -1], strict=True)
    rows = [(name, *(f"{value:.4f}" for value in pair)) for name, *pair in last]
    return {
        "heat_maps": maps,
        "named_rows": charts.named_rows(arm.layers),
        "correlation_step": steps[-1],
        "correlation_rows": rows,
    }


def _of_mistakes(name: str, mistakes: Mistakes) -> dict[str, Any]:
    """What the page says of one arm's mistakes: the matrix, or of many classes the pairs that it would be read for."""
    counts, names = mistakes.counts, mistakes.names
    totals = np.maximum(counts.sum(1), 1)
    shares = counts / totals[:, None]
    small = len(names) <= MOST_NUMBERS
    strengths = np.where(np.eye(len(names)) > 0, 60 * shares, np.ceil(shares) * (10 + 60 * np.sqrt(shares)))
    matrix = [
        (names[i], list(zip(counts[i].tolist(), strengths[i].round().astype(int).tolist(), strict=True)))
        for i in range(len(names) if small else 0)
    ]
    pairs = [
        (names[i], names[j], str(often), f"{100 * shares[i, j]:.0f} % of {totals[i]}")
        for i, j, often in confused_pairs(counts, _MOST_PAIRS)
    ]
    worst = [
        (url, names[wrong.label], names[wrong.predicted], wrong.label == wrong.predicted, wrong) for wrong, url in
        mistakes.worst
    ]  # fmt: skip
    epoch = f", after epoch {mistakes.epoch}" if mistakes.epoch else ""
    return {
        "name": name,
        "words": f"{mistakes.weights}{epoch}: {right_of(counts)}",
        "names": names,
        "long_names": max(map(len, names)) > 3,
        "matrix": matrix,
        "pairs": [] if small else pairs,
        "worst": worst,
    }


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
        "time_chart": charts.stacked_bars("Milliseconds an update", names, bars, colours),
        "time_key": [(part, f"var(--phase{_PARTS.index(part)})") for part in used],
        "time_names": names,
        "time_rows": rows,
    }


def _epochs(side: Side) -> tuple[str, list[str], list[list[str]]]:
    columns = list(dict.fromkeys(name for row in side.history for name in row))

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)

    return side.name, columns, [[cell(row.get(column)) for column in columns] for row in side.history]


def _facts(context: dict[str, Any], steps: int) -> list[tuple[str, str]]:
    machine = {key: value for key, value in context["machine"].items() if value}
    versions = ", ".join(f"{name} {version}" for name, version in context["versions"].items())
    rows = [("versions", versions), *((key.replace("_", " "), str(value)) for key, value in machine.items())]
    starts = context["starts"]
    if len(starts) > 1 or starts[0]["steps"]:  # the rows above are of the last one
        rows.append(("trained on", trained_on(starts, steps)))
        of_packages = [(name, versions_used(starts, steps, name)) for name in context["versions"]]
        rows += [(name, used) for name, used in of_packages if ", then" in used]
    return rows


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    # as they are written down where neither the command line nor accelerate's configuration says anything
    defaults = vars(train_parser().parse([])) | {"amp": False, "grad_accum_steps": 1}
    changed = {key: value for key, value in config.items() if value != defaults.get(key)}
    return [("--" + key.replace("_", "-"), str(value)) for key, value in changed.items()]
