"""Twins: a `decor_<name>` entrypoint for a timm model, with the model's own tags, weights and keys.

A family is a module of two statements (see decor_resnet.py): its `default_cfgs`, then its entrypoints. timm files an
entrypoint under the last part of its module's name and reads `default_cfgs` from that module while it registers.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    is_model,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from timm_decor.config import DecorConfig
from timm_decor.convert import decorrelate

PREFIX = "decor_"

Entrypoint = Callable[..., nn.Module]


def plain_name(name: str) -> str:
    """The timm name of a twin, tag included: `decor_resnet18.a1_in1k` gives `resnet18.a1_in1k`."""
    return name.removeprefix(PREFIX)


def twin_cfgs(names: Iterable[str]) -> dict[str, DefaultCfg]:
    """timm's pretrained configs of the named models, under their twins' names.

    They are read from timm's registry, where `hf_hub_id` is already written in full. (A bare `timm/` would be completed
    with the twin's name on registration, and no such repository exists.)

    Args:
        names: timm's names. One that this version of timm lacks has no twin.
    """
    return {PREFIX + name: _twin_cfg(name) for name in names if is_model(name)}


def _twin_cfg(name: str) -> DefaultCfg:
    cfgs = {split_model_name_tag(key)[1]: cfg for key, cfg in get_arch_pretrained_cfgs(name).items()}
    # timm lists the default tag first, and DefaultCfg wants it first.
    return DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=any(cfg.has_weights for cfg in cfgs.values()))


def register_twins(module: str, names: Iterable[str]) -> dict[str, Entrypoint]:
    """Register the twins of the named timm models.

    Args:
        module: `__name__` of the calling module, which must hold `default_cfgs` already.
        names: timm's names. One that this version of timm lacks has no twin.

    Returns:
        Entrypoints by the twins' names, for the module to keep as its own functions.
    """
    return {PREFIX + name: _register_twin(module, name) for name in names if is_model(name)}


def _register_twin(module: str, name: str) -> Entrypoint:
    variant = PREFIX + name
    if is_model(variant):
        registered = model_entrypoint(variant)
        if registered.__module__ == module:
            return registered  # the module is imported again: registering twice would list each tag twice

    def entrypoint(
        pretrained: bool = False,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        decor_config: DecorConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        _check_tag(variant, pretrained_cfg)
        # Resolved under the twin's name, so that `model.pretrained_cfg` names the model that was asked for.
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, dict(pretrained_cfg_overlay or {}))  # type: ignore[arg-type]
        model = model_entrypoint(name)(pretrained=pretrained, pretrained_cfg=cfg, **kwargs)
        if isinstance(decor_config, dict):
            decor_config = DecorConfig.from_dict(decor_config)
        return decorrelate(model, decor_config)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__module__ = module
    entrypoint.__doc__ = (
        f"`{name}` with layers that can be decorrelated: the same function, parameters and keys.\n\n"
        f"Takes what timm's `{name}` takes, and `decor_config`: a DecorConfig or a dictionary of its fields."
    )
    assert hasattr(sys.modules[module], "default_cfgs"), f"{module} registers twins before it holds default_cfgs"
    return register_model(entrypoint)


def _check_tag(variant: str, tag: str | dict[str, Any] | PretrainedCfg | None) -> None:
    if not tag or not isinstance(tag, str):
        return
    tags = [split_model_name_tag(key)[1] for key in get_arch_pretrained_cfgs(variant)]
    if tag not in tags:
        raise RuntimeError(f"{variant} has no tag {tag!r}; tags: {', '.join(filter(None, tags)) or 'none'}")
