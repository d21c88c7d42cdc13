"""timm's optimizers and losses, as the arguments describe them; what an optimizer's parameter groups hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from torch import nn
from torch.optim import Optimizer

from timm_decor.errors import UserError, first_line
from timm_decor.text import near
from timm_decor.training.options import LabelOptions, LossOptions, OptimizerOptions


def learning_rate(options: OptimizerOptions, images: int) -> float:
    """--lr, or --lr-base scaled by the images of an update, over all processes, in timm's way."""
    if options.lr is not None:
        return options.lr
    ratio = images / options.lr_base_size
    adaptive = any(word in options.opt.lower() for word in ("ada", "lamb"))
    if (options.lr_base_scale or ("sqrt" if adaptive else "linear")) == "sqrt":
        ratio **= 0.5
    return options.lr_base * ratio


def make_optimizer(options: OptimizerOptions, model: nn.Module, lr: float) -> Optimizer:
    """The optimizer of --opt on the model's parameters.

    Raises:
        UserError: an unknown name, or arguments that it does not take.
    """
    known = [str(name) for name in list_optimizers()]
    name = options.opt.lower()
    if name not in known and name.removeprefix("lookahead_") not in known:
        raise UserError(f"unknown optimizer '{options.opt}'{near(name, known)}")
    try:
        return create_optimizer_v2(model, **optimizer_kwargs(replace(options, lr=lr)), **options.opt_kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, ImportError, LookupError, ArithmeticError) as error:
        few = "; --opt-betas has too few values for it" if isinstance(error, LookupError) and options.opt_betas else ""
        raise UserError(f"optimizer {options.opt}: {first_line(error)}{few}") from error


def make_loss(options: LossOptions, label: LabelOptions) -> nn.Module:
    """The training loss: mixup brings soft labels, which are already smoothed."""
    if options.bce_loss:
        return BinaryCrossEntropy(
            0.0 if label.mixes else label.smoothing,
            target_threshold=options.bce_target_thresh,
            sum_classes=options.bce_sum,
            pos_weight=options.bce_pos_weight,
        )
    if label.mixes:
        return SoftTargetCrossEntropy()
    if label.smoothing:
        return LabelSmoothingCrossEntropy(label.smoothing)
    return nn.CrossEntropyLoss()


_RATES = ("lr", "initial_lr")  # what schedules move in a parameter group


def rates(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group's learning rates."""
    return {key: group[key] for key in _RATES if key in group}


def settings(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group's settings: plain values, without the learning rate."""

    def is_plain(value: Any) -> bool:
        return (
            all(map(is_plain, value))
            if isinstance(value, tuple | list)
            else value is None or isinstance(value, bool | int | float | str)
        )

    return {key: value for key, value in group.items() if key not in ("params", *_RATES) and is_plain(value)}


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What the parameter groups hold now: how many parameters, learning rate, weight decay and the like."""
    return [{"parameters": len(group["params"])} | rates(group) | settings(group) for group in optimizer.param_groups]
