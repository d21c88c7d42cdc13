"""Structures of R: how decorrelation matrices are stored, applied, inverted and refreshed. Pure.

Weights come as (n g, O, C, S): n layers of equal shape (one, or a batch of them), g groups, O outputs and C inputs a
group, S = kh * kw kernel positions (1 for a linear layer). R acts on the last two axes, D = C * S long: `apply` is W R,
so that y = (W R) x = W (R x). Where the outputs are decorrelated as well there is an L on the other side (outputs.py).
Every tensor of R has the layers on its first axis, n equal parts one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_decor.config import DecorConfig
from timm_decor.dense import BlockR, PatchR, SpaceR
from timm_decor.kronecker import KroneckerR
from timm_decor.outputs import BothSides, OutputL
from timm_decor.shape import OUTPUT_MOMENT, LayerShape, moment_shape, parts

Structure = PatchR | KroneckerR | BothSides
_MOST_OUTPUTS = 2  # a D, for an L: a larger one would outweigh the weights, and see too few columns
_STRUCTURES: dict[str, type[PatchR] | type[KroneckerR]] = {
    "auto": KroneckerR,  # until the first step has shown what fits; see auto.py
    "full": PatchR,
    "block": BlockR,
    "kronecker": KroneckerR,
    "space": SpaceR,
}


def identity(config: DecorConfig, shape: LayerShape, like: Tensor) -> Structure:
    """R = I (and L = I, where there is one) of one layer, in `like`'s dtype and on its device."""
    r = _input_structure(config, shape).identity(shape, config, like)
    return BothSides(r, OutputL.identity(shape, config, like)) if has_outputs(config, shape) else r


def input_moments(config: DecorConfig, shape: LayerShape) -> tuple[str, ...]:
    """Names of the moments of its inputs that a layer's refresh needs."""
    return _input_structure(config, shape).moments(shape, config)


def memory(config: DecorConfig, shape: LayerShape) -> tuple[int, int]:
    """Entries of a layer's R and L, and of the second moments that they are refreshed from."""
    names, size = input_moments(config, shape), _input_structure(config, shape).size(shape, config)
    if has_outputs(config, shape):
        names, size = (*names, OUTPUT_MOMENT), size + OutputL.size(shape, config)
    return size, sum(math.prod(moment_shape(name, shape)) for name in names)


def largest_factor(config: DecorConfig, shape: LayerShape) -> int:
    """Side of the largest matrix that a refresh of R has to factor."""
    return _input_structure(config, shape).largest_factor(shape, config)


def has_outputs(config: DecorConfig, shape: LayerShape) -> bool:
    """Whether a layer's outputs are decorrelated as well."""
    return config.two_sided and 1 < shape.outputs <= min(config.max_dim, _MOST_OUTPUTS * shape.dim)


def _input_structure(config: DecorConfig, shape: LayerShape) -> type[PatchR] | type[KroneckerR]:
    """The structure of R for a layer: the config's, and `space` where `kronecker` has one channel a group.

    A depthwise convolution would have its own S x S eigenproblem for every channel; one R for all of them has the
    statistics of all of them and costs nothing.
    """
    if config.structure in ("auto", "kronecker") and shape.channels == 1:
        return SpaceR
    return _STRUCTURES[config.structure]


def selected(r: Structure, count: int, index: Sequence[int]) -> Structure:
    """R of some of the `count` layers that r is of, in the order of `index`."""
    return r.from_tensors({name: parts(value, count)[list(index)].flatten(0, 1) for name, value in r.tensors().items()})


def stacked(rs: list[Structure]) -> Structure:
    """One structure of several layers of equal shape; `selected` takes it apart again."""
    tensors = [r.tensors() for r in rs]
    return rs[0].from_tensors({name: torch.cat([each[name] for each in tensors]) for name in tensors[0]})
