"""What processes send each other: every collective that torch hands to a process group, with its bytes.

A collective's bytes are those of the tensor that all of them end with (all-reduce, all-gather, broadcast) or begin with
(reduce-scatter): what a ring sends of it is in study/cluster.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Which argument has the bytes. Whatever else a process group is given ends the count.
_PLACES = {
    "allreduce_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
}


class Wire(TorchDispatchMode):
    """Collects the collectives that are started while it is on, in Python or in C++ (DDP's reducer).

        with Wire() as wire:
            optimizer.step()
        wire.sent()

    Attributes:
        calls: kind ("all_reduce", "all_gather", "reduce_scatter", "broadcast") and bytes of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if "c10d" in space:
            name = name.partition(".")[0]
            if name not in _PLACES:
                raise NotImplementedError(f"{func.name()}: nobody has said what of it is sent")
            kind, place = _PLACES[name]
            self.calls.append((kind, tensor_bytes(args[place])))
        return func(*args, **(kwargs or {}))

    def sent(self) -> dict[str, dict[str, int]]:
        """By kind how many collectives there were, and their bytes."""
        return totals(self.calls)


def totals(calls: list[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """Collectives by kind: {"calls", "bytes"}."""
    number = Counter(kind for kind, _ in calls)
    return {kind: {"calls": n, "bytes": sum(size for k, size in calls if k == kind)} for kind, n in number.items()}


def tensor_bytes(tree: Any) -> int:
    """Bytes of the elements of all tensors in a nested structure."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


@contextmanager
def pretended_group(processes: int) -> Iterator[None]:
    """Be the first of so many processes, of which there are no others: collectives send nothing and wait for nobody."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
