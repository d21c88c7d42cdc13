"""Structures of R: how the decorrelation matrix of one layer is stored, applied, inverted and refreshed. Pure.

Weights come as (g, O, C, S): g groups, O outputs and C inputs a group, S = kh * kw kernel positions (1 for a linear
layer). R acts on the last two axes, D = C * S long: `apply` is W R, so that y = (W R) x = W (R x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_decor import rules
from timm_decor.config import DecorConfig


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer: g groups, C input channels a group, S kernel positions."""

    groups: int
    channels: int
    positions: int

    @property
    def dim(self) -> int:
        """D, the length of one patch of one group."""
        return self.channels * self.positions


def moment_shape(name: str, shape: LayerShape) -> tuple[int, int, int]:
    """Shape of a layer's moment "patch", "channel", "space" (one a group) or "shared_space" (one a layer)."""
    side = {"patch": shape.dim, "channel": shape.channels}.get(name, shape.positions)
    return (1 if name == "shared_space" else shape.groups), side, side


_REPORTED_ENTRIES = 1024


def _entries(size: int, device: torch.device) -> Tensor:
    """Which entries of x and z a report looks at: all, or the same ones each time (D = 25 088 in VGG's first head).

    Drawn rather than evenly spaced: a spacing of S would only ever compare one kernel position.
    """
    if size <= _REPORTED_ENTRIES:
        return torch.arange(size, device=device)
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:_REPORTED_ENTRIES]
    return drawn.sort().values.to(device)


class PatchR:
    """`full`: one dense R of D x D a group. Needs the moment "patch"."""

    moments: tuple[str, ...] = ("patch",)

    def __init__(self, matrix: Tensor, inverse: Tensor | None = None) -> None:
        self.matrix = matrix  # (g, D, D)
        self.inverse = inverse  # (g, D, D), or None where only `solve` gives it

    @classmethod
    def identity(cls, shape: LayerShape, config: DecorConfig, like: Tensor) -> PatchR:
        return cls(torch.eye(shape.dim, dtype=like.dtype, device=like.device).repeat(shape.groups, 1, 1))

    @staticmethod
    def size(shape: LayerShape, config: DecorConfig) -> int:
        """Entries of R, and of its inverse where the rule gives one."""
        return (2 if config.rule == "whiten" else 1) * shape.groups * shape.dim**2

    @staticmethod
    def largest_factor(shape: LayerShape) -> int:
        """Side of the largest matrix that a refresh has to factor."""
        return shape.dim

    def apply(self, w: Tensor) -> Tensor:
        """W R, shape of w: (g, O, C, S)."""
        return self._rows(w, lambda rows: rows @ self.matrix)

    def apply_transposed(self, grad: Tensor) -> Tensor:
        """G R^T: the gradient for W when G is the gradient for A = W R. Shape of grad: (g, O, C, S)."""
        return self._rows(grad, lambda rows: rows @ self.matrix.mT)

    def apply_gram(self, grad: Tensor) -> Tensor:
        """G R^T R: the gradient for W, as a direction for A. Shape of grad: (g, O, C, S)."""
        return self.apply(self.apply_transposed(grad))

    def apply_inverse(self, a: Tensor) -> Tensor:
        """A R^-1, shape of a: (g, O, C, S)."""
        if self.inverse is None:
            return self._rows(a, lambda rows: torch.linalg.solve(self.matrix, rows, left=False))
        inverse = self.inverse
        return self._rows(a, lambda rows: rows @ inverse)

    def refreshed(self, moments: dict[str, Tensor], config: DecorConfig) -> PatchR:
        """R after one refresh from the averaged moments.

        Raises:
            rules.DegenerateMoment: the statistics cannot be used; R must stay as it is.
        """
        sigma = moments[self.moments[0]]
        if config.rule == "dbp":
            return type(self)(rules.dbp(self.matrix, sigma, config.kappa, config.decor_lr))
        return type(self)(*self._whiten(sigma, config.damping))

    _whiten = staticmethod(rules.whiten)

    @staticmethod
    def _rows(w: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        return multiply(w.flatten(2)).view(w.shape)

    def input_moment(self, moments: dict[str, Tensor]) -> Tensor:
        """<x x^T> of n entries, not all where there are too many: (g, n, n)."""
        sigma = moments[self.moments[0]]
        index = _entries(sigma.shape[-1], sigma.device)
        return sigma[:, index][..., index]

    def output_moment(self, moments: dict[str, Tensor]) -> Tensor:
        """<z z^T> = R Sigma R^T of the same entries: (g, n, n)."""
        sigma = moments[self.moments[0]]
        rows = self.matrix[:, _entries(sigma.shape[-1], sigma.device)]
        return rows @ sigma @ rows.mT

    def condition(self) -> float:
        """Condition number of R, the largest over groups."""
        return float(torch.linalg.cond(self.matrix).max())

    def dense(self, shape: LayerShape) -> Tensor:
        """R as (g, D, D), whatever the structure."""
        return self.matrix

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of R; `from_tensors` reads it back."""
        return {"matrix": self.matrix} | ({} if self.inverse is None else {"inverse": self.inverse})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> PatchR:
        return cls(**tensors)


class SpaceR(PatchR):
    """`space`: R = I_C (x) R_s, one S x S matrix shared by all channels and groups. Needs the moment "shared_space"."""

    moments = ("shared_space",)
    _whiten = staticmethod(rules.whiten_symmetric)

    @classmethod
    def identity(cls, shape: LayerShape, config: DecorConfig, like: Tensor) -> SpaceR:
        return cls(torch.eye(shape.positions, dtype=like.dtype, device=like.device)[None])

    @staticmethod
    def size(shape: LayerShape, config: DecorConfig) -> int:
        return (2 if config.rule == "whiten" else 1) * shape.positions**2

    @staticmethod
    def largest_factor(shape: LayerShape) -> int:
        return shape.positions

    @staticmethod
    def _rows(w: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        return multiply(w.reshape(1, -1, w.shape[-1])).view(w.shape)

    def dense(self, shape: LayerShape) -> Tensor:
        eye = torch.eye(shape.channels, dtype=self.matrix.dtype, device=self.matrix.device)
        return torch.kron(eye, self.matrix[0]).repeat(shape.groups, 1, 1)


class KroneckerR:
    """`kronecker`: channels (x) space in the product's eigenbasis; see `rules.KroneckerFactors`.

    R is symmetric and no D x D matrix is formed: applying it takes two thin products with the weight (C x r, where
    r = min(rank, C)) and S x S ones. Needs the moments "channel" and "space".
    """

    moments: tuple[str, ...] = ("channel", "space")

    def __init__(self, factors: rules.KroneckerFactors) -> None:
        self.factors = factors
        self._matrix = _Spiked(factors.channel_basis, factors.space_basis, factors.gain, factors.tail)
        self._inverse = _Spiked(factors.channel_basis, factors.space_basis, 1 / factors.gain, 1 / factors.tail)
        self._gram = _Spiked(factors.channel_basis, factors.space_basis, factors.gain**2, factors.tail**2)

    @classmethod
    def identity(cls, shape: LayerShape, config: DecorConfig, like: Tensor) -> KroneckerR:
        def eye(rows: int, columns: int) -> Tensor:
            return torch.eye(rows, columns, dtype=like.dtype, device=like.device).repeat(shape.groups, 1, 1)

        rank = min(config.rank, shape.channels)
        return cls(
            rules.KroneckerFactors(
                channel_basis=eye(shape.channels, rank),
                space_basis=eye(shape.positions, shape.positions),
                gain=like.new_ones(shape.groups, rank, shape.positions),
                tail=like.new_ones(shape.groups, shape.positions),
            )
        )

    @staticmethod
    def size(shape: LayerShape, config: DecorConfig) -> int:
        rank = min(config.rank, shape.channels)
        s = shape.positions
        return shape.groups * (shape.channels * rank + s * s + (rank + 1) * s)

    @staticmethod
    def largest_factor(shape: LayerShape) -> int:
        return max(shape.channels, shape.positions)

    def apply(self, w: Tensor) -> Tensor:
        """W R, shape of w: (g, O, C, S)."""
        return self._matrix.multiply(w)

    apply_transposed = apply  # R is symmetric

    def apply_gram(self, grad: Tensor) -> Tensor:
        """G R^T R at the cost of one product, shape of grad: (g, O, C, S)."""
        return self._gram.multiply(grad)

    def apply_inverse(self, a: Tensor) -> Tensor:
        """A R^-1, shape of a: (g, O, C, S)."""
        return self._inverse.multiply(a)

    def refreshed(self, moments: dict[str, Tensor], config: DecorConfig) -> KroneckerR:
        """R after one refresh from the averaged moments.

        Raises:
            rules.DegenerateMoment: the statistics cannot be used; R must stay as it is.
        """
        channel = moments["channel"]
        rank = min(config.rank, channel.shape[-1])
        start = self.factors.channel_basis
        return KroneckerR(rules.whiten_kronecker(channel, moments["space"], config.damping, rank, start))

    def input_moment(self, moments: dict[str, Tensor]) -> Tensor:
        """Sigma = Sigma_c (x) Sigma_s of n entries, not all where there are too many: (g, n, n)."""
        channel, space = moments["channel"], moments["space"]
        index = _entries(channel.shape[-1] * space.shape[-1], channel.device)
        c, s = index // space.shape[-1], index % space.shape[-1]
        return channel[:, c][..., c] * space[:, s][..., s]

    def output_moment(self, moments: dict[str, Tensor]) -> Tensor:
        """<z z^T> = R Sigma R^T of the same entries: (g, n, n). The D x D matrix is never formed."""
        channel, space = moments["channel"], moments["space"]
        index = _entries(channel.shape[-1] * space.shape[-1], channel.device)
        picks = channel.new_zeros(len(channel), len(index), channel.shape[-1], space.shape[-1])
        picks.flatten(2)[:, torch.arange(len(index), device=index.device), index] = 1
        rows = self.apply(picks)  # of R, which is symmetric
        weighted = channel[:, None] @ rows @ space[:, None]
        return weighted.flatten(2) @ rows.flatten(2).mT

    def condition(self) -> float:
        """Condition number of R, the largest over groups."""
        gain, tail = self.factors.gain, self.factors.tail
        channels, kept = self.factors.channel_basis.shape[1:]
        scales = gain.flatten(1) if kept == channels else torch.cat([gain.flatten(1), tail], 1)
        return float((scales.amax(1) / scales.amin(1)).max())

    def dense(self, shape: LayerShape) -> Tensor:
        """R as (g, D, D)."""
        eye = torch.eye(shape.dim, dtype=self.factors.gain.dtype, device=self.factors.gain.device)
        rows = eye.repeat(shape.groups, 1, 1).view(shape.groups, shape.dim, shape.channels, shape.positions)
        return self.apply(rows).flatten(2)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of R; `from_tensors` reads it back."""
        return self.factors._asdict()

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> KroneckerR:
        return cls(rules.KroneckerFactors(**tensors))


class _Spiked:
    """The symmetric matrix sum over j of [U (gain_j - tail_j) U^T + tail_j I_C] (x) v_j v_j^T, ready to multiply."""

    def __init__(self, channel_basis: Tensor, space_basis: Tensor, gain: Tensor, tail: Tensor) -> None:
        self.channel_basis = channel_basis  # U, (g, C, r)
        self.space_basis = space_basis[:, None]  # V, (g, 1, S, S)
        self.space_tail: Tensor | None = None  # V tail V^T, (g, 1, S, S); no direction is left for it where r = C
        if channel_basis.shape[1] > channel_basis.shape[2]:
            self.space_tail = ((space_basis * tail[:, None, :]) @ space_basis.mT)[:, None]
            gain = gain - tail[:, None, :]
        self.core = gain.mT[:, None]  # (g, 1, S, r)

    def multiply(self, w: Tensor) -> Tensor:
        """w times the matrix; (g, O, C, S) to the same shape.

        Channels last, the products over C are single large ones; for a channels_last weight that view is free.
        """
        groups, outputs, channels, positions = w.shape
        rows = w.transpose(2, 3).reshape(groups, outputs * positions, channels)
        thin = (rows @ self.channel_basis).unflatten(1, (outputs, positions))  # (g, O, S, r)
        thin = self.space_basis @ ((self.space_basis.mT @ thin) * self.core)
        if self.space_tail is None:
            out = thin.flatten(1, 2) @ self.channel_basis.mT
        else:
            if positions == 1:
                out = rows * self.space_tail[:, 0]
            else:
                out = (self.space_tail @ rows.unflatten(1, (outputs, positions))).flatten(1, 2)
            out.baddbmm_(thin.flatten(1, 2), self.channel_basis.mT)
        return out.unflatten(1, (outputs, positions)).transpose(2, 3)


Structure = PatchR | KroneckerR
_STRUCTURES: dict[str, type[PatchR] | type[KroneckerR]] = {"full": PatchR, "kronecker": KroneckerR, "space": SpaceR}


def structure_for(config: DecorConfig, shape: LayerShape) -> type[PatchR] | type[KroneckerR]:
    """The structure of R for a layer: the config's, and `space` where `kronecker` has one channel a group.

    A depthwise convolution would have its own S x S eigenproblem for every channel; one R for all of them has the
    statistics of all of them and costs nothing.
    """
    if config.structure == "kronecker" and shape.channels == 1:
        return SpaceR
    return _STRUCTURES[config.structure]
