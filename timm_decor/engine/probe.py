"""What is found out about an optimizer by trying one like it on a small weight: what is refused, how long a step is."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import _disable_current_modes

from timm_decor.engine.optimizers import UNKNOWN, Power

_logger = logging.getLogger(__name__)

_STEPS = 12  # slow copies (Lookahead, Ranger) are made in the first five or six
_RATE = 1e-3
_LEAST_SHARE = 0.05  # of a weight in a tensor of the state, to say that it holds weights
_LARGER = 4.0  # how much larger a gradient or a weight is tried to see what becomes of the step
_SETTLED = 60  # steps after which averages hardly know where they began: RAdam's and RMSpropTF's begin as SGD
_SMALL = 0.05  # of weights: about the size that those of networks have, where a clipped trust ratio is not clipped
_OF_NO_MATTER = ("params", "param_names", "lr", "initial_lr", "lr_scale", "weight_decay")  # to a step's length
_HARDLY = 1e-9  # weight decay that does nothing, but is there: LARS and LAMB have their ratio only where it is


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
    for number, dim in _kinds(optimizer, weights):
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


def power_of(optimizer: Optimizer, weights: Iterable[Tensor]) -> Power:
    """How the length of the optimizer's steps depends on the size of gradient and weight.

    It is what the optimizer does, with its own options, on a small weight, not what it is called.

    Args:
        optimizer: that will step.
        weights: decorrelated ones.

    Returns:
        `UNKNOWN` where it cannot be tried, has no whole powers, or has others for other weights: then no scale can
        keep its steps' length, and there is a warning.
    """
    kind, found = type(optimizer).__name__, set()
    alike: dict[str, tuple[int, int]] = {}  # layer decay makes dozens of groups that differ in their rate alone
    for number, dim in _kinds(optimizer, weights):
        group = optimizer.param_groups[number]
        options = [(name, group[name]) for name in sorted(group) if name not in _OF_NO_MATTER]
        alike[str((dim, bool(group.get("weight_decay")), options))] = number, dim
    for number, dim in alike.values():
        try:
            found.add(_power(optimizer, number, dim))
        except Exception:  # whatever a foreign optimizer does on a weight that is not its own
            found.add(None)
    if len(found) == 1 and (power := found.pop()) is not None and power.exponent in (0, 1, 2):
        return power
    _logger.warning("%s: its step has no length that a scale could keep; the learning rate may need tuning", kind)
    return UNKNOWN


def _power(optimizer: Optimizer, number: int, dim: int) -> Power | None:
    with _aside():
        start, gradients = _small(dim)
        lengths = []
        for weight, gradient in ((_SMALL, 1.0), (_SMALL, _LARGER), (_LARGER * _SMALL, 1.0)):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs as well
            twin = _twin(optimizer, number, weight * start, _HARDLY)
            (parameter,) = twin.param_groups[0]["params"]
            many = [gradient * gradients[i % len(gradients)] for i in range(_SETTLED)]
            _state_after(twin, many[:-1])
            before = parameter.detach().double().clone()
            _state_after(twin, many[-1:])
            lengths.append(float((parameter.detach().double() - before).norm()))
    base, *others = lengths
    if not base or not all(map(math.isfinite, lengths)) or not all(others):
        return None
    powers = [math.log(each / base) / math.log(_LARGER) for each in others]
    return Power(*map(round, powers)) if all(abs(p - round(p)) < 0.2 for p in powers) else None


def _kinds(optimizer: Optimizer, weights: Iterable[Tensor]) -> list[tuple[int, int]]:
    """The groups, by number, and dimensions of the weights: an optimizer may treat each in its own way."""
    wanted = {id(weight): weight.dim() for weight in weights}
    return [
        (number, dim)
        for number, group in enumerate(optimizer.param_groups)
        for dim in sorted({wanted[id(p)] for p in group["params"] if id(p) in wanted})
    ]


def _small(dim: int) -> tuple[Tensor, list[Tensor]]:
    """A weight of some dimensions, and gradients."""
    generator = torch.Generator("cpu").manual_seed(0)  # whatever torch.set_default_device says
    shape = (6, 5, 1, 1)[:dim] if dim <= 4 else (6, 5, *[1] * (dim - 2))
    start = torch.randn(shape, generator=generator, device="cpu")
    return start, [torch.randn(shape, generator=generator, device="cpu") for _ in range(_STEPS)]


def _weights_in_state(optimizer: Optimizer, number: int, dim: int) -> str:
    """Where the state of an optimizer like this one holds a weight; "" where it does not.

    It steps twice on a small weight with the same gradients, once from w and once from -w: what is odd in w, and looks
    like it, holds it. (A trust ratio depends on the weight's size, which is the same for both.)
    """
    with _aside():
        start, gradients = _small(dim)
        states = []
        for sign in (1, -1):
            torch.default_generator.manual_seed(0)
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
def _aside() -> Iterator[None]:
    """Nothing of what is tried is seen outside, and step hooks on all optimizers do not see it."""
    both: list[Any] = [_global_optimizer_pre_hooks, _global_optimizer_post_hooks]
    kept = [(hooks, dict(hooks)) for hooks in both]
    for hooks, _ in kept:
        hooks.clear()
    try:
        with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


def _twin(optimizer: Optimizer, number: int, weight: Tensor, decay: float = 0.0) -> Optimizer:
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
    decay = decay if options.get("weight_decay") else 0.0
    known = {"weight_decay": decay, "lr": _RATE, "fused": False, "capturable": False, "foreach": False}
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
