"""The state of one attached layer: R, W, the running statistics; and how a refresh moves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from timm_decor.config import DecorConfig
from timm_decor.layers import DecorLayer
from timm_decor.reporting import AttachedRow
from timm_decor.rules import DegenerateMoment, normalized
from timm_decor.statistics import at_least_float32, mean_correlation
from timm_decor.structure import Structure, moment_shape


@dataclass
class LayerState:
    """R of one layer and what belongs to it.

    Attributes:
        name: the layer's name in the model.
        layer: the layer, whose weight is A = W R between steps.
        r: R.
        latent: W, in the weight's shape and precision; None until the first step, then W = A R^-1.
        version: of the weight when it was last written here: another one means that somebody else wrote it.
        moments: the averaged statistics that R was last refreshed with, by name.
        refreshes: refreshes of R so far.
        skips: refreshes that were due but left R alone.
    """

    name: str
    layer: DecorLayer
    r: Structure
    latent: Tensor | None = None
    version: int = -1
    moments: dict[str, Tensor] = field(default_factory=dict)
    refreshes: int = 0
    skips: int = 0

    def times(self, product: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        """product((g, O, C, S)) of a tensor shaped like the weight, in R's precision, in the weight's shape."""
        grouped = product(at_least_float32(self.layer.grouped(tensor)))
        out = torch.empty_like(tensor)
        self.layer.grouped(out).copy_(grouped)
        return out

    def write(self) -> None:
        """Weight <- W R."""
        weight = self.layer.weight
        assert self.latent is not None
        self.layer.grouped(weight).copy_(self.r.apply(at_least_float32(self.layer.grouped(self.latent))))
        self.version = weight._version

    def sync_latent(self) -> None:
        """Make W R equal the weight again where the weight was written elsewhere (a checkpoint, EMA, Lookahead)."""
        weight = self.layer.weight
        if self.latent is not None and self.version == weight._version:
            return
        # Loading a checkpoint writes what is there already: keep W then, for a resume that is exact to the bit.
        if self.latent is None or not torch.equal(self.times(self.r.apply, self.latent), weight):
            self.latent = self.times(self.r.apply_inverse, weight)
        self.version = weight._version

    def refresh(self, fresh: dict[str, Tensor], config: DecorConfig) -> None:
        """Move R by the config's rule; W follows where the function is to be preserved.

        Args:
            fresh: averaged moments of this step's inputs, by name.

        Raises:
            DegenerateMoment: the statistics are not usable; nothing has changed then.
        """
        _require_finite(fresh, "the input statistics are not finite")
        moments = fresh if config.rule == "dbp" else self._running_average(fresh, config.stat_decay)
        r = self.r.refreshed(moments, config)
        _require_finite(r.tensors(), "the new R is not finite")
        if config.preserve_function:
            assert self.latent is not None
            function = self.times(self.r.apply, self.latent)
            latent = self.times(r.apply_inverse, function)
            _require_finite({"W": latent}, "R is too close to singular")
            self.latent = latent
        self.r, self.moments = r, moments

    def _running_average(self, fresh: dict[str, Tensor], decay: float) -> dict[str, Tensor]:
        # In units of the mean eigenvalue, so that a batch of large inputs does not outweigh the others.
        unit = {name: normalized(moment) for name, moment in fresh.items()}
        return {name: self.moments[name].lerp(new, 1 - decay) if self.moments else new for name, new in unit.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that continue this layer exactly."""
        with torch.no_grad():
            self.sync_latent()
        return {
            "r": dict(self.r.tensors()),
            "moments": dict(self.moments),
            "latent": self.latent,
            "refreshes": self.refreshes,
            "skips": self.skips,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, on the weight's device."""
        weight = self.layer.weight

        def here(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(weight.device, copy=True) for name, tensor in tensors.items()}

        self.r = type(self.r).from_tensors(here(saved["r"]))
        self.moments = here(saved["moments"])
        self.latent = torch.empty_like(weight).copy_(saved["latent"])
        self.version = -1  # whether the weight is W R is seen at the next step
        self.refreshes, self.skips = saved["refreshes"], saved["skips"]

    def report(self) -> AttachedRow:
        """This layer's row in the report."""
        before = after = None
        if self.moments:
            before = mean_correlation(self.r.input_moment(self.moments))
            after = mean_correlation(self.r.output_moment(self.moments))
        dim = self.layer.decor_shape.dim
        return AttachedRow(self.name, dim, before, after, self.r.condition(), self.refreshes, self.skips)


def averaged_moments(states: list[LayerState]) -> list[dict[str, Tensor]]:
    """Each layer's recorded moments, averaged over the rows of all micro-batches and processes.

    One all-reduce, of the same size on every process whatever the processes saw. A layer that saw no row gets NaN.
    """
    totals = [_recorded(state) for state in states]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        tensors = [tensor for total in totals for tensor in total.values()]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = iter(flat.split([tensor.numel() for tensor in tensors]))
        totals = [{name: next(parts).view_as(tensor) for name, tensor in total.items()} for total in totals]
    return [{name: total[name] / total["rows"] for name in total if name != "rows"} for total in totals]


def _recorded(state: LayerState) -> dict[str, Tensor]:
    layer, shape = state.layer, state.layer.decor_shape
    like = at_least_float32(layer.weight.detach()[:0])
    sums = {
        name: layer.moments[name].to(like) if name in layer.moments else like.new_zeros(moment_shape(name, shape))
        for name in state.r.moments
    }
    return {**sums, "rows": like.new_full((1,), layer.rows)}


def _require_finite(tensors: dict[str, Tensor], otherwise: str) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise DegenerateMoment(otherwise)
