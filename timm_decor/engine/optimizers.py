"""What the engine knows of optimizers: where wrappers keep the inner one, and how it steps on A."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import timm.optim
import torch
from torch import Tensor
from torch.optim import Optimizer

from timm_decor.layers import DecorLayer

# Where wrappers keep the optimizer whose `step` is torch's: Accelerate's and Lightning's, timm's Lookahead, torch's
# PostLocalSGDOptimizer, the sharpness-aware ones.
_INNER = ("optimizer", "_base_optimizer", "base_optimizer", "optim")

# Optimizers whose update of W is linear in (gradient, W, momentum), with the names of their state in W's coordinates.
LINEAR: dict[type[Optimizer], tuple[str, ...]] = {torch.optim.SGD: ("momentum_buffer",)}

# A factor of W, from a parameter's group and its state after the step.
Decay = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]


def _decoupled(group: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    return 1 - group["lr"] * group["weight_decay"]


def _timm_muon(group: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    # Weights that are no matrices, and the head, are AdamW's, at a rate of their own.
    scale = 1 if "momentum_buffer" in state else group["fallback_lr_scale"]
    return 1 - group["lr"] * scale * group["weight_decay"]


# Optimizers that do nothing with a weight but decay it: W <- factor W + (something without W).
DECAYING: dict[type[Optimizer], Decay] = {torch.optim.AdamW: _decoupled, timm.optim.Muon: _timm_muon}
if hasattr(torch.optim, "Muon"):
    DECAYING[torch.optim.Muon] = _decoupled


class Power(NamedTuple):
    """How a step's length depends on what the optimizer is given; see probe.py.

    Attributes:
        gradient: its power of the gradient's size: 1 for SGD, 0 for Adam, Muon, Lion and whatever normalizes it.
        weight: its power of the weight's size: 1 for trust ratios (LARS, LAMB), 0 for all others.
    """

    gradient: int
    weight: int

    @property
    def exponent(self) -> int:
        """k: a scale c beside R makes a step c^k times as long on A.

        W is 1 / c of what it was, its gradient c times, and what becomes of W's step in A c times: 2 for SGD, 1 for
        Adam, 0 for LARS.
        """
        return 1 + self.gradient - self.weight


UNKNOWN = Power(-1, 0)  # of one that cannot be tried: no scale


def is_linear(optimizer: Optimizer) -> bool:
    """Whether the optimizer's update is linear in gradient, weight and momentum: that of SGD."""
    return type(optimizer) in LINEAR


def innermost(optimizer: Any) -> Optimizer:
    """The optimizer whose `step` runs torch's hooks, out of the wrappers that keep it.

    Raises:
        ValueError: there is none.
    """
    seen: set[int] = set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        for name in _INNER:
            inner = getattr(optimizer, name, None)
            if inner is not None and (isinstance(inner, Optimizer) or hasattr(inner, "param_groups")):
                optimizer = inner
                break
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer")
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(
            f"{type(optimizer).__name__} never ran torch.optim.Optimizer.__init__, so its step has no hooks; "
            f"attach the optimizer that it wraps"
        )
    return optimizer


def check_held(optimizer: Optimizer, layers: Sequence[tuple[str, DecorLayer]]) -> None:
    """Refuse an optimizer that does not hold all of the layers' weights.

    Raises:
        ValueError: names one of them.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, layer in layers if id(layer.weight) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold the weight of {missing[0]}"
            + (f" and {len(missing) - 1} more layers" if len(missing) > 1 else "")
            + "; make the optimizer from this model's parameters, after decorrelate (and fully_shard) and before attach"
        )


def rates(optimizer: Optimizer, weights: Iterable[Tensor]) -> Iterator[Any]:
    """The learning rates of the groups that hold some of the weights."""
    wanted = {id(weight) for weight in weights}
    for group in optimizer.param_groups:
        if any(id(p) in wanted for p in group["params"]):
            yield group.get("lr")


def is_zero(rate: Any) -> bool:
    """Whether a learning rate is known to be zero, without a wait for a device. (Some optimizers keep None there.)"""
    if isinstance(rate, Tensor):
        return rate.device.type == "cpu" and float(rate) == 0
    return isinstance(rate, int | float) and rate == 0
