"""All that an arm needs to go on, as one value: how it is taken and checked, and how an arm goes on from it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from timm_decor.engine import shards
from timm_decor.errors import UserError
from timm_decor.training.build import check_fit
from timm_decor.training.keeping.progress import Progress
from timm_decor.training.keeping.whole import load_optimizer, load_weights, whole_optimizer, whole_weights
from timm_decor.training.optim import rates
from timm_decor.training.seeing.losswatch import NonFiniteLoss

if TYPE_CHECKING:
    from timm_decor.training.arm import Arm


def state_of(arm: Arm) -> dict[str, Any]:
    """The state, in tensors and plain Python types. Collective."""
    scaler, writes = arm.accelerator.scaler, arm.accelerator.is_main_process
    weights = whole_weights(arm.model, writes)  # first: it puts the shares back that an evaluation has left whole
    return {
        "arch": arm.options.model,
        "decorrelated": arm.handle is not None,
        "opt": arm.options.optimizer.opt,
        "options": arm.given,
        "parameters": _parameter_names(arm),
        "plan": _plan(arm),
        "peak_lr": arm.schedule.peak_lr,
        "epoch": arm.epoch,
        "history": arm.history,
        "state_dict": weights,
        "state_dict_ema": whole_weights(arm.ema.module, writes) if arm.ema else None,
        "optimizer": whole_optimizer(arm.optimizer, writes),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "observed": arm.observer.state(),
        "progress": arm.progress and arm.progress.state(arm.accelerator, arm.models, _plan(arm)),
    }


def load_into(arm: Arm, state: dict[str, Any], path: str) -> None:
    """Let an arm go on from what `state_of` returned. What the arguments say otherwise of the optimizer takes effect.

    Args:
        arm: as it was made.
        state: the state.
        path: where it was, for messages.

    Raises:
        UserError: the state is of another model or optimizer, or of the middle of an epoch of other batches.
    """
    _check_kind(arm, state, path)
    check_fit(arm.model, state["state_dict"], path)
    names = _parameter_names(arm)
    if state.get("parameters", names) != names:
        raise UserError(f"{path} trained other parameters, or grouped them otherwise: --freeze and --layer-decay "
                        f"cannot change on the way")  # fmt: skip
    load_weights(arm.model, state["state_dict"])
    if arm.ema:
        load_weights(arm.ema.module, state["state_dict_ema"] or state["state_dict"])
    arm.history = list(state["history"])
    arm.schedule.peak_lr = state.get("peak_lr", 0.0)
    arm.observer.load(state.get("observed"))
    # A schedule is a function of updates and of the metrics so far: replaying those restores it.
    for epoch in range(arm.epoch + 1):
        arm.schedule.begin(epoch, arm.metric(epoch))
    if state.get("progress"):
        arm.progress = Progress(arm.loss_watch(), 0)
        try:
            arm.progress.load(state["progress"], arm.accelerator, arm.models, _plan(arm))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        arm.schedule.resume(arm.epoch, arm.steps_of_epoch)
    _load_optimizer(arm, state, path)
    if arm.accelerator.scaler is not None and state["scaler"]:
        arm.accelerator.scaler.load_state_dict(state["scaler"])


def refuse_non_finite(arm: Arm, row: dict[str, Any]) -> None:
    """Refuse a state that must not replace the last good checkpoint. Collective.

    Args:
        arm: after an update, or behind an evaluation.
        row: with the evaluation's losses, where there was one: the last update is behind no training loss.

    Raises:
        NonFiniteLoss: a loss or a weight is not finite.
    """
    if arm.progress is not None:
        arm.progress.losses.check(arm.name, arm.epoch + 1)
    found = [f"{kind} loss" for kind in ("eval", "ema") if not math.isfinite(row.get(f"{kind}_loss", 0.0))]
    for model in arm.models:
        state = model.state_dict().items()
        named = [(name, shards.here(value)) for name, value in state if value.is_floating_point()]
        finite = [value.isfinite().all().to(arm.accelerator.device) for _, value in named]  # some may be offloaded
        if finite and not bool(torch.stack(finite).all()):
            found.append(next(f"weight {name}" for name, value in named if not value.isfinite().all()))
    anywhere = arm.accelerator.gather(torch.tensor([bool(found)], device=arm.accelerator.device))
    if bool(anywhere.any()):  # on all processes together, or the others would wait for this one
        raise NonFiniteLoss(arm.name, (found or ["state of another process"])[-1], arm.epoch + 1, arm.steps)


def _load_optimizer(arm: Arm, state: dict[str, Any], path: str) -> None:
    scheduled = [rates(group) for group in arm.optimizer.param_groups]
    try:
        load_optimizer(arm.optimizer, state["optimizer"])
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit this run: {error}") from error
    # a state has the values of its own run, and what an optimizer counts in its groups: only what was changed on the
    # command line is changed here
    before = state.get("options", arm.given)
    for group, rate, given, its in zip(arm.optimizer.param_groups, scheduled, arm.given, before, strict=True):
        group.update(rate | {key: value for key, value in given.items() if its.get(key, value) != value})


def _check_kind(arm: Arm, state: dict[str, Any], path: str) -> None:
    """Refuse what would load, or nearly so, and be another run."""
    mine = arm.options.optimizer.opt
    decorrelated, opt = state.get("decorrelated", arm.handle is not None), state.get("opt", mine)
    if decorrelated != (arm.handle is not None):
        what = "decorrelated: go on with --decor, or a decor_ model" if decorrelated else "plain: leave out --decor"
        raise UserError(f"{path} was trained {what}")
    if opt.lower() != mine.lower():
        raise UserError(f"{path} was trained with --opt {opt}, whose state is of no use to {mine}: "
                        f"go on with it, or begin another run with --initial-checkpoint")  # fmt: skip


def _parameter_names(arm: Arm) -> list[list[str]]:
    """What is trained, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in arm.model.named_parameters()}
    return [[names.get(id(p), "") for p in group["params"]] for group in arm.optimizer.param_groups]


def _plan(arm: Arm) -> dict[str, int]:
    """What decides which batches an epoch has, by the names of the arguments."""
    return {
        "processes": arm.accelerator.num_processes,
        "batch-size": arm.options.loader.batch_size,
        "grad-accum-steps": arm.options.update.grad_accum_steps,
        "seed": arm.options.seed,
        "batches": arm.batches_per_epoch,
        **arm.order_plan,
    }
