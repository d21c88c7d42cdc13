"""`crgd`: the rule of "Correlations Are Ruining Your Gradient Descent" (arXiv 2407.10780)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from timm_decor.moments import MEAN
from timm_decor.rules.base import Rule, stable
from timm_decor.shape import LayerShape
from timm_decor.structures import Structure


class Crgd(Rule):
    """Centred inputs, gain-preserving normalisation, full correlation. Knob: `decor_lr`."""

    name = "crgd"

    def moments(self, structure: type[Structure], shape: LayerShape) -> tuple[str, ...]:
        return (*structure.moments(shape), MEAN)

    def refreshed(self, r: Structure, moments: Mapping[str, Tensor]) -> Structure:
        def step(matrix: Tensor, sigma: Tensor, mean: Tensor | None) -> Tensor:
            assert mean is not None, "crgd records it"
            return crgd_step(matrix, sigma, mean, self.config.decor_lr)

        return r.iterated(moments, step)


def crgd_step(r: Tensor, sigma: Tensor, mean: Tensor, decor_lr: float) -> Tensor:
    """One step of the rule.

    The statistics are centred, Sigma_c = <x x^T> - <x> <x>^T; with z = R (x - <x>) and C = <z z^T> without its
    diagonal, R <- g R', R' = (I - decor_lr C) R, where the diagonal g keeps each entry's variance:
    <z_i^2> = <(x_i - <x_i>)^2> ("gain-preserving": it decorrelates and does not whiten). An entry that never varies
    keeps its row of R'.

    The layer itself goes on to see x, not x - <x>: an ordinary kernel has no place for the mean, and a BatchNorm behind
    the layer makes the gradient blind to it.

    Args:
        r: R, (g, D, D).
        sigma: <x x^T>, (g, D, D).
        mean: <x>, (g, 1, D).
        decor_lr: step size.

    Returns:
        The new R, (g, D, D).
    """
    centred = sigma - mean.mT @ mean
    zz = r @ centred @ r.mT
    correlation = zz - torch.diag_embed(zz.diagonal(dim1=-2, dim2=-1))
    r = r - stable(decor_lr, correlation) * (correlation @ r)
    before = centred.diagonal(dim1=-2, dim2=-1)
    after = torch.einsum("gij,gjk,gik->gi", r, centred, r)
    varies = (before > 0) & (after > 0)
    gain = torch.where(varies, before / torch.where(varies, after, 1.0), 1.0).sqrt()
    return gain[..., None] * r
