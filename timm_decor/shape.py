"""A layer's sizes, and what a batch of layers of equal size is made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer: g groups, C input channels a group, S kernel positions, O outputs a group."""

    groups: int
    channels: int
    positions: int
    outputs: int

    @property
    def dim(self) -> int:
        """D, the length of one patch of one group."""
        return self.channels * self.positions

    @property
    def size(self) -> int:
        """Elements of the weight."""
        return self.groups * self.outputs * self.dim


def parts(tensor: Tensor, count: int) -> Tensor:
    """A tensor of `count` layers, (n g, ...), with the layers on an axis of their own: (n, g, ...)."""
    return tensor.unflatten(0, (count, len(tensor) // count))
