"""DecorHandle: one model bound to one optimizer, from `attach` to `detach`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_decor.config import DecorConfig
from timm_decor.convert import decor_layers, handle_of, mark_attached, norms_behind, replan
from timm_decor.eligibility import own_name
from timm_decor.engine import checkpoint, shards
from timm_decor.engine.coordinates import transformed, unbatched
from timm_decor.engine.flight import StepInFlight
from timm_decor.engine.group import LayerGroup, Refreshed, grouped
from timm_decor.engine.hooks import StepHooks
from timm_decor.engine.optimizers import UNKNOWN, check_held, is_linear, is_zero, rates
from timm_decor.engine.probe import power_of
from timm_decor.engine.watch import Watch
from timm_decor.layers import DecorLayer
from timm_decor.plan import LayerPlan, plan
from timm_decor.reporting import AttachReport
from timm_decor.rules import RULES
from timm_decor.structures import Sides

_logger = logging.getLogger(__name__)

attached_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class DecorHandle:
    """What `attach` returns: the binding of one model to one optimizer.

    Attributes:
        config: with the sides that "auto" came to.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, layers: Sequence[tuple[str, DecorLayer]], config: DecorConfig
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._power = power_of(optimizer, [layer.weight for _, layer in layers]) if config.graft else UNKNOWN
        plans = {name: self._planned(config, layer) for name, layer in layers}
        if config.sides == "auto":
            config = dataclasses.replace(config, sides=_sides(config, is_linear(optimizer)))
        self.config = config
        self._layers = list(layers)
        self._norms = norms_behind(model)
        self._groups: list[LayerGroup] = grouped(self._layers, optimizer, config, plans, self._norms)
        self._flight: StepInFlight | None = None
        self._counted = 0  # steps, of which the device may know that some were none
        self._not_made: Tensor | None = None
        self._watch = Watch(model, optimizer, self._layers)
        replan(model, plans)
        self._tell_left_out(plans)
        self._step_hooks = StepHooks(optimizer, self._before_step, self._after_step, self._abort)
        self._hooks = [
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        self._loading: tuple[Mapping[str, Mapping[str, Any]], int] = {}, 0  # layers and step of a state that is loaded
        # Looked up on the instance by copy and pickle, which keep neither hooks nor what hangs on them.
        vars(optimizer).update(zip(_ON_INSTANCE, (self._copy_optimizer, self._pickled_optimizer), strict=True))
        attached_optimizers.add(optimizer)
        for _, layer in self._layers:
            mark_attached(layer, self)
        self._set_recording()

    @property
    def step(self) -> int:
        """Optimizer steps since attach that were made: at a learning rate above zero, and not skipped."""
        self._settle()
        return self._counted

    @property
    def begun(self) -> int:
        """`step`, and those steps that a fused optimizer may have skipped since that was asked: no wait for a GPU."""
        return self._counted

    @property
    def names(self) -> list[str]:
        """Names of the attached layers in the model."""
        return [name for name, _ in self._layers]

    @property
    def scale(self) -> float | None:
        """c, which makes a step as long as the plain optimizer's, as it was measured last; None for none."""
        return float(self._scale) if self._scale is not None else None

    @property
    def summary(self) -> str:
        """What is decorrelated, and how long a step is, in a line."""
        sides = "inputs and outputs decorrelated" if self.config.sides == "both" else "inputs decorrelated"
        if not self.config.graft:
            return f"{sides}; without --decor-graft it wants a learning rate of its own"
        if self._power.exponent:
            return f"{sides}, steps as long as plain training's: keep its learning rate"
        if self._power == UNKNOWN:
            return f"{sides}, without a scale for this optimizer: the learning rate may need tuning"
        return f"{sides}; the length of its steps comes from the weights, as in plain training"

    def __repr__(self) -> str:
        """What is bound, how, and how far it is: from numbers on the host, so that no device is waited for."""
        config, steps, last = self.config, self._counted, self._last_refresh
        sides = "inputs and outputs" if config.sides == "both" else "inputs"
        kind = f"rank {config.rank} {config.structure}" if config.structure == "kronecker" else config.structure
        made = f"{steps} step{'s' * (steps != 1)}" if self._not_made is None else f"at most {steps} steps"
        refreshed = "no refresh of R yet" if last is None else f"R last refreshed in step {last}"
        skips, done = (sum(sum(getattr(group, of)) for group in self._groups) for of in ("skips", "refreshes"))
        every = f"every {config.every}" if config.every > 1 else "each step"
        return (
            f"DecorHandle of {type(self._optimizer).__name__}{'' if self._hooks else ' (detached)'}\n"
            f"  {len(self._layers)} layers, {sides} decorrelated: rule {config.rule}, structure {kind}\n"
            f"  {made}; {refreshed} ({every}); {skips} of {skips + done} refreshes skipped\n"
            f"  report() tells of each layer"
        )

    @property
    def _last_refresh(self) -> int | None:
        """The step, from 1, at whose end R was refreshed last, or was to be; None for none."""
        return (self._counted - 1) // self.config.every * self.config.every + 1 if self._counted else None

    @property
    def refresh_due(self) -> bool:
        """Whether the next optimizer step ends with a refresh of R."""
        return self._counted % self.config.every == 0

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
        if not self._hooks:
            return
        self._recover()
        self._step_hooks.remove()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for name in _ON_INSTANCE:
            vars(self._optimizer).pop(name, None)
        for _, layer in self._layers:
            layer.stop_recording()
            mark_attached(layer, None)
        attached_optimizers.discard(self._optimizer)

    def save_r(self, path: str | Path) -> None:
        """Write R and the second moments behind it to a safetensors file; see `load_r`."""
        self._recover()
        checkpoint.write_r(self.state(), path)

    def load_r(self, path: str | Path) -> None:
        """Begin with the R of another run of these layers, instead of the identity.

        Args:
            path: a file that `save_r` wrote, or the decor.safetensors of a published model.

        Raises:
            ValueError: steps were made already, the file cannot be read, or it is of another rule, structure or model.
        """
        if self.step:
            raise ValueError(f"R can be loaded before the first step only, not after {self.step}")
        saved = checkpoint.read_r(path)
        checkpoint.check_fits(saved, self._layers, self.config)
        self._continue(saved["layers"], 0)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record inputs while gradients are off, too: for training whose gradients come from elsewhere.

        with handle.recording(), torch.no_grad():
            loss = criterion(model(x), y)
        for parameter, gradient in zip(model.parameters(), estimates): parameter.grad = gradient
        optimizer.step()
        """
        before = self._without_grad
        self._record_without_grad(self._layers, True)
        try:
            yield
        finally:
            self._record_without_grad(self._layers, before)

    def kernel_direction(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A direction in W's coordinates as one for the kernels: L V R.

        A perturbation that is drawn white for W is decorrelated for A (arXiv 2407.10780).

        Args:
            values: V by the parameter's name (also as DDP or torch.compile has it), shaped like the parameter; those
                of other parameters stay as they are. Under FSDP2 DTensors like the parameters, and all processes ask
                together.

        Raises:
            ValueError: none of the names is a parameter's of the model.
        """
        return self._in_kernels(values, Sides.apply)

    def kernel_gradient(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A gradient for W as one for the kernels: L^-T V R^-T, which a step turns into V again.

        Args:
            values: as for `kernel_direction`.

        Raises:
            ValueError: none of the names is a parameter's of the model.
        """
        return self._in_kernels(values, Sides.apply_inverse_transposed)

    @torch.no_grad()
    def _in_kernels(self, values: Mapping[str, Tensor], product: Any) -> dict[str, Tensor]:
        out = dict(values)
        keys = self._keys(values)
        for group in self._groups:
            for i, (name, weight) in enumerate(zip(group.names, group.weights, strict=True)):
                if (key := keys.get(name)) is not None:
                    sides, value = group.sides_here([i]).unit, weight.local(out[key])
                    new = transformed([weight], functools.partial(product, sides), [value])
                    out[key] = weight.whole(*unbatched([weight], new, [value]))
        return out

    def _keys(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Of each layer whose weight is among `values`, the name that it has there."""
        known = {_bare(f"{name}.weight"): name for name in self.names}
        found = {known[_bare(key)]: key for key in values if _bare(key) in known}
        if values and not found:
            parameters = {_bare(name) for name, _ in self._model.named_parameters()}
            if not any(_bare(key) in parameters for key in values):
                raise ValueError(
                    f"'{next(iter(values))}' is no parameter of the attached model, as '{next(iter(known))}' is"
                )
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the optimizer holds of decorrelation, by layer."""
        states = {n: checkpoint.layer_state(group, i) for group in self._groups for i, n in enumerate(group.names)}
        return {
            "format": checkpoint.STATE_FORMAT,
            "config": self.config.to_json(),
            "kind": self._kind,
            "step": self.step,
            "layers": {name: states[name] for name in self.names},
        }

    def _planned(self, config: DecorConfig, layer: DecorLayer, cut: bool | None = None) -> LayerPlan:
        linear, scales = is_linear(self._optimizer), self._power.exponent > 0
        cut = shards.is_cut(layer.weight) if cut is None else cut
        return plan(config, layer.decor_shape, layer.weight.dtype, linear, scales, cut)

    def _tell_left_out(self, plans: Mapping[str, LayerPlan]) -> None:
        """Say whose output side is left out because of how its weight is cut."""
        left = [n for n, layer in self._layers if self._planned(self.config, layer, False).outputs > plans[n].outputs]
        if left:
            names = left[0] if len(left) == 1 else f"{left[0]} and {len(left) - 1} more"
            _logger.warning("the outputs of %s are not decorrelated: fully_shard cuts the rows of its groups", names)

    @property
    def _weights(self) -> dict[str, Tensor]:
        pairs = (pair for group in self._groups for pair in zip(group.names, group.weights, strict=True))
        return {name: weight.parameter for name, weight in pairs}

    @property
    def _kind(self) -> str:
        """Whose state this is: SGD's momentum is in A's coordinates, all others' in W's."""
        return "SGD" if is_linear(self._optimizer) else type(self._optimizer).__name__

    @torch.no_grad()
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._recover()
        changed = _evaluated(args, kwargs)  # the closure's gradients are those of kernels
        self._follow()
        weights = self._weights
        self._watch.replaced(weights)
        counts = not all(map(is_zero, rates(optimizer, weights.values())))
        look = counts and self._counted % self.config.output_every == 0
        measures = counts and self._measure_due
        self._step_hooks.begin()
        self._flight = StepInFlight(self._groups, optimizer, counts, look, self._power, measures)
        return changed

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flight = self._flight
        if flight is None:
            return
        try:
            flight.leave()
            first = self._grafts and not self._has_refreshed
            proposed = flight.refresh(first) if flight.counts and self.refresh_due else None
            looked = look_at([each.flags for each in proposed]) if proposed else None
        except BaseException:
            self._abort()
            raise
        flight.land()
        self._flight = None
        if not flight.counts:
            return
        self._counted += 1
        if flight.skipped is not None:
            none = flight.skipped.to(torch.int64)
            self._not_made = none if self._not_made is None else self._not_made + none
        if proposed is None or looked is None:
            self._set_recording()
        else:
            self._finish_refresh(flight, proposed, looked)
        if flight.scale is not None:
            self._rescale(flight.scale)

    @property
    def _grafts(self) -> bool:
        return self._groups[0].plan.graft

    @property
    def _has_refreshed(self) -> bool:
        return any(any(group.refreshes) for group in self._groups)

    @property
    def _measure_due(self) -> bool:
        """Whether the next step is the first one with a new R: on other inputs than R was made from.

        With those a step looks shorter than the following ones are, most of all where a layer saw few rows. Before the
        second refresh it is asked again after 2, 4, 8... steps: at first many layers' gradients are zero (behind them
        is a BatchNorm with a weight of zero), and the network's number is that of the others.
        """
        step, every = self._counted, self.config.every
        due = step % every == 1 % every or (step < every and step & (step - 1) == 0)
        return self._grafts and self._has_refreshed and due

    def _rescale(self, scale: Tensor) -> None:
        """Take a measured scale over: its geometric mean with the one before, because a single batch is noisy."""
        if self._counted > self.config.every + 1 and (old := self._scale) is not None:
            scale = (scale * old.to(scale)).sqrt()
        for group in self._groups:
            group.rescale(scale)

    @property
    def _scale(self) -> Tensor | None:
        """The network's c: that of a layer which was refreshed most often, for others may be new."""
        if not self._grafts:
            return None
        group = max(self._groups, key=lambda each: max(each.refreshes))
        return group.scales()[group.refreshes.index(max(group.refreshes))]

    def _finish_refresh(
        self, flight: StepInFlight, proposed: Sequence[Refreshed], looked: Sequence[list[list[bool]]]
    ) -> None:
        """Take a refresh over, unless the step was none, or came early because an earlier one was none."""
        counted = self._counted
        self._settle()
        if self._counted == counted:
            found = zip(self._groups, proposed, looked, flight.active, flight.idle, strict=True)
            for group, each, flags, active, idle in found:
                group.accept(each)
                _, seen, _ = flags
                # an idle one that saw nothing either was not meant
                self._tell_skips(group, flags, [*active, *(i for i in idle if seen[i])])
                group.begin_late([i for i in range(len(seen)) if not seen[i]])
            self._watch.look()
            self._set_recording()
        elif not self.refresh_due:
            self._set_recording()  # else it goes on: the next step's inputs are added

    def _tell_skips(self, group: LayerGroup, flags: list[list[bool]], index: Sequence[int]) -> None:
        moved, seen, alive = flags
        for i in group.count(moved, index):
            if not seen[i]:
                reason = "it saw no input in training mode, or none that is finite"
                if unrecorded := group.layers[i].unrecorded:
                    reason = f"none of {unrecorded} inputs could be recorded (nested or sparse tensors, torch.func)"
            elif not alive[i]:
                reason = "the layer's inputs are all zero, or all the same"
            else:
                reason = "R is too close to singular"
            log = _logger.warning if group.skips[i] == 1 else _logger.debug
            log("step %d, layer %s: refresh of R skipped: %s", self._counted - 1, group.names[i], reason)

    def _settle(self) -> None:
        """Ask the device which steps were none, where a gradient scaler left that to a fused optimizer."""
        if self._not_made is not None:
            none, self._not_made = int(self._not_made), None
            if none:
                self._counted -= none

    def _abort(self) -> None:
        """Undo a step that did not end: the optimizer raised, or was interrupted."""
        flight, self._flight = self._flight, None
        if flight is not None:
            with torch.no_grad():
                flight.abort()
            _logger.warning("step %d did not end: the weights are put back to what they were before it", self._counted)

    def _recover(self) -> None:
        """The same for a step that was not called through `optimizer.step`, so that its exception was not seen.

        Raises:
            RuntimeError: the step is running (a signal's handler, or another thread, asks): its weights are W.
        """
        if self._step_hooks.is_running:
            raise RuntimeError(
                "the optimizer's step is running, and what it works on is not the model's weights: save between steps "
                "(a signal's handler sets a flag, and the loop saves)"
            )
        self._abort()

    def _set_recording(self) -> None:
        for group in self._groups:
            if self.refresh_due:
                group.start_recording(weakref.WeakMethod(self._watch.outside))
            else:
                group.stop_recording()

    def _follow(self) -> None:
        """Follow what happened to the model since the last step: layers that train now, weights that were moved."""
        new = self._watch.unfrozen()
        norms = norms_behind(self._model) if self.refresh_due else self._norms  # frozen or replaced since, by others
        if new or norms != self._norms or any(group.is_misplaced for group in self._groups):
            if any(shards.is_cut(layer.weight) for _, layer in (*self._layers, *new)):  # perhaps since the last step
                check_held(self._optimizer, self._layers)
            shards.check_cuts([*self._layers, *new])
            self._norms = norms
            saved = self.state()["layers"]
            self._take_in(new)
            self._regroup(saved)
            if new and self.refresh_due:  # what they saw for this step was not recorded; the next refresh is theirs
                _logger.info("taken in at step %d: %s", self._counted, ", ".join(name for name, _ in new))
            replan(self._model, {name: group.plan for group in self._groups for name in group.names})

    def _regroup(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Groups of the layers as they are now, which go on from a saved state; layers that it lacks start."""
        shards.put_back(self._model, self._layers)
        plans = {}
        for name, layer in self._layers:
            now = self._planned(self.config, layer)
            plans[name] = checkpoint.planned(now, saved[name]) if name in saved else now
        groups = grouped(self._layers, self._optimizer, self.config, plans, self._norms)
        for group in groups:
            checkpoint.take_over(group, saved)
        self._groups = groups

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._recover()
        state_dict[checkpoint.STATE_KEY] = self.state()
        return checkpoint.with_entries(optimizer, state_dict, self._weights)

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Look at the state that is to be loaded; nothing changes yet, because torch may refuse it."""
        weights = self._weights | {name: layer.weight for name, layer in self._watch.held_back()}
        rest, saved = checkpoint.without_entries(optimizer, state_dict, weights)
        if saved is None:
            _logger.warning("the optimizer state has no decorrelation state: R starts from the identity")
            self._loading = {}, 0
        else:
            checkpoint.check_loadable(saved, self._kind, [*self._layers, *self._trained_before(saved)], self.config)
            self._loading = saved["layers"], saved["step"]
        return rest

    def _after_load(self, optimizer: Optimizer) -> None:
        (layers, step), self._loading = self._loading, ({}, 0)
        new = self._trained_before({"layers": layers})
        self._take_in(new)
        self._watch.taken_in(new)
        self._continue(layers, step)

    def _trained_before(self, saved: Mapping[str, Any]) -> list[tuple[str, DecorLayer]]:
        """Layers that trained when a state was saved, and were frozen at this attach: they have their R from it."""
        return [(name, layer) for name, layer in self._watch.held_back() if name in saved["layers"]]

    def _take_in(self, layers: Sequence[tuple[str, DecorLayer]]) -> None:
        self._record_without_grad(layers, self._without_grad)
        self._layers += layers
        for _, layer in layers:
            mark_attached(layer, self)

    @property
    def _without_grad(self) -> bool:
        """Whether this is inside of `recording`."""
        return self._layers[0][1].without_grad

    @staticmethod
    def _record_without_grad(layers: Sequence[tuple[str, DecorLayer]], wanted: bool) -> None:
        for _, layer in layers:
            layer.without_grad = wanted

    def _continue(self, saved: Mapping[str, Mapping[str, Any]], step: int) -> None:
        """Go on from the state of every layer (or, where it is empty, from the identity)."""
        self._regroup(saved)
        self._counted, self._not_made = step, None
        for _, layer in self._layers:  # what was recorded so far is another run's
            layer.stop_recording()
        replan(self._model, {name: group.plan for group in self._groups for name in group.names})
        self._set_recording()
        for group in self._groups:
            checkpoint.restore_recorded(group, saved)

    def __deepcopy__(self, memo: dict[int, Any]) -> DecorHandle:
        """That of the copied model and optimizer, which are copied with it (an object that holds all three).

        Raises:
            TypeError: the optimizer was copied before its model, as a plain one.
        """
        if not self._hooks:
            new = memo[id(self)] = object.__new__(type(self))
            vars(new).update(copy.deepcopy(vars(self), memo))
            return new
        model = copy.deepcopy(self._model, memo)
        copy.deepcopy(self._optimizer, memo)  # attaches itself to that
        found = handle_of(dict(decor_layers(model))[self.names[0]])
        if not isinstance(found, DecorHandle):
            raise TypeError(
                "a DecorHandle cannot be copied after its optimizer was copied without the model: model first"
            )
        return found

    def _copy_optimizer(self, memo: dict[int, Any]) -> Optimizer:
        """`copy.deepcopy` of the optimizer: attached to the copy of the model, if that was copied with it."""
        optimizer = self._optimizer
        own = {name: vars(optimizer).pop(name) for name in _ON_INSTANCE}
        try:
            twin = copy.deepcopy(optimizer, memo)
        finally:
            vars(optimizer).update(own)
        model = memo.get(id(self._model))
        if model is None:
            twin.register_step_pre_hook(_TellOnce("a copy of an attached optimizer steps plainly: attach it again"))
            return twin
        layers = dict(decor_layers(model))
        handle = DecorHandle(model, twin, [(name, layers[name]) for name in self.names], self.config)
        state = copy.deepcopy(self.state())
        handle._continue(state["layers"], state["step"])
        return twin

    def _pickled_optimizer(self) -> dict[str, Any]:
        """What pickle asks an optimizer for."""
        _logger.warning("a pickled optimizer is a plain one, without R: save optimizer.state_dict() instead")
        return type(self._optimizer).__getstate__(self._optimizer)


_ON_INSTANCE = ("__deepcopy__", "__getstate__")


def _bare(name: str) -> str:
    """A parameter's name without what DDP and torch.compile put before it."""
    name = own_name(name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


class _TellOnce:
    """A step hook that warns at the first step."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.text:
            _logger.warning(self.text)
        self.text = ""


def look_at(flags: Sequence[Tensor]) -> list[list[list[bool]]]:
    """(3, n) flags of each group on the host: a refresh's only wait for the device, once for all layers."""
    counts = [each.shape[1] for each in flags]
    rows = torch.cat([each.to(flags[0].device) for each in flags], 1).tolist()
    ends = list(itertools.accumulate(counts, initial=0))
    return [[row[start:end] for row in rows] for start, end in itertools.pairwise(ends)]


def _evaluated(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of `step` with the value of its closure in the closure's place, if there is one.

    The closure runs here, on kernels; torch runs it in the step, where the weights are W. Lightning gives one to every
    step, with forward and backward in it.
    """
    place = next((i for i, value in enumerate(args[1:], 1) if callable(value)), None)
    name = next((key for key, value in kwargs.items() if callable(value)), None)
    if place is None and name is None:
        return None
    closure = args[place] if place is not None else kwargs[name]  # type: ignore[index]
    with torch.enable_grad():
        loss = closure()
    calls = []

    def evaluated() -> Any:
        calls.append(loss)
        if len(calls) > 1:
            raise RuntimeError("a decorrelated step evaluates its closure once: between evaluations the weights are W")
        return loss

    if place is not None:
        return (*args[:place], evaluated, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: evaluated}  # type: ignore[dict-item]


def _sides(config: DecorConfig, linear: bool) -> str:
    return "both" if RULES[config.rule].both_sides and linear else "input"
