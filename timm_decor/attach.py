"""attach(model, optimizer): binds a decorrelated model to its optimizer, in the merged view.

The model's parameter is always A = W R, an ordinary kernel; forward and backward never see R. Around each
`optimizer.step()` hooks turn it into a step on W:

    before:  gradient <- gradient R^T,  parameter <- W
    after:   W <- parameter;  every `every` steps R <- rule(R, statistics);  parameter <- W R

which is exactly the step of explicit modules z = R x, y = W z (tests/test_equivalence.py).
"""

from __future__ import annotations

import importlib
import logging
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from timm_decor.config import DecorConfig
from timm_decor.convert import any_attached, decor_layers, mark_attached, reconverted
from timm_decor.coordinates import coordinates_for, refuse_anchored
from timm_decor.layers import DecorLayer
from timm_decor.reporting import AttachReport
from timm_decor.rules import DegenerateMoment
from timm_decor.state import LayerState, averaged_moments
from timm_decor.statistics import at_least_float32
from timm_decor.structure import structure_for

_logger = logging.getLogger(__name__)

STATE_KEY = "timm_decor"  # in optimizer.state_dict()
_STATE_FORMAT = 1

_attached_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def new_state(name: str, layer: DecorLayer, optimizer: Optimizer, config: DecorConfig) -> LayerState:
    """A layer's state before the first refresh: R is the identity."""
    like = at_least_float32(layer.weight.detach()[:0])
    r = structure_for(config, layer.decor_shape).identity(layer.decor_shape, config, like)
    return LayerState(name, layer, r, coordinates_for(layer, optimizer))


class DecorHandle:
    """What `attach` returns: the binding of one model to one optimizer."""

    def __init__(self, optimizer: Optimizer, states: list[LayerState], config: DecorConfig) -> None:
        self.config = config
        self.step = 0  # optimizer steps since attach
        self._optimizer = optimizer
        self._states = states
        self._active: list[LayerState] = []  # layers whose weight and gradient are in W's coordinates just now
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]
        _attached_optimizers.add(optimizer)
        for state in states:
            mark_attached(state.layer, self)
        self._set_recording()

    def report(self) -> AttachReport:
        """Correlation before and after R, condition, refreshes and skips of each layer; costs up to D^3 a layer."""
        self._recover()
        return AttachReport(self.step, tuple(state.report() for state in self._states))

    def detach(self) -> None:
        """Make the optimizer's steps plain again; the model keeps its function. A second call does nothing.

        Optimizer state stays what it is: SGD's momentum is that of the plain weights, other optimizers' is W's.
        """
        self._recover()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for state in self._states:
            state.layer.stop_recording()
            mark_attached(state.layer, None)
        _attached_optimizers.discard(self._optimizer)

    @property
    def _refresh_due(self) -> bool:
        return self.step % self.config.every == 0

    def _set_recording(self) -> None:
        for state in self._states:
            if self._refresh_due:
                state.layer.start_recording(state.r.moments, self.config.sample)
            else:
                state.layer.stop_recording()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # args[0] is the optimizer itself where step is called as a bound method of the class
        if any(callable(value) for value in (*args[1:], *kwargs.values())):
            raise ValueError(
                "a decorrelated step takes no closure: during the step the parameters hold W, not the model's weights"
            )
        self._recover()
        for state in self._states:
            if state.layer.weight.grad is not None:
                self._active.append(state)
                state.coordinates.enter(state.r)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for state in self._active:
            state.coordinates.leave()
        try:
            if self._refresh_due:
                self._refresh()
        finally:  # whatever happens to R, the weight must be a kernel again
            for state in self._active:
                state.coordinates.write(state.r)
            self._active = []
        self.step += 1
        self._set_recording()

    @torch.no_grad()
    def _recover(self) -> None:
        """Undo a step that began and never ended: the optimizer raised, or was interrupted."""
        if self._active:
            _logger.warning("step %d did not end: the weights are put back to what they were before it", self.step)
        for state in self._active:
            state.coordinates.abandon(state.r)
        self._active = []

    def _refresh(self) -> None:
        # All layers, so that processes whose layers have gradients at different times still reduce the same tensors.
        for state, moments in zip(self._states, averaged_moments(self._states), strict=True):
            if state not in self._active:
                continue
            try:
                with torch.autocast(state.layer.weight.device.type, enabled=False):
                    state.refresh(moments, self.config)
                state.refreshes += 1
            except DegenerateMoment as error:
                state.skips += 1
                log = _logger.warning if state.skips == 1 else _logger.debug
                log("step %d, layer %s: refresh of R skipped: %s", self.step, state.name, error)

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._recover()
        state_dict[STATE_KEY] = {
            "format": _STATE_FORMAT,
            "config": self.config.to_json(),
            "step": self.step,
            "layers": {state.name: state.state_dict() for state in self._states},
        }
        return state_dict

    def _load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get(STATE_KEY)
        if saved is None:
            _logger.warning("the optimizer state has no decorrelation state: R starts from the identity")
            self._states = [new_state(state.name, state.layer, self._optimizer, self.config) for state in self._states]
            self.step = 0
            self._set_recording()
            return
        self._check_loadable(saved)
        for state in self._states:
            state.load_state_dict(saved["layers"][state.name])
        self.step = saved["step"]
        self._set_recording()

    def _check_loadable(self, saved: dict[str, Any]) -> None:
        if saved.get("format") != _STATE_FORMAT:
            raise ValueError(f"decorrelation state format {saved.get('format')!r}; can read {_STATE_FORMAT}")
        theirs = DecorConfig.from_json(saved["config"])
        for name in ("rule", "structure"):
            has, wanted = getattr(theirs, name), getattr(self.config, name)
            if has != wanted:
                raise ValueError(
                    f"the optimizer state is of {name} {has!r}, this run uses {wanted!r}; "
                    f"attach with the saved config, or start without the optimizer state"
                )
        for state in self._states:
            entry = saved["layers"].get(state.name)
            shape = list(state.layer.weight.shape)
            if entry is None or entry["shape"] != shape:
                has = "nothing" if entry is None else f"shape {entry['shape']}"
                raise ValueError(f"the optimizer state has {has} for layer {state.name}, which has shape {shape}")
            if entry["kind"] != state.coordinates.kind:
                raise ValueError(f"the optimizer state is not that of a {type(self._optimizer).__name__}")


def attach(model: nn.Module, optimizer: Optimizer, config: DecorConfig | None = None) -> DecorHandle:
    """Make every `optimizer.step()` from now on a decorrelated step of the model.

    R starts as the identity, so that the first step is a plain one. The state (R, statistics, W) travels in
    `optimizer.state_dict()` under the key "timm_decor". Gradients are back to autograd's own after each step.

    A layer whose statistics cannot be used (all zero, not finite, no input in training mode) keeps its R: the refresh
    is skipped, counted in `report()` and, the first time, logged with its step and layer. Weights written from outside
    between steps (a checkpoint, EMA, Lookahead) are followed, except through `.data`, which torch lets nobody see.

    Args:
        model: a model that went through `decorrelate` (every `decor_*` model has); DDP and torch.compile may wrap it.
        optimizer: a `torch.optim.Optimizer` that steps without a closure; Accelerate's and timm's wrappers are fine.
        config: that given to `decorrelate` if None.

    Returns:
        A handle with `report()` and `detach()`.

    Raises:
        ValueError: no decorrelated layer, attached twice, an optimizer that does not hold the layers' weights, or one
            that keeps weights in its state (MADGRAD) or needs second derivatives.
    """
    inner = _innermost(optimizer)
    refuse_anchored(inner)
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise ValueError("nn.DataParallel runs on copies, whose inputs are not seen: use DistributedDataParallel")
    if inner in _attached_optimizers or any_attached(layer for _, layer in decor_layers(model)):
        raise ValueError("already attached: call detach() on the first handle before attaching again")
    if torch.__version__ < (2, 5):  # type: ignore[operator]
        # There torch.compile takes a module's attributes for constants unless told; `recording` changes with the steps.
        importlib.import_module("torch._dynamo").config.guard_nn_modules = True  # imported late: it takes seconds
    config = reconverted(model, config).config
    layers = list(decor_layers(model))
    trained = [(name, layer) for name, layer in layers if layer.weight.requires_grad]
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    missing = [name for name, layer in trained if id(layer.weight) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold the weight of {missing[0]}"
            + (f" and {len(missing) - 1} more layers" if len(missing) > 1 else "")
            + "; make the optimizer from this model's parameters, after decorrelate and before attach"
        )
    if not trained:
        raise ValueError("every decorrelated layer is frozen: nothing to attach")
    return DecorHandle(inner, [new_state(name, layer, inner, config) for name, layer in trained], config)


def _innermost(optimizer: Any) -> Optimizer:
    """The optimizer whose `step` runs torch's hooks, out of Accelerate's wrapper and timm's Lookahead."""
    while True:
        inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_base_optimizer", None)
        if inner is None:
            break
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer")
    return optimizer
