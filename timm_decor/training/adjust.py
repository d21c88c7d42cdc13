"""What the arguments change in a model after it was made: its head's start, its BatchNorm layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_decor.errors import UserError


def set_batch_norm(model: nn.Module, momentum: float | None, eps: float | None) -> None:
    """Override momentum and eps of every BatchNorm layer; None leaves them. timm's own arguments reach few families."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = module.momentum if momentum is None else momentum
            module.eps = module.eps if eps is None else eps


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
