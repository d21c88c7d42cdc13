"""An epoch's one watcher: its loss, its progress on the screen, where the time goes, and what R does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

from accelerate import Accelerator

from timm_decor.engine.handle import DecorHandle
from timm_decor.training.keeping.progress import Progress
from timm_decor.training.seeing.clock import StepClock, synchronize
from timm_decor.training.seeing.display import Display
from timm_decor.training.seeing.observe import Observer
from timm_decor.training.seeing.timeleft import Going, TimeLeft


class Watched(Going, Protocol):
    """What is trained: training/arm.py's Arm, as far as it matters here."""

    accelerator: Accelerator
    handle: DecorHandle | None
    observer: Observer
    time_left: TimeLeft
    log: Callable[[dict[str, Any], int], None]


class EpochWatch:
    """Sees an epoch from its first batch, or from where it is gone on with, to its last. It changes nothing there.

    Args:
        arm: that trains.
        progress: how far the epoch has come; the loop counts in it, and its losses are looked at here.
        batches: of the epoch, on this process.
        updates: of the epoch.
        images: of a batch, on all processes together.
        interval: batches between figures.
    """

    def __init__(
        self, arm: Watched, progress: Progress, batches: int, updates: int, images: int, interval: int
    ) -> None:
        self._progress, self._observer, self._device = progress, arm.observer, arm.accelerator.device
        self._name, self._epoch = arm.name, arm.epoch + 1
        self._updates_of_run = updates * arm.epochs
        self._before = arm.history[-1]["seconds"] if arm.history else 0.0
        self._display = Display(
            f"{arm.name} {self._epoch}/{arm.epochs}",
            batches,
            images,
            arm.accelerator,
            interval,
            arm.log,
            partial(arm.time_left.seconds, arm),
            done=progress.batches,
        )
        self._clock = StepClock(arm.accelerator.device, updates, arm.handle)
        self._updated = False
        self._observer.begin_epoch()
        self._start, self._spent = time.perf_counter() - progress.seconds, self._observer.spent

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches. What the loop does with one ends where it asks for the next."""
        for batch in self._clock.batches(loader):
            yield batch
            if self._updated:  # not earlier: a pause, in which a checkpoint may be written, is none of an update's time
                self._clock.updated()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here (a checkpoint may be written) is none of the epoch's time; what was queued before is."""
        synchronize(self._device)
        self._progress.seconds = self.seconds  # for the checkpoint
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def lap(self, phase: str) -> None:
        """A phase of a batch ends here: one of `PHASES` in training/seeing/clock.py."""
        self._clock.lap(phase)

    def trained(self, lr: float, updated: bool) -> None:
        """A batch is trained, and counted in the progress.

        Args:
            lr: learning rate of the last update.
            updated: whether the batch was an update's last.

        Raises:
            NonFiniteLoss: names epoch and step.
        """
        progress, observer, self._updated = self._progress, self._observer, updated
        if updated and self._clock.refreshes:
            seconds = self._before + time.perf_counter() - self._start
            observer.look(seconds, (progress.steps - 1) / self._updates_of_run)
        looked = None
        if progress.losses.due or self._display.due:
            progress.losses.check(self._name, self._epoch)
            looked = progress.losses.figures()
            observer.point(progress.steps, looked[0], lr)
        self._display.update(looked, lr, observer.correlation, progress.steps)

    @property
    def seconds(self) -> float:
        """The epoch's seconds so far, without pauses and those that went into looking at R."""
        return time.perf_counter() - self._start - (self._observer.spent - self._spent)

    def close(self) -> None:
        """After the last batch: take the bar away, and note what was timed."""
        self._display.close()
        self._observer.end_epoch(self._clock.watched)
