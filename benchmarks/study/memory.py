"""Peak memory of a piece of code, on any device: bytes of live tensors at the highest point."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(tree: Any) -> int:
    """Bytes of all tensors in a nested structure; memory that several share counts once."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held(model: torch.nn.Module, optimizer: torch.optim.Optimizer, img_size: int) -> float:
    """What an optimizer keeps after two steps on noise, R, L and statistics included, in times the weights' bytes.

    Args:
        model: of 32-bit weights; its weights change.
        optimizer: of the model, attached or not.
        img_size: height and width in pixels.
    """
    for _ in range(2):
        model(torch.randn(32, 3, img_size, img_size)).square().mean().backward()
        optimizer.step()
    weights = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    return storage_bytes(optimizer.state_dict()) / weights


class PeakMemory(TorchDispatchMode):
    """Follows the memory of tensors that are made and dropped while it is on.

        with PeakMemory(alive) as meter:
            optimizer.step()
        meter.peak_bytes

    What an operation needs inside of itself is not seen.

    Args:
        alive: tensors that exist before.
    """

    def __init__(self, alive: Iterable[Tensor]) -> None:
        super().__init__()
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.bytes = self.peak_bytes = 0
        for tensor in alive:
            self._follow(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live[key] = weakref.ref(storage, lambda _: self._forget(key)), size
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _forget(self, key: int) -> None:
        self.bytes -= self._live.pop(key)[1]


def alive(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights, buffers, gradients, and all that the optimizer keeps."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return tensors + [leaf for leaf in tree_leaves(optimizer.state_dict()) if isinstance(leaf, Tensor)]
