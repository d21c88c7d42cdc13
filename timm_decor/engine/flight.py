"""A step in flight: one object that lands as a whole or is aborted as a whole.

Made when every other pre-hook has run, with everything that a step may change: until it lands, the engine's state is
that of before the step, and `abort` gives every decorrelated weight and gradient back. The optimizer's own state is
left as torch leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from timm_decor.engine.coordinates import StepOnW, step_type
from timm_decor.engine.group import LayerGroup, Refreshed
from timm_decor.engine.length import Lengths, scale
from timm_decor.engine.optimizers import Power
from timm_decor.engine.sharing import agreed, averaged, averaged_moments, processes, refreshed
from timm_decor.moments import OUTPUT_MOMENT


class StepInFlight:
    """One step of the optimizer, made on W.

    Args:
        groups: of all attached layers.
        optimizer: that steps.
        counts: whether this may be a step of the training; at a learning rate of zero it is none, nor without a single
            gradient, and changes no statistic.
        look: let this step's gradients into the moments of the output errors.
        power: the optimizer's.
        measures: find out how long this step is beside the plain one.

    Attributes:
        scale: with which this step would have been as long as the plain one, or NaN; None where nobody asked.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        optimizer: Optimizer,
        counts: bool,
        look: bool,
        power: Power,
        measures: bool = False,
    ) -> None:
        self.groups, self._power, self._measures = groups, power, measures
        self.scale: Tensor | None = None
        self._held = {id(p) for each in optimizer.param_groups for p in each["params"]}
        self.active = [group.active(self._held) for group in groups]
        self.idle: list[list[int]] = []  # known at a refresh, which alone asks
        # Not where there are other processes: they may have a gradient where this one has none.
        self.counts = counts and (any(self.active) or processes() > 1)
        # What a gradient scaler leaves with a fused optimizer, which then finds out on the device whether it steps.
        found = getattr(optimizer, "found_inf", None)
        self.skipped: Tensor | None = found != 0 if isinstance(found, Tensor) else None
        kind = step_type(optimizer)
        self._steps: dict[int, StepOnW] = {}  # by the group's number
        self._looked: dict[int, Tensor] = {}
        try:
            for number, (group, index) in enumerate(zip(groups, self.active, strict=True)):
                if not index:
                    continue
                if look and OUTPUT_MOMENT in group.moments:
                    self._looked[number] = group.look_at_outputs(index)
                step = kind([group.weights[i] for i in index], group.sides_here(index), optimizer, power, measures)
                self._steps[number] = step
                step.enter()
        except BaseException:
            self.abort()
            raise

    def leave(self) -> None:
        """The optimizer has stepped: the weights are kernels again, as they were before it; `land` must follow."""
        for step in self._steps.values():
            step.leave(self.skipped)
        if self._measures:
            self.scale = self._found([step.lengths() for step in self._steps.values()])

    def refresh(self, first: bool = False) -> list[Refreshed]:
        """What a refresh of L and R after this step comes to, for each group; nothing changes yet.

        Of all layers, so that processes whose layers have gradients at different times still reduce the same tensors.

        Args:
            first: the first one of all, for which the scale is found at once: the next step is not to be a shorter one.
        """
        self.idle = [group.idle(self._held) for group in self.groups]
        with torch.autocast(self.groups[0].layers[0].weight.device.type, enabled=False):
            fresh = averaged_moments(self.groups)
            pairs = zip(self.groups, fresh, strict=True)
            moments = [group.running(f, self._moments(i)) for i, (group, f) in enumerate(pairs)]
            sides = refreshed(self.groups, moments)
            if first:
                new = {i: self.groups[i].sides_here(self.active[i], sides[i]) for i in self._steps}
                self.scale = self._found([step.lengths(new[i]) for i, step in self._steps.items()])
            return agreed(
                self.groups,
                [
                    group.proposal(f, m, s, self.active[i], self.idle[i], self._steps.get(i))
                    for i, (group, f, m, s) in enumerate(zip(self.groups, fresh, moments, sides, strict=True))
                ],
            )

    def _found(self, lengths: list[Lengths]) -> Tensor:
        none = torch.full((), float("nan"), device=self.groups[0].layers[0].weight.device)
        return averaged(scale(lengths, self._power, self.groups[0].weights[0].total) if lengths else none)

    def land(self) -> None:
        """The weights move, and what was seen of the output errors stays."""
        for step in self._steps.values():
            step.land(self.skipped)
        for number, group in enumerate(self.groups):
            group.moments = self._moments(number)
        if self.skipped is not None and self.scale is not None:
            self.scale = torch.where(self.skipped.to(self.scale.device), float("nan"), self.scale)
        self._steps = {}

    def abort(self) -> None:
        """Weights and gradients as they were before this step."""
        for step in self._steps.values():
            step.abort()
        self._steps = {}

    def _moments(self, number: int) -> dict[str, Any]:
        before = self.groups[number].moments
        if number not in self._looked:
            return dict(before)
        looked = self._looked[number]
        if self.skipped is not None:  # other layers' gradients were finite, but of a step that is none
            looked = torch.where(self.skipped.to(looked.device), before[OUTPUT_MOMENT], looked)
        return {**before, OUTPUT_MOMENT: looked}
