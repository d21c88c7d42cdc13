"""R as dense matrices: `full` (one a group), `space` (one for the kernel positions of a layer)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from timm_decor.moments import MEAN, normalized
from timm_decor.shape import LayerShape
from timm_decor.structures.base import MatrixStep, Structure, solved, times
from timm_decor.structures.eigen import eigenpairs

if TYPE_CHECKING:
    from typing_extensions import Self

_NAN = float("nan")


class FullR(Structure):
    """`full`: one dense R of D x D a group."""

    name = "full"

    @property
    def matrix(self) -> Tensor:
        """R, (n g, D, D)."""
        return self._tensors["matrix"]

    @classmethod
    def moments(cls, shape: LayerShape) -> tuple[str, ...]:
        return ("patch",)

    @classmethod
    def identity(cls, shape: LayerShape, rank: int, like: Tensor, inverse: bool) -> Self:
        eye = torch.eye(shape.dim, dtype=like.dtype, device=like.device).repeat(shape.groups, 1, 1)
        return cls(shape, {"matrix": eye, "inverse": eye.clone()} if inverse else {"matrix": eye})

    def dense(self) -> Tensor:
        return self.matrix

    def apply_inverse(self, a: Tensor) -> Tensor:
        inverse = self._tensors.get("inverse")
        if inverse is None:
            return solved(self.matrix, a.flatten(2)).view(a.shape)
        return (a.flatten(2) @ inverse).view(a.shape)

    def is_invertible(self) -> Tensor:
        if (inverse := self._tensors.get("inverse")) is None:
            inverse, info = torch.linalg.inv_ex(self.matrix)
            inverse = torch.where(info[..., None, None] == 0, inverse, _NAN)
        return torch.isfinite(inverse).flatten(1).all(1)

    def whitened(self, moments: Mapping[str, Tensor], damping: float) -> Self:
        matrix, inverse = cholesky_whitening(moments["patch"], damping)
        return self.with_tensors({"matrix": matrix, "inverse": inverse})

    def iterated(self, moments: Mapping[str, Tensor], step: MatrixStep) -> Self:
        sigma = moments[self.moments(self.shape)[0]]
        return self.with_tensors({"matrix": step(self.matrix, sigma, moments.get(MEAN))})


class SpaceR(FullR):
    """`space`: R = I_C (x) R_s, one S x S matrix shared by all channels and groups of a layer."""

    name = "space"

    @classmethod
    def moments(cls, shape: LayerShape) -> tuple[str, ...]:
        return ("shared_space",)

    @classmethod
    def identity(cls, shape: LayerShape, rank: int, like: Tensor, inverse: bool) -> Self:
        eye = torch.eye(shape.positions, dtype=like.dtype, device=like.device)[None]
        return cls(shape, {"matrix": eye, "inverse": eye.clone()} if inverse else {"matrix": eye})

    @classmethod
    def largest_factor(cls, shape: LayerShape) -> int:
        return shape.positions

    @classmethod
    def unfit(cls, shape: LayerShape) -> str:
        return "space structure: a 1x1 kernel has one position" if shape.positions == 1 else ""

    def apply(self, w: Tensor, scale: Tensor | None = None) -> Tensor:
        return times((self._rows(w) @ self.matrix).view(w.shape), scale)

    def apply_transposed(self, grad: Tensor, scale: Tensor | None = None) -> Tensor:
        return times((self._rows(grad) @ self.matrix.mT).view(grad.shape), scale)

    def apply_inverse(self, a: Tensor) -> Tensor:
        inverse = self._tensors.get("inverse")
        rows = self._rows(a)
        return (solved(self.matrix, rows) if inverse is None else rows @ inverse).view(a.shape)

    def apply_inverse_transposed(self, w: Tensor) -> Tensor:
        return solved(self.matrix.mT, self._rows(w)).view(w.shape)

    def output_moment(self, moments: Mapping[str, Tensor]) -> Tensor:
        return self.matrix @ moments["shared_space"] @ self.matrix.mT

    def condition(self) -> float:
        return float(torch.linalg.cond(self.matrix).max())

    def whitened(self, moments: Mapping[str, Tensor], damping: float) -> Self:
        matrix, inverse = symmetric_whitening(moments["shared_space"], damping)
        return self.with_tensors({"matrix": matrix, "inverse": inverse})

    def dense(self) -> Tensor:
        eye = torch.eye(self.shape.channels, dtype=self.matrix.dtype, device=self.matrix.device)
        return torch.stack([torch.kron(eye, matrix) for matrix in self.matrix]).repeat_interleave(self.shape.groups, 0)

    def _rows(self, w: Tensor) -> Tensor:
        return w.reshape(len(self.matrix), w[..., 0].numel() // len(self.matrix), w.shape[-1])  # w may have no rows


def cholesky_whitening(sigma: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Damped whitening by a Cholesky factor: R = L^-1 with L L^T = Sigma / mean-eigenvalue + damping I.

    R^T R = (Sigma / mean-eigenvalue + damping I)^-1, all that SGD and Muon see of R, at the cost of D^3 / 3.

    Args:
        sigma: <x x^T>, (g, D, D).
        damping: in units of the mean eigenvalue.

    Returns:
        R and R^-1 = L, both (g, D, D), lower triangular; NaN where there is no factor.
    """
    eye = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    lower, info = torch.linalg.cholesky_ex(normalized(sigma) + damping * eye)
    lower = torch.where(info[..., None, None] == 0, lower, _NAN)
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False), lower


def symmetric_whitening(sigma: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Damped whitening by the symmetric root: R = (Sigma / mean-eigenvalue + damping I)^-1/2.

    Args and what is returned as for `cholesky_whitening`; R is symmetric. For small D (an eigendecomposition).
    """
    values, basis = eigenpairs(normalized(sigma))
    scale = (values + damping).rsqrt()
    return (basis * scale[..., None, :]) @ basis.mT, (basis / scale[..., None, :]) @ basis.mT
