"""timm's optimizers, schedules and losses, as the arguments describe them."""

from __future__ import annotations

import argparse
from typing import Any

from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn
from torch.optim import Optimizer

from timm_decor.errors import UserError, first_line
from timm_decor.text import near
from timm_decor.training.data.loaders import mixes


def learning_rate(args: argparse.Namespace, processes: int) -> float:
    """--lr, or --lr-base scaled by the global batch size in timm's way."""
    if args.lr is not None:
        return float(args.lr)
    ratio = args.batch_size * processes * args.grad_accum_steps / args.lr_base_size
    adaptive = any(word in args.opt.lower() for word in ("ada", "lamb"))
    if (args.lr_base_scale or ("sqrt" if adaptive else "linear")) == "sqrt":
        ratio **= 0.5
    return float(args.lr_base * ratio)


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> Optimizer:
    """The optimizer of --opt on the model's parameters, at learning rate `args.lr`.

    Raises:
        UserError: an unknown name, or arguments that it does not take.
    """
    known = [str(name) for name in list_optimizers()]
    if args.opt.lower() not in known and args.opt.lower().removeprefix("lookahead_") not in known:
        raise UserError(f"unknown optimizer '{args.opt}'{near(args.opt.lower(), known)}")
    try:
        return create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, ImportError) as error:
        raise UserError(f"optimizer {args.opt}: {first_line(error)}") from error


def make_scheduler(args: argparse.Namespace, optimizer: Optimizer, updates_per_epoch: int) -> tuple[Any, int]:
    """timm's scheduler and the number of epochs that it wants, warm-up prefix and cooldown included.

    Returns:
        The scheduler (None for --sched none) and the number of epochs.

    Raises:
        UserError: a combination that timm refuses.
    """
    if args.sched == "none" and args.layer_decay not in (None, 1):
        raise UserError("--layer-decay does nothing with --sched none: timm's schedules apply it; use --sched constant")
    kwargs = scheduler_kwargs(args)
    kwargs["step_on_epochs"] |= args.sched == "plateau"  # it follows the metric of whole epochs
    try:
        scheduler, epochs = create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)
    except (ValueError, AssertionError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"schedule {args.sched}: {first_line(error)}") from error
    return scheduler, int(epochs)


def make_loss(args: argparse.Namespace) -> nn.Module:
    """The training loss: mixup brings soft labels, which are already smoothed."""
    soft = mixes(args)
    if args.bce_loss:
        return BinaryCrossEntropy(
            0.0 if soft else args.smoothing,
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    if soft:
        return SoftTargetCrossEntropy()
    if args.smoothing:
        return LabelSmoothingCrossEntropy(args.smoothing)
    return nn.CrossEntropyLoss()
