"""`whiten`: damped whitening of a running second moment, the default."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from timm_decor.moments import MEAN, mean_moment, normalized
from timm_decor.rules.base import Rule, of_layers
from timm_decor.shape import LayerShape, parts
from timm_decor.structures import Structure

_ROUNDING = 16  # units in the last place, by which sums of a batch's squares and of its mean may differ


class Whiten(Rule):
    """R^T R = (Sigma / mean eigenvalue + damping I)^-1. Knobs: `damping`, `stat_decay`, `center`."""

    name = "whiten"
    gives_inverse = True
    both_sides = True

    def recorded(self, structure: type[Structure], shape: LayerShape, before_norm: bool) -> tuple[str, ...]:
        mean = (MEAN,) if self.config.center and before_norm else ()
        return (*structure.moments(shape), *mean)

    def averaged(self, averages: dict[str, Tensor], blind: Tensor, shape: LayerShape) -> dict[str, Tensor]:
        """Centred where a BatchNorm takes away what the mean input comes to.

        Errors then add up to zero over a batch, and the gradient is that of centred inputs: their moment is the one to
        whiten.
        """
        mean = averages.pop(MEAN, None)
        if mean is None:
            return averages
        return {
            name: _cleared(moment - of_layers(blind, moment) * mean_moment(name, mean, shape), moment)
            for name, moment in averages.items()
        }

    def running(self, old: Mapping[str, Tensor], fresh: Mapping[str, Tensor], started: Tensor) -> dict[str, Tensor]:
        # In units of the mean eigenvalue, so that a batch of large inputs does not outweigh the others.
        unit = {name: normalized(moment) for name, moment in fresh.items()}
        weight = 1 - self.config.stat_decay * started.to(next(iter(unit.values())))
        mixed = {name: old[name].lerp(new, of_layers(weight, new)) for name, new in unit.items()}
        return {name: _or_before(new, old[name], fresh[name], len(started)) for name, new in mixed.items()}

    def refreshed(self, r: Structure, moments: Mapping[str, Tensor]) -> Structure:
        return r.whitened(moments, self.config.damping)


def _or_before(mixed: Tensor, old: Tensor, fresh: Tensor, count: int) -> Tensor:
    """With the moment of before for a group without inputs, where other groups of its layer have some.

    At first that is the identity, which is no opinion. A layer without any inputs stays NaN.
    """
    if len(fresh) == count:
        return mixed
    trace, known = (each.diagonal(dim1=-2, dim2=-1).sum(-1) for each in (fresh, old))
    others = of_layers(parts(trace > 0, count).any(1), trace)
    eye = torch.eye(old.shape[-1], dtype=old.dtype, device=old.device)
    before = torch.where((known > 0)[:, None, None], old, eye)
    return torch.where((others & (trace == 0))[:, None, None], before, mixed)


def _cleared(centred: Tensor, moment: Tensor) -> Tensor:
    """Zero where nothing but rounding is left of a moment: inputs that are all the same have none to whiten."""
    left, whole = (each.diagonal(dim1=-2, dim2=-1).sum(-1).abs() for each in (centred, moment))
    is_noise = left <= _ROUNDING * torch.finfo(moment.dtype).eps * whole
    return torch.where(is_noise[:, None, None], torch.zeros_like(centred), centred)
