"""R as a Kronecker product of channels and kernel positions, in the product's eigenbasis: `kronecker`."""

from __future__ import annotations

import torch
from torch import Tensor

from timm_decor import rules
from timm_decor.config import DecorConfig
from timm_decor.shape import LayerShape, Pace, reported_entries


class KroneckerR:
    """`kronecker`: channels (x) space in the product's eigenbasis; see `rules.KroneckerFactors`.

    R is symmetric and no D x D matrix is formed: applying it takes two thin products with the weight (C x r, where
    r = min(rank, C)) and S x S ones.
    """

    name = "kronecker"

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
    def moments(shape: LayerShape, config: DecorConfig) -> tuple[str, ...]:
        return ("channel", "space")

    @staticmethod
    def size(shape: LayerShape, config: DecorConfig) -> int:
        rank = min(config.rank, shape.channels)
        s = shape.positions
        return shape.groups * (shape.channels * rank + s * s + (rank + 1) * s)

    @staticmethod
    def largest_factor(shape: LayerShape, config: DecorConfig) -> int:
        return max(shape.channels, shape.positions)

    def apply(self, w: Tensor) -> Tensor:
        """W R, shape of w: (n g, O, C, S)."""
        return self._matrix.multiply(w)

    apply_transposed = apply  # R is symmetric

    def apply_gram(self, grad: Tensor) -> Tensor:
        """G R^T R at the cost of one product, shape of grad: (n g, O, C, S)."""
        return self._gram.multiply(grad)

    def apply_inverse(self, a: Tensor) -> Tensor:
        """A R^-1, shape of a: (n g, O, C, S)."""
        return self._inverse.multiply(a)

    def refreshed(self, moments: dict[str, Tensor], config: DecorConfig, pace: Pace) -> KroneckerR:
        """R after one refresh from the averaged moments; NaN where they cannot be used."""
        channel, space, start = moments["channel"], moments["space"], self.factors.channel_basis
        rank = min(config.rank, channel.shape[-1])
        return KroneckerR(rules.whiten_kronecker(channel, space, pace.damping, rank, start, pace.strength))

    def input_moment(self, moments: dict[str, Tensor]) -> Tensor:
        """Sigma = Sigma_c (x) Sigma_s of n entries, not all where there are too many: (g, n, n)."""
        channel, space = moments["channel"], moments["space"]
        index = reported_entries(channel.shape[-1] * space.shape[-1], channel.device)
        c, s = index // space.shape[-1], index % space.shape[-1]
        return channel[:, c][..., c] * space[:, s][..., s]

    def output_moment(self, moments: dict[str, Tensor]) -> Tensor:
        """<z z^T> = R Sigma R^T of the same entries: (g, n, n). The D x D matrix is never formed."""
        channel, space = moments["channel"], moments["space"]
        index = reported_entries(channel.shape[-1] * space.shape[-1], channel.device)
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
        groups = len(self.factors.gain)
        rows = eye.repeat(groups, 1, 1).view(groups, shape.dim, shape.channels, shape.positions)
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
        """w times the matrix; (n g, O, C, S) to the same shape.

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
