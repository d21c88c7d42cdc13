"""`dbp`: the rule of decorrelated backpropagation (arXiv 2405.02385)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from timm_decor.rules.base import Rule, stable
from timm_decor.structures import Structure


class Dbp(Rule):
    """R <- R - decor_lr ((1 - kappa) C + kappa V) R. Knobs: `kappa`, `decor_lr`."""

    name = "dbp"

    def refreshed(self, r: Structure, moments: Mapping[str, Tensor]) -> Structure:
        kappa, decor_lr = self.config.kappa, self.config.decor_lr
        return r.iterated(moments, lambda matrix, sigma, _: dbp_step(matrix, sigma, kappa, decor_lr))


def dbp_step(r: Tensor, sigma: Tensor, kappa: float, decor_lr: float) -> Tensor:
    """One step of decorrelated backpropagation's rule for R (arXiv 2405.02385, eq. 3).

    With z = R x: C = <z z^T> without its diagonal, V = diag(<z_i^2> - 1),
    R <- R - decor_lr ((1 - kappa) C + kappa V) R.

    Two things the paper leaves to the choice of decor_lr are made safe here: a step that could overshoot is shortened
    (see `stable`), and an entry that never fires keeps its row of R, which would grow for ever.

    Args:
        r: R, (g, D, D).
        sigma: <x x^T>, (g, D, D), not centred, as in the paper.
        kappa: weight of the unit-variance term, in [0, 1].
        decor_lr: step size.

    Returns:
        The new R, (g, D, D).
    """
    zz = r @ sigma @ r.mT
    variance = zz.diagonal(dim1=-2, dim2=-1)
    correlation = zz - torch.diag_embed(variance)
    excess = torch.where(variance > 0, variance - 1, 0.0)
    # Both multiply from the left: V scales the rows of R.
    step = (1 - kappa) * correlation + torch.diag_embed(kappa * excess)
    return r - stable(decor_lr, step) * (step @ r)
