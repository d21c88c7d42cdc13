"""R as dense matrices: `full` (one a group), `block` (one a block of channels), `space` (one for kernel positions)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from timm_decor import rules
from timm_decor.config import DecorConfig
from timm_decor.shape import MEAN, LayerShape, Pace, moment_shape, reported_entries


class PatchR:
    """`full`: one dense R of D x D a group."""

    name = "full"

    def __init__(self, matrix: Tensor, inverse: Tensor | None = None) -> None:
        self.matrix = matrix  # (n g, D, D)
        self.inverse = inverse  # (n g, D, D), or None where only `solve` gives it
        self._gram: Tensor | None = None

    @classmethod
    def identity(cls, shape: LayerShape, config: DecorConfig, like: Tensor) -> PatchR:
        """R = I of one layer, in `like`'s dtype and on its device."""
        return cls._of(torch.eye(shape.dim, dtype=like.dtype, device=like.device).repeat(shape.groups, 1, 1), config)

    @classmethod
    def _of(cls, matrix: Tensor, config: DecorConfig) -> PatchR:
        """R = I where `matrix` is: the whitening rules keep R^-1 beside it."""
        return cls(matrix, matrix.clone() if config.rule == "whiten" else None)

    @staticmethod
    def moments(shape: LayerShape, config: DecorConfig) -> tuple[str, ...]:
        """Names of the moments that a refresh needs; see `moment_shape`."""
        return ("patch", MEAN) if config.rule == "crgd" else ("patch",)

    @staticmethod
    def size(shape: LayerShape, config: DecorConfig) -> int:
        """Entries of what is kept of R: itself, R^T R and, where the rule gives it, R^-1."""
        return _matrices(config) * shape.groups * shape.dim**2

    @classmethod
    def largest_factor(cls, shape: LayerShape, config: DecorConfig) -> int:
        """Side of the largest matrix that a refresh has to factor."""
        return moment_shape(cls.moments(shape, config)[0], shape)[1]

    def apply(self, w: Tensor) -> Tensor:
        """W R, shape of w: (n g, O, C, S)."""
        return self._rows(w, lambda rows: rows @ self.matrix)

    def apply_transposed(self, grad: Tensor) -> Tensor:
        """G R^T: the gradient for W when G is the gradient for A = W R. Shape of grad: (n g, O, C, S)."""
        return self._rows(grad, lambda rows: rows @ self.matrix.mT)

    def apply_gram(self, grad: Tensor) -> Tensor:
        """G R^T R: the gradient for W, as a direction for A. Shape of grad: (n g, O, C, S)."""
        if self._gram is None:
            self._gram = self.matrix.mT @ self.matrix  # once a refresh, so that a step is one product
        gram = self._gram
        return self._rows(grad, lambda rows: rows @ gram)

    def apply_inverse(self, a: Tensor) -> Tensor:
        """A R^-1, shape of a: (n g, O, C, S); NaN where R is singular."""
        if self.inverse is None:
            # solve_ex: a singular R must not raise, which would cost the others of the batch theirs
            return self._rows(a, lambda rows: _solved(self.matrix, rows))
        inverse = self.inverse
        return self._rows(a, lambda rows: rows @ inverse)

    def refreshed(self, moments: dict[str, Tensor], config: DecorConfig, pace: Pace) -> PatchR:
        """R after one refresh from the averaged moments; NaN where they cannot be used."""
        sigma = next(value for name, value in moments.items() if name != MEAN)
        if config.rule == "dbp":
            return self._new(rules.dbp(self.matrix, sigma, config.kappa, pace.decor_lr))
        if config.rule == "crgd":
            mean = moments[MEAN].reshape(len(sigma), 1, -1)
            return self._new(rules.crgd(self.matrix, sigma, mean, pace.decor_lr))
        if config.rule == "whiten":
            return self._new(*self._whiten(sigma, pace.damping, pace.strength))
        raise NotImplementedError(f"{type(self).__name__}.refreshed has no rule {config.rule!r}")

    def _new(self, matrix: Tensor, inverse: Tensor | None = None) -> PatchR:
        return type(self)(matrix, inverse)

    _whiten = staticmethod(rules.whiten)

    @staticmethod
    def _rows(w: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        return multiply(w.flatten(2)).view(w.shape)

    def input_moment(self, moments: dict[str, Tensor]) -> Tensor:
        """<x x^T> of some of the entries, not all where there are too many: (n g, m, m)."""
        sigma = next(iter(moments.values()))
        index = reported_entries(sigma.shape[-1], sigma.device)
        return sigma[:, index][..., index]

    def output_moment(self, moments: dict[str, Tensor]) -> Tensor:
        """<z z^T> = R Sigma R^T of the same entries: (n g, m, m)."""
        sigma = next(iter(moments.values()))
        rows = self.matrix[:, reported_entries(sigma.shape[-1], sigma.device)]
        return rows @ sigma @ rows.mT

    def condition(self) -> float:
        """Condition number of R, the largest over groups."""
        return float(torch.linalg.cond(self.matrix).max())

    def dense(self, shape: LayerShape) -> Tensor:
        """R as (n g, D, D), whatever the structure."""
        return self.matrix

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of R; `from_tensors` reads it back."""
        return {"matrix": self.matrix} | ({} if self.inverse is None else {"inverse": self.inverse})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> PatchR:
        """R from what `tensors` gave."""
        return cls(**tensors)


class BlockR(PatchR):
    """`block`: full inside blocks of neighbouring channels, nothing between them; see `block_count`."""

    name = "block"

    @classmethod
    def identity(cls, shape: LayerShape, config: DecorConfig, like: Tensor) -> PatchR:
        groups, side, _ = moment_shape(cls.moments(shape, config)[0], shape)
        return cls._of(torch.eye(side, dtype=like.dtype, device=like.device).repeat(groups, 1, 1), config)

    @staticmethod
    def moments(shape: LayerShape, config: DecorConfig) -> tuple[str, ...]:
        blocks = f"patch/{block_count(shape, config.block_dim)}"
        return (blocks, MEAN) if config.rule == "crgd" else (blocks,)

    @staticmethod
    def size(shape: LayerShape, config: DecorConfig) -> int:
        return PatchR.size(shape, config) // block_count(shape, config.block_dim)

    def _rows(self, w: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        groups, outputs, channels, positions = w.shape
        blocks = len(self.matrix) // groups
        parts = w.unflatten(2, (blocks, channels // blocks)).transpose(1, 2)  # (n g, blocks, O, C / blocks, S)
        out = multiply(parts.reshape(groups * blocks, outputs, -1))
        return out.view(parts.shape).transpose(1, 2).flatten(2, 3)

    def dense(self, shape: LayerShape) -> Tensor:
        blocks = block_count(shape, len(self.matrix[0]))
        return torch.stack([torch.block_diag(*part) for part in self.matrix.split(blocks)])


def block_count(shape: LayerShape, block_dim: int) -> int:
    """Blocks a group: the fewest of equal size, in whole channels, that have no more than `block_dim` entries each."""
    channels = max(
        c
        for c in range(1, shape.channels + 1)
        if shape.channels % c == 0 and (c * shape.positions <= block_dim or c == 1)
    )
    return shape.channels // channels


class SpaceR(PatchR):
    """`space`: R = I_C (x) R_s, one S x S matrix shared by all channels and groups of a layer."""

    name = "space"

    @classmethod
    def identity(cls, shape: LayerShape, config: DecorConfig, like: Tensor) -> PatchR:
        return cls._of(torch.eye(shape.positions, dtype=like.dtype, device=like.device)[None], config)

    @staticmethod
    def moments(shape: LayerShape, config: DecorConfig) -> tuple[str, ...]:
        return ("shared_space",)

    @staticmethod
    def size(shape: LayerShape, config: DecorConfig) -> int:
        return _matrices(config) * shape.positions**2

    _whiten = staticmethod(rules.whiten_symmetric)

    def _rows(self, w: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        return multiply(w.reshape(len(self.matrix), -1, w.shape[-1])).view(w.shape)

    def dense(self, shape: LayerShape) -> Tensor:
        eye = torch.eye(shape.channels, dtype=self.matrix.dtype, device=self.matrix.device)
        return torch.stack([torch.kron(eye, matrix) for matrix in self.matrix]).repeat_interleave(shape.groups, 0)


def _matrices(config: DecorConfig) -> int:
    return 3 if config.rule == "whiten" else 2


def _solved(matrix: Tensor, rows: Tensor) -> Tensor:
    """rows matrix^-1; NaN where the matrix is singular."""
    out, info = torch.linalg.solve_ex(matrix, rows, left=False)
    return torch.where(info[..., None, None] == 0, out, float("nan"))
