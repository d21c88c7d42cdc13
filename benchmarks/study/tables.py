"""The table of time_to_accuracy, as rows of text; and a new table beside a committed one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from study.protocol import Row, seed_spread

HEADER = (
    "target", "optimizer", "arm", "lr", "top-1 % (each seed)", "ms a step", "budget to the target", "missed with",
    "faster in steps", "faster in seconds",
)  # fmt: skip
CONFIDENCE = 0.99  # a true reproduction leaves this interval once in a hundred figures
COST_TOLERANCE = 0.10  # what the ratio of two arms' seconds moves by between quiet machines of one kind


def cells(row: Row, bold: bool = False) -> list[str]:
    """A row of the table under HEADER.

    Args:
        row: the figures.
        bold: mark what a reader looks for, for markdown.
    """

    def strong(text: str, is_better: bool) -> str:
        return f"**{text}**" if bold and is_better and not row.is_target else text

    each = ", ".join(f"{value:.1f}" for value in row.top1)
    top1 = strong(f"{row.mean:.1f}", row.mean > row.target) + f" ({each})"
    first = [f"{row.against} {row.target:.1f}", row.opt, row.arm, f"{row.lr:g}", top1]
    milliseconds = f"{row.milliseconds:.0f}" if row.milliseconds >= 20 else f"{row.milliseconds:.2f}"
    if row.is_target:
        return [*first, milliseconds, "1", "-", "-", "-"]
    cost = f"{milliseconds} ({statistics.median(row.cost):.2f}x)" if row.cost else f"{milliseconds} (not in turns)"
    missed = f"{row.missed:g}: {row.tried[row.missed]:.1f}" if row.missed else "-"
    if row.unfinished:  # the smallest budget so far says nothing of how fast the arm is
        return [*first, cost, budget_text(row), missed, "-", "-"]
    speedup = strong(times(row.seconds_speedup), (row.seconds_speedup or 0) > 1)
    return [*first, cost, budget_text(row), missed, times(row.steps_speedup), speedup]


def budget_text(row: Row) -> str:
    """The smallest budget in units of plain's, or why there is none."""
    if row.unfinished:
        return f"at most {row.budget:g}, unfinished" if row.budget else "unfinished"
    return f"{row.budget:g}" if row.budget else "not with 1"


def times(factor: float | None) -> str:
    """A speed-up for people."""
    return f"{factor:.2f}x" if factor else "-"


def compared(new: Sequence[Row], committed: Sequence[Row], budgets: Sequence[float]) -> tuple[list[list[str]], int]:
    """Each figure of a new table beside the committed one.

    An accuracy is within the spread where the difference of the two means is less than chance gives in 99 of 100 cases
    (Student's t, with the committed runs' standard deviation over seeds, pooled over the arms). A budget is where it is
    the same or the next one on the list; the ratio of seconds within 10 %. Seconds themselves are the machine's.

    Returns:
        Rows of (figure, committed, here, allowed difference, verdict), and how many of them are outside.
    """
    from scipy.stats import t as student

    spread, freedom = seed_spread(committed)
    interval = float(student.ppf(0.5 + CONFIDENCE / 2, freedom)) * spread if freedom else math.nan
    lines: list[list[str]] = []
    here = {(row.against, row.opt, row.arm): row for row in new}

    def line(figure: str, old: str, found: str, allowed: str, within: bool) -> None:
        lines.append([figure, old, found, allowed, "within" if within else "OUTSIDE"])

    for old in committed:
        row = here.get((old.against, old.opt, old.arm))
        name = f"{old.opt} {old.arm}"
        if row is None:
            line(name, "measured", "missing", "", False)
            continue
        if old.opt == old.against:
            allowed = interval * math.sqrt(1 / len(old.top1) + 1 / len(row.top1))
            close = abs(old.mean - row.mean) <= allowed
            line(f"{name}: top-1 %", f"{old.mean:.2f}", f"{row.mean:.2f}", f"{allowed:.2f}", close)
        if old.is_target:
            continue
        name += f" to {old.against}'s target"
        near = abs(_place(old, budgets) - _place(row, budgets)) <= 1 and not row.unfinished
        line(f"{name}: budget", budget_text(old), budget_text(row), "one on the list", near)
        if old.cost and row.cost:
            was, now = statistics.median(old.cost), statistics.median(row.cost)
            close = abs(now / was - 1) <= COST_TOLERANCE
            line(f"{name}: cost of a step", f"{was:.3f}x", f"{now:.3f}x", f"{COST_TOLERANCE:.0%}", close)
    return lines, sum(verdict[-1] == "OUTSIDE" for verdict in lines)


def _place(row: Row, budgets: Sequence[float]) -> int:
    """Where on the list the budget stands; past its end if none reaches the target."""
    return [*budgets, 1.0].index(row.budget) if row.budget else len(budgets) + 1
