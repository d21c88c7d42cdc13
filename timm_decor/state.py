"""The state of one attached layer: R, W, the running statistics; and how a refresh moves them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from timm_decor.config import DecorConfig
from timm_decor.coordinates import Coordinates
from timm_decor.layers import DecorLayer
from timm_decor.reporting import AttachedRow
from timm_decor.rules import DegenerateMoment, normalized
from timm_decor.statistics import at_least_float32, mean_correlation
from timm_decor.structure import Structure, moment_shape


@dataclass(eq=False)  # compared by identity: its tensors have no truth value
class LayerState:
    """R of one layer and what belongs to it.

    Attributes:
        name: the layer's name in the model.
        layer: the layer, whose weight is A = W R between steps.
        r: R.
        coordinates: how the optimizer's step on A becomes one on W.
        moments: the averaged statistics that R was last refreshed with, by name.
        refreshes: refreshes of R so far.
        skips: refreshes that were due but left R alone.
    """

    name: str
    layer: DecorLayer
    r: Structure
    coordinates: Coordinates
    moments: dict[str, Tensor] = field(default_factory=dict)
    refreshes: int = 0
    skips: int = 0

    def refresh(self, fresh: dict[str, Tensor], config: DecorConfig) -> None:
        """Move R by the config's rule, between the coordinates' `leave` and `write`.

        Args:
            fresh: averaged moments of this step's inputs, by name.

        Raises:
            DegenerateMoment: the statistics are not usable; nothing has changed then.
        """
        _require_finite(fresh, "it saw no input in training mode, or none that is finite")
        moments = fresh if config.rule == "dbp" else self._running_average(fresh, config.stat_decay)
        try:
            r = self.r.refreshed(moments, config)
            _require_finite(r.tensors(), "the new R is not finite")
            self.coordinates.move(self.r, r, config.preserve_function)
        except torch.linalg.LinAlgError as error:
            raise DegenerateMoment(f"R is singular ({error})") from error
        self.r, self.moments = r, moments

    def _running_average(self, fresh: dict[str, Tensor], decay: float) -> dict[str, Tensor]:
        # In units of the mean eigenvalue, so that a batch of large inputs does not outweigh the others.
        unit = {name: normalized(moment) for name, moment in fresh.items()}
        return {name: self.moments[name].lerp(new, 1 - decay) if self.moments else new for name, new in unit.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that continue this layer exactly."""
        with torch.no_grad():
            coordinates = self.coordinates.state_dict(self.r)
        return {
            "shape": list(self.layer.weight.shape),
            "r": dict(self.r.tensors()),
            "moments": dict(self.moments),
            "kind": self.coordinates.kind,
            "coordinates": coordinates,
            "refreshes": self.refreshes,
            "skips": self.skips,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, on the weight's device."""
        device = self.layer.weight.device

        def here(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}

        self.r = type(self.r).from_tensors(here(saved["r"]))
        self.moments = here(saved["moments"])
        with torch.no_grad():
            self.coordinates.load_state_dict(saved["coordinates"])
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

    One all-reduce in the default process group, of the same size on every process whatever inputs each of them saw.
    A layer that saw no row gets NaN.
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
    return {**sums, "rows": layer.rows.to(like)}


def _require_finite(tensors: dict[str, Tensor], otherwise: str) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise DegenerateMoment(otherwise)
