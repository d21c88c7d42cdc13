"""Decorrelated steps in a training script that knows nothing of them: importing this module is the switch.

    train.py --device-modules timm_decor.hook --model decor_resnet18 ...   # timm's own script, as it is
    python -m timm_decor.run train.py --model decor_resnet18 ...           # a script that has no such argument

From the import on, an optimizer that is made over a decorrelated model's weights is attached to it. That happens as
`torch.optim.Optimizer.__init__` returns, because scripts load a checkpoint into the optimizer before its first step,
and because the first refresh of R needs the inputs of the first forward pass. `TIMM_DECOR_<FIELD>` in the environment
overrides a field of the `DecorConfig` that the model was made with. See docs/timm_train.md.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import os
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import timm_decor
from timm_decor.convert import any_attached, decor_layers
from timm_decor.engine.attach import giving_way
from timm_decor.engine.handle import DecorHandle, attached_optimizers
from timm_decor.engine.optimizers import innermost
from timm_decor.knobs import VARIABLE_PREFIX, from_environment
from timm_decor.layers import DecorLayer
from timm_decor.reporting import ConversionReport

_logger = logging.getLogger("timm_decor.hook")  # the name by which people import this


@dataclass(eq=False)
class _Binding:
    """An attachment made here. Weak references: it ends with its optimizer, whose hooks keep the handle alive."""

    model: weakref.ref[nn.Module]
    optimizer: weakref.ref[Optimizer]
    handle: weakref.ref[DecorHandle]
    was_moved: bool = False  # the model went to an optimizer that was made later, or to the script's own attach

    @property
    def is_live(self) -> bool:
        optimizer = self.optimizer()
        return not self.was_moved and optimizer is not None and optimizer in attached_optimizers


_bindings: list[_Binding] = []
_settled: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # optimizers whose steps need no more looking at
_told_plain: list[str] = []  # the warning that no decorrelated model was found, once it is out


def handles() -> list[DecorHandle]:
    """What was attached here and still is, oldest first: for `report()` and `detach()`."""
    found = [binding.handle() for binding in _bindings if binding.is_live]
    return [handle for handle in found if handle is not None]


def _made(optimizer: Optimizer) -> None:
    """An optimizer has its weights: attach it if they are those of a decorrelated model."""
    shares = [(model, *_share(model, optimizer)) for model in _decorrelated_models()]
    models = [model for model, held, count in shares if held and held == count]
    if len(models) > 1:
        names = ", ".join(type(model).__name__ for model in models)
        raise ValueError(
            f"timm_decor.hook: a {type(optimizer).__name__} holds {len(models)} decorrelated models ({names}) and can "
            f"train one: call timm_decor.to_plain on the others, or make an optimizer for each"
        )
    for model in models:
        layers = [layer for _, layer in decor_layers(model)]
        for binding in _bindings:
            if binding.is_live and binding.model() is model:
                _release(binding)
        if any_attached(layers):
            return  # by the script itself, to another optimizer
        report: ConversionReport = model.decor_report  # type: ignore[assignment]
        try:
            config = dataclasses.replace(report.config, **_OPTIONS)
            handle = timm_decor.attach(model, optimizer, config)
        except ValueError as error:
            raise ValueError(f"timm_decor.hook: {error}") from error
        _bindings[:] = [binding for binding in _bindings if binding.optimizer() is not None]
        _bindings.append(_Binding(weakref.ref(model), weakref.ref(optimizer), weakref.ref(handle)))
        optimizer.register_load_state_dict_post_hook(_loaded)
        _say(
            logging.INFO,
            f"decorrelation is on: {type(model).__name__}, {len(handle.names)} layers, "
            f"{config.rule}, {config.structure}, every {config.every} steps, {type(optimizer).__name__}; "
            f"{handle.summary}",
        )


def _loaded(optimizer: Optimizer) -> None:
    for binding in _bindings:
        if not binding.is_live or binding.optimizer() is not optimizer or (handle := binding.handle()) is None:
            continue
        if handle.step:  # else it was a plain run's, which has been told of
            _say(logging.INFO, f"decorrelation goes on after step {handle.step}, as the loaded optimizer state says")


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Look at an optimizer's first steps: do they do what the person who switched this on expects?"""
    if optimizer in _settled:
        return
    binding = next((b for b in _bindings if b.optimizer() is optimizer and b.is_live), None)
    if binding is not None:
        _look_for_inputs(binding, optimizer)
        return
    _settled.add(optimizer)
    # Wrappers come by as well, such as timm's Lookahead; the one that is attached is the one inside.
    try:
        inner = innermost(optimizer)
    except ValueError:  # what it wraps could not be attached, which is no reason to end a plain script's training
        inner = optimizer
    if optimizer in attached_optimizers or inner in attached_optimizers:
        return
    if why := _why_plain(optimizer):
        _say(logging.WARNING, why)


def _look_for_inputs(binding: _Binding, optimizer: Optimizer) -> None:
    """Detach a model that trains without its layers' forward: torch.jit.script leaves R the identity for ever."""
    model = binding.model()
    layers = [layer for _, layer in decor_layers(model)] if model is not None else []
    asked = [layer for layer in layers if layer.recording and layer.training and layer.weight.grad is not None]
    if any(layer.rows for layer in asked):
        _settled.add(optimizer)
    elif asked:
        _settled.add(optimizer)
        for handle in filter(None, [binding.handle()]):
            handle.detach()
        _say(
            logging.WARNING,
            f"training is plain: {type(model).__name__} has gradients, but no input came through the forward of its "
            f"decorrelated layers; torch.jit (--torchscript) hides them: use torch.compile (--torchcompile) or none",
        )


def _why_plain(optimizer: Optimizer) -> str:
    """What to say of a plain step; nothing where it was asked for, or where another optimizer is the decorrelated."""
    kind = type(optimizer).__name__
    past = [binding for binding in _bindings if binding.optimizer() is optimizer]
    if past and not past[-1].was_moved:
        return ""  # the script called detach()
    for model in _decorrelated_models():
        held, count = _share(model, optimizer)
        name = type(model).__name__
        if held and any_attached(layer for _, layer in decor_layers(model)):
            return f"steps of this {kind} are plain: {name} is attached to another optimizer, the last that was made"
        if held < count and held:
            return (
                f"steps of this {kind} are plain: it holds {held} of {name}'s {count} decorrelated layers; "
                f"one optimizer must hold them all"
            )
        if held:
            return (
                f"steps of this {kind} are plain: it got {name}'s weights after it was made; "
                f"call timm_decor.attach(model, optimizer)"
            )
    if _told_plain or len(attached_optimizers):
        return ""
    _told_plain.append(kind)
    return (
        f"training is plain: this {kind} holds no weight of a decorrelated model; create one by its decor_ name "
        f"(--model decor_resnet18), or call timm_decor.decorrelate(model) before the optimizer is made"
    )


def _give_way(model: nn.Module, optimizer: Optimizer) -> None:
    # The script's own attach wins: it may have chosen a config, and it wants the handle. Ours finds no live binding.
    layers = {layer for _, layer in decor_layers(model)}
    for binding in _bindings:
        theirs = binding.model()
        shares = theirs is not None and any(layer in layers for _, layer in decor_layers(theirs))
        if binding.is_live and (shares or binding.optimizer() is optimizer):
            _release(binding)
            ignored = f"; {', '.join(VARIABLE_PREFIX + name.upper() for name in _OPTIONS)} not used" if _OPTIONS else ""
            _say(logging.INFO, f"the script calls timm_decor.attach itself, which takes over{ignored}")


def _release(binding: _Binding) -> None:
    """End an attachment in favour of another."""
    optimizer, handle = binding.optimizer(), binding.handle()
    if handle is not None:
        handle.detach()
    if optimizer is not None:
        _settled.discard(optimizer)  # should it step again, that has to be told
    binding.was_moved = True


def _decorrelated_models() -> list[nn.Module]:
    """Every living model that went through `decorrelate`, whole.

    Not a registry: a deep copy or an unpickled model went through it as well, and nobody would enter those.
    """
    modules = (thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module))
    models = [module for module in modules if "decor_report" in vars(module)]
    parts = {part for model in models for part in model.modules() if part is not model}
    return [model for model in models if model not in parts]


def _share(model: nn.Module, optimizer: Optimizer) -> tuple[int, int]:
    """How many of a model's trained decorrelated layers an optimizer holds, and how many there are; 0 for none."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers: list[DecorLayer] = [layer for _, layer in decor_layers(model) if layer.weight.requires_grad]
    count = sum(id(layer.weight) in held for layer in layers)
    return count, len(layers)


def _say(level: int, text: str) -> None:
    """One line in the log, of one process."""
    in_group = dist.is_available() and dist.is_initialized()
    if (dist.get_rank() if in_group else int(os.environ.get("RANK", 0))) == 0:
        _logger.log(level, text)


class _LastResort(logging.Handler):
    """Shows the lines of this module in a script that sets up no logging."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.root.handlers:
            print(f"{record.name}: {record.getMessage()}", file=sys.stderr)


def _install() -> None:
    original = Optimizer.__init__
    if hasattr(original, "_timm_decor"):
        return  # the module is imported again

    @functools.wraps(original)
    def init(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _made(self)

    init._timm_decor = True  # type: ignore[attr-defined]
    Optimizer.__init__ = init  # type: ignore[method-assign]
    register_optimizer_step_pre_hook(_before_step)
    giving_way.append(_give_way)
    _logger.addHandler(_LastResort())
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)


_OPTIONS = from_environment(os.environ)
_install()
