"""decorrelate(model) and to_plain(model): layers become able to be decorrelated, and plain again."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from timm_decor.config import DecorConfig
from timm_decor.eligibility import Reasons, candidates, own_matrices, own_name
from timm_decor.layers import DECOR_TYPES, PLAIN_TYPES, DecorConv2d, DecorLayer, DecorLinear, become, class_of
from timm_decor.plan import LayerPlan, plan, unfit
from timm_decor.reporting import ConversionReport, LayerRow

_logger = logging.getLogger(__name__)

FilterFn = Callable[[str, nn.Module], bool]
ReasonFn = Callable[[str, nn.Module], str]

# The handle that each attached layer belongs to. Not an attribute of the layer, so that a deep copy (EMA) does not
# inherit it; a weak reference, so that a binding ends with its optimizer.
_handles: weakref.WeakKeyDictionary[nn.Module, weakref.ref[object]] = weakref.WeakKeyDictionary()


def decorrelate(model: nn.Module, config: DecorConfig | None = None, filter_fn: FilterFn | None = None) -> nn.Module:
    """Turn a model's convolutions and linear layers into layers that can be decorrelated, in place.

    Those are `nn.Conv2d`, `nn.Linear` and timm's forms of them, `Conv2dSame` and `timm.layers.Linear`.

    Modules, Parameters, names, hooks and the function stay the same objects; only the layers' class changes. What was
    done to each layer is in `model.decor_report` (print it) and in one line of the log. A second call replaces the
    configuration. Nothing trains differently until `attach`.

    Args:
        model: any module.
        config: `DecorConfig()` if None.
        filter_fn: called with (name, layer); layers for which it is false stay plain. If None, those stay plain that
            are better left so: channel gates, and depthwise convolutions with a kernel below 7x7.

    Returns:
        The same model.

    Raises:
        ValueError: the model is wrapped (DDP, FSDP1, torch.compile), is attached, or has no layer that fits.
    """

    def leave_out(name: str, layer: nn.Module) -> str:
        assert filter_fn is not None
        return "" if filter_fn(name, layer) else "excluded by filter_fn"

    _refuse_wrapped(model)
    better_plain = Reasons(model).better_plain
    return convert(model, config or DecorConfig(), leave_out if filter_fn is not None else better_plain)


def convert(model: nn.Module, config: DecorConfig, leave_out: ReasonFn) -> nn.Module:
    """`decorrelate`, with a function that says why a layer is to be left plain ("" where it is not)."""
    rows = []
    left_out: dict[str, str] = {}
    reasons, found = Reasons(model), list(candidates(model))
    _refuse_attached(module for _, module in found)
    module: Any
    for name, module in found:
        weight_bytes = sum(weight.numel() * weight.element_size() for weight in own_matrices(module))
        reason = reasons.unfit(module)
        if not reason and (reason := leave_out(name, module)):
            left_out[name] = reason
        if not reason:
            kind = class_of(module)
            become(module, DECOR_TYPES.get(kind, kind))
            reason = unfit(config, module.decor_shape)
        if reason:
            if class_of(module) in PLAIN_TYPES:
                _make_plain(module)
            rows.append(LayerRow(name, class_of(module).__name__, None, weight_bytes, reason))
            continue
        done = plan(config, module.decor_shape, module.weight.dtype)
        rows.append(LayerRow(name, class_of(module).__name__, done, weight_bytes))
    report = ConversionReport(config, tuple(rows), left_out)
    if not report.decorrelated:
        most = Counter(row.plain_reason for row in rows).most_common(1)
        why = f"; most often: {most[0][0]}" if most else ", nor any other convolution or linear layer"
        raise ValueError(f"{type(model).__name__} has no layer that can be decorrelated{why}")
    model.decor_report = report  # type: ignore[assignment]
    _logger.info("%s: %s", type(model).__name__, report.summary())
    return model


def to_plain(model: nn.Module) -> nn.Module:
    """Turn a decorrelated model back into ordinary modules, in place; the function and the Parameters stay.

    Returns:
        The same model.

    Raises:
        ValueError: the model is wrapped, or still attached to an optimizer.
    """
    _refuse_wrapped(model)
    layers = [module for module in model.modules() if class_of(module) in PLAIN_TYPES]
    _refuse_attached(layers)
    for module in layers:
        _make_plain(module)
    for module in model.modules():  # a decorrelated backbone may be anywhere in it
        module.__dict__.pop("decor_report", None)
        _forget_decor_name(module)
    return model


def reconverted(model: nn.Module, config: DecorConfig | None = None) -> ConversionReport:
    """Decorrelate again what went through `decorrelate`, wherever in `model` it is, with what `filter_fn` left out.

    Layers that came since (timm's `reset_classifier` makes a new head) become decorrelated too.

    Args:
        model: may be wrapped.
        config: that of the first time if None.

    Returns:
        The new report.

    Raises:
        ValueError: nothing here went through `decorrelate`, or no layer fits the config.
    """
    owner = _owner(model)
    before: ConversionReport = owner.decor_report  # type: ignore[assignment]
    convert(owner, config or before.config, lambda name, _: before.left_out.get(name, ""))
    return owner.decor_report  # type: ignore[return-value]


@contextlib.contextmanager
def report_kept_on_error(model: nn.Module) -> Iterator[None]:
    """An exception leaves the model's report, and so its config, what it was."""
    owner = _owner(model)
    before = owner.decor_report
    try:
        yield
    except BaseException:
        owner.decor_report = before
        raise


def _owner(model: nn.Module) -> nn.Module:
    """The module that went through `decorrelate`."""
    owner = next((module for module in model.modules() if "decor_report" in vars(module)), None)
    if owner is None:
        raise ValueError(f"{type(model).__name__} has no decorrelated layers: call timm_decor.decorrelate(model) first")
    return owner


def decor_layers(model: nn.Module) -> Iterator[tuple[str, DecorLayer]]:
    """(name, layer) of every decorrelated layer, named as in the unwrapped model."""
    wrapped: list[str] = []  # where DDP keeps a model: what begins so has DDP's `module.` in its name
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            wrapped.append(f"{name}.module." if name else "module.")
        # The exact type: one whose weight became a computed one is a subclass by then.
        if isinstance(module, DecorConv2d | DecorLinear) and class_of(module) in PLAIN_TYPES:
            for prefix in reversed(wrapped):
                if name.startswith(prefix):
                    name = prefix.removesuffix("module.") + name.removeprefix(prefix)
            yield own_name(name), module


def norms_behind(model: nn.Module) -> dict[nn.Module, BatchNorm]:
    """The BatchNorm that takes a layer's output, for the decorrelated layers that have one.

    That is a layer without a bias whose next module, in the order in which the model's were defined, is a BatchNorm of
    as many channels: how timm writes them. A layer that this order misses (the last one of a pre-activation block, one
    with a bias) is not in here, and its statistics stay uncentred.
    """
    found: dict[nn.Module, BatchNorm] = {}
    before: DecorLayer | None = None
    for module in model.modules():
        if isinstance(module, BatchNorm) and before is not None:
            if module.num_features == before.weight.shape[0]:
                found[before] = module
            before = None
        elif isinstance(module, DecorConv2d | DecorLinear):
            before = module if module.bias is None else None
        elif not isinstance(module, nn.Identity | nn.Sequential):
            before = None
    return found


def replan(model: nn.Module, plans: Mapping[str, LayerPlan]) -> None:
    """Put the final plans of a model's layers, by name, into its report."""
    owner = _owner(model)
    report: ConversionReport = owner.decor_report  # type: ignore[assignment]
    inside = {id(module): own_name(name) for name, module in owner.named_modules()}
    own = {inside[id(layer)]: plans[name] for name, layer in decor_layers(model) if name in plans}
    rows = tuple(dataclasses.replace(row, plan=own.get(row.name, row.plan)) for row in report.rows)
    owner.decor_report = dataclasses.replace(report, rows=rows)  # type: ignore[assignment]


def convertible(module: nn.Module) -> bool:
    """Whether a module's class is one that `decorrelate` takes."""
    return class_of(module) in DECOR_TYPES


def _make_plain(module: Any) -> None:
    module.stop_recording()
    become(module, PLAIN_TYPES[class_of(module)])


def _refuse_wrapped(model: nn.Module) -> None:
    for module in model.modules():
        kind = type(module).__name__
        if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            raise ValueError(f"the model is wrapped in {kind}: call this on the model itself, before wrapping it")
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError("the model is compiled: call this on the model itself, before torch.compile")


def mark_attached(layer: nn.Module, handle: object | None) -> None:
    """Note that a layer belongs to a handle, or (None) to none any more."""
    if handle is None:
        _handles.pop(layer, None)
    else:
        _handles[layer] = weakref.ref(handle)


def handle_of(layer: nn.Module) -> object | None:
    """The handle that a layer belongs to; None for none, or one whose optimizer is gone."""
    reference = _handles.get(layer)
    return reference() if reference is not None else None


def any_attached(layers: Iterable[nn.Module]) -> bool:
    """Whether one of the layers belongs to a handle whose optimizer is still there."""
    layers = list(layers)

    def held() -> bool:
        return any(handle_of(layer) is not None for layer in layers)

    if held():
        gc.collect()  # an optimizer and its handle refer to each other: one that was dropped may still be around
    return held()


def _refuse_attached(modules: Iterable[nn.Module]) -> None:
    if any_attached(modules):
        raise ValueError(
            "the model is attached to an optimizer: call detach() on the handle first, or use copy.deepcopy(model)"
        )


def _forget_decor_name(model: nn.Module) -> None:
    """timm keeps a model's architecture and arguments for its config.json: a plain model's must be those of a twin."""
    getattr(model, "_model_args", {}).pop("decor_config", None)
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict) and str(cfg.get("architecture", "")).startswith("decor_"):
        model.pretrained_cfg = {**cfg, "architecture": cfg["architecture"].removeprefix("decor_")}  # type: ignore
        model.default_cfg = model.pretrained_cfg
