"""--find-lr: short trainings from the same weights over a grid of learning rates, before a run is begun.

Each is as long as the others, on the same batches, with a schedule of its own length (a warm-up, then down to zero).
What counts is the training loss of the last fifth of its updates: the evaluation images have no say. Short trainings
favour higher rates a little, so of rates that are as good as the best within their noise the lowest is named.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import safe_model_name
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_decor.errors import UserError
from timm_decor.text import text_table
from timm_decor.training import build
from timm_decor.training.arm import Arm
from timm_decor.training.keeping.folder import RunFolder
from timm_decor.training.keeping.progress import Progress
from timm_decor.training.options import FolderOptions, TrainOptions
from timm_decor.training.runtime import make_accelerator
from timm_decor.training.seeing.compare import SIDES
from timm_decor.training.seeing.drawing import MARKERS, label, plain_text
from timm_decor.training.seeing.plot import COLOURS

_FACTOR = 2.0  # between neighbours of the grid, at most
_LAST = 0.2  # of the updates, whose loss counts


@dataclass(frozen=True)
class Trial:
    """A short training.

    Attributes:
        lr: peak learning rate.
        losses: of each update; fewer than asked for where it diverged.
        updates: that were asked for.
    """

    lr: float
    losses: list[float]
    updates: int

    @property
    def diverged(self) -> bool:
        return len(self.losses) < self.updates

    @property
    def failed(self) -> bool:
        """Whether it diverged, or its loss ended above where it began."""
        return self.diverged or self.loss > self.losses[0]

    @property
    def _last(self) -> list[float]:
        return self.losses[-max(1, round(_LAST * self.updates)) :]

    @property
    def loss(self) -> float:
        """Mean training loss of the last updates; infinite where it diverged."""
        return math.inf if self.diverged else statistics.fmean(self._last)

    @property
    def error(self) -> float:
        """Standard error of `loss`, as far as batches differ."""
        last = self._last
        return statistics.stdev(last) / math.sqrt(len(last)) if len(last) > 1 and not self.diverged else 0.0


@dataclass(frozen=True)
class Search:
    """One side's trials, in the order of their rates."""

    name: str
    trials: list[Trial]

    @property
    def best(self) -> Trial | None:
        """The lowest rate that is as good as the best one within the noise; None where the loss fell with none."""
        trained = [trial for trial in self.trials if not trial.failed]
        if not trained:
            return None
        least = min(trained, key=lambda trial: trial.loss)
        return next(trial for trial in trained if trial.loss <= least.loss + least.error)

    @property
    def words(self) -> str:
        """The result in a sentence."""
        best = self.best
        if best is None:
            return f"{self.name}: with every learning rate training diverged, or its loss rose; try lower ones"
        edge = {self.trials[0].lr: "lower", self.trials[-1].lr: "higher"}.get(best.lr)
        at_edge = f"; it is at the edge of what was tried: try {edge} ones, too" if edge else ""
        return f"{self.name}: learning rate {best.lr:.4g} (training loss {best.loss:.4f}){at_edge}"


def grid(low: float, high: float) -> list[float]:
    """Learning rates from low to high, a geometric series of steps by two or less."""
    steps = math.ceil(math.log(high / low) / math.log(_FACTOR) - 1e-9)
    return [float(f"{low * (high / low) ** (i / max(1, steps)):.4g}") for i in range(steps + 1)]


def table(searches: Sequence[Search]) -> str:
    """The losses, a row a rate, the named ones marked."""

    def cell(trial: Trial, of: Search) -> str:
        if trial.diverged:
            return f"diverged at update {len(trial.losses) + 1}"
        mark = "  <-" if of.best and trial.lr == of.best.lr else ""
        error = f" +- {trial.error:.4f}" if trial.error else ""  # of a single update nobody knows it
        return f"{trial.loss:.4f}{error}{mark}"

    rows = [
        [f"{trials[0].lr:.4g}", *(cell(trial, of) for trial, of in zip(trials, searches, strict=True))]
        for trials in zip(*(each.trials for each in searches), strict=True)
    ]
    return text_table(("learning rate", *(each.name for each in searches)), rows)


def as_json(searches: Sequence[Search], context: dict[str, Any]) -> dict[str, Any]:
    """All trials with their losses, and the rates that were named."""
    return {
        **context,
        "sides": [
            {
                "name": each.name,
                "best_lr": each.best and each.best.lr,
                "trials": [
                    {"lr": t.lr, "loss": None if t.diverged else t.loss, "diverged": t.diverged, "losses": t.losses}
                    for t in each.trials
                ],
            }
            for each in searches
        ],
    }


@plain_text()
def save_picture(searches: Sequence[Search], path: Path, title: str) -> None:
    """Training loss over the learning rate; rates that ended above where they began stand at the top as crosses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axis.set_title(label(title, 90), fontsize=12)
    for each, colour, marker in zip(searches, COLOURS, MARKERS, strict=False):
        good = [trial for trial in each.trials if not trial.failed]
        axis.errorbar(
            [t.lr for t in good], [t.loss for t in good], [t.error for t in good],
            color=colour, marker=marker, markersize=5, capsize=3, label=label(each.name),
        )  # fmt: skip
        if each.best:
            axis.plot(each.best.lr, each.best.loss, marker="o", markersize=13, fillstyle="none", color=colour)
    for each, colour in zip(searches, COLOURS, strict=False):
        lost = [trial.lr for trial in each.trials if trial.failed]
        axis.plot(lost, [0.97] * len(lost), "x", color=colour, transform=axis.get_xaxis_transform())
    axis.set_xscale("log", base=2)
    rates = [trial.lr for trial in searches[0].trials]
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    axis.set_xlabel("peak learning rate (circle: the one that is named; cross: ended above its start)")
    axis.set_ylabel("training loss of the last updates")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(searches), frameon=False)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def open_folder(options: FolderOptions, model: str, low: float, high: float) -> RunFolder:
    """A folder that no run has: a search touches none of a run's files.

    Args:
        options: where.
        model: its name.
        low: the lowest learning rate.
        high: the highest one.

    Raises:
        UserError: there is nothing to search, or the folder cannot be made.
    """
    if options.resume:
        raise UserError("--find-lr tries learning rates before a run is begun: leave out --resume")
    if low > high:
        raise UserError(f"--find-lr {low:g} {high:g}: the lower one comes first")
    name = options.experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_model_name(model)}"
    return RunFolder.fresh(Path(options.output) / f"{name}-find-lr")


def search(
    options: TrainOptions,
    model: nn.Module,
    loaders: tuple[DataLoader[Any], DataLoader[Any]],
    distillation: nn.Module | None,
    decorrelated: bool,
    folder: RunFolder,
    context: dict[str, Any],
) -> None:
    """Short trainings of the model and, to compare, of its plain twin. Collective.

    Args:
        options: of the run that is to come, `find_lr` among them.
        model: with the weights that every training begins with.
        loaders: of training and of evaluation.
        distillation: a teacher's opinion, or None.
        decorrelated: whether the model is.
        folder: for what is found.
        context: what every result has: command, arguments, versions, machine.
    """
    assert options.search.find_lr is not None
    low, high = options.search.find_lr
    device, updates, opt = options.device, options.search.find_updates, options.optimizer.opt
    searches, accelerator = [], None
    for side in SIDES if options.compare.compare else SIDES[not decorrelated :][:1]:
        name, trials = build.side_name(options.model, decorrelated=side != "plain"), []
        for lr in grid(low, high):
            accelerator = make_accelerator(
                device.device, device.amp, device.amp_dtype, options.update.grad_accum_steps, options.dist_timeout
            )
            own = build.plain_twin(model) if side == "plain" else copy.deepcopy(model)
            arm = Arm(name, own, options, lr, accelerator, *loaders, decorrelated=side != "plain")
            arm.distillation = distillation
            trials.append(Trial(lr, short_training(arm, updates), updates))
            accelerator.free_memory()
            accelerator.print(f"{name}, {opt} at learning rate {lr:.4g}: training loss {trials[-1].loss:.4f}")
        searches.append(Search(name, trials))
    assert accelerator is not None  # there is a rate
    for each in searches:
        accelerator.print(each.words)
    if accelerator.is_main_process:
        print(table(searches))
        folder.write_json("find_lr.json", as_json(searches, context))
        picture = folder.path / "find_lr.png"
        save_picture(searches, picture, f"{opt}, {updates} updates a learning rate")
        print(f"picture: {picture}")
    accelerator.end_training()


def short_training(arm: Arm, updates: int) -> list[float]:
    """Train for a few updates with a schedule of their own: a warm-up over a tenth of them, then down to zero.

    Args:
        arm: at the beginning.
        updates: of the optimizer.

    Returns:
        Each update's training loss, over all processes; shorter where one is not finite.
    """
    arm.model.train()
    losses: list[Tensor] = []
    epoch = 0
    while len(losses) < updates:
        progress = Progress(arm.loss_watch(), 0)
        parts: list[Tensor] = []  # of the update
        for images, labels in arm.batches(epoch, progress):
            share = min(1.0, (len(losses) + 1) / (0.1 * updates)) * (1 - len(losses) / updates)
            for group in arm.optimizer.param_groups:
                group["lr"] = arm.lr * share * group.get("lr_scale", 1.0)
            parts.append(arm.learn(images, labels, progress, lambda _: None))
            progress.batches += 1
            if arm.accelerator.sync_gradients:
                losses.append(arm.accelerator.reduce(torch.stack(parts).float().mean(), "mean"))  # type: ignore
                parts = []
                if len(losses) == updates or (len(losses) % 10 == 0 and not bool(losses[-1].isfinite())):
                    break
        if not bool(losses[-1].isfinite()):
            break
        epoch += 1
    found = torch.stack(losses).tolist()
    return found[: next((i for i, loss in enumerate(found) if not math.isfinite(loss)), len(found))]
