"""What the arguments change in a model after it was made: its head's start, its BatchNorm layers.

A checkpoint is one of timm's, which cannot say an eps: `weights_for_timm` lets its running variances make up for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_decor.errors import UserError

_OWN_EPS = "eps_of_architecture"  # of a model: the eps of its BatchNorm layers before --bn-eps, by name


def set_batch_norm(model: nn.Module, momentum: float | None, eps: float | None, trained: bool = False) -> None:
    """Override momentum and eps of every BatchNorm layer; None leaves them. timm's own arguments reach few families.

    Args:
        model: changed in place.
        momentum: of the running statistics.
        eps: beside the variance.
        trained: whether the running variances are somebody's: they then make up for another eps, as
            `weights_for_timm` lets them, so that the function stays.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for module in layers.values():
        module.momentum = module.momentum if momentum is None else momentum
    if eps is not None:
        # by name: --sync-bn makes other modules of them; on the model, so that its copies have it
        vars(model)[_OWN_EPS] = {name: module.eps for name, module in layers.items()}
        for module in layers.values():
            if trained and module.running_var is not None:
                module.running_var += module.eps - eps
            module.eps = eps


def weights_for_timm(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights for the same architecture with its own eps: variance + eps stays what it is.

    Args:
        model: that may have another eps, from `set_batch_norm`.
        weights: its state, or some of it.
    """
    found = dict(weights)
    for name, own in vars(model).get(_OWN_EPS, {}).items():
        key = f"{name}.running_var"
        if found.get(key) is not None:
            found[key] = found[key] + (model.get_submodule(name).eps - own)  # type: ignore[operator]
    return found


def with_own_eps(model: nn.Module) -> nn.Module:
    """Take back what `set_batch_norm` did to eps, in place: for weights that `weights_for_timm` made."""
    for name, own in vars(model).pop(_OWN_EPS, {}).items():
        model.get_submodule(name).eps = own
    return model


@torch.no_grad()
def init_head(model: nn.Module, scale: float | None, bias: float | None) -> None:
    """Multiply the classifier's weight and bias by `scale`, then set its bias to `bias`; None leaves them.

    Raises:
        UserError: the model has no classifier that could be so changed.
    """
    if scale is None and bias is None:
        return
    found = model.get_classifier()  # type: ignore[operator]  # of every timm model
    heads = found if isinstance(found, tuple) else (found,)
    flag = "--head-init-bias" if scale is None else "--head-init-scale"
    for head in heads:
        if getattr(head, "weight", None) is None:
            raise UserError(f"{flag}: {type(model).__name__} has no classifier with a weight")
        if bias is not None and head.bias is None:
            raise UserError(f"--head-init-bias: the classifier of {type(model).__name__} has no bias")
        if scale is not None:
            head.weight.mul_(scale)
            if head.bias is not None:
                head.bias.mul_(scale)
        if bias is not None:
            head.bias.fill_(bias)
