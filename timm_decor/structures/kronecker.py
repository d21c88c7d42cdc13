"""R as a Kronecker product of channels and kernel positions, in the product's eigenbasis: `kronecker`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from timm_decor.moments import normalized, reported_entries
from timm_decor.shape import LayerShape
from timm_decor.structures.base import LowRank, Structure
from timm_decor.structures.eigen import eigenpairs, leading_eigenpairs, leading_work

if TYPE_CHECKING:
    from typing_extensions import Self


class KroneckerR(Structure):
    """`kronecker`: R = sum over j of [U (gain_j - tail_j) U^T + tail_j I_C] (x) v_j v_j^T.

    R is symmetric and no D x D matrix is formed: applying it takes two thin products with the weight (C x r, where
    r = min(rank, C)) and S x S ones. Its tensors:

      * channel_basis: U, (n g, C, r), orthonormal columns: the leading eigenvectors of the channel factor;
      * space_basis: V, (n g, S, S), orthonormal columns v_j: the eigenvectors of the space factor;
      * gain: (n g, r, S), the scale of direction u_i (x) v_j;
      * tail: (n g, S), the scale of every channel direction outside U, along v_j.
    """

    name = "kronecker"

    def __init__(self, shape: LayerShape, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(shape, tensors)
        self._powers: dict[int, _Spiked] = {}

    @classmethod
    def moments(cls, shape: LayerShape) -> tuple[str, ...]:
        return ("channel", "space")

    @classmethod
    def identity(cls, shape: LayerShape, rank: int, like: Tensor, inverse: bool) -> Self:
        def eye(rows: int, columns: int) -> Tensor:
            return torch.eye(rows, columns, dtype=like.dtype, device=like.device).repeat(shape.groups, 1, 1)

        rank = min(rank, shape.channels)
        return cls(
            shape,
            {
                "channel_basis": eye(shape.channels, rank),
                "space_basis": eye(shape.positions, shape.positions),
                "gain": like.new_ones(shape.groups, rank, shape.positions),
                "tail": like.new_ones(shape.groups, shape.positions),
            },
        )

    @classmethod
    def largest_factor(cls, shape: LayerShape) -> int:
        return max(shape.channels, shape.positions)

    @classmethod
    def refresh_work(cls, shape: LayerShape, rank: int) -> int:
        channels = leading_work(shape.channels, min(rank, shape.channels))
        return shape.groups * (channels + leading_work(shape.positions, shape.positions))

    def apply(self, w: Tensor, scale: Tensor | None = None) -> Tensor:
        return self._power(1).multiply(w, scale=scale)

    apply_transposed = apply  # type: ignore[assignment]  # R is symmetric

    def apply_gram(self, grad: Tensor, scale: Tensor | None = None, plus: LowRank | None = None) -> Tensor:
        return self._power(2).multiply(grad, scale=scale, plus=plus)

    def add_product(self, target: Tensor, w: Tensor, beta: float | Tensor, scale: Tensor | None = None) -> None:
        rows = target.transpose(2, 3)
        if isinstance(beta, Tensor) or not rows.is_contiguous():  # in place on channels_last weights alone
            super().add_product(target, w, beta, scale)
        else:
            self._power(1).multiply(w, scale=scale, out=rows, beta=beta)

    def apply_inverse(self, a: Tensor) -> Tensor:
        return self._power(-1).multiply(a)

    apply_inverse_transposed = apply_inverse  # type: ignore[assignment]

    def errors(self, grad: Tensor, channels: slice) -> Tensor:
        return self._power(1).multiply(grad, channels)

    def whitened(self, moments: Mapping[str, Tensor], damping: float) -> Self:
        """As `Structure.whitened`, by the symmetric root of Sigma_c (x) Sigma_s, damped jointly.

        Direction (i, j) is scaled by (l_c[i] l_s[j] + damping)^-1/2, eigenvalues in units of their factor's mean. The
        C - rank smallest channel eigenvalues are replaced by their mean (activations have few large eigenvalues, and
        damping makes the small ones alike), so that R is `space (x) identity` plus a term of that rank.
        """
        basis = self._tensors["channel_basis"]
        values, channel_basis = leading_eigenpairs(normalized(moments["channel"]), basis.shape[-1], basis)
        space_values, space_basis = eigenpairs(normalized(moments["space"]))
        gain = (values[..., None] * space_values[..., None, :] + damping).rsqrt()
        tail = (mean_rest(values, self.shape.channels)[..., None] * space_values + damping).rsqrt()
        if channel_basis.shape[-1] == self.shape.channels:  # no direction is left for the tail; 1 keeps it invertible
            tail = torch.ones_like(tail)
        return self.with_tensors(
            {"channel_basis": channel_basis.contiguous(), "space_basis": space_basis, "gain": gain, "tail": tail}
        )

    def input_moment(self, moments: Mapping[str, Tensor]) -> Tensor:
        """Sigma = Sigma_c (x) Sigma_s of n entries, not all where there are too many: (g, n, n)."""
        channel, space = moments["channel"], moments["space"]
        index = reported_entries(self.shape.dim, channel.device)
        c, s = index // self.shape.positions, index % self.shape.positions
        return channel[:, c][..., c] * space[:, s][..., s]

    def output_moment(self, moments: Mapping[str, Tensor]) -> Tensor:
        """<z z^T> = R Sigma R^T of the same entries: (g, n, n). The D x D matrix is never formed."""
        channel, space = moments["channel"], moments["space"]
        index = reported_entries(self.shape.dim, channel.device)
        picks = channel.new_zeros(len(channel), len(index), self.shape.channels, self.shape.positions)
        picks.flatten(2)[:, torch.arange(len(index), device=index.device), index] = 1
        rows = self.apply(picks)  # of R, which is symmetric
        weighted = channel[:, None] @ rows @ space[:, None]
        return weighted.flatten(2) @ rows.flatten(2).mT

    def is_invertible(self) -> Tensor:
        scales = torch.cat([self._tensors["gain"], self._tensors["tail"][:, None]], 1).flatten(1)
        return (torch.isfinite(scales) & (scales > 0)).all(1)

    def condition(self) -> float:
        gain, tail = self._tensors["gain"], self._tensors["tail"]
        scales = gain.flatten(1) if gain.shape[1] == self.shape.channels else torch.cat([gain.flatten(1), tail], 1)
        return float((scales.amax(1) / scales.amin(1)).max())

    def dense(self) -> Tensor:
        gain, shape = self._tensors["gain"], self.shape
        eye = torch.eye(shape.dim, dtype=gain.dtype, device=gain.device)
        rows = eye.repeat(len(gain), 1, 1).view(len(gain), shape.dim, shape.channels, shape.positions)
        return self.apply(rows).flatten(2)

    def _power(self, power: int) -> _Spiked:
        """R to a power, ready to multiply: made once a refresh."""
        if power not in self._powers:
            gain, tail = self._tensors["gain"] ** power, self._tensors["tail"] ** power
            self._powers[power] = _Spiked(self._tensors["channel_basis"], self._tensors["space_basis"], gain, tail)
        return self._powers[power]


def mean_rest(values: Tensor, size: int) -> Tensor:
    """Mean of the eigenvalues of a normalised moment that are not among `values`, (g, r); their sum is its size."""
    return ((size - values.sum(-1)) / max(1, size - values.shape[-1])).clamp_min(0)


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

    def multiply(
        self,
        w: Tensor,
        channels: slice = slice(None),
        scale: Tensor | None = None,
        plus: LowRank | None = None,
        out: Tensor | None = None,
        beta: float = 0.0,
    ) -> Tensor:
        """w times the matrix, or some columns of it: (n g, O, C, S) to (n g, O, those channels, S).

        Channels last, the products over C are single large ones; for a channels_last weight that view is free.

        Args:
            w: of any strides.
            channels: of the columns.
            scale: (n g, 1, 1), a factor of the product, or None.
            plus: added to it, or None.
            out: (n g, O, S, C), contiguous, which becomes beta out + the product; None for a new tensor.
            beta: factor of `out`.
        """
        groups, outputs, size, positions = w.shape
        rows = w.transpose(2, 3).reshape(groups, outputs * positions, size)
        thin = (rows @ self.channel_basis).unflatten(1, (outputs, positions))  # (g, O, S, r)
        core = self.core if scale is None else self.core * scale[..., None]
        thin = self.space_basis @ ((self.space_basis.mT @ thin) * core)
        basis = self.channel_basis[:, channels]
        rows = rows[..., channels].contiguous().unflatten(1, (outputs, positions))
        out = self._tail_part(rows, scale, out, beta)
        # Views, or an error: without rows, of which a sharded layer may have none here, -1 would name no size.
        out.view(groups, outputs * positions, out.shape[-1]).baddbmm_(thin.flatten(1, 2), basis.mT)
        if plus is not None:
            out.view(groups, outputs, positions * size).baddbmm_(plus.left, plus.right.transpose(2, 3).flatten(2))
        return out.transpose(2, 3)

    def _tail_part(self, rows: Tensor, scale: Tensor | None, out: Tensor | None, beta: float) -> Tensor:
        """beta out + what the matrix makes of the directions that it does not keep: (n g, O, S, C)."""
        if self.space_tail is None:
            return torch.zeros_like(rows, memory_format=torch.contiguous_format) if out is None else out.mul_(beta)
        tail = self.space_tail if scale is None else self.space_tail * scale[..., None]  # (n g, 1, S, S)
        if out is None:
            return rows * tail if rows.shape[2] == 1 else tail @ rows
        if rows.shape[2] == 1:
            return out.mul_(beta).addcmul_(rows, tail)
        flat = tail.expand(-1, rows.shape[1], -1, -1).flatten(0, 1)
        out.flatten(0, 1).baddbmm_(flat, rows.flatten(0, 1), beta=beta)
        return out
