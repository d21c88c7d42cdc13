"""One run in a folder at a time, by a lock that the system lets go of when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

LOCK_FILE = ".lock"
_ours: set[int] = set()  # descriptors of locks that this process holds


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock in here; on Windows, and on file systems without locks, nothing is held.

    No library: a data worker is a fork, which outlives a killed run by seconds and would keep an inherited lock.

    Args:
        folder: gets a file `.lock`, which goes in the end.

    Yields:
        Whether nobody else holds it.
    """
    if sys.platform == "win32":
        yield True
        return
    descriptor = _open(folder / LOCK_FILE)
    try:
        if descriptor is not None:
            _ours.add(descriptor)
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _ours.discard(descriptor)
            with contextlib.suppress(OSError):  # before it is let go: later it would be the next run's
                (folder / LOCK_FILE).unlink()
            os.close(descriptor)


def _open(path: Path) -> int | None:
    """The file's descriptor, locked; None where somebody else has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # a file system without locks
            return descriptor
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # its run has just ended, and took the file with it


def _let_go() -> None:
    while _ours:
        os.close(_ours.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
