"""What accuracy over the budget says: tables for docs/measured.md and README's, from the results of two scripts alone.

budget_curve.py has a small network over five budgets; recipe_study.py a network at its real size over two or three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.curve import AT_PLAIN_RATE, Curve, interval, speedups, spreads
from study.training import PLAIN
from timm_decor.errors import UserError
from timm_decor.text import markdown_table

Costs = Mapping[tuple[str, str], float]  # (opt, role): seconds of a step, in units of plain SGD's
Table = tuple[list[str], list[list[str]]]  # head and rows


@dataclass(frozen=True)
class Pair:
    """An arm, and the plain training whose accuracy it is to reach."""

    mine: Curve
    target: Curve

    def cost(self, costs: Costs) -> float:
        """Seconds of a step of the arm in units of the target's.

        Raises:
            UserError: one of them was not timed.
        """
        missing = next(
            (key for curve in (self.mine, self.target) if (key := (curve.opt, curve.role)) not in costs), None
        )
        if missing:
            raise UserError(f"no step of {', '.join(missing)} was timed: run step_cost.py with it")
        return costs[self.mine.opt, self.mine.role] / costs[self.target.opt, self.target.role]


def pairs(found: Sequence[Curve]) -> list[Pair]:
    """Each plain curve with those that are set beside it: its own optimizer decorrelated, and the rival either way.

    The rival is the optimizer that was trained plain alone.
    """
    opts = {each.opt for each in found if each.role != PLAIN}

    def belongs(mine: Curve, target: Curve) -> bool:
        if mine.role == PLAIN:
            return mine.opt not in opts and target.opt in opts
        return mine.opt == target.opt or target.opt not in opts

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


def of_recipe(runs: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The curves of recipe_study.py's rows; its decorrelated arm has plain training's rate."""
    tested = [run for run in runs if run["measured_on"] == "test"]
    found = []
    for opt, arm in dict.fromkeys((run["opt"], run["arm"]) for run in tested):
        mine = sorted((r for r in tested if (r["opt"], r["arm"]) == (opt, arm)), key=lambda r: (r["epochs"], r["seed"]))
        scores: dict[float, list[float]] = {}
        for run in mine:
            scores.setdefault(run["epochs"], []).append(run["top1"])
        lrs = {run["epochs"]: run["lr"] for run in mine}
        found.append(Curve(opt, PLAIN if arm == PLAIN else AT_PLAIN_RATE, lrs, scores))
    return found


def step_costs(record: Mapping[str, Any], img_size: int, batch_size: int) -> dict[tuple[str, str], float]:
    """Seconds of a step by (opt, role), in units of plain SGD's, from step_cost.py's results of one image size.

    Raises:
        UserError: nothing was measured with these sizes, or not plain SGD.
    """
    shape = {"img_size": img_size, "batch_size": batch_size}
    cases = {each["case"]["opt"]: each for each in record["results"] if shape.items() <= each["case"].items()}
    if "sgd" not in cases:
        raise UserError(f"no step of plain SGD was timed at {img_size} px, batch {batch_size}: run step_cost.py")
    base = cases["sgd"]["seconds"]["plain"]
    found: dict[tuple[str, str], float] = {}
    for opt, each in cases.items():
        found[opt, PLAIN] = each["seconds"]["plain"] / base
        found[opt, AT_PLAIN_RATE] = found[opt, PLAIN] * each["ratio"]["amortised"]
    return found


HEADLINE = (
    "network, data, epochs", "optimizer", "plain", "decorrelated, same rate", "plain Muon",
    "faster to plain's accuracy, in seconds", "Muon is faster",
)  # fmt: skip


def headline(what: str, opt: str, epochs: float, found: Sequence[Curve], costs: Costs) -> list[str] | None:
    """A row under HEADLINE: three accuracies at an equal budget, and how much faster two of them are to the first.

    A speed-up has its 95 % interval where it can be had.

    Args:
        what: network and data.
        opt: base optimizer.
        epochs: the budget.
        found: the curves.
        costs: of a step.

    Returns:
        None where plain training, or its decorrelated twin, has not had this budget.
    """
    opts = {each.opt for each in found if each.role != PLAIN}
    plain, mine, rival = (
        next((each for each in found if test(each) and epochs in each.scores), None)
        for test in (
            lambda each: (each.opt, each.role) == (opt, PLAIN),
            lambda each: (each.opt, each.role) == (opt, AT_PLAIN_RATE),
            lambda each: each.opt not in opts,
        )
    )
    if plain is None or mine is None:
        return None

    def faster(arm: Curve | None) -> str:
        if arm is None:
            return "-"
        cost = Pair(arm, plain).cost(costs)
        seconds = {each.epochs: each.seconds for each in speedups(arm, plain, cost)}.get(epochs)
        if not seconds:
            return "-"
        ends = interval(arm, plain, cost, epochs, spreads(found))
        return f"{seconds:.1f}x" + (f" ({ends[0]:.1f} to {ends[1]:.1f})" if ends else "")

    means = [f"{arm.means[epochs]:.1f} %" if arm else "-" for arm in (plain, mine, rival)]
    return [f"{what}, {_epochs(epochs)}", opt, *means, faster(mine), faster(rival)]


def _epochs(number: float) -> str:
    return f"{number:g} epoch{'s' * (number != 1)}"
