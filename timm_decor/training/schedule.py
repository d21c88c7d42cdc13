"""The learning rate's way over a run."""

from __future__ import annotations

from typing import Any

import timm
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch.optim import Optimizer

from timm_decor.errors import UserError, first_line
from timm_decor.training.options import ScheduleOptions


class Schedule:
    """timm's scheduler, told of updates and epochs.

    One that steps on updates counts them by epochs: so it goes on where it was when batches become larger or smaller
    between two epochs.

    Args:
        options: of the schedule.
        optimizer: whose rates are scheduled.
        updates_per_epoch: of the optimizer.
        layer_decay: the optimizer's, which schedules apply.
        eval_metric: what plateau follows.
        seed: of the rate's noise.

    Attributes:
        epochs: how many there will be, warm-up prefix and cooldown included.
        warmup_epochs: of them; 0 where there is no schedule.
        peak_lr: the highest learning rate that an update was made with, of any parameter.

    Raises:
        UserError: a combination that timm refuses.
    """

    def __init__(
        self,
        options: ScheduleOptions,
        optimizer: Optimizer,
        updates_per_epoch: int,
        layer_decay: float | None,
        eval_metric: str,
        seed: int,
    ) -> None:
        self.warmup_epochs = 0.0 if options.sched == "none" else options.warmup_epochs
        self.peak_lr = 0.0
        self._optimizer, self._updates_per_epoch = optimizer, updates_per_epoch
        self._scheduler, self.epochs = _timm_scheduler(
            options, optimizer, updates_per_epoch, layer_decay, eval_metric, seed
        )
        self.begin(0, None)

    @property
    def lr(self) -> float:
        """The learning rate now, the mean over the optimizer's groups."""
        groups = self._optimizer.param_groups
        return float(sum(group["lr"] for group in groups) / len(groups))

    def begin(self, epoch: int, metric: float | None) -> None:
        """So many epochs are done, and the next one begins.

        Args:
            epoch: how many.
            metric: of the last one, where it was evaluated.
        """
        if self._scheduler is None:
            return
        if epoch:
            self._scheduler.step(epoch, metric)
        self._scheduler.step_update(epoch * self._updates_per_epoch)

    def updated(self, epoch: int, updates: int) -> None:
        """An update was made with the rates as they are.

        Args:
            epoch: how many are done.
            updates: of the epoch after those.
        """
        self.peak_lr = max(self.peak_lr, *(group["lr"] for group in self._optimizer.param_groups))
        self.resume(epoch, updates)

    def resume(self, epoch: int, updates: int) -> None:
        """Go to a place within an epoch; arguments as for `updated`."""
        if self._scheduler is not None:
            self._scheduler.step_update(epoch * self._updates_per_epoch + updates)


def _timm_scheduler(
    options: ScheduleOptions,
    optimizer: Optimizer,
    updates_per_epoch: int,
    layer_decay: float | None,
    eval_metric: str,
    seed: int,
) -> tuple[Any, int]:
    """timm's scheduler, None for --sched none, and the number of epochs that it wants."""
    if options.sched == "none" and layer_decay not in (None, 1):
        raise UserError("--layer-decay does nothing with --sched none: timm's schedules apply it; use --sched constant")
    if options.warmup_prefix and options.warmup_epochs % 1:  # timm would cut the end of the schedule off
        raise UserError(
            f"--warmup-prefix puts whole epochs before the schedule, not --warmup-epochs {options.warmup_epochs:g}"
        )
    kwargs = scheduler_kwargs(options, decreasing_metric=eval_metric == "loss") | {"noise_seed": seed}
    kwargs["step_on_epochs"] |= options.sched == "plateau"  # it follows the metric of whole epochs
    try:
        scheduler, epochs = create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)
    except (ValueError, AssertionError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"schedule {options.sched}: {first_line(error)}") from error
    if scheduler is None and options.sched != "none":  # timm before 1.0.31 takes any name, and schedules nothing
        raise UserError(f"timm {timm.__version__} has no --sched {options.sched}; a newer timm may have it")
    return scheduler, int(epochs)
