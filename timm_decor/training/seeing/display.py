"""An epoch's progress: a bar where somebody looks, a line now and then where nobody does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm


class Display:
    """Shows loss, accuracy, images/s, time left and mean correlation during one epoch.

    Args:
        title: of the epoch.
        batches: of the epoch, on this process.
        images: of a batch, on all processes together.
        accelerator: only its main process shows anything.
        interval: batches between two lines, and between two calls of `log`.
        log: takes figures by name, and the number of updates so far, for trackers.
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
        done: int = 0,
    ) -> None:
        self._title, self._batches, self._images = title, batches, images
        self._accelerator, self._interval, self._log = accelerator, interval, log
        self._on_terminal = sys.stderr.isatty()
        self._start = time.perf_counter()
        self._done, self._before = done, done
        self._bar: Any = tqdm(
            total=batches * images,
            initial=done * images,
            desc=title,
            unit="img",
            leave=False,
            disable=not (accelerator.is_main_process and self._on_terminal),
        )

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
        self._done += 1
        if looked is not None:
            figures = {"loss": f"{looked[0]:.3f}", "top-1": f"{looked[1]:.1f}%", "lr": f"{lr:.2g}"}
            if correlation is not None:
                figures["corr"] = f"{correlation[0]:.2f}>{correlation[1]:.2f}"
            self._bar.set_postfix(figures, refresh=False)
        self._bar.update(self._images)
        if looked is None or self._done % self._interval:
            return
        rate = (self._done - self._before) * self._images / (time.perf_counter() - self._start)
        logged = {"train/loss": looked[0], "train/top1": looked[1], "train/lr": lr, "train/images_per_s": rate}
        if correlation is not None:
            logged |= {"train/correlation_before": correlation[0], "train/correlation_after": correlation[1]}
        self._log(logged, step)
        if not self._on_terminal:
            self._accelerator.print(self._line(looked, rate, correlation))

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def _line(self, looked: tuple[float, float], rate: float, correlation: tuple[float, float] | None) -> str:
        left = tqdm.format_interval((self._batches - self._done) * self._images / rate)
        text = (
            f"  {self._title}: batch {self._done}/{self._batches}, loss {looked[0]:.4g}, training top-1 "
            f"{looked[1]:.1f} %, {rate:.0f} images/s, {left} left"
        )
        if correlation is not None:
            text += f", correlation {correlation[0]:.3f}, after R {correlation[1]:.3f}"
        return text
