"""What a structure of R is: few verbs, and slow, correct defaults for most of them. Pure.

Weights come as (n g, O, C, S): n layers of equal shape (one, or a batch of them), g groups, O outputs and C inputs a
group, S = kh * kw kernel positions (1 for a linear layer). R acts on the last two axes, D = C * S long: `apply` is W R,
so that y = (W R) x = W (R x). Every tensor of R has the layers on its first axis, n equal parts one after the other.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from timm_decor.moments import reported_entries
from timm_decor.shape import LayerShape, parts

if TYPE_CHECKING:
    from typing_extensions import Self

# (R, Sigma, <x> or None) to the new R: how a rule that iterates moves a matrix.
MatrixStep = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


class LowRank(NamedTuple):
    """left @ right, (n g, O, r) and (n g, r, C, S): a weight of rank r."""

    left: Tensor
    right: Tensor

    def product(self) -> Tensor:
        """(n g, O, C, S)."""
        return (self.left @ self.right.flatten(2)).unflatten(2, self.right.shape[2:])


class Structure(ABC):
    """R of n layers of equal shape. A new one needs `moments`, `identity`, `dense` and a way to be refreshed.

    Args:
        shape: of each layer.
        tensors: what is kept of R, by name: all that a checkpoint holds of it.
    """

    name: ClassVar[str]

    def __init__(self, shape: LayerShape, tensors: Mapping[str, Tensor]) -> None:
        self.shape, self._tensors = shape, dict(tensors)

    @classmethod
    @abstractmethod
    def moments(cls, shape: LayerShape) -> tuple[str, ...]:
        """Names of the second moments that a refresh needs; see `moments.moment_shape`."""

    @classmethod
    @abstractmethod
    def identity(cls, shape: LayerShape, rank: int, like: Tensor, inverse: bool) -> Self:
        """R = I of one layer, in `like`'s dtype and on its device.

        Args:
            shape: of the layer.
            rank: directions kept, for structures that keep some.
            like: whose dtype and device R takes.
            inverse: keep R^-1 beside R, which the rule gives with it.
        """

    @classmethod
    def largest_factor(cls, shape: LayerShape) -> int:
        """Side of the largest matrix that a refresh has to factor."""
        return shape.dim

    @classmethod
    def refresh_work(cls, shape: LayerShape, rank: int) -> int:
        """Operations of a layer's refresh, about: processes share layers out by it."""
        return shape.groups * cls.largest_factor(shape) ** 3

    @classmethod
    def unfit(cls, shape: LayerShape) -> str:
        """Why a layer cannot have this structure; "" if it can."""
        return ""

    @abstractmethod
    def dense(self) -> Tensor:
        """R as (n g, D, D), whatever the structure."""

    def whitened(self, moments: Mapping[str, Tensor], damping: float) -> Self:
        """Damped whitening: R^T R = (Sigma / mean eigenvalue + damping I)^-1; NaN where Sigma cannot be used."""
        raise NotImplementedError(f"structure {self.name!r} has no damped whitening")

    def iterated(self, moments: Mapping[str, Tensor], step: MatrixStep) -> Self:
        """R moved by a rule that iterates on its matrix."""
        raise NotImplementedError(f"structure {self.name!r} has no matrix to iterate on")

    def apply(self, w: Tensor, scale: Tensor | None = None) -> Tensor:
        """scale W R, shape of w: (n g, O, C, S); scale: (n g, 1, 1), or None for 1, here and below."""
        return times((w.flatten(2) @ self.dense()).view(w.shape), scale)

    def apply_transposed(self, grad: Tensor, scale: Tensor | None = None) -> Tensor:
        """scale G R^T: the gradient for W when G is the gradient for A = W R. Shape of grad: (n g, O, C, S)."""
        return times((grad.flatten(2) @ self.dense().mT).view(grad.shape), scale)

    def apply_gram(self, grad: Tensor, scale: Tensor | None = None, plus: LowRank | None = None) -> Tensor:
        """scale G R^T R + (a term of low rank): the gradient for W, as a direction for A, (n g, O, C, S).

        Args:
            grad: G.
            scale: (n g, 1, 1), or None for 1.
            plus: what the output side adds, or None.
        """
        out = self.apply(self.apply_transposed(grad), scale)
        return out if plus is None else out + plus.product()

    def add_product(self, target: Tensor, w: Tensor, beta: float | Tensor, scale: Tensor | None = None) -> None:
        """target <- beta target + scale w R, in place; shape of both: (n g, O, C, S)."""
        target.mul_(beta).add_(self.apply(w, scale))

    def apply_inverse(self, a: Tensor) -> Tensor:
        """A R^-1, shape of a: (n g, O, C, S); NaN where R is singular."""
        return solved(self.dense(), a.flatten(2)).view(a.shape)

    def apply_inverse_transposed(self, w: Tensor) -> Tensor:
        """V R^-T, shape of w: the gradient for A when V is one for W."""
        return solved(self.dense().mT, w.flatten(2)).view(w.shape)

    def errors(self, grad: Tensor, channels: slice) -> Tensor:
        """G R^T at some input channels: what `moments.gradient_moment` looks at; (n g, O, fewer C, S)."""
        return self.apply_transposed(grad)[:, :, channels]

    def input_moment(self, moments: Mapping[str, Tensor]) -> Tensor:
        """<x x^T> of some of the entries, not all where there are too many: (n g, m, m)."""
        sigma = moments[self.moments(self.shape)[0]]
        index = reported_entries(sigma.shape[-1], sigma.device)
        return sigma[:, index][..., index]

    def output_moment(self, moments: Mapping[str, Tensor]) -> Tensor:
        """<z z^T> = R Sigma R^T of the same entries: (n g, m, m)."""
        sigma = moments[self.moments(self.shape)[0]]
        rows = self.dense()[:, reported_entries(sigma.shape[-1], sigma.device)]
        return rows @ sigma @ rows.mT

    def is_invertible(self) -> Tensor:
        """(n g,): whether R^-1 exists, as a step needs it."""
        inverse, info = torch.linalg.inv_ex(self.dense())
        return (info == 0) & torch.isfinite(inverse).flatten(1).all(1)

    def condition(self) -> float:
        """Condition number of R, the largest over groups."""
        return float(torch.linalg.cond(self.dense()).max())

    def of_groups(self, count: int, groups: slice) -> Self:
        """Of `count` layers' R that of some groups; what all groups of a layer share stays."""
        all_groups = self.shape.groups
        shape = dataclasses.replace(self.shape, groups=len(range(*groups.indices(all_groups))))
        return type(self)(shape, {n: of_groups(t, count, all_groups, groups) for n, t in self._tensors.items()})

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of R; `with_tensors` reads it back."""
        return dict(self._tensors)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """R of layers of the same shape, from what `tensors` gave."""
        return type(self)(self.shape, tensors)


def selected(tensors: Mapping[str, Tensor], count: int, index: Sequence[int]) -> dict[str, Tensor]:
    """Of tensors of `count` layers those of some, in the order of `index`."""
    return {name: parts(value, count)[list(index)].flatten(0, 1) for name, value in tensors.items()}


def of_groups(tensor: Tensor, count: int, all_groups: int, groups: slice) -> Tensor:
    """Of a tensor of `count` layers, (n g, ...), some groups of each; one that has no groups stays as it is."""
    of_layers = parts(tensor, count)
    return of_layers[:, groups].flatten(0, 1) if of_layers.shape[1] == all_groups else tensor


def times(out: Tensor, scale: Tensor | None) -> Tensor:
    """A product that nobody else holds, (n g, O, C, S), times a factor, (n g, 1, 1)."""
    return out if scale is None else out.mul_(scale[..., None])


def solved(matrix: Tensor, rows: Tensor) -> Tensor:
    """rows matrix^-1; NaN where the matrix is singular, which must not cost the others of a batch theirs."""
    out, info = torch.linalg.solve_ex(matrix, rows, left=False)
    return torch.where(info[..., None, None] == 0, out, float("nan"))
