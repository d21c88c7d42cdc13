"""An arm: one model with all that trains it, an epoch at a time.

A run has one arm, a comparison two. An arm shares nothing with another but the loaders, and each epoch starts from
random numbers that depend on seed and epoch only, so arms may take turns without changing each other's results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.models import model_parameters
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import timm_decor
from timm_decor.errors import UserError, first_line
from timm_decor.training.adjust import weights_for_timm
from timm_decor.training.build import class_count, compiled, place
from timm_decor.training.data.loaders import of_epoch, told
from timm_decor.training.data.sources import Source
from timm_decor.training.evaluate import Metrics, evaluate
from timm_decor.training.keeping.progress import Progress
from timm_decor.training.keeping.whole import refuse_own_weights, whole_weights
from timm_decor.training.optim import make_loss, make_optimizer, settings
from timm_decor.training.options import TrainOptions
from timm_decor.training.runtime import is_sharded, mixed_seed, seed_everything, set_random_state, shard
from timm_decor.training.schedule import Schedule
from timm_decor.training.seeing.compare import ranked
from timm_decor.training.seeing.losswatch import LossWatch
from timm_decor.training.seeing.observe import Observer
from timm_decor.training.seeing.timeleft import TimeLeft
from timm_decor.training.seeing.watch import EpochWatch
from timm_decor.training.state import load_into, refuse_non_finite, state_of

Row = dict[str, Any]  # an epoch in summary.csv


@contextlib.contextmanager
def batch_norm_explained(name: str, batch_size: int, size: int) -> Iterator[None]:
    """What BatchNorm says in training of a batch that leaves it one value a channel, in one line.

    Args:
        name: of the model.
        batch_size: of a process.
        size: the images', in pixels.

    Raises:
        UserError: see above.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        taken = f"--batch-size {batch_size} at {size} px"
        raise UserError(f"{name}: {taken} leaves BatchNorm one value a channel: take a larger one") from error


class Arm:
    """One model in training.

    Args:
        name: for messages and tables.
        model: on any device; moved, but kept the same object.
        options: train.py's, with this arm's model and epochs.
        lr: peak learning rate.
        accelerator: of this arm alone, because it holds the gradient scaler.
        train_loader: prepared by any Accelerator; sets the number of updates an epoch.
        eval_loader: the same.
        decorrelated: attach decorrelation to the optimizer.

    Attributes:
        ema: the average of the weights, or None.
        optimizer: as Accelerate prepared it.
        given: the settings of its parameter groups as the arguments have them.
        schedule: of the learning rate.
        handle: what `timm_decor.attach` returned, or None.
        history: a row per finished epoch.
        progress: of the epoch that is being trained, or None.
        epochs: how many there will be.
        failure: why it cannot go on, or None.
        distillation: adds a teacher's opinion to the loss, or None.
        observer: what its report will need.
        log: takes figures by name and the number of updates so far, for trackers.
        time_left: of its run; of both arms where they take turns.
        pause: called where an epoch can be left and gone on with, after an update and before a batch of evaluation;
            takes the context in which to save.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        options: TrainOptions,
        lr: float,
        accelerator: Accelerator,
        train_loader: DataLoader[Any],
        eval_loader: DataLoader[Any],
        decorrelated: bool,
    ) -> None:
        self.name, self.options, self.lr, self.accelerator = name, options, lr, accelerator
        self.history: list[Row] = []
        self.progress: Progress | None = None
        self.failure: str | None = None
        self.distillation: nn.Module | None = None
        self.log: Callable[[Row, int], None] = lambda values, step: None
        self.pause: Callable[..., None] = lambda within=None: None
        self.time_left = TimeLeft([self])
        self._train_loader, self._eval_loader = train_loader, eval_loader
        device, update, sharded = options.device, options.update, is_sharded(accelerator)
        if sharded and update.clip_grad is not None and update.clip_mode == "agc":
            raise UserError("--clip-mode agc compares whole weights, which FSDP2 has in pieces: use norm or value")
        # fully_shard takes weights in their ordinary layout only; the images have the other all the same
        self.model = place(model, accelerator.device, device.channels_last and not sharded)
        # the average is a copy: made before anything wraps or attaches to the model
        self.ema = (
            ModelEmaV3(
                self.model, decay=update.model_ema_decay, use_warmup=update.model_ema_warmup, foreach=not sharded
            )
            if update.model_ema
            else None
        )
        optimizer = make_optimizer(options.optimizer, self.model, lr)
        try:
            self._wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
            if sharded and self.ema:
                shard(self.ema.module, accelerator)  # its shares lie beside those that they follow
        except ValueError as error:  # a class of layers to wrap that the model has not
            raise UserError(f"{name}: {first_line(error)}") from error
        if sharded:
            refuse_own_weights(self.model)
        if isinstance(self._wrapped, DistributedDataParallel):
            # Each process keeps the running statistics of its own images, and they are averaged at the epoch's end:
            # DDP would throw away all but the first process's, and send them at every step. Its argument of this name
            # is deprecated, the attribute is not.
            self._wrapped.broadcast_buffers = False
        self.handle = None
        if decorrelated:
            try:
                self.handle = timm_decor.attach(self.model, self.optimizer, options.decor)
                if options.start.initial_r:
                    self.handle.load_r(options.start.initial_r)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error
        # R is the same on every process: one looks at it
        self.observer = Observer(self.handle if accelerator.is_main_process else None, accelerator.device)
        self._wrapped = compiled(self._wrapped, device)
        self._second_order = bool(getattr(optimizer, "is_second_order", False))
        self._loss = make_loss(options.loss, options.label).to(accelerator.device)
        self._updates_per_epoch = -(-len(train_loader) // update.grad_accum_steps)
        self.schedule = Schedule(
            options.schedule,
            optimizer,
            self._updates_per_epoch,
            options.optimizer.layer_decay,
            options.evaluation.eval_metric,
            options.seed,
        )
        self.epochs = self.schedule.epochs
        self.given = [settings(group) for group in self.optimizer.param_groups]

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return len(self.history)

    @property
    def chance(self) -> float:
        """Top-1 accuracy, %, of guessing the same class always: that of the most frequent one."""
        labels = self.evaluation_source.labels
        if labels is None:
            return 100 / class_count(self.model)
        return float(100 * np.bincount(labels).max() / len(labels))

    @property
    def evaluation_source(self) -> Source:
        """The images of an evaluation."""
        return self._eval_loader.dataset.source  # type: ignore[attr-defined, no-any-return]

    @property
    def steps(self) -> int:
        """Optimizer updates so far."""
        if self.progress is not None:
            return self.progress.steps
        return self.history[-1]["steps"] if self.history else 0

    @property
    def steps_of_epoch(self) -> int:
        """Those of the epoch that is being trained."""
        return self.steps - (self.history[-1]["steps"] if self.history else 0)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of this process."""
        return len(self._train_loader)

    @property
    def order_plan(self) -> dict[str, int]:
        """What the order of the training images depends on beside the batches' size and number."""
        return self._train_loader.dataset.plan  # type: ignore[attr-defined,no-any-return]

    def work(self, epoch: int) -> float:
        """What an epoch costs, in relation to the others: the pixels of its images decide."""
        return self._train_loader.dataset.work(epoch)  # type: ignore[attr-defined,no-any-return]

    @property
    def best(self) -> Row | None:
        """The row with the best --eval-metric, of the averaged weights where there are any; the first of equals."""
        return next(iter(self.ranked), None)

    @property
    def ranked(self) -> list[Row]:
        """The evaluated rows, the best first; NaN, which has no rank, is left out."""
        return ranked(self.history, self.metric_column)

    @property
    def metric_column(self) -> str:
        """The column of the history that decides what is best."""
        return f"{'ema' if self.ema else 'eval'}_{self.options.evaluation.eval_metric}"

    def metric(self, epoch: int) -> float | None:
        """What the metric was after so many epochs; None without an evaluation."""
        return self.history[epoch - 1].get(self.metric_column) if epoch else None

    def train_epoch(self) -> None:
        """Train one epoch, or the rest of it. `state` has it, and `finish_epoch` can be called again.

        Raises:
            NonFiniteLoss: names epoch and step.
        """
        if self.progress is None:
            self.progress = Progress(self.loss_watch(), self.steps)
        if self.progress.batches < self.batches_per_epoch:
            self._train(self.progress)

    def _train(self, progress: Progress) -> None:
        """Train the epoch's batches from `progress.batches` on."""
        images_per_batch = self.options.loader.batch_size * self.accelerator.num_processes
        interval = self.options.watch.log_interval
        watch = EpochWatch(self, progress, self.batches_per_epoch, self._updates_per_epoch, images_per_batch, interval)
        self.model.train()
        for images, labels in watch.batches(self.batches(self.epoch, progress)):
            self.learn(images, labels, progress, watch.lap)
            progress.batches += 1
            updated = self.accelerator.sync_gradients
            if updated:
                self._count_update(progress)
            watch.trained(progress.lr or self.schedule.lr, updated)
            if updated and progress.batches < self.batches_per_epoch:
                self.pause(watch.paused)
        watch.close()
        self._end_training(progress)
        progress.seconds = watch.seconds

    def learn(self, images: Tensor, labels: Tensor, progress: Progress, lap: Callable[[str], None]) -> Tensor:
        """Forward and backward, and the optimizer's step where it is due; returns the batch's loss.

        Args:
            images: a batch.
            labels: its labels.
            progress: of the epoch, which sees the loss.
            lap: told what has just ended.
        """
        with self.accelerator.accumulate(self._wrapped):
            output = self._forward(images)
            logits = output[0] if isinstance(output, tuple) else output  # of a model with a distillation head
            loss = self._loss(logits, labels)
            if self.distillation is not None:
                loss = self.distillation(loss, output, images)
            progress.losses.see(loss.detach(), logits.detach(), labels, progress.steps + 1)
            lap("forward")
            self.accelerator.backward(loss * self._weight(progress.batches), create_graph=self._second_order)
            if self.accelerator.sync_gradients:
                self._clip()
            lap("backward")
            self.optimizer.step()
            self.optimizer.zero_grad()
            lap("optimizer")
        return loss.detach()

    def _count_update(self, progress: Progress) -> None:
        progress.steps += 1
        if self.ema:
            self.ema.update(self.model, step=progress.steps)
        progress.lr = self.schedule.lr
        self.schedule.updated(self.epoch, self.steps_of_epoch)

    def _end_training(self, progress: Progress) -> None:
        """What is left to do for an epoch behind its last batch."""
        if hasattr(self.optimizer.optimizer, "sync_lookahead"):
            self.optimizer.optimizer.sync_lookahead()
        progress.losses.check(self.name, self.epoch + 1)
        if self.accelerator.num_processes > 1:  # each process has its own running statistics
            for model in self.models:
                distribute_bn(model, self.accelerator.num_processes, reduce=True)

    def _forward(self, images: Tensor) -> Any:
        """The model's output, on the way of an epoch."""
        if self.options.device.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with batch_norm_explained(self.name, self.options.loader.batch_size, images.shape[-1]):
            return self._wrapped(images)

    def _clip(self) -> None:
        clip, mode = self.options.update.clip_grad, self.options.update.clip_mode
        if clip is not None:
            self.accelerator.unscale_gradients()
            dispatch_clip_grad(model_parameters(self.model, exclude_head="agc" in mode), clip, mode=mode)

    @property
    def evaluation_due(self) -> bool:
        """Whether the epoch that comes, or is being trained, is one to evaluate."""
        return (self.epoch + 1) % self.options.evaluation.val_interval == 0 or self.epoch + 1 == self.epochs

    def finish_epoch(self) -> Row:
        """Evaluate the epoch that was trained, where that is due, and append its row to the history.

        Raises:
            NonFiniteLoss: names epoch and step.
        """
        assert self.progress is not None, "train_epoch comes first"
        epoch = self.epoch
        row = self._training_row(epoch, self.progress)
        due = self.evaluation_due
        row |= _columns("eval", self.evaluate(self.model) if due else None)
        if self.ema:
            row |= _columns("ema", self.evaluate(self.ema.module) if due else None)
        self.check_finite(row)
        self.history.append(row)
        self.log(row, row["steps"])
        self.progress = None
        self.schedule.begin(epoch + 1, self.metric(epoch + 1))
        return row

    def evaluate(self, model: nn.Module, seen: list[Tensor] | None = None) -> Metrics:
        """Evaluate the model, or its average, on the evaluation split; `seen` as in `evaluate`."""
        batches, channels_last = self._pausing(self._eval_loader), self.options.device.channels_last
        return evaluate(model, batches, self.accelerator, channels_last, seen)

    def _pausing(self, loader: DataLoader[Any]) -> Iterator[Any]:
        for batch in told(loader):
            self.pause()
            yield batch

    def batches(self, epoch: int, progress: Progress) -> Iterator[Any]:
        """The epoch's batches that are still to come, with random numbers as they follow on those before."""
        for number, batch in enumerate(told(of_epoch(self._train_loader, epoch, progress.batches))):
            # not earlier: a loader draws a number when it starts its workers, which it does once in a process
            if progress.random is not None:
                set_random_state(progress.random, self.accelerator.device)
                progress.random = None
            elif number == 0:
                seed_everything(mixed_seed(self.options.seed, epoch, self.accelerator.process_index))
            yield batch

    def _weight(self, batch: int) -> float:
        """Weight of a batch's loss, which Accelerate divides by --grad-accum-steps whatever an update's batches are."""
        steps, batches = self.options.update.grad_accum_steps, self.batches_per_epoch
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

    def loss_watch(self) -> LossWatch:
        """A new one, for an epoch that begins."""
        return LossWatch(self.accelerator, self.options.watch.log_interval)

    def check_finite(self, row: Row | None = None) -> None:
        """Refuse a state that must not replace the last good checkpoint: see `refuse_non_finite`. Collective."""
        refuse_non_finite(self, row or {})

    def timm_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights of the model, or of its average, as a checkpoint has them. Collective where it is sharded."""
        return weights_for_timm(model, whole_weights(model, self.accelerator.is_main_process))

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, in tensors and plain Python types. Collective."""
        return state_of(self)

    def load_state(self, state: dict[str, Any], path: str) -> None:
        """Go on from what `state` returned: see `load_into`."""
        load_into(self, state, path)

    @property
    def models(self) -> list[nn.Module]:
        """What has weights and running statistics: the model, and its average where there is one."""
        return [self.model, *([self.ema.module] if self.ema else [])]


def _columns(prefix: str, metrics: Metrics | None) -> Row:
    if metrics is None:
        return {}
    row = {f"{prefix}_loss": metrics.loss, f"{prefix}_top1": metrics.top1}
    return row if metrics.top5 is None else row | {f"{prefix}_top5": metrics.top5}
