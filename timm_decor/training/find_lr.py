"""--find-lr: short trainings from the same weights over a grid of learning rates, before a run is begun.

Each is as long as the others, on the same batches, with a schedule of its own length (a warm-up, then down to zero).
What counts is the training loss of the last fifth of its updates: the evaluation images have no say. Short trainings
favour higher rates a little, so of rates that are as good as the best within their noise the lowest is named.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_decor.text import text_table
from timm_decor.training.seeing.drawing import label, plain_text
from timm_decor.training.seeing.plot import COLOURS, MARKERS

_FACTOR = 2.0  # between neighbours of the grid, at most
_LAST = 0.2  # of the updates, whose loss counts


@dataclass(frozen=True)
class Trial:
    """A short training.

    Attributes:
        lr: peak learning rate.
        losses: of each update; fewer than asked for where it diverged.
        updates: that were asked for.
    """

    lr: float
    losses: list[float]
    updates: int

    @property
    def diverged(self) -> bool:
        return len(self.losses) < self.updates

    @property
    def failed(self) -> bool:
        """Whether it diverged, or its loss ended above where it began."""
        return self.diverged or self.loss > self.losses[0]

    @property
    def _last(self) -> list[float]:
        return self.losses[-max(1, round(_LAST * self.updates)) :]

    @property
    def loss(self) -> float:
        """Mean training loss of the last updates; infinite where it diverged."""
        return math.inf if self.diverged else statistics.fmean(self._last)

    @property
    def error(self) -> float:
        """Standard error of `loss`, as far as batches differ."""
        last = self._last
        return statistics.stdev(last) / math.sqrt(len(last)) if len(last) > 1 and not self.diverged else 0.0


@dataclass(frozen=True)
class Search:
    """One side's trials, in the order of their rates."""

    name: str
    trials: list[Trial]

    @property
    def best(self) -> Trial | None:
        """The lowest rate that is as good as the best one within the noise; None where all diverged."""
        least = min(self.trials, key=lambda trial: trial.loss)
        if math.isinf(least.loss):
            return None
        return next(trial for trial in self.trials if trial.loss <= least.loss + least.error)

    @property
    def words(self) -> str:
        """The result in a sentence."""
        best = self.best
        if best is None:
            return f"{self.name}: every learning rate diverged; try lower ones"
        edge = {self.trials[0].lr: "lower", self.trials[-1].lr: "higher"}.get(best.lr)
        at_edge = f"; it is at the edge of what was tried: try {edge} ones, too" if edge else ""
        return f"{self.name}: learning rate {best.lr:.4g} (training loss {best.loss:.4f}){at_edge}"


def grid(low: float, high: float) -> list[float]:
    """Learning rates from low to high, a geometric series of steps by two or less."""
    steps = math.ceil(math.log(high / low) / math.log(_FACTOR) - 1e-9)
    return [float(f"{low * (high / low) ** (i / max(1, steps)):.4g}") for i in range(steps + 1)]


def table(searches: Sequence[Search]) -> str:
    """The losses, a row a rate, the named ones marked."""

    def cell(trial: Trial, of: Search) -> str:
        if trial.diverged:
            return f"diverged at update {len(trial.losses) + 1}"
        mark = "  <-" if of.best and trial.lr == of.best.lr else ""
        return f"{trial.loss:.4f} +- {trial.error:.4f}{mark}"

    rows = [
        [f"{trials[0].lr:.4g}", *(cell(trial, of) for trial, of in zip(trials, searches, strict=True))]
        for trials in zip(*(each.trials for each in searches), strict=True)
    ]
    return text_table(("learning rate", *(each.name for each in searches)), rows)


def as_json(searches: Sequence[Search], context: dict[str, Any]) -> dict[str, Any]:
    """All trials with their losses, and the rates that were named."""
    return {
        **context,
        "sides": [
            {
                "name": each.name,
                "best_lr": each.best and each.best.lr,
                "trials": [
                    {"lr": t.lr, "loss": None if t.diverged else t.loss, "diverged": t.diverged, "losses": t.losses}
                    for t in each.trials
                ],
            }
            for each in searches
        ],
    }


@plain_text()
def save_picture(searches: Sequence[Search], path: Path, title: str) -> None:
    """Training loss over the learning rate; rates that ended above where they began stand at the top as crosses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axis.set_title(label(title, 90), fontsize=12)
    for each, colour, marker in zip(searches, COLOURS, MARKERS, strict=False):
        good = [trial for trial in each.trials if not trial.failed]
        axis.errorbar(
            [t.lr for t in good], [t.loss for t in good], [t.error for t in good],
            color=colour, marker=marker, markersize=5, capsize=3, label=label(each.name),
        )  # fmt: skip
        if each.best:
            axis.plot(each.best.lr, each.best.loss, marker="o", markersize=13, fillstyle="none", color=colour)
    for each, colour in zip(searches, COLOURS, strict=False):
        lost = [trial.lr for trial in each.trials if trial.failed]
        axis.plot(lost, [0.97] * len(lost), "x", color=colour, transform=axis.get_xaxis_transform())
    axis.set_xscale("log", base=2)
    rates = [trial.lr for trial in searches[0].trials]
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    axis.set_xlabel("peak learning rate (circle: the one that is named; cross: ended above its start)")
    axis.set_ylabel("training loss of the last updates")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
