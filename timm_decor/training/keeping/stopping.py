"""Stopping on request: SIGTERM and Ctrl-C become a wish that all processes learn of at the same update."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# One request may arrive twice: from the cluster, or the terminal, and handed on by the launcher.
_SAME_REQUEST_S = 1.0


class StopRequest:
    """Listens to the two signals for as long as it is entered.

    The first one is noted and training goes on to the end of its update; a later one does what it does by default,
    which is to end the process at once.

    Args:
        processes: of this run; with more than one, entering is collective.
        tells: whether this one says that a request has come.
        timeout: seconds that a process waits for another one; None for torch's own.
    """

    def __init__(self, processes: int = 1, tells: bool = True, timeout: float | None = None) -> None:
        self._processes = processes
        self._tells = tells
        self._timeout = timedelta(seconds=timeout) if timeout else None
        self._signum = 0
        self._since = 0.0
        self._handlers: dict[int, Any] = {}
        self._group: Any = None
        self._pending: tuple[Tensor, Any] | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python lets no other one listen
            self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        if self._processes > 1:
            # its own group, on the CPU: no GPU has to wait, and no other reduction can come in between
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def asked(self) -> int:
        """The signal that asks for the end, or 0. Collective, and the same on every process.

        With several processes the answer is what was known at the call before, so that none waits for the slowest.
        """
        if self._group is None:
            return self._signum
        before, flag = self._pending, torch.tensor([self._signum])
        self._pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        if before is None:
            return 0
        flag, work = before
        work.wait()
        return int(flag)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signum:
            self._signum, self._since = signum, now
            if self._tells:
                name = signal.Signals(signum).name
                # not print, which may be in the middle of a line of its own and is not to be entered twice
                text = f"\n{name}: saving after this update; a second signal ends it at once\n"
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
        elif now - self._since > _SAME_REQUEST_S:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


def spare_worker(_: int) -> None:
    """In a DataLoader worker: outlive a signal to the whole group, because the update may need more batches.

    It goes when its own process says so, or is no more.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None and hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_told_by, args=(parent.pid,), daemon=True).start()


def _leave_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
