"""Two ways to make a step on W = A R^-1 while the model's weight is A.

`LatentCoordinates` asks nothing of the update rule: it keeps W, and the weight holds W while the optimizer steps; two
products with R a step. `LinearCoordinates` is for optimizers whose update is linear in gradient, weight and momentum
(SGD): the step on W is then, in A's own terms, the step with gradient G R^T R; one product a step, and no copy of the
weights. Both are the explicit step exactly; tests/test_equivalence.py holds them against it.

Both work on a batch of layers of equal shape, whose R is one batch as well: one product for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from timm_decor.layers import DecorLayer
from timm_decor.statistics import at_least_float32
from timm_decor.structure import Structure

Product = Callable[[Tensor], Tensor]

# Optimizers whose update of W is linear in (gradient, W, momentum), with the names of their state in W's coordinates.
_LINEAR: dict[type[Optimizer], tuple[str, ...]] = {torch.optim.SGD: ("momentum_buffer",)}


def transformed(layers: Sequence[DecorLayer], product: Product, sources: Sequence[Tensor]) -> Tensor:
    """product of tensors that are shaped like the layers' weights, as one batch: (n g, O, C, S).

    It runs in R's precision, float32 or better, whatever the weights'.
    """
    with torch.autocast(sources[0].device.type, enabled=False):  # products with R lose too much in half precision
        rows = [layer.grouped(source) for layer, source in zip(layers, sources, strict=True)]
        return product(at_least_float32(rows[0] if len(rows) == 1 else torch.cat(rows)))


def write(layers: Sequence[DecorLayer], values: Tensor, out: Sequence[Tensor]) -> None:
    """Put a batch, (n g, O, C, S), into tensors that are shaped like the layers' weights."""
    for layer, target, value in zip(layers, out, values.chunk(len(layers)), strict=True):
        layer.grouped(target).copy_(value)


def weights(layers: Sequence[DecorLayer]) -> list[Tensor]:
    """The layers' weights, without their history."""
    return [layer.weight.detach() for layer in layers]


class _Coordinates:
    """What both have: during the step each weight holds another gradient, and afterwards its own again."""

    def __init__(self) -> None:
        self._gradients: list[tuple[DecorLayer, Tensor]] = []

    def _swap_gradients(self, layers: Sequence[DecorLayer], product: Product) -> None:
        gradients = [layer.weight.grad for layer in layers]
        assert all(gradient is not None for gradient in gradients)
        moved = transformed(layers, product, gradients)  # type: ignore[arg-type]
        self._gradients = list(zip(layers, gradients, strict=True))  # type: ignore[arg-type]
        new = [torch.empty_like(gradient) for _, gradient in self._gradients]
        write(layers, moved, new)
        for layer, gradient in zip(layers, new, strict=True):
            layer.weight.grad = gradient

    def _restore_gradients(self) -> None:
        for layer, gradient in self._gradients:
            layer.weight.grad = gradient
        self._gradients = []


class LatentCoordinates(_Coordinates):
    """W kept beside the weight, for any optimizer whose state does not anchor the weight (see `refuse_anchored`)."""

    kind = "latent"

    def __init__(self) -> None:
        super().__init__()
        self._latent: dict[DecorLayer, Tensor] = {}  # W, in the weight's shape and precision, from the first step on
        # Each weight's version when it was last written here: another one means that somebody else wrote it.
        self._version: dict[DecorLayer, int] = {}

    def enter(self, layers: Sequence[DecorLayer], r: Structure) -> None:
        """Before the optimizer's step: gradient <- gradient R^T, weight <- W."""
        self._sync(layers, r)
        self._swap_gradients(layers, r.apply_transposed)
        for layer in layers:
            layer.weight.copy_(self._latent[layer])

    def leave(self, layers: Sequence[DecorLayer]) -> None:
        """After it: W <- weight. `write` must follow."""
        for layer in layers:
            self._latent[layer].copy_(layer.weight)
        self._restore_gradients()

    def abandon(self, layers: Sequence[DecorLayer], r: Structure) -> None:
        """The optimizer's step failed: gradients and weights as they were before `enter`."""
        self._restore_gradients()
        self.write(layers, r)

    def moved(
        self, layers: Sequence[DecorLayer], old: Structure, new: Structure, preserve_function: bool
    ) -> list[Move]:
        """What must change when R moves between `leave` and `write`: W <- W R_old R_new^-1 where the function stays."""
        if not preserve_function:
            return []
        latents = [self._latent[layer] for layer in layers]
        return [(latents, transformed(layers, lambda rows: new.apply_inverse(old.apply(rows)), latents))]

    def write(self, layers: Sequence[DecorLayer], r: Structure) -> None:
        """Weight <- W R."""
        values = transformed(layers, r.apply, [self._latent[layer] for layer in layers])
        write(layers, values, weights(layers))
        for layer in layers:
            self._version[layer] = layer.weight._version

    def state(self, layer: DecorLayer, r: Structure) -> dict[str, Any]:
        """What a checkpoint holds of one layer, r being its own R; `load_state` takes it back."""
        self._sync([layer], r)
        return {"latent": self._latent[layer]}

    def load_state(self, layer: DecorLayer, saved: dict[str, Any]) -> None:
        self._latent[layer] = torch.empty_like(layer.weight).copy_(saved["latent"])
        self._version[layer] = -1  # whether the weight is W R is seen at the next step

    def _sync(self, layers: Sequence[DecorLayer], r: Structure) -> None:
        """Make W R equal the weight again where a weight was written elsewhere (a checkpoint, EMA, Lookahead)."""
        if all(self._version.get(layer) == layer.weight._version for layer in layers):
            return
        known = [layer in self._latent for layer in layers]
        current = weights(layers)
        latent = [torch.empty_like(weight) for weight in current]
        write(layers, transformed(layers, r.apply_inverse, current), latent)
        if any(known):
            # Loading a checkpoint writes what is there already: keep W then, for a resume that is exact to the bit.
            kept = [self._latent.get(layer, new) for layer, new in zip(layers, latent, strict=True)]
            again = [torch.empty_like(weight) for weight in current]
            write(layers, transformed(layers, r.apply, kept), again)
            same = [torch.equal(a, b) for a, b in zip(again, current, strict=True)]
            latent = [old if keep else new for old, new, keep in zip(kept, latent, same, strict=True)]
        for layer, value in zip(layers, latent, strict=True):
            self._latent[layer], self._version[layer] = value, layer.weight._version


class LinearCoordinates(_Coordinates):
    """The same step on A itself, for SGD: gradient <- gradient R^T R, and the momentum follows R."""

    kind = "linear"

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__()
        self._optimizer = optimizer

    def enter(self, layers: Sequence[DecorLayer], r: Structure) -> None:
        """Before the optimizer's step: gradient <- gradient R^T R."""
        self._swap_gradients(layers, r.apply_gram)

    def leave(self, layers: Sequence[DecorLayer]) -> None:
        """After it. Nothing to take out: the weight is A all the time."""
        self._restore_gradients()

    def abandon(self, layers: Sequence[DecorLayer], r: Structure) -> None:
        """The optimizer's step failed: gradients as they were before `enter`."""
        self._restore_gradients()

    def moved(
        self, layers: Sequence[DecorLayer], old: Structure, new: Structure, preserve_function: bool
    ) -> list[Move]:
        """What stays where it is in W's coordinates moves in A's: momentum, and A itself unless it is preserved."""
        names = _LINEAR[type(self._optimizer)]
        states = [self._optimizer.state[layer.weight] for layer in layers]
        tensors = [[state[name] for state in states] for name in names if states[0].get(name) is not None]
        tensors += [] if preserve_function else [weights(layers)]
        return [(each, transformed(layers, lambda rows: new.apply(old.apply_inverse(rows)), each)) for each in tensors]

    def write(self, layers: Sequence[DecorLayer], r: Structure) -> None:
        """Nothing to write: the weight is A all the time."""

    def state(self, layer: DecorLayer, r: Structure) -> dict[str, Any]:
        return {}

    def load_state(self, layer: DecorLayer, saved: dict[str, Any]) -> None:
        """Nothing is kept here."""


Coordinates = LatentCoordinates | LinearCoordinates
Move = tuple[list[Tensor], Tensor]  # tensors shaped like the weights, and what they become: (n g, O, C, S)


# Optimizers whose state holds a copy of the weight to pull towards: a refresh would leave it in other coordinates.
_ANCHORED = re.compile(r"MADGRAD|Prodigy|DAdapt|ScheduleFree", re.IGNORECASE)


def refuse_anchored(optimizer: Optimizer) -> None:
    """Refuse the optimizers whose steps on W cannot be told from steps on A.

    Raises:
        ValueError: its state anchors the weight, or it differentiates the gradient.
    """
    kind = type(optimizer).__name__
    if _ANCHORED.search(kind):
        raise ValueError(f"{kind} keeps a copy of the weights in its state, which a change of R would falsify")
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"{kind} differentiates the gradient, which here is changed before the step")


def coordinates_for(optimizer: Optimizer) -> Coordinates:
    """The cheaper coordinates that are exact with this optimizer."""
    return LinearCoordinates(optimizer) if is_linear(optimizer) else LatentCoordinates()


def is_linear(optimizer: Optimizer) -> bool:
    """Whether the optimizer's update is linear in gradient, weight and momentum: that of SGD."""
    return type(optimizer) in _LINEAR
