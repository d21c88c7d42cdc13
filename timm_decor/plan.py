"""What is done to one layer: the decision that report, engine and checkpoint all read.

`DecorConfig` is what a person wants; a `LayerPlan` is what that comes to for one layer's sizes. It is provisional after
`decorrelate`, when the optimizer is not known, and final at `attach`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from timm_decor.config import DecorConfig
from timm_decor.moments import moment_shape
from timm_decor.rules import RULES
from timm_decor.shape import LayerShape
from timm_decor.structures import STRUCTURES, NoOutputs, OutputL, Sides, Structure, has_outputs


@dataclass(frozen=True)
class LayerPlan:
    """One layer's decorrelation.

    Attributes:
        shape: the layer's sizes.
        rule: that moves R.
        structure: of R.
        rank: eigenvectors kept, of structures that keep some, and of L.
        outputs: whether there is an L.
        graft: whether a scale stands beside them; see engine/length.py.
        dtype: of R and of the moments.
    """

    shape: LayerShape
    rule: str
    structure: str
    rank: int
    outputs: bool
    graft: bool
    dtype: torch.dtype

    @property
    def structure_type(self) -> type[Structure]:
        """The class of R."""
        return STRUCTURES[self.structure]

    @property
    def input_moments(self) -> tuple[str, ...]:
        """Names of the inputs' moments that are kept between refreshes."""
        return RULES[self.rule](DecorConfig()).moments(self.structure_type, self.shape)

    @property
    def refresh_work(self) -> int:
        """Operations of a refresh of L and R, about."""
        outputs = OutputL.refresh_work(self.shape, self.rank) if self.outputs else 0
        return self.structure_type.refresh_work(self.shape, self.rank) + outputs

    def identity(self, device: torch.device | str) -> Sides:
        """R = I, and L = I where there is one."""
        like = torch.empty(0, dtype=self.dtype, device=device)
        r = self.structure_type.identity(self.shape, self.rank, like, RULES[self.rule].gives_inverse)
        left = OutputL.identity(self.shape, self.rank, like) if self.outputs else NoOutputs()
        return Sides(r, left, like.new_ones(self.shape.groups, 1, 1) if self.graft else None)

    def first_moments(self, device: torch.device | str) -> dict[str, Tensor]:
        """The moments before the first refresh."""
        moments = {
            name: torch.zeros(moment_shape(name, self.shape), dtype=self.dtype, device=device)
            for name in self.input_moments
        }
        for name in OutputL.moments if self.outputs else ():
            # from the identity, which is no opinion: the first gradients of a zero-initialised branch are zero
            eye = torch.eye(self.shape.outputs, dtype=self.dtype, device=device)
            moments[name] = eye.repeat(self.shape.groups, 1, 1)
        return moments

    @cached_property
    def bytes(self) -> int:
        """Memory of R (with R^-1 where it is kept) and of L."""
        return _bytes(self.identity("meta").tensors())

    @property
    def moment_bytes(self) -> int:
        """Memory of the second moments that they are refreshed from."""
        names = (*self.input_moments, *(OutputL.moments if self.outputs else ()))
        return self.dtype.itemsize * sum(math.prod(moment_shape(name, self.shape)) for name in names)


def plan(
    config: DecorConfig,
    shape: LayerShape,
    dtype: torch.dtype,
    linear: bool = True,
    scales: bool = True,
    cut: bool = False,
) -> LayerPlan:
    """What the config comes to for one layer.

    Args:
        config: of the model.
        shape: of the layer.
        dtype: of its weight.
        linear: whether the optimizer is SGD; before `attach` knows it, the plan is SGD's.
        scales: whether the optimizer's step depends on R's scale.
        cut: whether its rows are on several processes.
    """
    structure = config.structure
    if structure == "kronecker" and shape.channels == 1:
        # A depthwise convolution would have its own S x S eigenproblem for every channel; one R for all of them has the
        # statistics of all of them and costs nothing.
        structure = "space"
    both = config.sides == "both" or (config.sides == "auto" and RULES[config.rule].both_sides and linear)
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    outputs = both and has_outputs(shape, config.max_dim)
    if cut and shape.groups > 1:
        outputs = False  # what groups keep of their few outputs is as large as the weight, and would have to be sent
    return LayerPlan(shape, config.rule, structure, config.rank, outputs, config.graft and scales, at_least_float32)


def unfit(config: DecorConfig, shape: LayerShape) -> str:
    """Why a layer cannot have the structure that the config asks for; "" if it can."""
    if shape.dim == 1:
        return "D = 1: nothing to decorrelate"
    kind = plan(config, shape, torch.float32).structure_type
    if reason := kind.unfit(shape):
        return reason
    factor = kind.largest_factor(shape)
    if factor > config.max_dim:
        return f"needs a factor of {factor} x {factor}; max_dim is {config.max_dim}"
    return ""


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
