"""How long a run will still take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Going(Protocol):
    """What is trained: training/arm.py's Arm, as far as it matters here."""

    name: str
    epochs: int
    failure: str | None
    history: list[dict[str, Any]]

    @property
    def epoch(self) -> int: ...


@dataclass
class _Spent:
    """What an arm's epochs took in this process.

    Attributes:
        epochs: trained: a share of one for an epoch that was gone on with.
        seconds: in training.
        ends: epochs that came to their end.
        besides: seconds of those that were not training: evaluation and saving.
    """

    epochs: float = 0.0
    seconds: float = 0.0
    ends: int = 0
    besides: float = 0.0


class TimeLeft:
    """The seconds until the end of a run: of all its arms together, because they take turns.

    Every epoch to come is taken to cost what its arm's epochs cost in this process, the one that is being trained
    included: so much for its images, and so much for the evaluation and saving behind them (nothing, until there was
    one). An arm that has not had its turn yet costs what its history says of the process before, and without a history
    the same as the arm that has.

    Args:
        arms: of the run.
    """

    def __init__(self, arms: Sequence[Going]) -> None:
        self._arms = arms
        self._spent = {arm.name: _Spent() for arm in arms}
        self._now = (0.0, 0.0)  # of the epoch that is being trained: the share trained here, and its seconds

    def seconds(self, arm: Going, pace: float, share: float, rest: float) -> float:
        """The seconds left while an arm is being trained.

        Args:
            arm: that is being trained.
            pace: seconds that the images of a whole epoch would take at this epoch's rate.
            share: of the epoch's images that were trained in this process, above 0.
            rest: share of them that is still to come.
        """
        self._now = (share, pace * share)
        mine = self._spent[arm.name]
        pace = (mine.seconds + pace * share) / (mine.epochs + share)
        besides = mine.besides / mine.ends if mine.ends else 0.0
        left = rest * pace + besides
        for other in self._arms:
            if other.failure is None:
                to_come = max(0, other.epochs - other.epoch - (other is arm))
                left += to_come * (pace + besides if other is arm else self._cost(other, pace, besides))
        return left

    def end_epoch(self, arm: Going, whole: float) -> None:
        """The epoch of which `seconds` was asked last has been evaluated and saved.

        Args:
            arm: whose epoch.
            whole: seconds of everything, in this process.
        """
        (share, seconds), self._now = self._now, (0.0, 0.0)
        mine = self._spent[arm.name]
        mine.epochs += share
        mine.seconds += seconds
        mine.ends += 1
        mine.besides += max(0.0, whole - seconds)

    def _cost(self, arm: Going, pace: float, besides: float) -> float:
        """Seconds of an epoch of an arm that waits for its turn, given those of the one that is being trained."""
        known = self._spent[arm.name]
        if known.epochs:
            return known.seconds / known.epochs + known.besides / known.ends
        before = [row["epoch_seconds"] for row in arm.history]
        return (sum(before) / len(before) if before else pace) + besides
