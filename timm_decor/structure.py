"""Structures of R: how decorrelation matrices are stored, applied, inverted and refreshed. Pure.

Weights come as (n g, O, C, S): n layers of equal shape (one, or a batch of them), g groups, O outputs and C inputs a
group, S = kh * kw kernel positions (1 for a linear layer). R acts on the last two axes, D = C * S long: `apply` is W R,
so that y = (W R) x = W (R x). Every tensor of R has the layers on its first axis, n equal parts one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from timm_decor.config import DecorConfig
from timm_decor.dense import BlockR, PatchR, SpaceR
from timm_decor.kronecker import KroneckerR
from timm_decor.shape import LayerShape, parts

Structure = PatchR | KroneckerR
_STRUCTURES: dict[str, type[PatchR] | type[KroneckerR]] = {
    "auto": KroneckerR,  # until the first step has shown what fits; see auto.py
    "full": PatchR,
    "block": BlockR,
    "kronecker": KroneckerR,
    "space": SpaceR,
}


def structure_for(config: DecorConfig, shape: LayerShape) -> type[PatchR] | type[KroneckerR]:
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
