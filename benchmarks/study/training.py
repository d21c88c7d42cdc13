"""One training run, advanced a few steps at a time, and groups of runs that train in turns."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import timm.optim
import torch
import torch.nn.functional as F

import timm_decor
from study.images import Batches, Split
from study.networks import create
from study.presets import OPTIMIZERS, Optimizer, Preset
from timm_decor import DecorConfig

PLAIN = "plain"
WARM_UP = 3  # steps before the clock starts: allocators, algorithm choice, torch.compile; the third repeats the second


@dataclass(frozen=True)
class Spec:
    """What is asked of a run; two runs of equal specs would be the same run.

    Attributes:
        opt: base optimizer, a key of presets.OPTIMIZERS.
        arm: `plain`, or the name of a way to decorrelate.
        config: the DecorConfig's fields as JSON, None for plain; a string, so that specs can be compared and hashed.
        lr: peak learning rate.
        weight_decay: as the optimizer takes it.
        seed: of the initial weights and of the batches.
        steps: the whole budget; the schedule ends with it.
    """

    opt: str
    arm: str
    config: str | None
    lr: float
    weight_decay: float
    seed: int
    steps: int

    def __str__(self) -> str:
        decay = f", weight decay {self.weight_decay:g}" if len(OPTIMIZERS[self.opt].weight_decays) > 1 else ""
        return f"{self.opt} {self.arm}, lr {self.lr:g}{decay}, seed {self.seed}, {self.steps} steps"


@dataclass
class Record:
    """What came of a run; a row of the result file.

    Attributes:
        spec: what was asked.
        steps_per_epoch: optimizer steps.
        group: equal for runs that trained in turns: only their seconds may be compared.
        measured_on: `test` or `held-out`.
        at: steps done at the end of each epoch, and of the run.
        top1: accuracy there, in %.
        loss: mean training loss of the epoch that ends there.
        seconds: training seconds of each turn, refreshes included; evaluation and the warm-up steps are not.
        skipped_refreshes: refreshes of R that left it alone.
        diverged: the loss was not finite: the run was ended, and its last accuracy is that of what was left.
        session: index into the result file's sessions: command, versions, machine.
    """

    spec: Spec
    steps_per_epoch: int
    group: str
    measured_on: str
    at: list[int] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    loss: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    skipped_refreshes: int = 0
    diverged: bool = False
    session: int = 0

    @property
    def final(self) -> float:
        """Top-1 accuracy in % at the end of the schedule: no epoch is picked."""
        return self.top1[-1]

    def as_json(self) -> dict[str, Any]:
        """The record with the spec's fields beside its own, but for the configuration, which is the arm's."""
        values = asdict(self)
        spec = values.pop("spec")
        del spec["config"]
        return {**spec, **values}

    @classmethod
    def from_json(cls, values: dict[str, Any], config: dict[str, Any] | None) -> Record:
        """Read what `as_json` wrote. The config is not checked: it may be of another version of the package."""
        values = dict(values)
        spec = {name: values.pop(name) for name in ("opt", "arm", "lr", "weight_decay", "seed", "steps")}
        return cls(Spec(**spec, config=json.dumps(config) if config else None), **values)


class Run:
    """A run in progress.

    Args:
        spec: what to train.
        preset: the setting.
        split: images, on the device.
        group: the group's name.
        settings: of the optimizer, in place of those of its name.
    """

    def __init__(self, spec: Spec, preset: Preset, split: Split, group: str, settings: Optimizer | None = None) -> None:
        self.spec, self.preset, self.split = spec, preset, split
        self.settings = settings or OPTIMIZERS[spec.opt]
        self.device = split.train.pixels.device
        torch.manual_seed(spec.seed)  # the same initial weights for every run of a seed
        size = split.train.pixels.shape[-1]
        self.model = create(preset.model, split.num_classes, size, preset.stem)
        if spec.config:
            timm_decor.decorrelate(self.model, DecorConfig.from_json(spec.config))
        layout = torch.channels_last if preset.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self.forward = torch.compile(self.model) if preset.compile else self.model
        self._warm_up()
        self._start()
        self.batches = Batches(split.train, preset.batch_size, preset.shift, spec.seed)
        self.record = Record(spec, self.batches.steps_per_epoch, group, split.measured_on)
        self.step = 0
        self._epoch_loss, self._epoch_begin = torch.zeros((), device=self.device), 0

    @property
    def is_done(self) -> bool:
        return self.step == self.spec.steps or self.record.diverged

    def advance(self) -> None:
        """Train for a turn; measures where an epoch or the run ends in it."""
        end = min(self.step + self.preset.turn, self.spec.steps)
        seconds = 0.0
        while self.step < end and not self.record.diverged:
            per_epoch = self.batches.steps_per_epoch
            stop = min(end, (self.step // per_epoch + 1) * per_epoch)
            seconds += self._train(stop)
            if self.record.diverged or stop == self.spec.steps or stop % per_epoch == 0:
                self._measure()
        self.record.seconds.append(round(seconds, 5))
        if self.is_done and self.handle is not None:
            self.record.skipped_refreshes = sum(row.skips for row in self.handle.report().rows)

    def _train(self, stop: int) -> float:
        self.model.train()
        begin = self._now()
        plan = self.batches.plan(stop - self.step)
        for i in range(stop - self.step):
            for group in self.optimizer.param_groups:
                group["lr"] = self.spec.lr * schedule(self.step, self.spec.steps)
            self._epoch_loss += self._step(*self.batches.batch(plan, i))
            self.step += 1
        seconds = self._now() - begin
        self.record.diverged = not math.isfinite(float(self._epoch_loss))
        return seconds

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.preset.amp):
            loss = F.cross_entropy(self.forward(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()  # on the device: reading it would make every step wait

    @torch.no_grad()
    def _measure(self) -> None:
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        images = self.split.measured
        for start in range(0, len(images), 1000):
            rows = slice(start, start + 1000)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.preset.amp):
                right += (self.model(images.normalized(rows)).argmax(1) == images.labels[rows]).sum()
        steps = self.step - self._epoch_begin
        loss = float(self._epoch_loss) / max(1, steps)
        self.record.at.append(self.step)
        self.record.top1.append(round(100 * int(right) / len(images), 4))
        self.record.loss.append(round(loss, 5) if math.isfinite(loss) else None)
        self._epoch_loss, self._epoch_begin = torch.zeros((), device=self.device), self.step
        how = "diverged" if self.record.diverged else f"loss {loss:.3f}"
        print(f"{self.spec}: after {self.step}, {how}, top-1 {self.record.top1[-1]:.2f} %", file=sys.stderr, flush=True)

    def _start(self) -> None:
        settings = self.settings
        self.optimizer = timm.optim.create_optimizer_v2(
            self.model, settings.name, lr=self.spec.lr, weight_decay=self.spec.weight_decay, **settings.kwargs
        )
        self.handle = timm_decor.attach(self.model, self.optimizer) if self.spec.config else None

    def _warm_up(self) -> None:
        """A few steps that are undone: what a process pays once belongs to no arm."""
        before = {key: value.clone() for key, value in self.model.state_dict().items()}
        self._start()
        self.model.train()
        batches = Batches(self.split.train, self.preset.batch_size, self.preset.shift, self.spec.seed)
        for _ in range(WARM_UP):
            self._step(*batches.batch(batches.plan(1), 0))
        if self.handle is not None:
            self.handle.detach()
        self.model.zero_grad()
        self.model.load_state_dict(before)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a linear warm-up over a tenth of the steps, and a linear decay over all."""
    return min(1.0, (step + 1) / (0.1 * steps)) * (steps - step) / steps


def train_in_turns(specs: list[Spec], preset: Preset, split: Split, group: str, done: Callable[[Record], None]) -> None:
    """Train runs together, `preset.turn` steps each in turn, so that a slow minute of the machine meets all of them.

    Args:
        specs: the runs.
        preset: the setting.
        split: images, on the device.
        group: a name for what their records share.
        done: is given each record when its run ends.
    """
    runs = [Run(spec, preset, split, group) for spec in specs]
    turn = 0
    while unfinished := [run for run in runs if not run.is_done]:
        for run in unfinished if turn % 2 == 0 else reversed(unfinished):
            run.advance()
            if run.is_done:
                done(run.record)
        turn += 1
