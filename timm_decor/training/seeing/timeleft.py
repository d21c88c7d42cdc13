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

    def work(self, epoch: int) -> float: ...


@dataclass
class _Spent:
    """What an arm's epochs took in this process.

    Attributes:
        work: trained, in the units of `Going.work`: a share of an epoch's for one that was gone on with.
        seconds: in training.
        ends: epochs that came to their end.
        besides: seconds of those that were not training: evaluation and saving.
    """

    work: float = 0.0
    seconds: float = 0.0
    ends: int = 0
    besides: float = 0.0


class TimeLeft:
    """The seconds until the end of a run: of all its arms together, because they take turns.

    Every epoch to come is taken to cost what its arm's epochs cost in this process, the one that is being trained
    included: so much for its images, in proportion to their pixels where those change, and so much for the evaluation
    and saving behind them (nothing, until there was one). An arm that has not had its turn yet costs what its history
    says of the process before, and without a history the same as the arm that has.

    Args:
        arms: of the run.
    """

    def __init__(self, arms: Sequence[Going]) -> None:
        self._arms = arms
        self._spent = {arm.name: _Spent() for arm in arms}
        self._now = (0.0, 0.0)  # of the epoch that is being trained: the work done here, and its seconds

    def seconds(self, arm: Going, pace: float, share: float, rest: float) -> float:
        """The seconds left while an arm is being trained.

        Args:
            arm: that is being trained.
            pace: seconds that the images of a whole epoch would take at this epoch's rate.
            share: of the epoch's images that were trained in this process, above 0.
            rest: share of them that is still to come.
        """
        whole = arm.work(arm.epoch)
        self._now = (share * whole, pace * share)
        mine = self._spent[arm.name]
        pace = (mine.seconds + pace * share) / (mine.work + share * whole)
        besides = mine.besides / mine.ends if mine.ends else 0.0
        left = rest * whole * pace + besides
        for other in self._arms:
            if other.failure is None:
                to_come = range(other.epoch + (other is arm), other.epochs)
                its = (pace, besides) if other is arm else self._cost(other, pace, besides)
                left += its[0] * sum(other.work(epoch) for epoch in to_come) + its[1] * len(to_come)
        return left

    def end_epoch(self, arm: Going, whole: float) -> None:
        """The epoch of which `seconds` was asked last has been evaluated and saved.

        Args:
            arm: whose epoch.
            whole: seconds of everything, in this process.
        """
        (work, seconds), self._now = self._now, (0.0, 0.0)
        mine = self._spent[arm.name]
        mine.work += work
        mine.seconds += seconds
        mine.ends += 1
        mine.besides += max(0.0, whole - seconds)

    def _cost(self, arm: Going, pace: float, besides: float) -> tuple[float, float]:
        """Of an arm that waits for its turn, given those of the one that is being trained: its `pace` and `besides`."""
        known = self._spent[arm.name]
        if known.work:
            return known.seconds / known.work, known.besides / known.ends
        before = [row["epoch_seconds"] for row in arm.history]
        return (sum(before) / sum(map(arm.work, range(len(before)))) if before else pace), besides
