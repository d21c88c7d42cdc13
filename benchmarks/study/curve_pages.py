"""What budget_curve.py's results say, as tables and as a block of docs/measured.md, from the result files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from study.curve import Curve, speedups
from study.training import PLAIN
from timm_decor.text import markdown_table

Costs = Mapping[tuple[str, str], float]  # (opt, role): seconds of a step, in units of plain SGD's
Table = tuple[list[str], list[list[str]]]  # head and rows


@dataclass(frozen=True)
class Pair:
    """An arm, and the plain training whose accuracy it is to reach."""

    mine: Curve
    target: Curve

    def cost(self, costs: Costs) -> float:
        """Seconds of a step of the arm in units of the target's."""
        return costs[self.mine.opt, self.mine.role] / costs[self.target.opt, self.target.role]


def pairs(found: Sequence[Curve]) -> list[Pair]:
    """Each plain curve with those that are set beside it: its own optimizer decorrelated, and the rival either way.

    The rival is the optimizer that was trained plain alone.
    """
    opts = {each.opt for each in found if each.role != PLAIN}

    def belongs(mine: Curve, target: Curve) -> bool:
        if mine.role == PLAIN:
            return mine.opt not in opts and target.opt in opts
        return target.opt in (mine.opt, *({each.opt for each in found} - opts))

    plain = [each for each in found if each.role == PLAIN]
    return [Pair(mine, target) for target in plain for mine in found if mine is not target and belongs(mine, target)]


def budgets_of(found: Sequence[Curve]) -> list[float]:
    """Epochs, ascending."""
    return sorted({epochs for each in found for epochs in each.scores})


def score_table(found: Sequence[Curve]) -> Table:
    """Accuracy by budget, a row an arm: the mean, each seed, and the learning rate."""
    budgets = budgets_of(found)
    rows = []
    for each in found:
        cells = [f"{each.name} at {', '.join(f'{lr:g}' for lr in dict.fromkeys(each.lrs.values()))}"]
        for epochs in budgets:
            values = each.scores.get(epochs, ())
            seeds = ", ".join(f"{value:.1f}" for value in values)
            cells.append(f"{each.means[epochs]:.1f} ({seeds})" if values else "-")
        rows.append(cells)
    return ["arm, learning rate", *(_epochs(epochs) for epochs in budgets)], rows


def speedup_table(found: Sequence[Curve], costs: Costs) -> Table:
    """What an arm saves to a plain curve's accuracy at each budget: as fast in steps, and in seconds.

    A cell is empty where the arm's smallest budget is above that accuracy, or its largest below.
    """
    budgets = budgets_of(found)
    rows = []
    for pair in pairs(found):
        cost = pair.cost(costs)
        by_epochs = {each.epochs: each for each in speedups(pair.mine, pair.target, cost)}
        cells = []
        for epochs in budgets:
            each = by_epochs.get(epochs)
            cells.append(f"{each.steps:.2f}, {each.seconds:.2f}" if each and each.steps and each.seconds else "-")
        rows.append([pair.target.name, pair.mine.name, f"{cost:.2f}", *cells])
    head = ["to the accuracy of", "arm", "cost of a step", *(f"its {_epochs(epochs)}" for epochs in budgets)]
    return head, rows


def block(found: Sequence[Curve], costs: Costs, picture: Path) -> str:
    """Both tables and the picture.

    Args:
        found: the curves.
        costs: of a step.
        picture: its path, as the page is to link it.
    """
    alt = "test accuracy over epochs and over seconds: plain, decorrelated, Muon"
    said = "As fast as the plain optimizer to its accuracy at each budget, in steps and in seconds:"
    tables = [markdown_table(*score_table(found)), said, markdown_table(*speedup_table(found, costs))]
    return "\n\n".join([*tables, f"![{alt}]({picture.as_posix()})"])


def _epochs(number: float) -> str:
    return f"{number:g} epoch{'s' * (number != 1)}"
