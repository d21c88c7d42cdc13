"""The comparison of a decorrelated model with its plain twin: pure functions from two histories to a table and text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from timm_decor.text import markdown_cell

SIDES = ("decorrelated", "plain")  # the two models' folders in that of the run


def ranked(history: Sequence[Mapping[str, Any]], column: str) -> list[Any]:
    """The rows that were evaluated, the best by a column first, the first of equals; without NaN, which has no rank.

    Args:
        history: a row an epoch.
        column: of an accuracy or a loss.
    """
    rows = [row for row in history if math.isfinite(row.get(column, math.nan))]
    sign = 1 if column.endswith("loss") else -1
    return sorted(rows, key=lambda row: sign * row[column])


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: for headings.
        model: timm's name.
        optimizer: timm's name.
        lr: the highest learning rate that was reached.
        epochs: planned epochs.
        history: summary.csv's rows.
        failure: why it did not finish, or None.
        chance: top-1 accuracy, %, that guessing has; None where that is not known.
        images: of an evaluation; None where that is not known.
        metric: the column of the history that says which epoch is best: of the averaged weights where there are any.
    """

    name: str
    model: str
    optimizer: str
    lr: float
    epochs: int
    history: list[dict[str, Any]]
    failure: str | None = None
    chance: float | None = None
    images: int | None = None
    metric: str = "eval_top1"

    @property
    def outcome(self) -> str:
        """Whether it finished, in words."""
        return "finished" if self.failure is None else f"diverged after epoch {len(self.history)} of {self.epochs}"

    @property
    def is_averaged(self) -> bool:
        """Whether its accuracy is that of the averaged weights (EMA)."""
        return self.metric.startswith("ema_")

    @property
    def accuracy(self) -> str:
        """The column of its top-1 accuracy."""
        return "ema_top1" if self.is_averaged else "eval_top1"

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """The epochs that were evaluated."""
        return [row for row in self.history if row.get(self.accuracy) is not None]

    @property
    def best(self) -> dict[str, Any]:
        """The evaluated epoch with the highest top-1 accuracy, the first of equals."""
        return max(self.evaluated, key=lambda row: row[self.accuracy])

    @property
    def picked(self) -> dict[str, Any]:
        """The evaluated epoch that is best by `metric`, which best.safetensors is of; the first of equals."""
        return next(iter(ranked(self.history, self.metric)), self.best)

    @property
    def best_top1(self) -> float:
        """The accuracy of that epoch, %."""
        return float(self.best[self.accuracy])

    @property
    def at_chance(self) -> bool:
        """Whether its best accuracy could be that of guessing, within three standard deviations."""
        if self.chance is None or self.images is None:
            return False
        share = self.chance / 100
        return self.best_top1 <= self.chance + 300 * math.sqrt(share * (1 - share) / self.images)

    @property
    def seconds_per_step(self) -> float:
        """Median over epochs: one epoch that was disturbed does not count."""
        before = [0] + [row["steps"] for row in self.history]
        return median(row["epoch_seconds"] / (row["steps"] - n) for row, n in zip(self.history, before, strict=False))

    def first_at(self, top1: float) -> dict[str, Any] | None:
        """The first epoch whose accuracy is at least `top1` (%), or None."""
        return next((row for row in self.evaluated if row[self.accuracy] >= top1), None)


def summary(side: Side, other: Side) -> dict[str, Any]:
    """One side's figures; `reach_*` says when it was first as accurate as the other's best, None for never."""
    last, reached = side.evaluated[-1], side.first_at(other.best_top1)
    return {
        "model": side.model,
        "optimizer": side.optimizer,
        "lr": side.lr,
        "epochs": side.epochs,
        "steps": last["steps"],
        "final_top1": last[side.accuracy],
        "best_top1": side.best_top1,
        "final_train_loss": last["train_loss"],
        "final_eval_loss": last[side.accuracy.replace("top1", "loss")],
        "train_seconds": last["seconds"],
        "seconds_per_step": side.seconds_per_step,
        "reach_epoch": reached and reached["epoch"],
        "reach_seconds": reached and reached["seconds"],
        "failure": side.failure,
    }


# label, key of `summary`, format, factor to the label's unit
_ROWS: tuple[tuple[str, str, str, float | None], ...] = (
    ("model", "model", "{}", None),
    ("optimizer", "optimizer", "{}", None),
    ("learning rate", "lr", "{:.4g}", None),
    ("epochs", "epochs", "{}", None),
    ("steps", "steps", "{}", None),
    ("final top-1 accuracy, %", "final_top1", "{:.2f}", None),
    ("best top-1 accuracy, %", "best_top1", "{:.2f}", None),
    ("final training loss", "final_train_loss", "{:.4f}", None),
    ("final evaluation loss", "final_eval_loss", "{:.4f}", None),
    ("training time, s", "train_seconds", "{:.1f}", None),
    ("time per step, ms (median epoch)", "seconds_per_step", "{:.1f}", 1000),
    ("as accurate as the other's best after epoch", "reach_epoch", "{}", None),
    ("as accurate as the other's best after, s", "reach_seconds", "{:.1f}", None),
)


def figures(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """The figures of one side or two as text: a label, and a cell a side. One side compares with nothing."""
    summaries = [summary(side, other) for side, other in zip(sides, reversed(sides), strict=True)]
    rows = []
    for label, key, form, factor in _ROWS:
        if len(sides) == 1 and key.startswith("reach_"):
            continue
        cells = ["-" if f[key] is None else form.format(f[key] * factor if factor else f[key]) for f in summaries]
        rows.append((label, cells))
    if any(side.failure for side in sides):
        rows.append(("outcome", [side.outcome for side in sides]))
    return rows


def markdown(sides: tuple[Side, Side]) -> str:
    """The comparison as a markdown table, a column a side."""
    names = (markdown_cell(side.name) for side in sides)
    lines = [f"| | {' | '.join(names)} |", "|---|---|---|"]
    lines += [f"| {label} | {' | '.join(map(markdown_cell, cells))} |" for label, cells in figures(sides)]
    return "\n".join(lines) + "\n"


def half_interval(sides: tuple[Side, Side]) -> float | None:
    """Half the 95 % interval of the difference of two best top-1 accuracies, in points, as far as images go.

    That of two samples of independent images: both sides see the same ones, so that it is rather too wide. What another
    seed would change is not in it. None where the number of images is not known.
    """
    variance = 0.0
    for side in sides:
        if not side.images:
            return None
        right = side.best_top1 / 100
        variance += right * (1 - right) / side.images
    return 196 * math.sqrt(variance)


def verdict(sides: tuple[Side, Side]) -> str:
    """Who won, in a sentence or two; who did not finish, or learned nothing, comes first."""
    mine, other = summary(sides[0], sides[1]), summary(sides[1], sides[0])
    text = "".join(f"{side.name} {side.outcome}: its figures are those up to there. " for side in sides if side.failure)
    lost = [side for side in sides if side.at_chance]
    if lost:
        names = " and ".join(f"{side.name} ({side.best_top1:.2f} %)" for side in lost)
        return f"{text}{names}: no better than guessing ({lost[0].chance:.2f} %), so that there is nothing to compare."
    gap, half = mine["best_top1"] - other["best_top1"], half_interval(sides)
    won = "level with" if abs(gap) < 0.005 else f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'}"
    cost = mine["seconds_per_step"] / other["seconds_per_step"]
    text += (
        f"{sides[0].name} (learning rate {mine['lr']:.4g}) ends {won} {sides[1].name} (learning rate "
        f"{other['lr']:.4g}) in best top-1 accuracy{' of the averaged weights' if sides[0].is_averaged else ''}"
    )
    if half is not None:
        told = "" if abs(gap) > half else ", which they cannot tell apart"
        text += f" ({sides[0].images} images: +-{half:.2f}{told})"
    text += f"; its step takes {cost:.2f} times as long."
    if mine["reach_epoch"] is not None:
        text += (
            f" It is as accurate as the twin's best after epoch {mine['reach_epoch']} of {mine['epochs']} "
            f"({mine['reach_seconds']:.1f} s; the twin took {sides[1].best['seconds']:.1f} s)."
        )
    return text


def as_json(sides: tuple[Side, Side], context: dict[str, Any]) -> dict[str, Any]:
    """Everything in the comparison: context (configuration, versions, machine), figures and histories."""
    return {
        **context,
        "verdict": verdict(sides),
        "interval_95": half_interval(sides),
        "sides": [
            {"name": side.name, **summary(side, other), "metric": side.metric, "history": asdict(side)["history"]}
            for side, other in (sides, sides[::-1])
        ],
    }
