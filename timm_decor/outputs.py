"""The output side: L, which does for a layer's error signals what R does for its inputs. Pure.

A layer is then y = L W R x, and the gradient for W is L^T G R^T where G is that for A = L W R. L is damped whitening
of the output errors, by their second moment as the weight's own gradient shows it (see `gradient_moment`): the other
factor of the natural gradient, which K-FAC (arXiv 1503.05671) takes from the backward pass and Shampoo (arXiv
1802.09568) from the gradient as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from timm_decor import rules
from timm_decor.config import DecorConfig
from timm_decor.dense import PatchR
from timm_decor.kronecker import KroneckerR
from timm_decor.shape import OUTPUT_MOMENT, LayerShape, Pace

_MOST_COLUMNS = 1024  # of a gradient in one look, about: more cost more than they tell
_PREFIX = "output_"  # of L's tensors beside R's


class OutputL:
    """L = U (gain - tail) U^T + tail I: symmetric, with the `rank` leading directions of O kept.

    Args:
        basis: U, (n g, O, r), orthonormal columns.
        gain: (n g, r), the scale along each of them.
        tail: (n g, 1), the scale of every other direction.
    """

    def __init__(self, basis: Tensor, gain: Tensor, tail: Tensor) -> None:
        self.basis, self.gain, self.tail = basis, gain, tail

    @classmethod
    def identity(cls, shape: LayerShape, config: DecorConfig, like: Tensor) -> OutputL:
        """L = I of one layer, in `like`'s dtype and on its device."""
        rank = min(config.rank, shape.outputs)
        basis = torch.eye(shape.outputs, rank, dtype=like.dtype, device=like.device).repeat(shape.groups, 1, 1)
        return cls(basis, like.new_ones(shape.groups, rank), like.new_ones(shape.groups, 1))

    @staticmethod
    def size(shape: LayerShape, config: DecorConfig) -> int:
        """Entries of what is kept of L."""
        rank = min(config.rank, shape.outputs)
        return shape.groups * (shape.outputs * rank + rank + 1)

    def apply(self, w: Tensor, power: int = 1) -> Tensor:
        """L^power w, shape of w: (n g, O, C, S). For power 2 and -1 no other matrix has to be kept."""
        gain, tail = self.gain**power, self.tail**power
        # R's products leave the channels last in memory: that order of D is then free, and L does not care for it.
        rows = w.transpose(2, 3).flatten(2)  # (n g, O, S C)
        thin = (gain - tail)[..., None] * (self.basis.mT @ rows)
        out = (rows * tail[..., None]).baddbmm_(self.basis, thin)
        return out.unflatten(2, (w.shape[3], w.shape[2])).transpose(2, 3)

    def refreshed(self, moment: Tensor, config: DecorConfig, pace: Pace) -> OutputL:
        """L after one refresh from the averaged moment, (n g, O, O)."""
        rank = min(config.rank, moment.shape[-1])
        one = torch.ones_like(moment[:, :1, :1])
        new = rules.whiten_kronecker(moment, one, pace.output_damping, rank, self.basis, pace.strength)
        return OutputL(new.channel_basis, new.gain[..., 0], new.tail)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of L."""
        return {"basis": self.basis, "gain": self.gain, "tail": self.tail}


class BothSides:
    """R of the inputs and L of the outputs as one structure: what acts on a weight is L w R."""

    def __init__(self, r: PatchR | KroneckerR, left: OutputL) -> None:
        self.r, self.left = r, left

    @property
    def name(self) -> str:
        """Of R's structure, and that there is more."""
        return f"{self.r.name} + outputs"

    def apply(self, w: Tensor) -> Tensor:
        """L W R, shape of w: (n g, O, C, S)."""
        return self.left.apply(self.r.apply(w))

    def apply_transposed(self, grad: Tensor) -> Tensor:
        """L^T G R^T: the gradient for W when G is the gradient for A = L W R; L is symmetric."""
        return self.left.apply(self.r.apply_transposed(grad))

    def apply_gram(self, grad: Tensor) -> Tensor:
        """L L^T G R^T R: the gradient for W, as a direction for A."""
        return self.left.apply(self.r.apply_gram(grad), 2)

    def apply_inverse(self, a: Tensor) -> Tensor:
        """L^-1 A R^-1."""
        return self.left.apply(self.r.apply_inverse(a), -1)

    def refreshed(self, moments: dict[str, Tensor], config: DecorConfig, pace: Pace) -> BothSides:
        """Both after one refresh; NaN where a moment cannot be used."""
        r = self.r.refreshed(_inputs_of(moments), config, pace)
        return BothSides(r, self.left.refreshed(moments[OUTPUT_MOMENT], config, pace))

    def input_moment(self, moments: dict[str, Tensor]) -> Tensor:
        """As R's."""
        return self.r.input_moment(_inputs_of(moments))

    def output_moment(self, moments: dict[str, Tensor]) -> Tensor:
        """As R's: <z z^T>."""
        return self.r.output_moment(_inputs_of(moments))

    def condition(self) -> float:
        """Condition number of R."""
        return self.r.condition()

    def dense(self, shape: LayerShape) -> Tensor:
        """R as (n g, D, D)."""
        return self.r.dense(shape)

    def tensors(self) -> dict[str, Tensor]:
        """R's, and L's with a prefix."""
        return self.r.tensors() | {_PREFIX + name: value for name, value in self.left.tensors().items()}

    def from_tensors(self, tensors: dict[str, Tensor]) -> BothSides:
        """Both from what `tensors` gave."""
        left = {name: tensors[_PREFIX + name] for name in self.left.tensors()}
        return BothSides(self.r.from_tensors({name: tensors[name] for name in self.r.tensors()}), OutputL(**left))


def gradient_moment(rows: Tensor) -> Tensor:
    """Second moment of the output errors as a gradient shows it, in units of its mean eigenvalue: (n g, O, O).

    G R^T is the sum of d z^T over a batch's rows, d the errors at the outputs and z the decorrelated inputs. Where
    errors and inputs are independent of each other, as K-FAC assumes, its product with its own transpose is <d d^T> up
    to a factor in expectation. It is there in every step, the same on every process, and costs no look at the backward
    pass.

    Args:
        rows: G R^T, (n g, O, D); of many columns some are looked at, evenly spaced.

    Returns:
        NaN for a gradient that is zero or not finite.
    """
    rows = rows[..., :: max(1, rows.shape[2] // _MOST_COLUMNS)]
    scale = torch.linalg.matrix_norm(rows)[..., None, None]
    rows = rows / torch.where(scale > 0, scale, float("nan"))
    return rows.shape[1] * (rows @ rows.mT)


def _inputs_of(moments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in moments.items() if name != OUTPUT_MOMENT}
