"""Layers of equal shape, whose R are one batch: their state, and how a refresh moves it.

On a GPU the products of a step are small, and what they cost is their launches: one launch serves every layer of a
group. On a CPU a group is one layer (see `_STACKED_ELEMENTS`).
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_decor.config import DecorConfig
from timm_decor.engine.coordinates import Move, StepOnW, moves, transformed, write
from timm_decor.engine.optimizers import LINEAR
from timm_decor.engine.shards import weight_of
from timm_decor.layers import DecorLayer, Outside
from timm_decor.moments import OUTPUT_MOMENT, centred, gradient_moment, looked_at, mean_correlation, moment_shape
from timm_decor.plan import LayerPlan
from timm_decor.reporting import AttachedRow
from timm_decor.rules import RULES, of_layers
from timm_decor.shape import parts
from timm_decor.structures import Sides
from timm_decor.structures.base import selected

Norms = Mapping[nn.Module, nn.Module]  # the BatchNorm behind a layer

# Weights are stacked for a step up to this many elements: 64 MiB in float32. Stacking saves launches; there are none on
# a CPU, where it would only copy.
_STACKED_ELEMENTS = {"cpu": 0}
_STACKED_ELEMENTS_ELSEWHERE = 2**24


class Refreshed(NamedTuple):
    """A refresh of a group that has not been accepted yet, and which of its layers can take it.

    Attributes:
        sides: L and R of all layers.
        moments: that they came from.
        moves: what else changes with them, each with the layers that it is of.
        flags: (3, n) bool on the group's device: layers that can move; that saw rows in training mode, all of them
            finite; some of whose inputs were not zero.
    """

    sides: dict[str, Tensor]
    moments: dict[str, Tensor]
    moves: list[tuple[Sequence[int], Move]]
    flags: Tensor


class LayerGroup:
    """n layers of equal shape and plan on one optimizer, with their R.

    Args:
        layers: (name, layer) pairs.
        optimizer: that holds the layers' weights.
        config: of the decorrelation.
        plan: of each layer.
        norms: the BatchNorm behind a layer, of those that have one.

    Attributes:
        plan: of each layer.
        names: of the layers in the model.
        layers: whose weights are A = L W R.
        weights: theirs, as far as they are on this process.
        sides: L and R of all of them; the identity before the first refresh.
        moments: the averaged statistics that they were last refreshed with, by name; those of the outputs, which are
            looked at between refreshes, as they are now.
        refreshes: of each layer's R so far.
        skips: refreshes of each layer that were due but left R alone.
        late: layers that had seen nothing at the last refresh: they record until the next one, because it may be that
            they have no part in the steps that end with one.
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, DecorLayer]],
        optimizer: Optimizer,
        config: DecorConfig,
        plan: LayerPlan,
        norms: Norms,
    ) -> None:
        self.names, self.layers = [name for name, _ in layers], [layer for _, layer in layers]
        self.plan = plan
        self._optimizer, self._config, self._rule = optimizer, config, RULES[plan.rule](config)
        self._norms = [norms.get(layer) for layer in self.layers]
        self._recorded = self._rule.recorded(plan.structure_type, plan.shape, any(self._norms))
        self.weights = [weight_of(layer) for layer in self.layers]
        weight = self.layers[0].weight
        self._device = weight.device
        self._place = self.weights[0].place
        one = plan.identity(weight.device)
        self.sides: Sides = one.with_tensors({name: _repeated(t, len(layers)) for name, t in one.tensors().items()})
        self._here: tuple[Sides, Sides] | None = None  # those, and what they are for the rows that are here
        self.moments = {name: _repeated(t, len(layers)) for name, t in plan.first_moments(weight.device).items()}
        self.refreshes, self.skips = [0] * len(layers), [0] * len(layers)
        self.late: list[int] = []

    @property
    def is_misplaced(self) -> bool:
        """Whether a weight was moved to another device or precision, or cut, since this group was made."""
        return any(weight.place != self._place for weight in self.weights)

    def active(self, held: Container[int]) -> list[int]:
        """Which layers take part in a step: those with a gradient.

        Args:
            held: ids of the parameters that the optimizer steps on; a weight that was replaced is none of them.
        """
        parameters = [weight.parameter for weight in self.weights]
        return [i for i, p in enumerate(parameters) if p.grad is not None and id(p) in held]

    def idle(self, held: Container[int]) -> list[int]:
        """Which layers take no part in a step, but may in others: R follows what they saw; `held` as for `active`."""
        parameters = [weight.parameter for weight in self.weights]
        return [i for i, p in enumerate(parameters) if p.grad is None and p.requires_grad and id(p) in held]

    def sides_of(self, index: Sequence[int], sides: dict[str, Tensor] | None = None) -> Sides:
        """L and R of some layers: the present ones if none are given."""
        if len(index) == len(self.layers):
            return self.sides if sides is None else self.sides.with_tensors(sides)
        tensors = self.sides.tensors() if sides is None else sides
        return self.sides.with_tensors(selected(tensors, len(self.layers), index))

    def sides_here(self, index: Sequence[int], sides: dict[str, Tensor] | None = None) -> Sides:
        """The same, as they act on the rows that are on this process."""
        whole, weight = self.sides_of(index, sides), self.weights[0]
        if whole is not self.sides:
            return weight.sides(whole, len(index))
        if self._here is None or self._here[0] is not whole:
            self._here = whole, weight.sides(whole, len(index))  # kept: they know their powers
        return self._here[1]

    def start_recording(self, on_outside: Outside) -> None:
        """Record the statistics of the next training forward passes; see `DecorMixin.start_recording`."""
        for i, layer in enumerate(self.layers):
            if not (i in self.late and layer.recording):
                self._start(i, on_outside)

    def stop_recording(self) -> None:
        """Record no more, but for those that are late."""
        for i, layer in enumerate(self.layers):
            if i not in self.late:
                layer.stop_recording()
                continue
            if not layer.recording:
                self._start(i, None)
            layer.on_outside = None  # steps of the optimizer do not end what this one records

    def begin_late(self, late: Sequence[int]) -> None:
        """A refresh found that those had seen nothing, or nothing that is finite: they record anew."""
        self.late = list(late)
        for i in late:
            self._start(i, None)

    def _start(self, position: int, on_outside: Outside | None) -> None:
        layer, weight = self.layers[position], self.weights[position]
        stored = None if weight.cut is None else weight.parameter
        layer.start_recording(self._recorded, self._config.sample, self._config.max_rows, on_outside, stored)

    def look_at_outputs(self, index: Sequence[int]) -> Tensor:
        """The running moment of the output errors with this step's gradients; those that cannot be used are left out.

        Args:
            index: of the layers that have a gradient.
        """
        weights, r, shape = [self.weights[i] for i in index], self.sides_here(index).inputs, self.plan.shape
        gradients = [weight.local(weight.parameter.grad) for weight in weights]  # type: ignore[arg-type]
        channels = looked_at(shape)
        rows = weights[0].gathered(transformed(weights, lambda grad: r.errors(grad, channels), gradients))
        with torch.autocast(rows.device.type, enabled=False):
            fresh = parts(gradient_moment(rows), len(index))
        of_layers = parts(self.moments[OUTPUT_MOMENT], len(self.layers))
        every = len(index) == len(self.layers)  # an index would make a GPU wait for the host
        old = of_layers if every else of_layers[list(index)]
        usable = torch.isfinite(fresh).flatten(2).all(2)[..., None, None]
        new = torch.where(usable, fresh.lerp(old, self._config.output_decay), old)
        if not every:
            new = of_layers.index_copy(0, torch.tensor(list(index), device=new.device), new)
        return new.flatten(0, 1)

    def recorded(self) -> dict[str, Tensor]:
        """Sums over this process's rows: each wanted moment, and "rows", (n, 1)."""
        dtype, device = self.plan.dtype, self._device

        def of(layer: DecorLayer, name: str) -> Tensor:
            if layer.recording and name in layer.moments:  # a norm that is new behind it wants more
                return layer.moments[name].to(device, dtype)
            return torch.zeros(moment_shape(name, self.plan.shape), dtype=dtype, device=device)

        sums = {name: torch.cat([of(layer, name) for layer in self.layers]) for name in self._recorded}
        none = torch.zeros(1, dtype=dtype, device=device)  # of a layer that was frozen while the others recorded
        rows = [layer.rows.to(none) if layer.recording else none for layer in self.layers]
        return {**sums, "rows": torch.stack(rows)}

    def averaged(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """A refresh's moments from what `recorded` gave, summed over processes; NaN for a layer that saw no row."""
        averages = {name: totals[name] / of_layers(totals["rows"], totals[name]) for name in self._recorded}
        # A frozen norm's statistics are not the batch's, so that the gradient does see the mean.
        blind = [norm is not None and norm.training for norm in self._norms]
        rows = totals["rows"]
        return self._rule.averaged(averages, _flags(blind, rows.device).to(rows.dtype), self.plan.shape)

    def running(self, fresh: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, Tensor]:
        """The statistics to refresh L and R from.

        Args:
            fresh: of the inputs, from `averaged`.
            moments: the present ones, with this step's look at the outputs.
        """
        started = _flags([count > 0 for count in self.refreshes], self._device)
        return {**moments, **self._rule.running(moments, fresh, started)}

    def refreshed(self, moments: dict[str, Tensor], index: Sequence[int] | None = None) -> dict[str, Tensor]:
        """L and R of the layers in `index` (all if None) from `moments`; NaN where they cannot be used."""
        count = len(self.layers)
        index = range(count) if index is None else index
        sides, some = self.sides_of(index), moments if len(index) == count else selected(moments, count, index)
        r = self._rule.refreshed(sides.inputs, some)
        return Sides(r, sides.outputs.whitened(some, self._config.output_damping), sides.scale).tensors()

    def proposal(
        self,
        fresh: dict[str, Tensor],
        moments: dict[str, Tensor],
        sides: dict[str, Tensor],
        index: Sequence[int],
        idle: Sequence[int],
        step: StepOnW | None,
    ) -> Refreshed:
        """What a refresh comes to, and which layers can take it; nothing changes yet.

        Args:
            fresh: this step's averages of the inputs.
            moments: from `running`.
            sides: from `refreshed`, of all layers.
            index: of the layers that made this step.
            idle: of those that had no part in it.
            step: the former's, which has not landed; None if there is none.
        """
        count = len(self.layers)
        seen = self._finite(fresh)
        alive = torch.stack([parts(value, count).flatten(1).any(1) for value in fresh.values()]).all(0)
        can = seen & self._finite(sides)
        changes: list[tuple[Sequence[int], Move]] = []
        able = torch.zeros_like(can)
        for some in (index, idle):
            if not some:
                continue
            weights, old, new = [self.weights[i] for i in some], self.sides_here(some), self.sides_here(some, sides)
            ends = None
            if not self._config.preserve_function:
                ends = step.result() if step is not None and some is index else [weight.value for weight in weights]
            found = moves(weights, old, new, self._optimizer, ends)
            good = [parts(self.sides_of(some, sides).inputs.is_invertible(), len(some)).all(1)]
            good += [torch.isfinite(parts(values, len(some))).flatten(1).all(1) for _, values in found]
            able = able | self._scattered(torch.stack(good).all(0), some)
            changes += [(some, move) for move in found]
        return Refreshed(sides, moments, changes, torch.stack([can & able, seen, alive]))

    def accept(self, refreshed: Refreshed) -> None:
        """Take a refresh over, in those layers that can."""
        can = refreshed.flags[0]
        for index, (targets, values) in refreshed.moves:
            some = can if len(index) == len(self.layers) else can[list(index)]
            weights = [self.weights[i] for i in index]
            before = torch.cat([weight.grouped(t) for weight, t in zip(weights, targets, strict=True)])
            write(weights, _where(some, values.to(before), before), targets)
        old = self.sides.tensors()
        self.sides = self.sides.with_tensors({n: _where(can, value, old[n]) for n, value in refreshed.sides.items()})
        self.moments = {name: _where(can, value, self.moments[name]) for name, value in refreshed.moments.items()}

    def scales(self) -> Tensor:
        """c of each layer, (n,)."""
        assert self.sides.scale is not None
        return parts(self.sides.scale, len(self.layers)).flatten(1)[:, 0]

    def rescale(self, scale: Tensor) -> None:
        """Give the layers whose R was refreshed another scale: the number, where it is finite. A does not move.

        State that is kept in A's coordinates (SGD's momentum) stays what it is in W's: m <- (c' / c) m.

        Args:
            scale: c', a scalar.
        """
        old = self.sides.scale
        assert old is not None
        scale = scale.to(old)  # of a model on several devices it was found on the first layer's
        started = _flags([count > 0 for count in self.refreshes], old.device)
        new = torch.where(of_layers(started, old) & torch.isfinite(scale), scale, old)
        for weight, factor in zip(self.weights, parts(new / old, len(self.layers)).flatten(1)[:, 0], strict=True):
            state = self._optimizer.state.get(weight.parameter, {})
            for name in LINEAR.get(type(self._optimizer), ()):
                if state.get(name) is not None:
                    weight.local(state[name]).mul_(factor)
        self.sides = Sides(self.sides.inputs, self.sides.outputs, new)

    def count(self, moved: list[bool], index: Sequence[int]) -> list[int]:
        """Note which layers' R moved; returns those that made the step and skipped."""
        index = [i for i in index if self.layers[i].recording]  # one that was unfrozen for this step was not asked
        for i in index:
            self.refreshes[i] += moved[i]
            self.skips[i] += not moved[i]
        return [i for i in index if not moved[i]]

    def report(self, position: int, condition: bool) -> AttachedRow:
        """One layer's row in the report."""
        sides, before, after = self.sides_of([position]), None, None
        if self.refreshes[position]:
            moments = centred(self.moments_of(position), self.plan.shape)
            before = mean_correlation(sides.inputs.input_moment(moments))
            after = mean_correlation(sides.inputs.output_moment(moments))
        return AttachedRow(
            self.names[position],
            self.plan.shape.dim,
            sides.name,
            before,
            after,
            sides.inputs.condition() if condition else None,
            self.refreshes[position],
            self.skips[position],
            self.layers[position].unrecorded,
        )

    def moments_of(self, position: int) -> dict[str, Tensor]:
        """One layer's moments."""
        return {name: parts(value, len(self.layers))[position] for name, value in self.moments.items()}

    def _scattered(self, flags: Tensor, index: Sequence[int]) -> Tensor:
        """(n,): the flags of some layers, false for the others."""
        if len(index) == len(self.layers):
            return flags
        every = torch.zeros(len(self.layers), dtype=torch.bool, device=flags.device)
        return every.index_copy(0, torch.tensor(list(index), device=flags.device), flags)

    def _finite(self, tensors: dict[str, Tensor]) -> Tensor:
        """(n,): whether all of a layer's entries are finite."""
        count = len(self.layers)
        return torch.stack([torch.isfinite(parts(t, count)).flatten(1).all(1) for t in tensors.values()]).all(0)


def _flags(values: Sequence[bool], device: torch.device) -> Tensor:
    """Bools on a device; filled in where all agree, because a copy from the host waits for a GPU."""
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], device=device)
    return torch.tensor(values, device=device)


def _repeated(tensor: Tensor, count: int) -> Tensor:
    return tensor.repeat(count, *[1] * (tensor.dim() - 1))


def _where(moved: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new`, (n g, ...), for the layers that moved, `old` for the others: also where `new` is NaN."""
    # contiguous, as a checkpoint gives it back: products of another memory layout round differently
    return torch.where(of_layers(moved, new), new, old).contiguous()


def grouped(
    layers: Sequence[tuple[str, DecorLayer]],
    optimizer: Optimizer,
    config: DecorConfig,
    plans: Mapping[str, LayerPlan],
    norms: Norms,
) -> list[LayerGroup]:
    """The layers in groups whose R can be one batch, in the order of their first members."""
    # SGD without momentum has no state to move at a refresh, so that one with and one without do not go together
    momentum = {id(p): group.get("momentum") for group in optimizer.param_groups for p in group["params"]}
    members: dict[Any, list[list[tuple[str, DecorLayer]]]] = {}
    for name, layer in layers:
        weight = layer.weight
        key = (plans[name], weight.shape, weight.dtype, weight.device, momentum.get(id(weight)), weight_of(layer).cut)
        batches = members.setdefault(key, [[]])
        limit = _STACKED_ELEMENTS.get(weight.device.type, _STACKED_ELEMENTS_ELSEWHERE)
        if batches[-1] and (len(batches[-1]) + 1) * weight.numel() > limit:
            batches.append([])
        batches[-1].append((name, layer))
    return [
        LayerGroup(batch, optimizer, config, plans[batch[0][0]], norms)
        for batches in members.values()
        for batch in batches
    ]
