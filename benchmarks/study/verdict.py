"""What a family's result file says: the default arm against plain training, seeds taken together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.training import PLAIN

DEFAULT_ARM = "decorrelated"


@dataclass(frozen=True)
class Measured:
    """A family as it was measured.

    Attributes:
        setting: model, optimizer and the like, equal in all rows.
        lr: plain training's best.
        arms: top-1 in % of each seed, by arm.
    """

    setting: Mapping[str, Any]
    lr: float
    arms: Mapping[str, Sequence[float]]

    @classmethod
    def read(cls, file: Path) -> Measured | None:
        """From zoo_study.py's file; None while the decorrelated model has not been trained."""
        rows = json.loads(file.read_text(encoding="utf-8"))["runs"]
        found = next((row for row in rows if row["arm"] == DEFAULT_ARM), None)
        if found is None:
            return None
        lr, setting = found["lr"], found["setting"]
        mine = [row for row in rows if (row["lr"], row["setting"]) == (lr, setting)]
        arms: dict[str, list[float]] = {}
        for row in sorted(mine, key=lambda row: row["seed"]):
            arms.setdefault(row["arm"], []).append(row["top1"])
        return cls(setting, lr, arms)

    @property
    def gain(self) -> float:
        """Points of the decorrelated model's mean over plain training's."""
        return statistics.mean(self.arms[DEFAULT_ARM]) - statistics.mean(self.arms[PLAIN])

    @property
    def spread(self) -> float:
        """Points between the best and the worst seed, of the arm in which they differ more."""
        return max(max(scores) - min(scores) for scores in (self.arms[DEFAULT_ARM], self.arms[PLAIN]))

    @property
    def verdict(self) -> str:
        """`gains` or `loses` where the means differ by more than the seeds do, else `level`; of one seed nothing."""
        if min(len(self.arms[arm]) for arm in (PLAIN, DEFAULT_ARM)) < 2:
            return "one seed"
        if abs(self.gain) <= self.spread:
            return "level"
        return "gains" if self.gain > 0 else "loses"

    def words(self, example: str) -> str:
        """For a table of families, whose row names a member; says where another model, or an adapted one, was taken."""
        model, opt = self.setting["model"], self.setting["opt"]
        other = [] if model == example else [model]
        adapted = ["adapted"] if self.setting["kwargs"] else []
        return f"{self.verdict}: {self.gain:+.1f} points ({', '.join([*other, *adapted, opt])})"
