"""Twins: a `decor_<name>` entrypoint for a timm model, with the model's own tags, weights and keys.

timm files an entrypoint under the last part of its module's name, and reads `default_cfgs` from that module while it
registers. So every family gets a module, made here from its row in families.py.
"""

from __future__ import annotations

import fnmatch
import logging
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    get_deprecated_models,
    get_pretrained_cfg,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
    register_model_deprecations,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from timm_decor.config import DecorConfig
from timm_decor.convert import convert
from timm_decor.eligibility import Reasons
from timm_decor.models.families import Family
from timm_decor.models.staged import check, knowledge, own_cfgs, unavailable
from timm_decor.text import near

_logger = logging.getLogger(__name__)
_GENERAL = 100  # classes that weights know which are a start for anything

PREFIX = "decor_"
_SOURCES = {"state_dict", "file", "hf_hub_id", "url"}  # by which a caller names weights of their own

Entrypoint = Callable[..., nn.Module]


def plain_name(name: str) -> str:
    """The timm name of a twin, tag included: `decor_resnet18.a1_in1k` gives `resnet18.a1_in1k`."""
    return name.removeprefix(PREFIX)


def register_family(family: Family) -> ModuleType:
    """Register the twins of a family's models, and of the deprecated names for them.

    Returns:
        The module that timm knows the twins by, `timm_decor.models.decor_<family>`.
    """
    names = list_models(module=family.module)
    module = _module(family.module)
    for name in names:
        _register_twin(module, name, family.plain)
    renamed: dict[str, str | None] = {
        PREFIX + old: PREFIX + new
        for old, new in get_deprecated_models(family.module).items()
        if new and split_model_name_tag(new)[0] in names
    }
    register_model_deprecations(module.__name__, renamed)
    return module


def register_decorrelated(name: str, plain: Mapping[str, str] | None = None) -> Entrypoint:
    """Register `decor_<name>` for a model of your own, or any other in timm's registry.

        @timm.models.register_model
        def my_model(pretrained=False, **kwargs): ...

        timm_decor.register_decorrelated("my_model", plain={"stem.*": "it is frozen anyway"})
        model = timm.create_model("decor_my_model")

    Args:
        name: a model that timm knows, without a tag.
        plain: layers to leave plain: reason by a wildcard over layer names.

    Returns:
        The entrypoint. `decor_my_model` has the tags and weights of `my_model`.

    Raises:
        ValueError: timm knows no such model, or it is a twin already.
    """
    if not is_model(name) or split_model_name_tag(name)[1]:
        raise ValueError(
            f"timm has no model {name!r} (decorate its entrypoint with timm.models.register_model)"
            + near(name, list_models())
        )
    if name.startswith(PREFIX):
        raise ValueError(f"{name} is a decorrelated twin itself")
    module = _module(model_entrypoint(name).__module__.split(".")[-1])
    return _register_twin(module, name, plain or {}, tells_unmatched=True)


def _module(family: str) -> ModuleType:
    full_name = f"{__package__}.{PREFIX}{family}"
    if full_name not in sys.modules:
        module = ModuleType(full_name, f"The twins of timm's `{family}`.")
        vars(module).update(__all__=[], default_cfgs={})  # timm adds each entrypoint it registers to __all__
        sys.modules[full_name] = module
    return sys.modules[full_name]


def _twin_cfg(name: str) -> DefaultCfg:
    """The pretrained configs of a model's twin: the project's own weights, and timm's.

    timm's are read from its registry, where `hf_hub_id` is already written in full. (A bare `timm/` would be completed
    with the twin's name on registration, and no such repository exists.)
    """
    timms = {split_model_name_tag(key)[1]: cfg for key, cfg in get_arch_pretrained_cfgs(name).items()}
    own = own_cfgs(name)
    # timm lists the default tag first, and DefaultCfg wants it first. Nobody who asks for a model's usual weights wants
    # ten classes instead of ImageNet's.
    is_general = any(cfg.num_classes >= _GENERAL for cfg in own.values())
    own_first = is_general or not any(cfg.has_weights for cfg in timms.values())
    cfgs = {**own, **timms} if own_first else {**timms, **own}
    return DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=any(cfg.has_weights for cfg in cfgs.values()))


def _register_twin(
    module: ModuleType, name: str, plain: Mapping[str, str], tells_unmatched: bool = False
) -> Entrypoint:
    variant = PREFIX + name
    own = own_cfgs(name)
    has_cfgs = bool(own or get_arch_pretrained_cfgs(name))

    def leaves_out(model: nn.Module) -> Callable[[str, nn.Module], str]:
        better_plain = Reasons(model).better_plain

        def leave_out(layer_name: str, layer: nn.Module) -> str:
            reasons = (why for pattern, why in plain.items() if fnmatch.fnmatch(layer_name, pattern))
            return next(reasons, "") or better_plain(layer_name, layer)

        return leave_out

    def entrypoint(
        pretrained: bool = False,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        decor_config: DecorConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        _check_tag(variant, pretrained_cfg)
        asked = isinstance(pretrained_cfg, str)  # by its tag, so that nobody expects other weights
        if own and not pretrained_cfg and not (pretrained and not _SOURCES & set(pretrained_cfg_overlay or {})):
            # Without the project's weights a model is as the plain one is: classes, image size, mean and std.
            pretrained_cfg = replace(get_pretrained_cfg(name) or PretrainedCfg(), architecture=variant)
        if has_cfgs:
            # Resolved under the twin's name, so that `model.pretrained_cfg` names the model that was asked for.
            pretrained_cfg = resolve_pretrained_cfg(variant, pretrained_cfg, dict(pretrained_cfg_overlay or {}))  # type: ignore[arg-type]
        elif pretrained_cfg_overlay:
            kwargs["pretrained_cfg_overlay"] = pretrained_cfg_overlay
        if pretrained:
            check(pretrained_cfg)
        try:
            model = model_entrypoint(name)(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
        except Exception as error:  # what the Hub's client and its HTTP library raise has no common base
            tried = pretrained and not isinstance(error, TypeError) and unavailable(pretrained_cfg, error)
            if tried:
                raise RuntimeError(tried) from error
            raise
        if pretrained and (known := knowledge(pretrained_cfg)):
            theirs = next((tag for tag in map(_tag, get_arch_pretrained_cfgs(name)) if tag), "")
            instead = f"; timm's own: {variant}.{theirs}" if theirs else ""
            _logger.log(logging.INFO if asked else logging.WARNING, "%s%s", known, instead)
        if isinstance(decor_config, dict):
            decor_config = DecorConfig.from_dict(decor_config)
        convert(model, decor_config or DecorConfig(), leaves_out(model))
        for pattern in plain if tells_unmatched else ():  # a family's wildcards are for all of its members
            if not fnmatch.filter((layer_name for layer_name, _ in model.named_modules()), pattern):
                _logger.warning("%s: no layer matches %r, which was to stay plain", variant, pattern)
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__module__ = module.__name__
    entrypoint.__doc__ = (
        f"`{name}` with layers that can be decorrelated: the same function, parameters and keys.\n\n"
        f"Takes what timm's `{name}` takes, and `decor_config`: a DecorConfig or a dictionary of its fields."
    )
    if has_cfgs:
        vars(module)["default_cfgs"][variant] = _twin_cfg(name)
    vars(module)[variant] = entrypoint
    return register_model(entrypoint)


def _check_tag(variant: str, tag: str | dict[str, Any] | PretrainedCfg | None) -> None:
    if not tag or not isinstance(tag, str):
        return
    tags = list(map(_tag, get_arch_pretrained_cfgs(variant)))
    if tag not in tags:
        raise RuntimeError(f"{variant} has no tag {tag!r}; tags: {', '.join(filter(None, tags)) or 'none'}")


def _tag(key: str) -> str:
    return split_model_name_tag(key)[1]
