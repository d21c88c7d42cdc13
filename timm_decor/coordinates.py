"""Two ways to make a step on W = A R^-1 while the model's weight is A.

`LatentCoordinates` asks nothing of the update rule: it keeps W, and the weight holds W while the optimizer steps; two
products with R a step. `LinearCoordinates` is for optimizers whose update is linear in gradient, weight and momentum
(SGD): the step on W is then, in A's own terms, the step with gradient G R^T R; one product a step, and no copy of the
weights. Both are the explicit step exactly; tests/test_equivalence.py holds them against it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from timm_decor.layers import DecorLayer
from timm_decor.rules import DegenerateMoment
from timm_decor.statistics import at_least_float32
from timm_decor.structure import Structure

# Optimizers whose update of W is linear in (gradient, W, momentum), with the names of their state in W's coordinates.
_LINEAR: dict[type[Optimizer], tuple[str, ...]] = {torch.optim.SGD: ("momentum_buffer",)}


def transform(layer: DecorLayer, product: Callable[[Tensor], Tensor], source: Tensor, out: Tensor) -> Tensor:
    """out <- product(source), both shaped like the layer's weight (they may be one tensor).

    The product sees (g, O, C, S) and runs in R's precision, float32 or better, whatever the weight's.
    """
    with torch.autocast(source.device.type, enabled=False):  # products with R lose too much in half precision
        layer.grouped(out).copy_(product(at_least_float32(layer.grouped(source))))
    return out


def rebased(layer: DecorLayer, old: Structure, new: Structure, a: Tensor) -> Tensor:
    """a R_old^-1 R_new: what has fixed coordinates in W's space, seen from A's after R has moved.

    Raises:
        DegenerateMoment: R_old is too close to singular.
    """
    out = transform(layer, lambda rows: new.apply(old.apply_inverse(rows)), a, torch.empty_like(a))
    return _finite(out)


class _Coordinates:
    """What both have: during the step the weight holds another gradient, and afterwards its own again."""

    def __init__(self, layer: DecorLayer) -> None:
        self._layer = layer
        self._grad: Tensor | None = None

    def _swap_gradient(self, product: Callable[[Tensor], Tensor]) -> None:
        grad = self._layer.weight.grad
        assert grad is not None
        self._grad, self._layer.weight.grad = grad, transform(self._layer, product, grad, torch.empty_like(grad))

    def _restore_gradient(self) -> None:
        if self._grad is not None:
            self._layer.weight.grad, self._grad = self._grad, None


class LatentCoordinates(_Coordinates):
    """W kept beside the weight, for any optimizer whose state does not anchor the weight (see `refuse_anchored`)."""

    kind = "latent"

    def __init__(self, layer: DecorLayer) -> None:
        super().__init__(layer)
        self._latent: Tensor | None = None  # W, in the weight's shape and precision; None until the first step
        # The weight's version when it was last written here: another one means that somebody else wrote it.
        self._version = -1

    def enter(self, r: Structure) -> None:
        """Before the optimizer's step: gradient <- gradient R^T, weight <- W."""
        self._sync(r)
        assert self._latent is not None
        self._swap_gradient(r.apply_transposed)
        self._layer.weight.copy_(self._latent)

    def leave(self) -> None:
        """After it: W <- weight. `write` must follow."""
        assert self._latent is not None
        self._latent.copy_(self._layer.weight)
        self._restore_gradient()

    def abandon(self, r: Structure) -> None:
        """The optimizer's step failed: gradient and weight as they were before `enter`."""
        self._restore_gradient()
        self.write(r)

    def move(self, old: Structure, new: Structure, preserve_function: bool) -> None:
        """R moves, between `leave` and `write`: W <- W R_old R_new^-1 where the function is to stay.

        Raises:
            DegenerateMoment: R_new is too close to singular; nothing has changed.
        """
        if preserve_function:
            assert self._latent is not None
            product = lambda rows: new.apply_inverse(old.apply(rows))  # noqa: E731
            self._latent = _finite(transform(self._layer, product, self._latent, torch.empty_like(self._latent)))

    def write(self, r: Structure) -> None:
        """Weight <- W R."""
        weight = self._layer.weight
        assert self._latent is not None
        transform(self._layer, r.apply, self._latent, out=weight)
        self._version = weight._version

    def state_dict(self, r: Structure) -> dict[str, Any]:
        self._sync(r)
        return {"latent": self._latent}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._latent = torch.empty_like(self._layer.weight).copy_(saved["latent"])
        self._version = -1  # whether the weight is W R is seen at the next step

    def _sync(self, r: Structure) -> None:
        """Make W R equal the weight again where the weight was written elsewhere (a checkpoint, EMA, Lookahead)."""
        weight = self._layer.weight
        if self._latent is not None and self._version == weight._version:
            return
        # Loading a checkpoint writes what is there already: keep W then, for a resume that is exact to the bit.
        if self._latent is None:
            self._latent = transform(self._layer, r.apply_inverse, weight, torch.empty_like(weight))
        elif not torch.equal(transform(self._layer, r.apply, self._latent, torch.empty_like(weight)), weight):
            transform(self._layer, r.apply_inverse, weight, out=self._latent)
        self._version = weight._version


class LinearCoordinates(_Coordinates):
    """The same step on A itself, for SGD: gradient <- gradient R^T R, and the momentum follows R."""

    kind = "linear"

    def __init__(self, layer: DecorLayer, optimizer: Optimizer) -> None:
        super().__init__(layer)
        self._optimizer = optimizer

    def enter(self, r: Structure) -> None:
        """Before the optimizer's step: gradient <- gradient R^T R."""
        self._swap_gradient(r.apply_gram)

    def leave(self) -> None:
        """After it. Nothing to take out: the weight is A all the time."""
        self._restore_gradient()

    def abandon(self, r: Structure) -> None:
        """The optimizer's step failed: gradient as it was before `enter`."""
        self._restore_gradient()

    def move(self, old: Structure, new: Structure, preserve_function: bool) -> None:
        """R moves: what stays where it is in W's coordinates moves in A's (momentum; A itself unless it is preserved).

        Raises:
            DegenerateMoment: R_old is too close to singular; nothing has changed.
        """
        weight = self._layer.weight
        state = self._optimizer.state[weight]
        moving = [state[name] for name in _LINEAR[type(self._optimizer)] if state.get(name) is not None]
        moving += [] if preserve_function else [weight]
        for tensor, moved in [(tensor, rebased(self._layer, old, new, tensor)) for tensor in moving]:
            tensor.copy_(moved)

    def write(self, r: Structure) -> None:
        """Nothing to write: the weight is A all the time."""

    def state_dict(self, r: Structure) -> dict[str, Any]:
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Nothing is kept here."""


Coordinates = LatentCoordinates | LinearCoordinates


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


def coordinates_for(layer: DecorLayer, optimizer: Optimizer) -> Coordinates:
    """The cheaper coordinates that are exact with this optimizer."""
    return LinearCoordinates(layer, optimizer) if type(optimizer) in _LINEAR else LatentCoordinates(layer)


def _finite(tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise DegenerateMoment("R is too close to singular")
    return tensor
