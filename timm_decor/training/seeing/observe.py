"""What a run remembers for its report: curves, correlations, where the time went. It changes nothing in training."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from timm_decor.engine.handle import DecorHandle
from timm_decor.reporting import AttachReport
from timm_decor.training.seeing.clock import PHASES, synchronize

# What may be spent on looking at R: a share of the training time and, so that short runs see something, some seconds.
_SHARE, _SECONDS = 0.01, 10.0


class Series:
    """Rows that come one after another, thinned to at most `limit`: when full, every second one goes."""

    def __init__(self, limit: int) -> None:
        self.rows: list[Any] = []
        self._limit = limit
        self._stride = 1
        self._offered = 0

    def offer(self, make: Callable[[], Any]) -> None:
        """Keep what `make` returns, if it is this row's turn; it is not called otherwise."""
        if self._offered % self._stride == 0:
            self.rows.append(make())
            if len(self.rows) > self._limit:
                self.rows, self._stride = self.rows[::2], 2 * self._stride
        self._offered += 1

    def state(self) -> dict[str, Any]:
        """Plain values that continue the series."""
        return {"rows": self.rows, "stride": self._stride, "offered": self._offered}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.rows, self._stride, self._offered = list(state["rows"]), state["stride"], state["offered"]


class Observer:
    """The memory of one arm.

    Args:
        handle: what `timm_decor.attach` returned, or None for an arm, or a process, that does not look at R.
        device: of the model.

    Attributes:
        spent: seconds spent on looking, which are none of training's.
        correlation: mean correlation of the layers' inputs before and after R, when last looked; None before.
    """

    def __init__(self, handle: DecorHandle | None, device: torch.device) -> None:
        self._handle, self._device = handle, device
        self._curve = Series(512)
        self._correlations = Series(64)
        self._updates = Series(256)
        self._loads = Series(64)
        self._peak_bytes = 0
        self._last_cost = 0.0
        self.spent = 0.0
        self.correlation: tuple[float, float] | None = None

    def begin_epoch(self) -> None:
        """Forget the device's peak of memory, which another arm may have caused."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def end_epoch(self, watched: list[tuple[float, ...]]) -> None:
        """Note the peak of memory, the machine's load and the updates that a StepClock watched."""
        self._peak_bytes = max(self._peak_bytes, peak_memory(self._device))
        if hasattr(os, "getloadavg"):
            self._loads.offer(lambda: round(os.getloadavg()[0], 2))
        for row in watched:
            self._updates.offer(partial(list, row))

    def point(self, step: int, loss: float, lr: float) -> None:
        """A batch's loss and the learning rate it was trained with."""
        self._curve.offer(lambda: [step, loss, lr])

    def look(self, trained: float, done: float) -> None:
        """After an update that refreshed R: note the correlations, as often as there is time for it.

        Args:
            trained: seconds of training so far.
            done: share of the run's updates that are done, which spreads the seconds over the run.
        """
        if self._handle is None:
            return
        allowed = _SHARE * trained + _SECONDS * done
        if not self._correlations.rows or self.spent + self._last_cost <= allowed:
            self._correlations.offer(self._snapshot)

    def _snapshot(self) -> dict[str, Any]:
        assert self._handle is not None
        synchronize(self._device)
        start = time.perf_counter()
        row: dict[str, Any] = {"step": self._handle.step, "before": [], "after": []}
        try:
            report = self._handle.report(condition=False)
        except RuntimeError:  # linear algebra that does not converge; the end of the run says so
            pass
        else:
            row = _look(report)
            self.correlation = report.mean_correlation()
        self._last_cost = time.perf_counter() - start
        self.spent += self._last_cost
        return row

    def state(self) -> dict[str, Any]:
        """Plain values that continue the record."""
        series = {"curve": self._curve, "correlations": self._correlations}
        series |= {"updates": self._updates, "loads": self._loads}
        return {name: kept.state() for name, kept in series.items()} | {"peak_bytes": self._peak_bytes}

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from what `state` returned; None, from a version without, begins anew."""
        if state:
            self._curve.load(state["curve"])
            self._correlations.load(state["correlations"])
            self._updates.load(state["updates"])
            if "loads" in state:
                self._loads.load(state["loads"])
            self._peak_bytes = state["peak_bytes"]

    def record(self, final: AttachReport | None = None) -> dict[str, Any]:
        """What was seen, as numbers and lists.

        Args:
            final: the handle's report at the end of the run, as one more look.

        Returns:
            `curve`: rows of update, batch loss, learning rate. `correlations`: an entry for each look, with `step` and
            each layer's mean correlation `before` and `after` R. `ms_per_update`: milliseconds of each phase, None
            without a watched update. `peak_memory_bytes`: of the GPU's allocator, or of the whole process on a CPU.
            `load`: the machine's load (processes that run or want to), the median over the epochs' ends.
        """
        looks = [row for row in self._correlations.rows if row["before"]]
        if final is not None and any(row.refreshes for row in final.rows):
            looks.append(_look(final))
        return {
            "curve": self._curve.rows,
            "correlations": looks,
            "ms_per_update": phase_times(self._updates.rows, self._handle.config.every if self._handle else 1),
            "peak_memory_bytes": self._peak_bytes or None,
            "load": median(self._loads.rows) if self._loads.rows else None,
        }


def _look(report: AttachReport) -> dict[str, Any]:
    return {
        "step": report.step,
        "before": [row.correlation_before for row in report.rows],
        "after": [row.correlation_after for row in report.rows],
    }


def phase_times(rows: list[list[float]], every: int) -> dict[str, float] | None:
    """Medians over watched updates, in ms; what a refresh of R adds is spread over the updates between two of them.

    Args:
        rows: as in `StepClock.watched`.
        every: updates between refreshes.
    """
    plain = [row[1:] for row in rows if not row[0]]
    refreshing = [row[1:] for row in rows if row[0]]
    base = plain or refreshing
    if not base:
        return None
    times = {name: 1000 * median(column) for name, column in zip(PHASES, zip(*base, strict=True), strict=True)}
    if plain and refreshing:
        # not by phase: a refresh costs in the forward pass, where statistics are taken, and in the optimizer's step
        extra = median(map(sum, refreshing)) - median(map(sum, plain))
        times["refresh"] = max(0.0, 1000 * extra / every)
    return times


def peak_memory(device: torch.device) -> int:
    """Bytes: the CUDA allocator's peak, or elsewhere that of the whole process; 0 where nothing can tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
