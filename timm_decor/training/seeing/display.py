"""An epoch's progress: a bar where somebody looks, a line now and then where nobody does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

_COLUMNS = 80  # of a terminal that does not say how wide it is
_BAR = len("100%|######| ")  # what the bar itself takes at least


class Display:
    """Shows top-1, loss, learning rate, the run's time left, images/s and mean correlation during one epoch.

    On a terminal it is a bar of one line with as much of these, in this order, as there are columns for. Elsewhere it
    is a line after the first batch, after each `interval` batches and after the last one.

    Args:
        title: of the epoch.
        batches: of the epoch, on this process.
        images: of a batch, on all processes together.
        accelerator: only its main process shows anything.
        interval: batches between two lines, and between two calls of `log`.
        log: takes figures by name, and the number of updates so far, for trackers.
        left: the run's seconds left, given the seconds of a whole epoch's batches at the rate of those so far, the
            share of them that is done in this process, and the share that is still to come.
        done: batches that were done before, in a resumed epoch.
    """

    def __init__(
        self,
        title: str,
        batches: int,
        images: int,
        accelerator: Accelerator,
        interval: int,
        log: Callable[[dict[str, float], int], None],
        left: Callable[[float, float, float], float],
        done: int = 0,
    ) -> None:
        self._title, self._batches, self._images = title, batches, images
        self._accelerator, self._interval, self._log, self._time_left = accelerator, interval, log, left
        self._on_terminal = sys.stderr.isatty()
        self._start = self._second = time.perf_counter()
        self._done, self._before = done, done
        self._figures: dict[str, str] = {}  # the most important first
        self._bar = _Bar(
            self._title_and_figures,
            total=batches,
            initial=done,
            leave=False,
            dynamic_ncols=True,
            bar_format="{title} {percentage:3.0f}%|{bar}| {figures}",
            disable=not (accelerator.is_main_process and self._on_terminal),
        )

    @property
    def due(self) -> bool:
        """Whether the batch that comes is one to show figures of."""
        return self._done in (self._before, self._batches - 1) or (self._done + 1) % self._interval == 0

    def update(
        self, looked: tuple[float, float] | None, lr: float, correlation: tuple[float, float] | None, step: int
    ) -> None:
        """A batch is done.

        Args:
            looked: this batch's loss and the epoch's training top-1 accuracy so far (%), where they were looked at.
            lr: learning rate.
            correlation: mean correlation of the layers' inputs, before and after R.
            step: number of updates so far.
        """
        due = self.due
        self._done += 1
        left, rate = self._left_and_rate()
        if looked is not None:
            self._figures = {
                "top-1": f"top-1 {looked[1]:.1f}%",
                "loss": f"loss {looked[0]:.3f}",
                "lr": f"lr {lr:.2g}",
                "left": "",
                "rate": f"{rate:.0f} img/s",
            }
            if correlation is not None:
                self._figures["correlation"] = f"correlation {correlation[0]:.2f} > {correlation[1]:.2f}"
        if self._figures:
            self._figures["left"] = f"{left} left"
        self._bar.update()
        if looked is None or not due:
            return
        if self._done % self._interval == 0:
            logged = {"train/loss": looked[0], "train/top1": looked[1], "train/lr": lr, "train/images_per_s": rate}
            if correlation is not None:
                logged |= {"train/correlation_before": correlation[0], "train/correlation_after": correlation[1]}
            self._log(logged, step)
        if not self._on_terminal:
            where = f"batch {self._done}/{self._batches}"
            self._accelerator.print(f"  {self._title}: {', '.join([where, *self._figures.values()])}")

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def _left_and_rate(self) -> tuple[str, float]:
        """The run's time left in words, and images/s."""
        now, done = time.perf_counter(), self._done - self._before
        if done == 1:
            self._second = now
            seconds = now - self._start
        else:  # the first batch waits for the loader, and for what the device does only once
            seconds = (now - self._second) / (done - 1)
        share = 1 / self._batches
        left = self._time_left(seconds * self._batches, done * share, (self._batches - self._done) * share)
        return tqdm.format_interval(left), done * self._images / (now - self._start)

    def _title_and_figures(self, columns: int) -> tuple[str, str]:
        """What fits beside the bar: the title and the first four figures always, by shortening the title's name."""
        if not self._figures:
            return self._title, ""
        known = list(self._figures.values())
        figures, more = known[:4], known[4:]
        room = columns - _BAR - 1 - len(", ".join(figures))
        if len(self._title) > room:
            name, _, epoch = self._title.rpartition(" ")
            return f"{name[: max(0, room - len(epoch) - 2)]}… {epoch}", ", ".join(figures)
        room -= len(self._title)
        for figure in more:
            room -= len(figure) + 2
            if room < 0:
                break
            figures.append(figure)
        return self._title, ", ".join(figures)


class _Bar(tqdm):  # type: ignore[type-arg]
    """tqdm's bar between a title and figures that depend on the columns there are.

    Args:
        fitted: title and figures for so many columns.
        kwargs: tqdm's.
    """

    def __init__(self, fitted: Callable[[int], tuple[str, str]], **kwargs: Any) -> None:
        self._fitted = fitted
        super().__init__(**kwargs)

    @property
    def format_dict(self) -> Any:
        known = super().format_dict
        columns = known["ncols"] or _COLUMNS
        title, figures = self._fitted(columns)
        return {**known, "ncols": columns, "title": title, "figures": figures}
