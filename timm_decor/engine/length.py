"""How long a decorrelated step is: as long as the plain optimizer's, so that people keep their learning rate.

Whitening shortens a step (SGD's several times over, AdamW's by less). A scale c beside R and L makes up for it:
z = c R x, so that a step on A is c^k times as long, where k depends on the optimizer (`Power.exponent`). c is one
number for the network,

    c^k = |plain step| / |decorrelated step at c = 1|,

norms over all decorrelated layers, measured at the first step after each refresh: on another batch than R was made
from, on which it would look shorter than it is. At the first refresh of all it is that batch's, so that the next step
has a scale, and it is measured more often until the second one (DecorHandle._measure_due). This is norm
grafting (arXiv 2002.11803) as Distributed Shampoo has it (2309.06497), with one factor for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from timm_decor.engine.optimizers import Power

Lengths = tuple[Tensor, Tensor]  # squared lengths of each layer's step, (n,): the plain one's, the decorrelated one's


def scale(lengths: Sequence[Lengths], power: Power, total: Callable[[Tensor], Tensor]) -> Tensor:
    """c, a scalar; NaN where nothing can be said: no step, or none that is finite.

    Args:
        lengths: of all layers' steps, at c = 1.
        power: of the optimizer.
        total: makes sums over all rows of the weights of those over the rows that are here.
    """
    device = lengths[0][0].device
    plain, ours = total(torch.stack([torch.cat([each[side].to(device) for each in lengths]) for side in (0, 1)]))
    usable = torch.isfinite(plain) & torch.isfinite(ours) & (plain > 0) & (ours > 0)
    ratio = torch.where(usable, plain, 0).sum() / torch.where(usable, ours, 0).sum()
    found = ratio ** (0.5 / power.exponent)
    return torch.where(torch.isfinite(found) & (found > 0), found, float("nan"))
