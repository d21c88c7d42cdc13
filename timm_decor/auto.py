"""`structure="auto"`: which structure R gets in each layer, by its D, the rows it sees, and memory. Pure.

Costs are FLOPs of a step's products with R as a share of the layer's own forward and backward pass,
6 x outputs x D x rows (two for each multiply-add, three passes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from timm_decor.config import DecorConfig
from timm_decor.shape import LayerShape
from timm_decor.structure import memory

COST_SHARE = 0.05  # of the layer's forward and backward pass that a step's products with R may take
MEMORY_SHARE = 1.5  # of the weights that every R and its statistics may take together
_LEAST_RANK = 4  # of `kronecker`: the few largest eigenvalues are most of what there is to decorrelate


class SeenLayer(NamedTuple):
    """A layer, or several alike, and what its first step was like.

    Attributes:
        shape: sizes of the layer.
        rows: patches or vectors in one process's part of a step.
        products: with R in an ordinary step: 1 where the optimizer's step is linear (SGD), else 2.
        copies: layers.
    """

    shape: LayerShape
    rows: float
    products: int
    copies: int = 1

    @property
    def weight_size(self) -> int:
        """Entries of the weights."""
        return self.copies * self.shape.groups * self.shape.outputs * self.shape.dim


def plan(layers: Sequence[SeenLayer], config: DecorConfig) -> list[DecorConfig]:
    """The config of each layer, with a structure (and a rank) in the place of "auto".

    `kronecker` at the highest rank that is cheap enough, `space` where none is; then `full`, the smallest layers first,
    where that is cheap enough and memory is left; and `block` or `space` for the layers that weigh most, where memory
    is short.
    """
    chosen = [_cheap(layer, config) for layer in layers]

    def size(index: int, option: DecorConfig) -> int:
        return layers[index].copies * sum(memory(option, layers[index].shape))

    left = int(MEMORY_SHARE * sum(layer.weight_size for layer in layers)) - sum(map(size, range(len(layers)), chosen))

    def choose(index: int, option: DecorConfig) -> int:
        before, chosen[index] = size(index, chosen[index]), option
        return left + before - size(index, option)

    full = dataclasses.replace(config, structure="full")
    for index in sorted(range(len(layers)), key=lambda i: size(i, full)):
        layer = layers[index]
        fits = size(index, full) - size(index, chosen[index]) <= left and layer.shape.dim <= config.max_dim
        if fits and _cost(layer, layer.shape.dim) <= COST_SHARE:
            left = choose(index, full)
    for index in sorted(range(len(layers)), key=lambda i: -size(i, chosen[i])):
        names = ("block", "space") if layers[index].shape.positions > 1 else ("block",)
        options = [dataclasses.replace(config, structure=name) for name in names]
        smaller = [option for option in options if size(index, option) < size(index, chosen[index])]
        if left < 0 and smaller:
            left = choose(index, smaller[0])
    return chosen


def _cheap(layer: SeenLayer, config: DecorConfig) -> DecorConfig:
    """`kronecker` at a rank that keeps to the share of the cost, else `space`."""
    shape = layer.shape
    rank = int((3 * layer.rows * COST_SHARE / layer.products - shape.positions) / 2)
    if rank < _LEAST_RANK and shape.positions > 1:
        return dataclasses.replace(config, structure="space")
    rank = min(config.rank, max(rank, _LEAST_RANK), shape.channels)
    return dataclasses.replace(config, structure="kronecker", rank=rank)


def _cost(layer: SeenLayer, width: int) -> float:
    """Share of the layer's own work that products with a matrix of that many columns take."""
    return layer.products * width / (3 * max(layer.rows, 1))
