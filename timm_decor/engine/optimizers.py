"""What the engine knows of optimizers: where wrappers keep the inner one, how it steps on A, what is refused."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import timm.optim
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import _disable_current_modes

_logger = logging.getLogger(__name__)

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

_PROBE_STEPS = 12  # slow copies (Lookahead, Ranger) are made in the first five or six
_PROBE_RATE = 1e-3
_LEAST_SHARE = 0.05  # of a weight in a tensor of the state, to say that it holds weights


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


def refuse(optimizer: Optimizer, weights: Iterable[Tensor]) -> None:
    """Refuse the optimizers whose steps on W cannot be told from steps on A.

    Raises:
        ValueError: its state holds weights, it differentiates the gradient, or it evaluates a closure several times.
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(f"{kind} evaluates its closure several times a step, when the weights are not kernels")
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"{kind} differentiates the gradient, which here is changed before the step")
    wanted = {id(weight): weight.dim() for weight in weights}
    for number, group in enumerate(optimizer.param_groups):
        dims = {wanted[id(p)] for p in group["params"] if id(p) in wanted}
        for dim in sorted(dims):
            try:
                where = _weights_in_state(optimizer, number, dim)
            except Exception as error:  # whatever a foreign optimizer does on a weight that is not its own
                _logger.warning(
                    "%s could not be tried on a small weight (%s): if its state holds weights (averages, slow copies), "
                    "decorrelation makes them wrong",
                    kind,
                    str(error).splitlines()[0] if str(error) else type(error).__name__,
                )
                return
            if where:
                raise ValueError(f"{kind} keeps a copy of the weights in its state ({where}), which R would falsify")


def _weights_in_state(optimizer: Optimizer, number: int, dim: int) -> str:
    """Where the state of an optimizer like this one holds a weight; "" where it does not.

    It steps twice on a small weight with the same gradients, once from w and once from -w: what is odd in w, and looks
    like it, holds it. (A trust ratio depends on the weight's size, which is the same for both.)
    """
    with _without_global_hooks(), _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        shape = (6, 5, 1, 1)[:dim] if dim <= 4 else (6, 5, *[1] * (dim - 2))
        start = torch.randn(shape, generator=generator)
        gradients = [torch.randn(shape, generator=generator) for _ in range(_PROBE_STEPS)]
        states = []
        for sign in (1, -1):
            torch.manual_seed(0)
            states.append(_state_after(_twin(optimizer, number, sign * start), gradients))
    for path, tensor in states[0].items():
        other = states[1].get(path)
        if other is None or other.shape != tensor.shape or tensor.numel() != start.numel():
            continue
        odd = (tensor.double() - other.double()).flatten() / 2
        share = float(odd @ start.double().flatten() / start.double().square().sum())
        if abs(share) > _LEAST_SHARE:
            return path
    return ""


@contextlib.contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Step hooks on all optimizers are not for one that is made to be looked at."""
    both: list[Any] = [_global_optimizer_pre_hooks, _global_optimizer_post_hooks]
    kept = [(hooks, dict(hooks)) for hooks in both]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


def _twin(optimizer: Optimizer, number: int, weight: Tensor) -> Optimizer:
    """An optimizer of the same class and options, without history, on one weight."""
    parameter = torch.nn.Parameter(weight.clone())
    memo: dict[int, Any] = {id(p): parameter for group in optimizer.param_groups for p in group["params"]}
    own = {"state", "param_groups", "step", "__deepcopy__", "__getstate__"}
    twin = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if isinstance(value, OrderedDict) and name.startswith("_optimizer_"):
            vars(twin)[name] = OrderedDict()
        elif name not in own:
            vars(twin)[name] = copy.deepcopy(value, memo)
    options = {name: value for name, value in optimizer.param_groups[number].items() if name != "params"}
    options = {name: copy.deepcopy(value, memo) for name, value in options.items()}
    # A small rate, so that the weight stays where it is; no decay, which puts it into the gradient.
    known = {"weight_decay": 0.0, "lr": _PROBE_RATE, "fused": False, "capturable": False, "foreach": False}
    options.update({name: value for name, value in known.items() if options.get(name) is not None})
    twin.state, twin.param_groups = defaultdict(dict), [{**options, "params": [parameter]}]
    return twin


def _state_after(optimizer: Optimizer, gradients: Iterable[Tensor]) -> dict[str, Tensor]:
    """All tensors that an optimizer keeps after steps with these gradients, by where they are."""
    (group,) = optimizer.param_groups
    (parameter,) = group["params"]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    kept = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups", "defaults")}
    others = {name: value for name, value in group.items() if name != "params"}
    found = [*_tensors(optimizer.state.get(parameter, {}), ""), *_tensors(others, "group"), *_tensors(kept, "self")]
    return {path: tensor for path, tensor in found if tensor is not parameter}


def _tensors(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield path, tree
    elif isinstance(tree, Mapping | list | tuple):
        for key, branch in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _tensors(branch, f"{path}.{key}" if path else str(key))
