"""The protocol's arithmetic, on records alone: which learning rate, which budget next, and the figures of the table.

    target       the mean over seeds of tuned plain training's accuracy after N epochs
    (a)          each arm's accuracy after N epochs
    (b)          the smallest budget on the list with which the other arm, on its own schedule of that length, reaches
                 the target in the mean over seeds; the next smaller one on the list was trained, too, and missed it
    tuning       every arm, plain training too, on one grid at N epochs; shorter budgets take that learning rate
    seconds      steps times the cost of a step; the ratio of two arms' costs is that of their seconds in runs that
                 trained in turns, over the turns in which none of the runs was slow

Accuracy is always that of the end of a schedule: neither the best epoch nor the first to cross a line is picked. This
is time to a target as AlgoPerf has it (arXiv 2306.07179), with the target set by the tuned rival itself, and a budget
per run as in airbench (arXiv 2404.00498), because a schedule that decays to zero is what people run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from study.training import PLAIN, Record
from timm_decor.errors import UserError

Point = tuple[float, float]  # learning rate, weight decay
MIN_TURNS = 4  # fewer, and a slow minute of the machine would have met one arm alone
# Times a run's usual turn: something else had the machine. A turn is a few seconds, and what disturbs it may be over
# before all arms have had theirs: ratios of whole runs were up to a twentieth off what undisturbed turns agree on.
SLOW = 1.3


def scores(records: Iterable[Record]) -> dict[Point, float]:
    """Mean accuracy over seeds of each point of a grid; a run that diverged counts as its last accuracy."""
    found: dict[Point, list[float]] = {}
    for record in records:
        found.setdefault((record.spec.lr, record.spec.weight_decay), []).append(record.final)
    return {point: statistics.mean(values) for point, values in found.items()}


def best(measured: Mapping[Point, float]) -> Point:
    """The point of highest accuracy; of equals the lowest learning rate."""
    return max(sorted(measured), key=lambda point: measured[point])


def beyond(values: Sequence[float], chosen: float) -> float | None:
    """The value by which a geometric series must grow for `chosen` not to lie at its edge; None if it does not.

    A series of one value is not tuned over, and does not grow.
    """
    ordered = sorted(values)
    if len(ordered) < 2 or ordered[0] < chosen < ordered[-1]:
        return None
    at_top = chosen == ordered[-1]
    ratio = ordered[-1] / ordered[-2] if at_top else ordered[0] / ordered[1]
    return float(f"{chosen * ratio:.6g}")


def best_rate(grid: Iterable[float], score: Callable[[float], float]) -> float:
    """The learning rate with the highest score, of equals the lowest; the grid grows until no rate beyond is better.

    Args:
        grid: learning rates to begin with.
        score: trains with one.
    """
    tried = {lr: score(lr) for lr in grid}
    chosen = max(sorted(tried), key=lambda lr: tried[lr])
    while (further := beyond(list(tried), chosen)) is not None:
        tried[further] = score(further)
        chosen = further if tried[further] > tried[chosen] else chosen
    return chosen


def chosen(measured: Mapping[Point, float], what: str) -> Point:
    """The tuned point of an arm.

    Raises:
        UserError: nothing was measured, or the best lies at the edge of the grid.
    """
    if not measured:
        raise UserError(f"{what} was not tuned: run the tune stage with it")
    point = best(measured)
    for name, values, value in zip(("learning rate", "weight decay"), zip(*measured, strict=True), point, strict=True):
        if beyond(sorted(set(values)), value) is not None:
            raise UserError(f"{what}: the best {name}, {value:g}, is at the edge of what was tried: go on with tune")
    return point


def smallest_first(budgets: Sequence[float], reached: Mapping[float, bool]) -> tuple[float | None, float | None]:
    """Bisection over the list of budgets, taking accuracy to rise with the budget.

    Args:
        budgets: shares of N epochs, ascending; the last is the whole.
        reached: whether the target was reached, for those that were tried.

    Returns:
        The smallest budget known to reach the target (None: not even the largest), and the one to try next (None: the
        search is over, and the budget before the smallest was tried and missed, or there is none).
    """
    if budgets[-1] not in reached:
        return None, budgets[-1]
    if not reached[budgets[-1]]:
        return None, None
    high = min(i for i, budget in enumerate(budgets) if reached.get(budget))
    low = max((i for i, budget in enumerate(budgets[:high]) if reached.get(budget) is False), default=-1)
    return budgets[high], None if high - low == 1 else budgets[(low + high) // 2]


@dataclass(frozen=True)
class Row:
    """One arm in the table, against plain training with an optimizer.

    Attributes:
        against: the optimizer whose plain training sets the target; the arm's own, but for the rival.
        opt: base optimizer.
        arm: `plain` or a way to decorrelate.
        lr: tuned learning rate.
        weight_decay: tuned or given.
        steps: of N epochs.
        top1: accuracy after N epochs, %, a number a seed.
        step_seconds: seconds of a step, refreshes included, a number a seed.
        cost: seconds of a step in units of the target's, a number for each seed whose runs trained in turns.
        target: mean accuracy of plain training after N epochs, with optimizer `against`.
        tried: mean accuracy at each budget that was trained with every seed.
        budget: the smallest share of N epochs that reaches the target; None if none does, or for the target itself.
        missed: the next smaller share, which was tried and missed; None if there is none.
        unfinished: the search is not over: some runs are missing.
    """

    against: str
    opt: str
    arm: str
    lr: float
    weight_decay: float
    steps: int
    top1: tuple[float, ...]
    step_seconds: tuple[float, ...]
    cost: tuple[float, ...]
    target: float
    tried: dict[float, float]
    budget: float | None
    missed: float | None
    unfinished: bool

    @property
    def is_target(self) -> bool:
        return self.opt == self.against and self.arm == PLAIN

    @property
    def mean(self) -> float:
        """Mean accuracy after N epochs, %."""
        return statistics.mean(self.top1)

    @property
    def milliseconds(self) -> float:
        """Of a step, refreshes included: the median over seeds."""
        return 1000 * statistics.median(self.step_seconds)

    @property
    def steps_speedup(self) -> float | None:
        """Plain's steps to the target over this arm's."""
        return 1 / self.budget if self.budget else None

    @property
    def seconds_speedup(self) -> float | None:
        """Plain's seconds to the target over this arm's, by the median cost of a step."""
        return 1 / (self.budget * statistics.median(self.cost)) if self.budget and self.cost else None


def share(steps: int, whole: int, budgets: Sequence[float]) -> float | None:
    """The budget on the list that a number of steps is."""
    return next((b for b in (*budgets, 1.0) if steps == budget_steps(b, whole)), None)


def budget_steps(budget: float, whole: int) -> int:
    """Steps of a share of N epochs."""
    return max(1, round(budget * whole))


def rows(
    records: Sequence[Record], whole: int, budgets: Sequence[float], seeds: int, rival: str | None = None
) -> list[Row]:
    """The table of a result file: for each optimizer the target first, then its other arms, then the rival.

    Args:
        records: of one setting; each arm with one learning rate.
        whole: steps of N epochs.
        budgets: shares of N epochs on the list, without the whole.
        seeds: how many each arm needs.
        rival: an optimizer whose plain training is set beside the others' arms.
    """
    found = []
    runs = {key: _by_budget(records, *key, whole, budgets) for key in {(r.spec.opt, r.spec.arm) for r in records}}
    quiet = quiet_turns([record for mine in runs.values() for record in mine.get(1.0, [])])
    complete = sorted(key for key, mine in runs.items() if len(mine.get(1.0, [])) >= seeds)
    for against in sorted({opt for opt, _ in complete}, key=lambda opt: (opt == rival, opt)):
        if (against, PLAIN) not in complete:
            continue
        plain = runs[against, PLAIN][1.0]
        arms = [key for key in complete if key[0] == against and key[1] != PLAIN]
        others = [(rival, PLAIN)] if rival and rival != against and (rival, PLAIN) in complete else []
        for key in [(against, PLAIN), *arms, *others]:
            found.append(_row(against, plain, *key, runs[key], whole, budgets, seeds, quiet))
    return found


def _row(
    against: str, plain: list[Record], opt: str, arm: str, mine: Mapping[float, list[Record]], whole: int,
    budgets: Sequence[float], seeds: int, quiet: Mapping[str, Sequence[int]],
) -> Row:  # fmt: skip
    target = statistics.mean(record.final for record in plain)
    tried = {b: statistics.mean(r.final for r in mine[b]) for b in sorted(mine) if len(mine[b]) >= seeds}
    budget = missed = following = None
    if (opt, arm) != (against, PLAIN):
        budget, following = smallest_first((*budgets, 1.0), {b: tried[b] >= target for b in tried})
        missed = max((b for b in tried if budget is not None and b < budget), default=None)
    runs, spec = mine[1.0], mine[1.0][0].spec
    return Row(
        against, opt, arm, spec.lr, spec.weight_decay, whole, tuple(r.final for r in runs),
        tuple(_step_seconds(r, quiet) for r in runs), _costs(runs, plain, quiet), target, tried,
        budget, missed, following is not None,
    )  # fmt: skip


def _by_budget(
    records: Sequence[Record], opt: str, arm: str, whole: int, budgets: Sequence[float]
) -> dict[float, list[Record]]:
    mine: dict[float, list[Record]] = {}
    for record in sorted(records, key=lambda r: r.spec.seed):
        if (record.spec.opt, record.spec.arm) == (opt, arm):
            which = share(record.spec.steps, whole, budgets)
            if which is not None:
                mine.setdefault(which, []).append(record)
    return mine


def quiet_turns(records: Iterable[Record]) -> dict[str, list[int]]:
    """By group, the turns in which no run was slow: one that something else disturbed makes the others look fast.

    Args:
        records: runs of one length. Those that diverged, or had fewer turns than `MIN_TURNS`, do not count.

    Returns:
        Indexes of turns; all of them where fewer than `MIN_TURNS` are quiet, as of a group in which no turn is usual.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        if _took_turns(record):
            groups.setdefault(record.group, []).append(record)
    found = {}
    for group, runs in groups.items():
        limits = [SLOW * statistics.median(run.seconds) for run in runs]
        turns = range(min(len(run.seconds) for run in runs))
        quiet = [i for i in turns if all(run.seconds[i] <= limit for run, limit in zip(runs, limits, strict=True))]
        found[group] = quiet if len(quiet) >= MIN_TURNS else list(turns)
    return found


def _took_turns(record: Record) -> bool:
    return not record.diverged and len(record.seconds) >= MIN_TURNS


def _costs(mine: Iterable[Record], plain: Iterable[Record], quiet: Mapping[str, Sequence[int]]) -> tuple[float, ...]:
    """Ratio of the seconds of quiet turns, of each seed whose runs trained in turns and to their end."""
    others = {record.group: record for record in plain if _took_turns(record)}
    pairs = [(record, others[record.group]) for record in mine if record.group in others and _took_turns(record)]
    return tuple(_seconds(record, quiet) / _seconds(other, quiet) for record, other in pairs)


def _seconds(record: Record, quiet: Mapping[str, Sequence[int]]) -> float:
    return sum(record.seconds[i] for i in quiet[record.group])


def _step_seconds(record: Record, quiet: Mapping[str, Sequence[int]]) -> float:
    """Of a step, over its group's quiet turns; of a run that took no turns over the whole."""
    if not _took_turns(record):
        return sum(record.seconds) / record.spec.steps
    turn = -(-record.spec.steps // len(record.seconds))  # the last one may be shorter
    steps = sum(min(turn, record.spec.steps - i * turn) for i in quiet[record.group])
    return _seconds(record, quiet) / steps


def seed_spread(table: Sequence[Row]) -> tuple[float, int]:
    """Standard deviation of a run's accuracy over seeds, pooled over all arms; and its degrees of freedom."""
    table = list({(row.opt, row.arm): row for row in table}.values())  # the rival is there several times
    freedom = sum(len(row.top1) - 1 for row in table)
    if not freedom:
        return math.nan, 0
    squares = sum((value - row.mean) ** 2 for row in table for value in row.top1)
    return math.sqrt(squares / freedom), freedom
