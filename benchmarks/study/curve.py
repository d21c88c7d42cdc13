"""Accuracy over the budget, from records alone: what a level of accuracy costs each arm, in steps and in seconds."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from study.protocol import Row
from study.training import PLAIN, Record

DECORRELATED = "decorrelated"
AT_PLAIN_RATE = "at plain's rate"
DRAWS = 2000
Rates = Mapping[tuple[str, str], Mapping[float, float]]  # (opt, arm): learning rates by the epochs they were tuned at


@dataclass(frozen=True)
class Curve:
    """An arm over the budget.

    Attributes:
        opt: base optimizer.
        role: `plain`, `decorrelated` (at its own rate) or `at plain's rate`.
        lrs: learning rate by epochs.
        scores: top-1 in % of each seed by epochs, ascending.
    """

    opt: str
    role: str
    lrs: Mapping[float, float]
    scores: Mapping[float, Sequence[float]]

    @property
    def name(self) -> str:
        return f"{self.opt}, {self.role}"

    @property
    def means(self) -> dict[float, float]:
        """Accuracy by epochs, %."""
        return {epochs: statistics.mean(values) for epochs, values in self.scores.items()}

    def budget_to(self, level: float) -> float | None:
        """Epochs to a level of accuracy, %: see `crossing`."""
        return crossing(list(self.means.items()), level)


def crossing(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Epochs to a level: between two budgets that were trained, along a line over their logarithms.

    Args:
        points: epochs and accuracy in %, by epochs.
        level: accuracy, %.

    Returns:
        None where the smallest budget is above the level already, or none reaches it.
    """
    for (before, low), (after, high) in zip(points, points[1:], strict=False):
        if low <= level <= high and low < high:
            share = (level - low) / (high - low)
            return 2 ** (math.log2(before) + share * (math.log2(after) - math.log2(before)))
    return None


def rate_for(rates: Mapping[float, float], epochs: float) -> float:
    """The learning rate that was tuned at the length nearest in logarithm; of two as near the longer one's."""
    return rates[min(rates, key=lambda tuned: (round(abs(math.log2(tuned / epochs)), 6), -tuned))]


def rate_of(rates: Rates, opt: str, role: str, epochs: float) -> float:
    """The learning rate of an arm in its role."""
    arm = DECORRELATED if role == DECORRELATED else PLAIN
    return rate_for(rates[opt, arm], epochs)


def roles(opt: str, rival: str) -> list[str]:
    """What an optimizer is trained as; the rival plain alone."""
    return [PLAIN] if opt == rival else [PLAIN, AT_PLAIN_RATE, DECORRELATED]


def curves(
    records: Sequence[Record], rates: Rates, per_epoch: int, seeds: int, rival: str, budgets: Sequence[float]
) -> list[Curve]:
    """The curves of a result file; a budget of which a seed is missing is left out, and so is an arm without any.

    Args:
        records: of one setting.
        rates: what was tuned.
        per_epoch: steps.
        seeds: how many a point needs.
        rival: see `roles`.
        budgets: epochs, ascending.
    """
    found = []
    for opt in dict.fromkeys(opt for opt, _ in rates):
        for role in roles(opt, rival):
            scores: dict[float, list[float]] = {}
            lrs: dict[float, float] = {}
            for epochs in budgets:
                lr = rate_of(rates, opt, role, epochs)
                arm = PLAIN if role == PLAIN else DECORRELATED
                mine = [
                    record.final
                    for record in sorted(records, key=lambda r: r.spec.seed)
                    if (record.spec.opt, record.spec.arm, record.spec.lr) == (opt, arm, lr)
                    and record.spec.steps == round(epochs * per_epoch)
                ]
                if len(mine) >= seeds:
                    scores[epochs], lrs[epochs] = mine, lr
            if scores:
                found.append(Curve(opt, role, lrs, scores))
    return found


def costs(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Seconds of a step by (opt, role), in units of plain SGD's, from time_to_accuracy's runs, which trained in turns.

    A rival's cost in units of each target's is there; what else is asked goes by the milliseconds of a step.
    """
    base = next(row.milliseconds for row in rows if row.opt == "sgd" and row.is_target)
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.is_target:
            found.setdefault((row.opt, PLAIN), row.milliseconds / base)
    for row in rows:
        if row.cost and row.against == row.opt:
            found[row.opt, row.arm] = statistics.median(row.cost) * found[row.opt, PLAIN]
        elif row.cost and row.against == "sgd":
            found[row.opt, PLAIN] = statistics.median(row.cost)
    return found


@dataclass(frozen=True)
class Speedup:
    """What an arm saves against another's accuracy at a budget.

    Attributes:
        epochs: of the other.
        steps: its steps over this arm's; None where this arm's curve does not cross the level.
        seconds: the same in seconds.
    """

    epochs: float
    steps: float | None
    seconds: float | None


def speedups(mine: Curve, other: Curve, cost: float) -> list[Speedup]:
    """Against each point of another curve.

    Args:
        mine: the arm.
        other: whose accuracy is the target.
        cost: seconds of a step of mine in units of the other's.
    """
    found = []
    for epochs, level in other.means.items():
        needed = mine.budget_to(level)
        steps = epochs / needed if needed else None
        found.append(Speedup(epochs, steps, steps and steps / cost))
    return found


def spreads(curves: Sequence[Curve]) -> dict[float, float]:
    """Standard deviation of a run's accuracy over seeds by epochs, %, pooled over the curves."""
    found: dict[float, list[float]] = {}
    freedom: dict[float, int] = {}
    for curve in curves:
        for epochs, values in curve.scores.items():
            mean = statistics.mean(values)
            found.setdefault(epochs, []).extend((value - mean) ** 2 for value in values)
            freedom[epochs] = freedom.get(epochs, 0) + len(values) - 1
    return {epochs: math.sqrt(sum(squares) / freedom[epochs]) for epochs, squares in found.items() if freedom[epochs]}


def interval(
    mine: Curve, other: Curve, cost: float, epochs: float, spread: Mapping[float, float]
) -> tuple[float, float] | None:
    """Where 95 of 100 repetitions would have the speed-up in seconds, by what seeds do (a parametric bootstrap).

    The cost of a step is taken as known.

    Args:
        mine: the arm.
        other: whose accuracy is the target.
        cost: seconds of a step of mine in units of the other's.
        epochs: the other's budget.
        spread: see `spreads`.

    Returns:
        None where a budget has one seed, or more than 1 in 20 repetitions would not have the curves meet.
    """
    if not all(each in spread for each in (*mine.scores, epochs)):
        return None
    draw, found = random.Random(0), []
    target, count = other.means[epochs], len(other.scores[epochs])
    for _ in range(DRAWS):
        level = draw.gauss(target, spread[epochs] / math.sqrt(count))
        points = [
            (at, draw.gauss(mean, spread[at] / math.sqrt(len(mine.scores[at])))) for at, mean in mine.means.items()
        ]
        if (needed := crossing(points, level)) is not None:
            found.append(epochs / needed / cost)
    if len(found) < 0.95 * DRAWS:
        return None
    found.sort()
    return found[round(0.025 * len(found))], found[round(0.975 * len(found)) - 1]
