"""Layers of equal shape, whose R are one batch: their state, their steps and how a refresh moves them.

On a GPU the products of a step are small, and what they cost is their launches: one launch serves every layer of a
group. On a CPU a group is one layer (see `_STACKED_ELEMENTS`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_decor.auto import SeenLayer
from timm_decor.config import DecorConfig
from timm_decor.coordinates import coordinates_for, transformed, write
from timm_decor.layers import DecorLayer
from timm_decor.outputs import BothSides, gradient_moment
from timm_decor.reporting import AttachedRow
from timm_decor.rules import normalized
from timm_decor.shape import MEAN, OUTPUT_MOMENT, LayerShape, Pace, moment_shape, parts
from timm_decor.statistics import at_least_float32, mean_correlation, mean_moment
from timm_decor.structure import Structure, identity, input_moments, selected, stacked

Norms = Mapping[nn.Module, nn.Module]  # the BatchNorm behind a layer

# Weights are stacked for a step up to this many elements: 64 MiB in float32. Stacking saves launches; there are none on
# a CPU, where it would only copy.
_STACKED_ELEMENTS = {"cpu": 0}
_STACKED_ELEMENTS_ELSEWHERE = 2**24


class Refreshed(NamedTuple):
    """What one refresh of a group came to, on the group's device: which layers moved, and why the others did not.

    Attributes:
        moved: (n,) bool.
        seen: (n,) bool, whether the layer saw rows in training mode, all of them finite.
        alive: (n,) bool, whether some of its inputs were not zero.
    """

    moved: Tensor
    seen: Tensor
    alive: Tensor


class LayerGroup:
    """n layers of equal shape on one optimizer, with their R.

    Args:
        layers: (name, layer) pairs.
        optimizer: that holds the layers' weights.
        config: of the decorrelation.
        norms: the BatchNorm behind a layer, of those that have one.

    Attributes:
        config: of the decorrelation; where "auto" has chosen, with what it chose.
        names: of the layers in the model.
        layers: whose weights are A = W R between steps.
        shape: of each layer.
        r: R of all of them, with L where the outputs are decorrelated; the identity before the first refresh.
        moments: the averaged statistics that R was last refreshed with, by name; zeros before the first refresh.
        refreshes: of each layer's R so far.
        skips: refreshes of each layer that were due but left R alone.
    """

    def __init__(
        self, layers: Sequence[tuple[str, DecorLayer]], norms: Norms, optimizer: Optimizer, config: DecorConfig
    ) -> None:
        self.names = [name for name, _ in layers]
        self.layers = [layer for _, layer in layers]
        self._norms = [norms.get(layer) for layer in self.layers]
        self.shape: LayerShape = self.layers[0].decor_shape
        self._like = at_least_float32(self.layers[0].weight.detach()[:0])
        self.choose(config)
        self.refreshes, self.skips = [0] * len(layers), [0] * len(layers)
        self._coordinates = coordinates_for(optimizer)
        self._active: list[int] = []  # layers whose weight and gradient are in W's coordinates just now

    def choose(self, config: DecorConfig) -> None:
        """Start again from R = I, in the structure that the config names."""
        self.config = config
        self.r: Structure = stacked([identity(config, self.shape, self._like)] * len(self.layers))
        # "auto" only counts rows, until it is told what to be
        self.wanted = () if config.structure == "auto" else input_moments(config, self.shape)
        self.moments = {
            name: self._like.new_zeros(moment_shape(name, self.shape)).repeat(len(self.layers), 1, 1)
            for name in self.wanted
        }
        if self.wanted and self._centres:
            self.wanted += (MEAN,)
        if isinstance(self.r, BothSides):
            # from the identity, which is no opinion: the first gradients of a zero-initialised branch are zero
            eye = torch.eye(self.shape.outputs, dtype=self._like.dtype, device=self._like.device)
            self.moments[OUTPUT_MOMENT] = eye.repeat(len(self.layers) * self.shape.groups, 1, 1)

    def seen(self, rows: float) -> SeenLayer:
        """The group as `auto.plan` asks for it, with the rows that a layer has in one process's part of a step."""
        products = 1 if self._coordinates.kind == "linear" else 2
        return SeenLayer(self.shape, rows, products, len(self.layers))

    def start_recording(self) -> None:
        """Record the statistics of the next training forward passes; where "auto" is to choose, every row's number."""
        sample = 1.0 if self.config.structure == "auto" else self.config.sample
        for layer in self.layers:
            layer.start_recording(self.wanted, sample, self.config.max_rows)

    def stop_recording(self) -> None:
        """Record no more."""
        for layer in self.layers:
            layer.stop_recording()

    def enter(self, look: bool) -> None:
        """Before the optimizer's step: into W's coordinates, those layers that have a gradient.

        Args:
            look: let this step's gradient into the moment of the output errors.
        """
        self._active = [i for i, layer in enumerate(self.layers) if layer.weight.grad is not None]
        if self._active:
            if look and isinstance(self.r, BothSides):
                self._look_at_outputs()
            self._coordinates.enter(self._active_layers, self._active_r)

    def _look_at_outputs(self) -> None:
        """Let the gradients into the running moment of the output errors; one that cannot be used leaves it alone."""
        active_r = self._active_r
        assert isinstance(active_r, BothSides)
        gradients = [layer.weight.grad for layer in self._active_layers]
        rows = transformed(self._active_layers, active_r.r.apply_transposed, gradients)  # type: ignore[arg-type]
        with torch.autocast(rows.device.type, enabled=False):
            fresh = parts(gradient_moment(rows.transpose(2, 3).flatten(2)), len(self._active))
        of_layers = parts(self.moments[OUTPUT_MOMENT], len(self.layers))
        every = len(self._active) == len(self.layers)  # an index would make a GPU wait for the host
        old = of_layers if every else of_layers[self._active]
        usable = torch.isfinite(fresh).flatten(2).all(2)[..., None, None]
        new = torch.where(usable, fresh.lerp(old, self.config.output_decay), old)
        if not every:
            new = of_layers.index_copy(0, torch.tensor(self._active, device=new.device), new)
        self.moments[OUTPUT_MOMENT] = new.flatten(0, 1)

    def leave(self) -> None:
        """After it: what the step made of W is taken out of the weights; `write` must follow."""
        if self._active:
            self._coordinates.leave(self._active_layers)

    def write(self) -> None:
        """Weight <- W R."""
        if self._active:
            self._coordinates.write(self._active_layers, self._active_r)
        self._active = []

    def abandon(self) -> bool:
        """Undo a step that began and never ended; returns whether there was one."""
        if not self._active:
            return False
        self._coordinates.abandon(self._active_layers, self._active_r)
        self._active = []
        return True

    def recorded(self) -> dict[str, Tensor]:
        """Sums over this process's rows: each wanted moment, and "rows", (n, 1)."""
        like = self._like
        sums = {
            name: torch.cat(
                [
                    layer.moments[name].to(like)
                    if name in layer.moments
                    else like.new_zeros(moment_shape(name, self.shape))
                    for layer in self.layers
                ]
            )
            for name in self.wanted
        }
        return {**sums, "rows": torch.stack([layer.rows for layer in self.layers]).to(like)}

    def averaged(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Averages over rows of what `recorded` gave, summed over processes; NaN for a layer that saw no row.

        A BatchNorm behind the layer takes away what the mean input comes to, so that errors add up to zero over a batch
        and the gradient is that of centred inputs: their moment is the one to whiten, unless the norm is frozen.
        """
        moments = {name: totals[name] / _rows_of(totals["rows"], totals[name]) for name in self.wanted}
        if not self._centres:
            return moments
        mean = moments.pop(MEAN)
        blind = mean.new_tensor([float(norm is not None and norm.training) for norm in self._norms])
        return {
            name: moment - _rows_of(blind, moment) * mean_moment(name, mean, self.shape)
            for name, moment in moments.items()
        }

    def running(self, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
        """The statistics to refresh R from: those of this step, or `whiten`'s running average that they enter."""
        if self.config.rule != "whiten":
            return {**self.moments, **fresh}
        # In units of the mean eigenvalue, so that a batch of large inputs does not outweigh the others.
        unit = {name: normalized(moment) for name, moment in fresh.items()}
        like = next(iter(unit.values()))
        weight = like.new_tensor([1 - self.config.stat_decay if refreshes else 1.0 for refreshes in self.refreshes])
        averaged = {name: self.moments[name].lerp(new, _rows_of(weight, new)) for name, new in unit.items()}
        return {**self.moments, **averaged}

    def refreshed(self, moments: dict[str, Tensor], pace: Pace, index: Sequence[int] | None = None) -> Structure:
        """R of the layers in `index` (all if None) after a refresh from `moments`; NaN where they cannot be used."""
        if index is None:
            return self.r.refreshed(moments, self.config, pace)
        count = len(self.layers)
        some = {name: parts(value, count)[list(index)].flatten(0, 1) for name, value in moments.items()}
        return selected(self.r, count, index).refreshed(some, self.config, pace)

    def accept(self, fresh: dict[str, Tensor], moments: dict[str, Tensor], r: Structure) -> Refreshed:
        """Move R, between the coordinates' `leave` and `write`, in those layers that can and that made this step.

        Args:
            fresh: this step's averages.
            moments: from `running`.
            r: from `refreshed`, of all layers.
        """
        count = len(self.layers)
        seen = self._finite(fresh)
        alive = torch.stack([parts(value, count).flatten(1).any(1) for value in fresh.values()]).all(0)
        moved = seen & self._finite(r.tensors())
        if len(self._active) < count:
            moved &= torch.tensor([i in self._active for i in range(count)], device=moved.device)
        if self._active:
            moves = self._coordinates.moved(self._active_layers, self._active_r, self._chosen(r), self._preserve)
            for _, values in moves:
                finite = torch.isfinite(parts(values, len(self._active))).flatten(1).all(1)
                moved[self._active] &= finite
            for targets, values in moves:
                before = torch.cat([layer.grouped(t) for layer, t in zip(self._active_layers, targets, strict=True)])
                write(self._active_layers, _where(moved[self._active], values.to(before), before), targets)
        old = self.r.tensors()
        self.r = r.from_tensors({name: _where(moved, value, old[name]) for name, value in r.tensors().items()})
        self.moments = {name: _where(moved, value, self.moments[name]) for name, value in moments.items()}
        return Refreshed(moved, seen, alive)

    def count(self, moved: list[bool]) -> list[int]:
        """Note which layers' R moved; returns the active ones that skipped."""
        for i in self._active:
            self.refreshes[i] += moved[i]
            self.skips[i] += not moved[i]
        return [i for i in self._active if not moved[i]]

    def state(self, index: int) -> dict[str, Any]:
        """Tensors and numbers that continue one layer exactly; `load_state` takes them back."""
        layer, r = self.layers[index], selected(self.r, len(self.layers), [index])
        with torch.no_grad():
            coordinates = self._coordinates.state(layer, r)
        return {
            "shape": list(layer.weight.shape),
            "structure": self.config.structure,
            "rank": self.config.rank,
            "r": dict(r.tensors()),
            "moments": self._moments_of(index),
            "kind": self._coordinates.kind,
            "coordinates": coordinates,
            # inputs that no refresh has used yet: there are some after a step that a gradient scaler skipped
            "recorded": layer.recorded(),
            "refreshes": self.refreshes[index],
            "skips": self.skips[index],
        }

    @property
    def _centres(self) -> bool:
        return self.config.center and self.config.rule == "whiten" and any(norm is not None for norm in self._norms)

    @property
    def kind(self) -> str:
        """Of the coordinates; a state of the other kind cannot be loaded."""
        return self._coordinates.kind

    def load_state(self, saved: list[dict[str, Any]]) -> None:
        """Take over what `state` gave of each layer, on the weights' device."""
        self.load_r(saved)
        with torch.no_grad():
            for layer, entry in zip(self.layers, saved, strict=True):
                self._coordinates.load_state(layer, entry["coordinates"])

    def load_r(self, saved: list[dict[str, Any]]) -> None:
        """Take over R and its statistics alone; before the first step, when the coordinates hold nothing yet."""
        device = self.layers[0].weight.device
        self.choose(dataclasses.replace(self.config, structure=saved[0]["structure"], rank=saved[0]["rank"]))

        def together(key: str) -> dict[str, Tensor]:
            return {
                name: torch.cat([entry[key][name].to(device, copy=True) for entry in saved]) for name in saved[0][key]
            }

        # What the file has of the other side is left, and what it lacks starts from the identity: SGD and AdamW can
        # begin with each other's R.
        tensors, known = self.r.tensors(), together("r")
        self.r = self.r.from_tensors({name: known.get(name, value) for name, value in tensors.items()})
        known = together("moments")
        self.moments = {name: known.get(name, value) for name, value in self.moments.items()}
        self.refreshes, self.skips = ([entry[key] for entry in saved] for key in ("refreshes", "skips"))

    def restore_recorded(self, saved: list[dict[str, Any]]) -> None:
        """Go on recording where the state was saved; recording must have started."""
        for layer, entry in zip(self.layers, saved, strict=True):
            layer.restore_recorded(entry["recorded"])

    def report(self, index: int, condition: bool) -> AttachedRow:
        """One layer's row in the report."""
        r, before, after = selected(self.r, len(self.layers), [index]), None, None
        if self.refreshes[index]:
            moments = self._moments_of(index)
            before = mean_correlation(r.input_moment(moments))
            after = mean_correlation(r.output_moment(moments))
        structure = self.r.name
        counts = self.refreshes[index], self.skips[index]
        return AttachedRow(
            self.names[index], self.shape.dim, structure, before, after, r.condition() if condition else None, *counts
        )

    @property
    def _preserve(self) -> bool:
        return self.config.preserve_function

    @property
    def _active_layers(self) -> list[DecorLayer]:
        return [self.layers[i] for i in self._active]

    @property
    def _active_r(self) -> Structure:
        return self._chosen(self.r)

    def _chosen(self, r: Structure) -> Structure:
        """r, of the active layers."""
        return r if len(self._active) == len(self.layers) else selected(r, len(self.layers), self._active)

    def _moments_of(self, index: int) -> dict[str, Tensor]:
        return {name: parts(value, len(self.layers))[index] for name, value in self.moments.items()}

    def _finite(self, tensors: dict[str, Tensor]) -> Tensor:
        """(n,): whether all of a layer's entries are finite."""
        count = len(self.layers)
        return torch.stack([torch.isfinite(parts(t, count)).flatten(1).all(1) for t in tensors.values()]).all(0)


def _rows_of(per_layer: Tensor, like: Tensor) -> Tensor:
    """One value a layer, (n,) or (n, 1), as a factor of `like`, (n g, ...)."""
    groups = len(like) // len(per_layer)
    return per_layer.flatten().repeat_interleave(groups).view(-1, *[1] * (like.dim() - 1))


def _where(moved: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new`, (n g, ...), for the layers that moved, `old` for the others: also where `new` is NaN."""
    # contiguous, as a checkpoint gives it back: products of another memory layout round differently
    return torch.where(_rows_of(moved, new), new, old).contiguous()


def grouped(
    layers: Sequence[tuple[str, DecorLayer]], norms: Norms, optimizer: Optimizer, config: DecorConfig
) -> list[LayerGroup]:
    """The layers in groups whose R can be one batch, in the order of their first members."""
    # SGD without momentum has no state to move at a refresh, so that one with and one without do not go together
    momentum = {id(p): group.get("momentum") for group in optimizer.param_groups for p in group["params"]}
    members: dict[Any, list[list[tuple[str, DecorLayer]]]] = {}
    for name, layer in layers:
        weight = layer.weight
        key = (layer.decor_shape, weight.shape, weight.dtype, weight.device, momentum[id(weight)])
        batches = members.setdefault(key, [[]])
        limit = _STACKED_ELEMENTS.get(weight.device.type, _STACKED_ELEMENTS_ELSEWHERE)
        if batches[-1] and (len(batches[-1]) + 1) * weight.numel() > limit:
            batches.append([])
        batches[-1].append((name, layer))
    return [LayerGroup(batch, norms, optimizer, config) for batches in members.values() for batch in batches]
