"""An arm: one model with all that trains it, an epoch at a time.

A run has one arm, a comparison two. An arm shares nothing with another but the loaders, and each epoch starts from
random numbers that depend on seed and epoch only, so arms may take turns without changing each other's results.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from timm.models import model_parameters
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import timm_decor
from timm_decor.errors import UserError
from timm_decor.training.args import decor_config
from timm_decor.training.build import check_fit, class_count, place
from timm_decor.training.data.loaders import told
from timm_decor.training.evaluate import Metrics, evaluate
from timm_decor.training.keeping.progress import Progress
from timm_decor.training.optim import make_loss, make_optimizer, make_scheduler
from timm_decor.training.runtime import mixed_seed, seed_everything, set_random_state
from timm_decor.training.seeing.losswatch import LossWatch, NonFiniteLoss
from timm_decor.training.seeing.observe import Observer
from timm_decor.training.seeing.timeleft import TimeLeft
from timm_decor.training.seeing.watch import EpochWatch

Row = dict[str, Any]  # an epoch in summary.csv


class Arm:
    """One model in training.

    Args:
        name: for messages and tables.
        model: on any device; moved, but kept the same object.
        args: train.py's arguments, with `lr` resolved and `epochs` those of this arm.
        accelerator: of this arm alone, because it holds the gradient scaler.
        train_loader: prepared by any Accelerator; sets the number of updates an epoch.
        eval_loader: the same.
        decorrelated: attach decorrelation to the optimizer.

    Attributes:
        history: a row per finished epoch.
        epochs: how many there will be.
        handle: what `timm_decor.attach` returned, or None.
        failure: why it cannot go on, or None.
        peak_lr: the highest learning rate that an update was made with, of any parameter.
        distillation: adds a teacher's opinion to the loss, or None.
        observer: what its report will need.
        log: takes figures by name and the number of updates so far, for trackers.
        time_left: of its run; of both arms where they take turns.
        pause: called where an epoch can be left and gone on with: after an update, and before a batch of evaluation.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        args: argparse.Namespace,
        accelerator: Accelerator,
        train_loader: DataLoader[Any],
        eval_loader: DataLoader[Any],
        decorrelated: bool,
    ) -> None:
        self.name = name
        self.args = args
        self.accelerator = accelerator
        self.history: list[Row] = []
        self.failure: str | None = None
        self.peak_lr = 0.0
        self.distillation: nn.Module | None = None
        self.log: Callable[[Row, int], None] = lambda values, step: None
        self.pause: Callable[[], None] = lambda: None
        self.time_left = TimeLeft([self])
        self._progress: Progress | None = None  # of the epoch that is being trained
        self._train_loader, self._eval_loader = train_loader, eval_loader
        self.model = place(model, accelerator.device, args.channels_last)
        # the average is a copy: made before anything wraps or attaches to the model
        self.ema = (
            ModelEmaV3(self.model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
            if args.model_ema
            else None
        )
        optimizer = make_optimizer(args, self.model)
        self._wrapped, self._optimizer = accelerator.prepare(self.model, optimizer)
        if isinstance(self._wrapped, DistributedDataParallel):
            # Each process keeps the running statistics of its own images, and they are averaged at the epoch's end:
            # DDP would throw away all but the first process's, and send them at every step. Its argument of this name
            # is deprecated, the attribute is not.
            self._wrapped.broadcast_buffers = False
        self.handle = None
        if decorrelated:
            try:
                self.handle = timm_decor.attach(self.model, self._optimizer, decor_config(args))
                if args.initial_r:
                    self.handle.load_r(args.initial_r)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error
        # R is the same on every process: one looks at it
        self.observer = Observer(self.handle if accelerator.is_main_process else None, accelerator.device)
        if args.torchcompile:
            self._wrapped = torch.compile(self._wrapped, backend=args.torchcompile, mode=args.torchcompile_mode)
        self._second_order = bool(getattr(optimizer, "is_second_order", False))
        self._loss = make_loss(args).to(accelerator.device)
        self._updates_per_epoch = -(-len(train_loader) // args.grad_accum_steps)
        self._scheduler, self.epochs = make_scheduler(args, optimizer, self._updates_per_epoch)
        self._schedule(0)
        self._given = [_options(group) for group in self._optimizer.param_groups]

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return len(self.history)

    @property
    def chance(self) -> float:
        """Top-1 accuracy, %, of guessing the same class always: that of the most frequent one."""
        labels = self._eval_loader.dataset.source.labels  # type: ignore[attr-defined]
        if labels is None:
            return 100 / class_count(self.model)
        return float(100 * np.bincount(labels).max() / len(labels))

    @property
    def evaluation_images(self) -> int:
        """Images of an evaluation."""
        return len(self._eval_loader.dataset)  # type: ignore[arg-type]

    @property
    def warmup_epochs(self) -> float:
        """Epochs of the schedule's warm-up; 0 where there is none."""
        return 0.0 if self.args.sched == "none" else float(self.args.warmup_epochs)

    @property
    def steps(self) -> int:
        """Optimizer updates so far."""
        if self._progress is not None:
            return self._progress.steps
        return self.history[-1]["steps"] if self.history else 0

    @property
    def best(self) -> Row | None:
        """The row with the best --eval-metric, of the averaged weights where there are any; the first of equals."""
        return next(iter(self.ranked), None)

    @property
    def ranked(self) -> list[Row]:
        """The evaluated rows, the best first; NaN, which has no rank, is left out."""
        column = self.metric_column
        rows = [row for row in self.history if math.isfinite(row.get(column, math.nan))]
        sign = 1 if column.endswith("loss") else -1
        return sorted(rows, key=lambda row: sign * row[column])

    @property
    def metric_column(self) -> str:
        """The column of the history that decides what is best."""
        return f"{'ema' if self.ema else 'eval'}_{self.args.eval_metric}"

    def train_epoch(self) -> None:
        """Train one epoch, or the rest of it. `state` has it, and `finish_epoch` can be called again.

        Raises:
            NonFiniteLoss: names epoch and step.
        """
        if self._progress is None:
            self._progress = Progress(self._loss_watch(), self.steps)
        if self._progress.batches < len(self._train_loader):
            self._train(self._progress)

    @property
    def evaluation_due(self) -> bool:
        """Whether the epoch that comes, or is being trained, is one to evaluate."""
        return (self.epoch + 1) % self.args.val_interval == 0 or self.epoch + 1 == self.epochs

    def finish_epoch(self) -> Row:
        """Evaluate the epoch that was trained, where that is due, and append its row to the history.

        Raises:
            NonFiniteLoss: names epoch and step.
        """
        assert self._progress is not None, "train_epoch comes first"
        epoch = self.epoch
        row = self._training_row(epoch, self._progress)
        due = self.evaluation_due
        row |= _columns("eval", self.evaluate(self.model) if due else None)
        if self.ema:
            row |= _columns("ema", self.evaluate(self.ema.module) if due else None)
        self.check_finite(row)
        self.history.append(row)
        self.log(row, row["steps"])
        self._progress = None
        self._schedule(epoch + 1)
        return row

    def evaluate(self, model: nn.Module) -> Metrics:
        """Evaluate the model, or its average, on the evaluation split."""
        return evaluate(model, self._pausing(self._eval_loader), self.accelerator, self.args.channels_last)

    def _pausing(self, loader: DataLoader[Any]) -> Iterator[Any]:
        for batch in told(loader):
            self.pause()
            yield batch

    def _train(self, progress: Progress) -> None:
        """Train the epoch's batches from `progress.batches` on."""
        batches, images_per_batch = len(self._train_loader), self.args.batch_size * self.accelerator.num_processes
        interval = self.args.log_interval
        watch = EpochWatch(self, progress, batches, self._updates_per_epoch, images_per_batch, interval)
        self.model.train()
        for images, labels in watch.batches(self._batches(self.epoch, progress)):
            self._learn(images, labels, progress, watch.lap)
            progress.batches += 1
            updated = self.accelerator.sync_gradients
            if updated:
                self._count_update(progress)
            watch.trained(progress.lr or self._lr(), updated)
            if updated and progress.batches < batches:
                progress.seconds = watch.seconds
                self.pause()
        watch.close()
        self._end_training(progress)
        progress.seconds = watch.seconds

    def _count_update(self, progress: Progress) -> None:
        progress.steps += 1
        if self.ema:
            self.ema.update(self.model, step=progress.steps)
        progress.lr = self._lr()
        self.peak_lr = max(self.peak_lr, *(group["lr"] for group in self._optimizer.param_groups))
        self._schedule_update()

    def _end_training(self, progress: Progress) -> None:
        """What is left to do for an epoch behind its last batch."""
        if hasattr(self._optimizer.optimizer, "sync_lookahead"):
            self._optimizer.optimizer.sync_lookahead()
        progress.losses.check(self.name, self.epoch + 1)
        if self.accelerator.num_processes > 1:  # each process has its own running statistics
            for model in self._models:
                distribute_bn(model, self.accelerator.num_processes, reduce=True)

    def _learn(self, images: Tensor, labels: Tensor, progress: Progress, lap: Callable[[str], None]) -> Tensor:
        """Forward and backward, and the optimizer's step where it is due; returns the batch's loss.

        Args:
            images: a batch.
            labels: its labels.
            progress: of the epoch, which sees the loss.
            lap: told what has just ended.
        """
        accelerator, args = self.accelerator, self.args
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.accumulate(self._wrapped):
            try:
                output = self._wrapped(images)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                size = f"--batch-size {args.batch_size} at {images.shape[-1]} px"
                raise UserError(
                    f"{self.name}: {size} leaves BatchNorm one value a channel: take a larger one"
                ) from error
            logits = output[0] if isinstance(output, tuple) else output  # of a model with a distillation head
            loss = self._loss(logits, labels)
            if self.distillation is not None:
                loss = self.distillation(loss, output, images)
            progress.losses.see(loss.detach(), logits.detach(), labels, progress.steps + 1)
            lap("forward")
            accelerator.backward(loss * self._weight(progress.batches), create_graph=self._second_order)
            if args.clip_grad is not None and accelerator.sync_gradients:
                self._clip()
            lap("backward")
            self._optimizer.step()
            self._optimizer.zero_grad()
            lap("optimizer")
        return loss.detach()

    def short_training(self, updates: int) -> list[float]:
        """Train for a few updates with a schedule of their own: a warm-up over a tenth of them, then down to zero.

        Args:
            updates: of the optimizer.

        Returns:
            Each update's training loss, over all processes; shorter where one is not finite.
        """
        self.model.train()
        losses: list[Tensor] = []
        epoch = 0
        while len(losses) < updates:
            progress = Progress(self._loss_watch(), 0)
            parts: list[Tensor] = []  # of the update
            for images, labels in self._batches(epoch, progress):
                share = min(1.0, (len(losses) + 1) / (0.1 * updates)) * (1 - len(losses) / updates)
                for group in self._optimizer.param_groups:
                    group["lr"] = self.args.lr * share * group.get("lr_scale", 1.0)
                parts.append(self._learn(images, labels, progress, lambda _: None))
                progress.batches += 1
                if self.accelerator.sync_gradients:
                    losses.append(self.accelerator.reduce(torch.stack(parts).float().mean(), "mean"))  # type: ignore
                    parts = []
                    if len(losses) == updates or (len(losses) % 10 == 0 and not bool(losses[-1].isfinite())):
                        break
            if not bool(losses[-1].isfinite()):
                break
            epoch += 1
        found = torch.stack(losses).tolist()
        return found[: next((i for i, loss in enumerate(found) if not math.isfinite(loss)), len(found))]

    def _batches(self, epoch: int, progress: Progress) -> Iterator[Any]:
        """The epoch's batches that are still to come, with random numbers as they follow on those before."""
        self._train_loader.set_epoch(epoch)  # type: ignore[attr-defined]
        # Accelerate's loader passes this on by itself, but not on several processes
        self._train_loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        loader = self._train_loader
        if progress.batches:
            loader = skip_first_batches(loader, progress.batches)
            loader.set_epoch(epoch)  # type: ignore[attr-defined]  # it counts epochs on its own
        for number, batch in enumerate(told(loader)):
            # not earlier: a loader draws a number when it starts its workers, which it does once in a process
            if progress.random is not None:
                set_random_state(progress.random, self.accelerator.device)
                progress.random = None
            elif number == 0:
                seed_everything(mixed_seed(self.args.seed, epoch, self.accelerator.process_index))
            yield batch

    def _weight(self, batch: int) -> float:
        """Weight of a batch's loss, which Accelerate divides by --grad-accum-steps whatever an update's batches are."""
        steps, batches = self.args.grad_accum_steps, len(self._train_loader)
        left_over = batches % steps
        return float(steps / left_over) if left_over and batch >= batches - left_over else 1.0

    def _training_row(self, epoch: int, progress: Progress) -> Row:
        train_loss, train_top1, images_seen = progress.losses.totals()
        return {
            "epoch": epoch + 1,
            "train_loss": train_loss,
            "train_top1": train_top1,
            "lr": progress.lr,
            "steps": progress.steps,
            "epoch_seconds": progress.seconds,
            "seconds": progress.seconds + (self.history[-1]["seconds"] if self.history else 0.0),
            "images_per_s": images_seen / progress.seconds,
        }

    def _loss_watch(self) -> LossWatch:
        return LossWatch(self.accelerator, self.args.log_interval)

    def check_finite(self, row: Row | None = None) -> None:
        """Refuse a state that must not replace the last good checkpoint. Collective.

        Args:
            row: with the evaluation's losses, where there was one: the last update is behind no training loss.

        Raises:
            NonFiniteLoss: a loss or a weight is not finite.
        """
        if self._progress is not None:
            self._progress.losses.check(self.name, self.epoch + 1)
        row = row or {}
        found = [f"{kind} loss" for kind in ("eval", "ema") if not math.isfinite(row.get(f"{kind}_loss", 0.0))]
        for model in self._models:
            named = [(name, value) for name, value in model.state_dict().items() if value.is_floating_point()]
            if named and not bool(torch.stack([value.isfinite().all() for _, value in named]).all()):
                found.append(next(f"weight {name}" for name, value in named if not value.isfinite().all()))
        anywhere = self.accelerator.gather(torch.tensor([bool(found)], device=self.accelerator.device))
        if bool(anywhere.any()):  # on all processes together, or the others would wait for this one
            raise NonFiniteLoss(self.name, (found or ["state of another process"])[-1], self.epoch + 1, self.steps)

    def _clip(self) -> None:
        self.accelerator.unscale_gradients()
        mode = self.args.clip_mode
        dispatch_clip_grad(model_parameters(self.model, exclude_head="agc" in mode), self.args.clip_grad, mode=mode)

    def _lr(self) -> float:
        groups = self._optimizer.param_groups
        return float(sum(group["lr"] for group in groups) / len(groups))

    def _schedule(self, epoch: int) -> None:
        """Tell the scheduler that `epoch` epochs are done; one that steps on updates counts them by epochs, too.

        So a schedule goes on where it was when batches become larger or smaller between two epochs.
        """
        if self._scheduler is None:
            return
        if epoch:
            self._scheduler.step(epoch, self.history[epoch - 1].get(self.metric_column))
        self._scheduler.step_update(epoch * self._updates_per_epoch)

    def _schedule_update(self) -> None:
        """Tell a scheduler that steps on updates of one more in this epoch."""
        if self._scheduler is not None:
            before = self.history[-1]["steps"] if self.history else 0
            self._scheduler.step_update(self.epoch * self._updates_per_epoch + self.steps - before)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, in tensors and plain Python types. Collective."""
        scaler = self.accelerator.scaler
        return {
            "arch": self.args.model,
            "decorrelated": self.handle is not None,
            "opt": self.args.opt,
            "options": self._given,
            "parameters": self._parameter_names,
            "peak_lr": self.peak_lr,
            "epoch": self.epoch,
            "history": self.history,
            "state_dict": self.model.state_dict(),
            "state_dict_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self._optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "observed": self.observer.state(),
            "progress": self._progress and self._progress.state(self.accelerator, self._models, self._plan),
        }

    def load_state(self, state: dict[str, Any], path: str) -> None:
        """Go on from what `state` returned. What the arguments say otherwise of the optimizer takes effect.

        Raises:
            UserError: the state is of another model or optimizer, or of the middle of an epoch of other batches.
        """
        self._check_kind(state, path)
        check_fit(self.model, state["state_dict"], path)
        names = state.get("parameters", self._parameter_names)
        if names != self._parameter_names:
            raise UserError(f"{path} trained other parameters, or grouped them otherwise: --freeze and --layer-decay "
                            f"cannot change on the way")  # fmt: skip
        self.model.load_state_dict(state["state_dict"])
        if self.ema:
            self.ema.module.load_state_dict(state["state_dict_ema"] or state["state_dict"])
        self.history = list(state["history"])
        self.peak_lr = state.get("peak_lr", 0.0)
        self.observer.load(state.get("observed"))
        # A schedule is a function of updates and of the metrics so far: replaying those restores it.
        for epoch in range(self.epoch + 1):
            self._schedule(epoch)
        if state.get("progress"):
            self._progress = Progress(self._loss_watch(), 0)
            try:
                self._progress.load(state["progress"], self.accelerator, self._models, self._plan)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            self._schedule_update()
        rates = [{key: group[key] for key in _RATES if key in group} for group in self._optimizer.param_groups]
        try:
            self._optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{path}: its optimizer state does not fit this run: {error}") from error
        # a state has the values of its own run, and what an optimizer counts in its groups: only what was changed on
        # the command line is changed here
        before = state.get("options", self._given)
        for group, rate, given, its in zip(self._optimizer.param_groups, rates, self._given, before, strict=True):
            group.update(rate | {key: value for key, value in given.items() if its.get(key, value) != value})
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _check_kind(self, state: dict[str, Any], path: str) -> None:
        """Refuse what would load, or nearly so, and be another run."""
        decorrelated, opt = state.get("decorrelated", self.handle is not None), state.get("opt", self.args.opt)
        if decorrelated != (self.handle is not None):
            what = "decorrelated: go on with --decor, or a decor_ model" if decorrelated else "plain: leave out --decor"
            raise UserError(f"{path} was trained {what}")
        if opt.lower() != self.args.opt.lower():
            raise UserError(f"{path} was trained with --opt {opt}, whose state is of no use to {self.args.opt}: "
                            f"go on with it, or begin another run with --initial-checkpoint")  # fmt: skip

    @property
    def _parameter_names(self) -> list[list[str]]:
        """What is trained, in the optimizer's order."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [[names.get(id(p), "") for p in group["params"]] for group in self._optimizer.param_groups]

    @property
    def options(self) -> list[dict[str, Any]]:
        """What the optimizer's groups hold now: learning rate, weight decay and the like."""
        return [
            {"parameters": len(group["params"])} | {k: group[k] for k in _RATES if k in group} | _options(group)
            for group in self._optimizer.param_groups
        ]

    @property
    def _models(self) -> list[nn.Module]:
        return [self.model, *([self.ema.module] if self.ema else [])]

    @property
    def _plan(self) -> dict[str, int]:
        """What decides which batches an epoch has, by the names of the arguments."""
        return {
            "processes": self.accelerator.num_processes,
            "batch-size": self.args.batch_size,
            "grad-accum-steps": self.args.grad_accum_steps,
            "seed": self.args.seed,
            "batches": len(self._train_loader),
        }


def _columns(prefix: str, metrics: Metrics | None) -> Row:
    if metrics is None:
        return {}
    row = {f"{prefix}_loss": metrics.loss, f"{prefix}_top1": metrics.top1}
    return row if metrics.top5 is None else row | {f"{prefix}_top5": metrics.top5}


_RATES = ("lr", "initial_lr")  # what schedules move


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group's settings: plain values, without the learning rate."""

    def is_plain(value: Any) -> bool:
        return (
            all(map(is_plain, value))
            if isinstance(value, tuple | list)
            else value is None or isinstance(value, bool | int | float | str)
        )

    return {key: value for key, value in group.items() if key not in ("params", *_RATES) and is_plain(value)}
