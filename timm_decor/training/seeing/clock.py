"""Where the time of an update goes, from a few updates an epoch that are watched with the device synchronised."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from timm_decor.engine.handle import DecorHandle

PHASES = ("data", "forward", "backward", "optimizer")  # of an update, in order; forward includes the loss


def synchronize(device: torch.device) -> None:
    """Wait for what the device still has to do; the CPU never has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class StepClock:
    """Times the phases of about four updates an epoch, of four more where R is refreshed; free in all others.

    The first update of an epoch is never watched: it waits for the loader to start.

    Args:
        device: synchronised round each phase of a watched update.
        updates: of the epoch.
        handle: what `timm_decor.attach` returned, or None.

    Attributes:
        refreshes: whether the update that has begun will refresh R.
        watched: for each watched update 1 if it refreshed R, else 0, and the seconds of each of `PHASES`.
    """

    def __init__(self, device: torch.device, updates: int, handle: DecorHandle | None) -> None:
        self._device, self._handle = device, handle
        self._every = handle.config.every if handle else 1
        self._period = self._every * max(1, updates // (4 * self._every))
        self._updates = 0
        self._on = False
        self.refreshes = self._refresh_is_due()
        self._seconds: dict[str, float] = {}
        self._last = 0.0
        self.watched: list[tuple[float, ...]] = []

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches; the wait for each counts as data."""
        for batch in loader:
            self.lap("data")
            yield batch

    def lap(self, phase: str) -> None:
        """A phase of a micro-batch ends here, and the next begins."""
        if self._on:
            synchronize(self._device)
            now = time.perf_counter()
            self._seconds[phase] += now - self._last
            self._last = now

    def updated(self) -> None:
        """An update is done, after its last lap."""
        if self._on:
            self.watched.append((float(self.refreshes), *self._seconds.values()))
        self._updates += 1
        step = self._handle.begun if self._handle else self._updates
        self.refreshes = self._refresh_is_due()
        self._on = step % self._period in (0, 1)  # of these two one refreshes R: neighbours meet the same conditions
        if self._on:
            self._seconds = dict.fromkeys(PHASES, 0.0)
            synchronize(self._device)
            self._last = time.perf_counter()

    def _refresh_is_due(self) -> bool:
        return self._handle is not None and self._handle.refresh_due
