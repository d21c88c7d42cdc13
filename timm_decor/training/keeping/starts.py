"""On which machines a run was trained: one entry a start, because a run may go on elsewhere, or with other threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm_decor.text import counted

Start = Mapping[str, Any]  # `steps`: updates done before it; `machine`: runtime.machine; `versions`: runtime.versions


def with_start(
    known: Sequence[Start], steps: int, machine: Mapping[str, Any], versions: Mapping[str, str]
) -> list[Start]:
    """The starts of a run that goes on after so many updates; what came later before is void, for it is trained anew.

    Args:
        known: before.
        steps: updates that are done.
        machine: as `runtime.machine` tells.
        versions: as `runtime.versions` tells.
    """
    new = {"steps": steps, "machine": dict(machine), "versions": dict(versions)}
    before = [start for start in known if start["steps"] < steps]
    same = before and all(before[-1][key] == new[key] for key in ("machine", "versions"))
    return before if same else [*before, new]


def trained_on(starts: Sequence[Start], steps: int) -> str:
    """Where a run was trained, in words.

    Args:
        starts: of the run, by rising `steps`.
        steps: updates of the whole run; of one that was stopped within an epoch, at least those of its last start.

    Returns:
        `AMD EPYC (2 threads)`, or of several `AMD EPYC (1 thread, 63 % of the updates), then AMD EPYC (2 threads)`.
    """
    steps = max([steps, *(start["steps"] for start in starts)])
    parts: list[list[Any]] = []  # name, what is in brackets, updates
    for start, end in zip(starts, _ends(starts, steps), strict=True):
        name, within = _named(start["machine"])
        if parts and parts[-1][:2] == [name, within]:
            parts[-1][2] += end - start["steps"]
        elif end > start["steps"] or len(starts) == 1:
            parts.append([name, within, end - start["steps"]])
    if starts and starts[0]["steps"]:
        parts.insert(0, ["a machine that is not on record", "", starts[0]["steps"]])
    words: list[str] = []
    for name, within, updates in parts:
        share = f"{100 * updates / max(steps, 1):.0f} % of the updates" if len(parts) > 1 else ""
        brackets = ", ".join(filter(None, (within, share if len(words) < len(parts) - 1 else "")))
        words.append(f"{name} ({brackets})" if brackets else name)
    return ", then ".join(words)


def longest(starts: Sequence[Start], steps: int) -> Start:
    """The start that most of a run's updates were trained from."""
    updates = {index: end - starts[index]["steps"] for index, end in enumerate(_ends(starts, steps))}
    return starts[max(updates, key=lambda index: updates[index])]


def versions_used(starts: Sequence[Start], steps: int, name: str, shown: Callable[[str], str] = str) -> str:
    """A package's versions that trained, one after the other: `2.14.0`, or `2.14.0, then 2.15.0`."""
    trained = [start for start, end in zip(starts, _ends(starts, steps), strict=True) if end > start["steps"]]
    return ", then ".join(dict.fromkeys(shown(start["versions"][name]) for start in trained or starts))


def _ends(starts: Sequence[Start], steps: int) -> list[int]:
    return [*(start["steps"] for start in starts[1:]), steps]


def _named(machine: Mapping[str, Any]) -> tuple[str, str]:
    """A machine's name, and what a CPU's speed depends on."""
    count = machine["processes"]
    several = f"{count} x " if count > 1 else ""
    if machine.get("gpu"):
        return f"{several}{machine['gpu']}", ""
    return f"{several}{machine['cpu']}", counted(machine["torch_threads"], "thread")
