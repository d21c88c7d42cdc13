"""The output side: L, which does for a layer's error signals what R does for its inputs. Pure.

A layer is then y = L W R x, and the gradient for W is L^T G R^T where G is that for A = L W R. L is damped whitening
of the output errors, by their second moment as the weight's own gradient shows it (see `moments.gradient_moment`): the
other factor of the natural gradient, which K-FAC (arXiv 1503.05671) takes from the backward pass and Shampoo (arXiv
1802.09568) from the gradient as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from timm_decor.moments import OUTPUT_MOMENT, normalized
from timm_decor.shape import LayerShape
from timm_decor.structures.base import LowRank, Structure, of_groups, times
from timm_decor.structures.eigen import leading_eigenpairs, leading_work
from timm_decor.structures.kronecker import mean_rest

SCALE = "step_scale"  # the name of c among a layer's tensors
_PREFIX = "output_"  # of L's tensors beside R's
_MOST_OUTPUTS = 2  # a D, for an L: a larger one would outweigh the weights, and see too few columns


def has_outputs(shape: LayerShape, max_dim: int) -> bool:
    """Whether an L pays for a layer of that shape."""
    return 1 < shape.outputs <= min(max_dim, _MOST_OUTPUTS * shape.dim)


def is_of_outputs(name: str) -> bool:
    """Whether a layer's tensor with that name, in R and L or in their moments, is of its output side."""
    return name.startswith(_PREFIX) or name == OUTPUT_MOMENT


class NoOutputs:
    """L = I, and nothing is kept of it."""

    name = ""
    moments: tuple[str, ...] = ()

    def apply(self, w: Tensor, power: int = 1) -> Tensor:
        """w itself."""
        return w

    def gram(self, r: Structure, grad: Tensor, scale: Tensor | None = None) -> Tensor:
        """scale L L^T G R^T R, shape of grad: (n g, O, C, S); scale: (n g, 1, 1), or None for 1."""
        return r.apply_gram(grad, scale)

    def add_product(
        self, r: Structure, target: Tensor, w: Tensor, beta: float | Tensor, scale: Tensor | None = None
    ) -> None:
        """target <- beta target + scale L w R, in place."""
        r.add_product(target, w, beta, scale)

    def whitened(self, moments: Mapping[str, Tensor], damping: float) -> NoOutputs:
        """Itself: it follows nothing."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> NoOutputs:
        """Itself."""
        return self


class OutputL(NoOutputs):
    """L = U (gain - tail) U^T + tail I: symmetric, with the `rank` leading directions of O kept.

    Args:
        tensors: basis (U, (n g, O, r), orthonormal columns), gain ((n g, r), the scale along each of them) and tail
            ((n g, 1), the scale of every other direction).
    """

    name = " + outputs"
    moments = (OUTPUT_MOMENT,)

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.basis, self.gain, self.tail = tensors["basis"], tensors["gain"], tensors["tail"]
        self._powers: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def identity(cls, shape: LayerShape, rank: int, like: Tensor) -> OutputL:
        """L = I of one layer, in `like`'s dtype and on its device."""
        rank = min(rank, shape.outputs)
        basis = torch.eye(shape.outputs, rank, dtype=like.dtype, device=like.device).repeat(shape.groups, 1, 1)
        return cls({"basis": basis, "gain": like.new_ones(shape.groups, rank), "tail": like.new_ones(shape.groups, 1)})

    @staticmethod
    def refresh_work(shape: LayerShape, rank: int) -> int:
        """Operations of a layer's refresh, about."""
        return shape.groups * leading_work(shape.outputs, min(rank, shape.outputs))

    def apply(self, w: Tensor, power: int = 1) -> Tensor:
        """L^power w, shape of w: (n g, O, C, S)."""
        tail, core = self.scales(power)
        # R's products leave the channels last in memory: that order of D is then free, and L does not care for it.
        rows = w.transpose(2, 3).flatten(2)  # (n g, O, S C)
        thin = core * self.projected(rows)
        out = (rows * tail).baddbmm_(self.basis, thin)
        return out.unflatten(2, (w.shape[3], w.shape[2])).transpose(2, 3)

    def gram(self, r: Structure, grad: Tensor, scale: Tensor | None = None) -> Tensor:
        tail, core = self.scales(2)
        if scale is not None:
            tail, core = tail * scale, core * scale
        rows = grad.transpose(2, 3)  # the order of D that products with R work in
        thin = (core * self.projected(rows.flatten(2))).unflatten(2, rows.shape[2:]).transpose(2, 3)
        return r.apply_gram(grad, tail, LowRank(self.basis, r.apply_gram(thin)))

    def add_product(
        self, r: Structure, target: Tensor, w: Tensor, beta: float | Tensor, scale: Tensor | None = None
    ) -> None:
        r.add_product(target, self.apply(w), beta, scale)

    def projected(self, rows: Tensor) -> Tensor:
        """U^T rows, (n g, r, D): all that L needs of other rows than the one it makes."""
        return self.basis.mT @ rows

    def scales(self, power: int) -> tuple[Tensor, Tensor]:
        """tail^power, (n g, 1, 1), and gain^power - tail^power, (n g, r, 1): made once a refresh."""
        if power not in self._powers:
            tail = self.tail[..., None] ** power
            self._powers[power] = tail, (self.gain**power)[..., None] - tail
        return self._powers[power]

    def whitened(self, moments: Mapping[str, Tensor], damping: float) -> OutputL:
        """L after a refresh from the averaged moment, (n g, O, O); NaN where it cannot be used."""
        size, rank = self.basis.shape[-2:]
        values, basis = leading_eigenpairs(normalized(moments[OUTPUT_MOMENT]), rank, self.basis)
        tail = (mean_rest(values, size)[..., None] + damping).rsqrt()
        if rank == size:
            tail = torch.ones_like(tail)
        return OutputL({"basis": basis.contiguous(), "gain": (values + damping).rsqrt(), "tail": tail})

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of L."""
        return {"basis": self.basis, "gain": self.gain, "tail": self.tail}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> OutputL:
        """L from what `tensors` gave."""
        return OutputL(tensors)


class Sides:
    """R of the inputs, L of the outputs and a scale, of n layers of equal shape: what acts on a weight is c L w R.

    Args:
        inputs: R.
        outputs: L.
        scale: c, (n g, 1, 1), which makes a step as long as the plain optimizer's (engine/length.py); None for 1.
    """

    def __init__(self, inputs: Structure, outputs: NoOutputs, scale: Tensor | None = None) -> None:
        self.inputs, self.outputs, self.scale = inputs, outputs, scale

    @property
    def name(self) -> str:
        """Of R's structure, and whether there is more."""
        return self.inputs.name + self.outputs.name

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the second moments that a refresh needs."""
        return self.inputs.moments(self.inputs.shape) + self.outputs.moments

    @property
    def unit(self) -> Sides:
        """The same R and L without the scale."""
        return Sides(self.inputs, self.outputs)

    def apply(self, w: Tensor) -> Tensor:
        """c L W R, shape of w: (n g, O, C, S)."""
        return self.outputs.apply(self.inputs.apply(w, self.scale))

    def apply_transposed(self, grad: Tensor) -> Tensor:
        """c L^T G R^T: the gradient for W when G is the gradient for A = c L W R; L is symmetric."""
        return self.outputs.apply(self.inputs.apply_transposed(grad, self.scale))

    def apply_gram(self, grad: Tensor) -> Tensor:
        """c^2 L L^T G R^T R: the gradient for W, as a direction for A."""
        return self.outputs.gram(self.inputs, grad, None if self.scale is None else self.scale.square())

    def add_product(self, target: Tensor, w: Tensor, beta: float | Tensor) -> None:
        """target <- beta target + c L w R, in place."""
        self.outputs.add_product(self.inputs, target, w, beta, self.scale)

    def apply_inverse(self, a: Tensor) -> Tensor:
        """L^-1 A R^-1 / c."""
        return times(self.outputs.apply(self.inputs.apply_inverse(a), -1), self._inverse_scale)

    def apply_inverse_transposed(self, w: Tensor) -> Tensor:
        """L^-T V R^-T / c: the gradient for A when V is one for W."""
        return times(self.outputs.apply(self.inputs.apply_inverse_transposed(w), -1), self._inverse_scale)

    @property
    def _inverse_scale(self) -> Tensor | None:
        return None if self.scale is None else 1 / self.scale

    def of_groups(self, count: int, groups: slice) -> Sides:
        """Those of some groups of each of `count` layers, which have no L."""
        assert not isinstance(self.outputs, OutputL)
        scale = self.scale
        if scale is not None:
            scale = of_groups(scale, count, self.inputs.shape.groups, groups)
        return Sides(self.inputs.of_groups(count, groups), self.outputs, scale)

    def tensors(self) -> dict[str, Tensor]:
        """R's, L's with a prefix, and the scale."""
        outputs = {_PREFIX + name: value for name, value in self.outputs.tensors().items()}
        return self.inputs.tensors() | outputs | ({} if self.scale is None else {SCALE: self.scale})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Sides:
        """All from what `tensors` gave; what is of none is left."""
        inputs = {name: tensors[name] for name in self.inputs.tensors()}
        outputs = {name: tensors[_PREFIX + name] for name in self.outputs.tensors()}
        scale = None if self.scale is None else tensors[SCALE]
        return Sides(self.inputs.with_tensors(inputs), self.outputs.with_tensors(outputs), scale)
