"""The table of time_to_accuracy, as rows of text; and a new table beside a committed one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from study.protocol import Row, seed_spread
from study.training import PLAIN

HEADER = (
    "optimizer", "arm", "lr", "top-1 % (each seed)", "cost of a step", "budget to plain's top-1", "missed with",
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
    each = ", ".join(f"{value:.1f}" for value in row.top1)
    mean = f"**{row.mean:.1f}**" if bold and row.arm != PLAIN and row.mean > row.target else f"{row.mean:.1f}"
    first = [row.opt, row.arm, f"{row.lr:g}", f"{mean} ({each})"]
    if row.arm == PLAIN:
        return [*first, "1", "1", "-", "-", "-"]
    cost = f"{statistics.median(row.cost):.2f}" if row.cost else "not in turns"
    return [*first, cost, budget_text(row), _missed_text(row), times(row.steps_speedup), times(row.seconds_speedup)]


def budget_text(row: Row) -> str:
    """The smallest budget in units of plain's, or why there is none."""
    if row.unfinished:
        return f"at most {row.budget:g}, unfinished" if row.budget else "unfinished"
    return f"{row.budget:g}" if row.budget else "not with 1"


def _missed_text(row: Row) -> str:
    return f"{row.missed:g}: {row.tried[row.missed]:.1f}" if row.missed else "-"


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
    here = {(row.opt, row.arm): row for row in new}

    def line(figure: str, old: str, found: str, allowed: str, within: bool) -> None:
        lines.append([figure, old, found, allowed, "within" if within else "OUTSIDE"])

    for old in committed:
        name = f"{old.opt} {old.arm}"
        row = here.get((old.opt, old.arm))
        if row is None:
            line(name, "measured", "missing", "", False)
            continue
        allowed = interval * math.sqrt(1 / len(old.top1) + 1 / len(row.top1))
        line(
            f"{name}: top-1 %", f"{old.mean:.2f}", f"{row.mean:.2f}", f"{allowed:.2f}",
            abs(old.mean - row.mean) <= allowed,
        )  # fmt: skip
        if old.arm == PLAIN:
            continue
        within = _index(budgets, old.budget) is not None and row.budget is not None and not row.unfinished
        near = within and abs(_index(budgets, old.budget) - _index(budgets, row.budget)) <= 1  # type: ignore[operator]
        both_none = old.budget is None and row.budget is None and not row.unfinished
        line(f"{name}: budget", budget_text(old), budget_text(row), "one step of the list", near or both_none)
        if old.cost and row.cost:
            was, now = statistics.median(old.cost), statistics.median(row.cost)
            close = abs(now / was - 1) <= COST_TOLERANCE
            line(f"{name}: cost of a step", f"{was:.3f}", f"{now:.3f}", f"{COST_TOLERANCE:.0%}", close)
    return lines, sum(verdict[-1] == "OUTSIDE" for verdict in lines)


def _index(budgets: Sequence[float], budget: float | None) -> int | None:
    return [*budgets, 1.0].index(budget) if budget else None
