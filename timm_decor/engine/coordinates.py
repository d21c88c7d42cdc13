"""How a step on W = L^-1 A R^-1 is made while the model's weight is A, and nothing keeps W between steps.

`General` asks nothing of the update rule: during the step the weight is W, and afterwards A moves by
L (W_after - W_before) R. `Decaying` is for optimizers that do nothing with a weight but decay it (AdamW, Muon): they
step from zero, and A is decayed directly; no W is formed. `Linear` is for optimizers whose update is linear in
gradient, weight and momentum (SGD): the step on W is then, in A's own terms, the step with gradient L L^T G R^T R. All
are the explicit step exactly; tests/test_equivalence.py holds them against it.

Each works on a batch of layers of equal shape, whose R are one batch as well: one product for all of them. An object
here is one batch's part of one step: made before it, and landed or aborted after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from timm_decor.engine.length import Lengths
from timm_decor.engine.optimizers import DECAYING, LINEAR, Power
from timm_decor.engine.shards import Weight
from timm_decor.moments import at_least_float32
from timm_decor.shape import parts
from timm_decor.structures import Sides

Product = Callable[[Tensor], Tensor]
Move = tuple[list[Tensor], Tensor]  # tensors shaped like the weights' rows here, and what they become: (n g, O, C, S)


def transformed(weights: Sequence[Weight], product: Product, sources: Sequence[Tensor]) -> Tensor:
    """product of tensors that are shaped like the weights' rows here, as one batch: (n g, O, C, S).

    It runs in R's precision, float32 or better, whatever the weights'.
    """
    with torch.autocast(sources[0].device.type, enabled=False):  # products with R lose too much in half precision
        rows = [weight.grouped(source) for weight, source in zip(weights, sources, strict=True)]
        return product(at_least_float32(rows[0] if len(rows) == 1 else torch.cat(rows)))


def unbatched(weights: Sequence[Weight], values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A batch, (n g, O, C, S), as tensors in shape, precision and memory format of others.

    Without a copy where the product has that format already: that of channels_last weights is the one it works in.
    """
    out = []
    for weight, target, value in zip(weights, like, values.chunk(len(weights)), strict=True):
        value = weight.ungrouped(value)
        if value.dtype != target.dtype or value.stride() != target.stride():
            value = torch.empty_like(target).copy_(value)
        out.append(value)
    return out


def write(weights: Sequence[Weight], values: Tensor, out: Sequence[Tensor]) -> None:
    """Put a batch, (n g, O, C, S), into tensors that are shaped like the weights' rows here."""
    for weight, target, value in zip(weights, out, values.chunk(len(weights)), strict=True):
        target.copy_(weight.ungrouped(value))


class StepOnW:
    """What all have: during the step each weight holds another gradient, and afterwards its own again.

    Args:
        weights: of the layers of a batch that have a gradient.
        sides: their L and R, and the scale, as they act on the rows that are here.
        optimizer: that steps.
        power: the optimizer's.
        measures: whether `lengths` will be asked how long the step was.
    """

    def __init__(
        self, weights: Sequence[Weight], sides: Sides, optimizer: Optimizer, power: Power, measures: bool = False
    ) -> None:
        self.weights, self.sides, self._optimizer, self._power = weights, sides, optimizer, power
        self._measures = measures
        self.kernels = [weight.value for weight in weights]  # A
        self._own: list[Tensor | None] = [weight.parameter.grad for weight in weights]
        self.gradients = [weight.local(own) for weight, own in zip(weights, self._own, strict=True)]  # type: ignore[arg-type]

    def enter(self) -> None:
        """Before the optimizer's step."""
        raise NotImplementedError

    def leave(self, skipped: Tensor | None) -> None:
        """After it: the weights are A again, as they were before; what is to become of them is known.

        Args:
            skipped: as for `land`.
        """
        raise NotImplementedError

    def land(self, skipped: Tensor | None) -> None:
        """A moves.

        Args:
            skipped: one bool on the device, true where the optimizer found that it must not step; None for no.
        """

    def result(self) -> list[Tensor]:
        """What A will be, between `leave` and `land`."""
        return self.kernels

    def abort(self) -> None:
        """Weights and gradients as they were before `enter`."""
        raise NotImplementedError

    def lengths(self, sides: Sides | None = None) -> Lengths:
        """Squared lengths of each layer's step, between `leave` and `land`: the plain optimizer's, and ours at scale 1.

        Of the rows that are here. Decay is no part of them. They are weighted by the layers' learning rates.

        Args:
            sides: L and R that the step might be made with; None for those that it was made with.
        """
        # Where a step grows with the gradient it is, momentum aside, the gradient.
        own = transformed(self.weights, (sides or self.sides).unit.apply_gram, self.gradients)
        return self._weighted(squared(self.gradients), squared_parts(own, len(self.weights)))

    def _weighted(self, plain: Tensor, own: Tensor) -> Lengths:
        weights = [_scalar(group.get("lr") or 0.0, own).to(own) for group in self._options]
        squares = torch.stack(weights).square()
        return plain * squares, own * squares

    def _at_unit_scale(self, lengths: Tensor, power: int) -> Tensor:
        """Squared lengths of what has the scale to a power in it without that."""
        assert self.sides.scale is not None  # nobody measures without one
        return lengths / parts(self.sides.scale, len(self.weights)).flatten(1)[:, 0] ** (2 * power)

    @cached_property
    def _options(self) -> list[dict[str, Any]]:
        """Of each layer the optimizer's group that holds its weight."""
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        return [groups[id(weight.parameter)] for weight in self.weights]

    def _swap_gradients(self, product: Product) -> None:
        new = unbatched(self.weights, transformed(self.weights, product, self.gradients), self.gradients)
        for weight, gradient in zip(self.weights, new, strict=True):
            weight.parameter.grad = weight.whole(gradient)

    def _restore(self) -> None:
        for weight, kernel in zip(self.weights, self.kernels, strict=True):
            weight.value = kernel
        self._give_gradients_back()

    def _give_gradients_back(self) -> None:
        for weight, own in zip(self.weights, self._own, strict=True):
            weight.parameter.grad = own

    def _keep_what_became_of_gradients(self, skipped: Tensor | None) -> None:
        """After a step a gradient is as the optimizer leaves those of other parameters: it may drop or unscale them."""
        pairs = zip(self.weights, self._own, strict=True)
        self._own = [None if weight.parameter.grad is None else own for weight, own in pairs]
        scale = getattr(self._optimizer, "grad_scale", None)  # a fused optimizer divides the gradients by it in place
        if scale is None:
            return
        for gradient in self.gradients:
            here = scale.to(gradient.device)
            gradient.div_(here if skipped is None else _unless(skipped, here, gradient))


class _FromStart(StepOnW):
    """The weight is moved to where the optimizer steps from, and A follows what the step made of it."""

    def enter(self) -> None:
        # An optimizer that does not care for the gradient's size does not see the scale, nor does what it averages.
        sides = self.sides if self._power.gradient else self.sides.unit
        self._swap_gradients(sides.apply_transposed)
        for weight, start in zip(self.weights, self._starts(), strict=True):
            weight.value = start

    def _starts(self) -> list[Tensor]:
        raise NotImplementedError

    def _factors(self) -> list[Any]:
        """What the step made of the part of A that the weight did not hold."""
        return [1] * len(self.weights)

    def lengths(self, sides: Sides | None = None) -> Lengths:
        if self._power.gradient:
            return super().lengths(sides)
        shares = self._decay_shares()
        moved = [m if a is None else m - a * w for m, (a, w) in zip(self._moved, shares, strict=True)]
        if sides is None:  # what it came to on A; of W it is A
            ends = self._increments or self._product()  # not kept: it is as large as all weights
            ends = [e if a is None else e - a * k for e, k, (a, _) in zip(ends, self.kernels, shares, strict=True)]
            return squared(moved), self._at_unit_scale(squared(ends), 1)
        return squared(moved), squared_parts(transformed(self.weights, sides.unit.apply, moved), len(self.weights))

    def _decay_shares(self) -> list[tuple[Any, Any]]:
        """How much of each layer's W the step took, and W: (a, W) for a step with a W in it; (None, None) for none."""
        return [(None, None)] * len(self.weights)

    def leave(self, skipped: Tensor | None) -> None:
        self._moved = self._differences([weight.value for weight in self.weights])
        self._keep_what_became_of_gradients(skipped)
        self._restore()
        self._decays = self._factors()
        # What can fail for want of memory is done before a single weight moves.
        self._increments = None if self._is_in_place() else self._product()

    def _differences(self, ends: list[Tensor]) -> list[Tensor]:
        return ends

    def land(self, skipped: Tensor | None) -> None:
        # A fused optimizer leaves a weight alone where it finds that it must not step.
        factors = self._decays if skipped is None else [_unless(skipped, d, k) for d, k in self._pairs()]
        if self._increments is None:
            (weight,), (kernel,), (moved,), (factor,) = self.weights, self.kernels, self._moved, factors
            with torch.autocast(kernel.device.type, enabled=False):
                self.sides.add_product(weight.grouped(kernel), weight.grouped(moved), factor)
            return
        for kernel, increment, factor in zip(self.kernels, self._increments, factors, strict=True):
            kernel.mul_(factor).add_(increment)

    def result(self) -> list[Tensor]:
        increments = self._increments or self._product()
        return [k * decay + i for (decay, k), i in zip(self._pairs(), increments, strict=True)]

    def _pairs(self) -> list[tuple[Any, Tensor]]:
        return list(zip(self._decays, self.kernels, strict=True))

    def _is_in_place(self) -> bool:
        """Whether A can take the product up as it is made: fewer passes over memory, which is what a step costs."""
        weight, kernel = self.weights[0], self.kernels[0]
        is_one = len(self.weights) == 1 and kernel.device.type == "cpu"
        return is_one and at_least_float32(kernel) is kernel and weight.is_grouped_view(kernel)

    def _product(self) -> list[Tensor]:
        return unbatched(self.weights, transformed(self.weights, self.sides.apply, self._moved), self.kernels)

    def abort(self) -> None:
        self._restore()


class General(_FromStart):
    """From W itself."""

    def _starts(self) -> list[Tensor]:
        values = transformed(self.weights, self.sides.apply_inverse, self.kernels)
        self._start = unbatched(self.weights, values, self.kernels)
        return [start.clone() for start in self._start]

    def _differences(self, ends: list[Tensor]) -> list[Tensor]:
        return [torch.sub(end, start, out=start) for end, start in zip(ends, self._start, strict=True)]

    def _decay_shares(self) -> list[tuple[Any, Any]]:
        # However it is made, decay is along the weight: that part is left out.
        values = transformed(self.weights, self.sides.apply_inverse, self.kernels)
        starts = unbatched(self.weights, values, self.kernels)
        pairs = list(zip(self._moved, starts, strict=True))
        sums = torch.stack([torch.stack([(moved * w).sum(), (w * w).sum()]) for moved, w in pairs])
        totals = self.weights[0].total(sums)
        shares = totals[:, 0] / totals[:, 1].where(totals[:, 1] > 0, 1)  # a weight of zero does not decay
        return list(zip(shares, starts, strict=True))


class Decaying(_FromStart):
    """From zero, where the optimizer does nothing with a weight but decay it: A is decayed directly."""

    def _starts(self) -> list[Tensor]:
        return [torch.zeros_like(kernel) for kernel in self.kernels]

    def _factors(self) -> list[Any]:
        decay = DECAYING[type(self._optimizer)]
        states = [self._optimizer.state.get(weight.parameter, {}) for weight in self.weights]
        return [decay(group, state) for group, state in zip(self._options, states, strict=True)]


class Linear(StepOnW):
    """The same step on A itself: gradient <- c^2 L L^T G R^T R."""

    _before: Sequence[Tensor] = ()  # A, once `enter` has come so far

    def enter(self) -> None:
        self._before = [kernel.clone() for kernel in self.kernels]
        self._swap_gradients(self.sides.apply_gram)
        if self._measures:  # now: Nesterov's step writes to the gradients
            stepped = [weight.local(weight.parameter.grad) for weight in self.weights]  # type: ignore[arg-type]
            self._plain, self._ours = squared(self.gradients), squared(stepped)

    def lengths(self, sides: Sides | None = None) -> Lengths:
        if sides is not None:
            return super().lengths(sides)
        return self._weighted(self._plain, self._at_unit_scale(self._ours, 2))

    def leave(self, skipped: Tensor | None) -> None:
        self._keep_what_became_of_gradients(skipped)
        self._give_gradients_back()

    def abort(self) -> None:
        self._restore()
        for kernel, before in zip(self.kernels, self._before, strict=False):
            kernel.copy_(before)


def _scalar(value: Any, like: Tensor) -> Tensor:
    """A number beside a tensor, in float32 or better: filled in, because a copy from the host waits for a GPU."""
    if isinstance(value, Tensor):
        return value.to(like.device)
    return torch.full((), value, dtype=at_least_float32(like[:0]).dtype, device=like.device)


def _unless(skipped: Tensor, factor: Any, like: Tensor) -> Tensor:
    """A factor of a weight or a gradient, or 1 where the device says that there was no step."""
    factor = _scalar(factor, like)
    return torch.where(skipped.to(like.device), torch.ones_like(factor), factor)


def squared(tensors: Sequence[Tensor]) -> Tensor:
    """Squared length of each, (n,), in float32 or better."""
    found = [torch.linalg.vector_norm(t, dtype=at_least_float32(t[:0]).dtype) for t in tensors]
    return torch.stack(found).square()


def squared_parts(rows: Tensor, count: int) -> Tensor:
    """Squared length of each layer's part of a batch, (n g, O, C, S) to (n,)."""
    return parts(rows, count).flatten(1).square().sum(1)


def step_type(optimizer: Optimizer) -> type[StepOnW]:
    """The cheapest way that is exact with this optimizer."""
    if type(optimizer) in LINEAR:
        return Linear
    return Decaying if type(optimizer) in DECAYING else General


def moves(
    weights: Sequence[Weight], old: Sides, new: Sides, optimizer: Optimizer, ends: Sequence[Tensor] | None
) -> list[Move]:
    """What else must change when L and R do.

    A stays, unless the function is not to be preserved. State that is kept in A's coordinates (SGD's momentum) stays
    what it is in W's: m <- L' L^-1 m R^-1 R'.

    Args:
        weights: of the layers.
        old: L and R as they are.
        new: what they become.
        optimizer: that holds the weights.
        ends: what A is before the change, where the function is not to be preserved; None where it is.
    """
    old, new = old.unit, new.unit  # the scale is the same before and after

    def turned(sources: Sequence[Tensor]) -> Tensor:
        return transformed(weights, lambda rows: new.apply(old.apply_inverse(rows)), sources)

    states: list[dict[str, Any]] = [optimizer.state.get(weight.parameter, {}) for weight in weights]
    found: list[Move] = []
    for name in LINEAR.get(type(optimizer), ()):
        kept = [state.get(name) for state in states]
        if any(value is not None for value in kept):  # one that has none yet, because it was frozen, moves a zero
            momenta = [
                torch.zeros_like(weight.value) if m is None else weight.local(m)
                for weight, m in zip(weights, kept, strict=True)
            ]
            found.append((momenta, turned(momenta)))
    if ends is not None:
        found.append(([weight.value for weight in weights], turned(ends)))
    return found
