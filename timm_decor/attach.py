"""attach(model, optimizer): binds a decorrelated model to its optimizer, in the merged view.

The model's parameter is always A = W R, an ordinary kernel; forward and backward never see R. Around each
`optimizer.step()` hooks turn it into a step on W:

    before:  gradient <- gradient R^T,  parameter <- W
    after:   W <- parameter;  every `every` steps R <- rule(R, statistics);  parameter <- W R

which is exactly the step of explicit modules z = R x, y = W z (tests/test_equivalence.py). Where the outputs are
decorrelated as well, y = L W z, and the same holds with L^T gradient R^T and L W R.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_decor.auto import plan
from timm_decor.config import DecorConfig
from timm_decor.convert import any_attached, decor_layers, mark_attached, norms_behind, reconverted
from timm_decor.coordinates import is_linear, refuse_anchored
from timm_decor.group import LayerGroup, Norms, grouped
from timm_decor.layers import DecorLayer
from timm_decor.portable import read_r, write_r
from timm_decor.reporting import AttachReport
from timm_decor.shape import Pace
from timm_decor.sharing import averaged_moments, refreshed, rows_a_process

_logger = logging.getLogger(__name__)

STATE_KEY = "timm_decor"  # in optimizer.state_dict()
_STATE_FORMAT = 3
_LEAST_DAMPING_SHARE = 0.1  # follow_lr: without damping R would undo the learning rate's decay where inputs are small

_attached_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class DecorHandle:
    """What `attach` returns: the binding of one model to one optimizer."""

    def __init__(
        self, optimizer: Optimizer, layers: Sequence[tuple[str, DecorLayer]], norms: Norms, config: DecorConfig
    ) -> None:
        if config.sides == "auto":
            sides = "both" if config.two_sided and is_linear(optimizer) else "input"
            config = dataclasses.replace(config, sides=sides)
        self.config = config
        self.step = 0  # optimizer steps since attach
        self.names = [name for name, _ in layers]  # of the attached layers
        self._optimizer = optimizer
        self._layers, self._norms = layers, norms
        self._groups: list[LayerGroup] = grouped(layers, norms, optimizer, config)
        self._peak_lr = 0.0  # the highest learning rate that a refresh has seen
        self._in_step = False
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]
        _attached_optimizers.add(optimizer)
        for _, layer in layers:
            mark_attached(layer, self)
        self._set_recording()

    def report(self, condition: bool = True) -> AttachReport:
        """Correlation before and after R, its condition number, refreshes and skips of each layer.

        Args:
            condition: whether to compute the condition numbers, which costs D^3 for a dense R.
        """
        self._recover()
        rows = {name: group.report(i, condition) for group in self._groups for i, name in enumerate(group.names)}
        return AttachReport(self.step, tuple(rows[name] for name in self.names))

    def detach(self) -> None:
        """Make the optimizer's steps plain again; the model keeps its function. A second call does nothing.

        Optimizer state stays what it is: SGD's momentum is that of the plain weights, other optimizers' is W's.
        """
        self._recover()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for _, layer in self._layers:
            layer.stop_recording()
            mark_attached(layer, None)
        _attached_optimizers.discard(self._optimizer)

    def save_r(self, path: str | Path) -> None:
        """Write R and the second moments behind it to a safetensors file; see `load_r`."""
        self._recover()
        write_r(self._state(), path)

    def load_r(self, path: str | Path) -> None:
        """Begin with the R of another run of these layers, instead of the identity.

        Args:
            path: a file that `save_r` wrote, or the decor.safetensors of a published model.

        Raises:
            ValueError: steps were made already, the file cannot be read, or it is of another rule, structure or model.
        """
        if self.step:
            raise ValueError(f"R can be loaded before the first step only, not after {self.step}")
        saved = read_r(path)
        self._check_fits(saved)
        for group in self._groups:
            group.load_r([saved["layers"][name] for name in group.names])
        self._set_recording()

    @property
    def refresh_due(self) -> bool:
        """Whether the next optimizer step ends with a refresh of R."""
        first = 1 if self.config.structure == "auto" else 0  # its first step is for `_choose`
        return self.step >= first and (self.step - first) % self.config.every == 0

    @property
    def _undecided(self) -> bool:
        return any(group.config.structure == "auto" for group in self._groups)

    def _set_recording(self) -> None:
        for group in self._groups:
            if self.refresh_due or self._undecided:
                group.start_recording()
            else:
                group.stop_recording()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # args[0] is the optimizer itself where step is called as a bound method of the class
        if any(callable(value) for value in (*args[1:], *kwargs.values())):
            raise ValueError(
                "a decorrelated step takes no closure: during the step the parameters hold W, not the model's weights"
            )
        self._recover()
        self._in_step = True
        look = self.step % self.config.output_every == 0
        for group in self._groups:
            group.enter(look)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for group in self._groups:
            group.leave()
        try:
            if self.refresh_due:
                self._refresh()
        finally:  # whatever happens to R, the weight must be a kernel again
            for group in self._groups:
                group.write()
            self._in_step = False
        if self._undecided:
            self._choose()
        self.step += 1
        self._set_recording()

    @torch.no_grad()
    def _recover(self) -> None:
        """Undo a step that began and never ended: the optimizer raised, or was interrupted."""
        if not self._in_step:
            return
        _logger.warning("step %d did not end: the weights are put back to what they were before it", self.step)
        for group in self._groups:
            group.abandon()
        self._in_step = False

    def _choose(self) -> None:
        """After the first step, whose rows are counted: the structure of each layer that "auto" leaves open."""
        seen = [group.seen(rows) for group, rows in zip(self._groups, rows_a_process(self._groups), strict=True)]
        for group, config in zip(self._groups, plan(seen, self.config), strict=True):
            group.choose(config)
        chosen = Counter(group.r.name for group in self._groups for _ in group.layers)
        _logger.info("structure of R: %s", ", ".join(f"{name} in {n} layers" for name, n in chosen.items()))

    def _refresh(self) -> None:
        # All layers, so that processes whose layers have gradients at different times still reduce the same tensors.
        pace = self._pace()
        with torch.autocast(self._layers[0][1].weight.device.type, enabled=False):
            fresh = averaged_moments(self._groups)
            moments = [group.running(each) for group, each in zip(self._groups, fresh, strict=True)]
            new = refreshed(self._groups, moments, pace)
            outcomes = [g.accept(f, m, r) for g, f, m, r in zip(self._groups, fresh, moments, new, strict=True)]
        # The only look at what is on the device, once for all layers.
        flags = torch.cat([torch.stack(outcome).cpu() for outcome in outcomes], 1)
        for group, (moved, seen, alive) in zip(self._groups, _split(flags, self._groups), strict=True):
            for i in group.count(moved):
                if not seen[i]:
                    reason = "it saw no input in training mode, or none that is finite"
                elif not alive[i]:
                    reason = "the layer's inputs are all zero, or all the same"
                else:
                    reason = "R is too close to singular"
                log = _logger.warning if group.skips[i] == 1 else _logger.debug
                log("step %d, layer %s: refresh of R skipped: %s", self.step, group.names[i], reason)

    def _pace(self) -> Pace:
        """The config's values as the learning rate and the warm-up have them at this step."""
        lr = max(float(group["lr"]) for group in self._optimizer.param_groups)
        self._peak_lr = max(self._peak_lr, lr)
        share = lr / self._peak_lr if self.config.follow_lr and self._peak_lr else 1.0
        strength = min(1.0, (self.step + 1) / self.config.warmup) if self.config.warmup else 1.0
        damped = max(share, _LEAST_DAMPING_SHARE)
        config = self.config
        return Pace(
            config.decor_lr * share * strength, config.damping * damped, config.output_damping * damped, strength
        )

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._recover()
        state_dict[STATE_KEY] = self._state()
        return state_dict

    def _state(self) -> dict[str, Any]:
        states = {name: group.state(i) for group in self._groups for i, name in enumerate(group.names)}
        return {
            "format": _STATE_FORMAT,
            "config": self.config.to_json(),
            "step": self.step,
            "peak_lr": self._peak_lr,
            "layers": {name: states[name] for name in self.names},
        }

    def _load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get(STATE_KEY)
        if saved is None:
            _logger.warning("the optimizer state has no decorrelation state: R starts from the identity")
            self._groups = grouped(self._layers, self._norms, self._optimizer, self.config)
            self.step, self._peak_lr = 0, 0.0
            self._set_recording()
            return
        self._check_loadable(saved)
        for group in self._groups:
            group.load_state([saved["layers"][name] for name in group.names])
        self.step, self._peak_lr = saved["step"], saved["peak_lr"]
        self._set_recording()
        for group in self._groups:
            group.restore_recorded([saved["layers"][name] for name in group.names])

    def _check_loadable(self, saved: dict[str, Any]) -> None:
        if saved.get("format") != _STATE_FORMAT:
            raise ValueError(f"decorrelation state format {saved.get('format')!r}; can read {_STATE_FORMAT}")
        self._check_fits(saved)
        kind = self._groups[0].kind
        for name, layer in self._layers:
            entry, shape = saved["layers"][name], list(layer.weight.shape)
            if entry["shape"] != shape:
                raise ValueError(f"the optimizer state has shape {entry['shape']} for layer {name}, not {shape}")
            if entry["kind"] != kind:
                raise ValueError(f"the optimizer state is not that of a {type(self._optimizer).__name__}")
        self._check_same(saved, "sides")

    def _check_fits(self, saved: dict[str, Any]) -> None:
        """Refuse the R of another rule, structure or model; a head of other classes has the same inputs."""
        blocks = ("block_dim",) if self.config.structure in ("block", "auto") else ()
        self._check_same(saved, "rule", "structure", *blocks)
        for name, layer in self._layers:
            entry = saved["layers"].get(name)
            shape = list(layer.weight.shape)
            if entry is None or entry["shape"][1:] != shape[1:]:
                has = "nothing" if entry is None else f"shape {entry['shape']}"
                raise ValueError(f"the saved R has {has} for layer {name}, which has shape {shape}")

    def _check_same(self, saved: dict[str, Any], *names: str) -> None:
        theirs = DecorConfig.from_json(saved["config"])
        for name in names:
            has, wanted = getattr(theirs, name), getattr(self.config, name)
            if has != wanted:
                raise ValueError(
                    f"the saved R is of {name} {has!r}, this run uses {wanted!r}; "
                    f"attach with the saved config, or start without that R"
                )


def _split(flags: Tensor, groups: Sequence[LayerGroup]) -> Iterator[list[list[bool]]]:
    """Each group's columns of (3, all layers), as lists."""
    for part in flags.split([len(group.layers) for group in groups], 1):
        yield part.tolist()


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
    if type(inner).__name__ == "Muon":
        _logger.warning("decorrelated Muon ended below plain Muon in our measurements: compare it with plain training")
    return DecorHandle(inner, trained, norms_behind(model), config)


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
