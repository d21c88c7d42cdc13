"""One arm of step_cost: a model that takes timed steps. Needs no more of timm_decor than every version of it has.

Run as a script it is a worker: another checkout of the package, in a process of its own, told what to do in lines of
JSON. It waits on a read, so that it costs nothing while another arm is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from study.memory import PeakMemory, alive, storage_bytes
    from timm_decor.errors import UserError
except ImportError:  # as a worker, which has this folder alone, and a timm_decor whose modules may have other names
    from memory import PeakMemory, alive, storage_bytes  # type: ignore[import-not-found,no-redef]

import timm_decor


@dataclass(frozen=True)
class Options:
    """What all combinations share."""

    device: str
    num_classes: int
    lr: float
    threads: int | None


@dataclass(frozen=True)
class Case:
    """One combination."""

    model: str
    img_size: int
    batch_size: int
    opt: str
    precision: str
    compile: bool
    channels_last: bool


class Arm:
    """One model with its optimizer and its (fixed, random) batch.

    Args:
        case: the combination.
        options: of the command line.
        decor: the DecorConfig's fields; None for the plain model and the peer.
        peer: the authors' code, to be this arm.
        wrap: what to train in the model's place, such as its DistributedDataParallel.
    """

    def __init__(
        self,
        case: Case,
        options: Options,
        decor: dict[str, Any] | None,
        peer: Any = None,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self.device = torch.device(options.device)
        self.amp = case.precision == "bfloat16"
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        torch.manual_seed(0)  # the same weights and batch for all arms
        is_fixed = timm.models.get_pretrained_cfg_value(case.model, "fixed_input_size")
        img_size = case.img_size if is_fixed else None  # timm drops None: most convolutional models take any size
        model: nn.Module = timm.create_model(case.model, num_classes=options.num_classes, img_size=img_size)
        if decor is not None:
            timm_decor.decorrelate(model, timm_decor.DecorConfig(**decor))
        if peer:
            model = peer.convert(model)
        model.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        size = (case.batch_size, 3, case.img_size, case.img_size)
        self.images = torch.randn(size, device=self.device).contiguous(memory_format=layout)
        self.labels = torch.randint(options.num_classes, (case.batch_size,), device=self.device)
        self.optimizer = timm.optim.create_optimizer_v2(model, opt=case.opt, lr=options.lr, momentum=0.9)
        if decor is not None:
            timm_decor.attach(model, self.optimizer)
        self.peer, self.peer_layers = peer, peer.layers(model) if peer else []
        model.train()
        self.plain_model = model
        self.model: nn.Module = torch.compile(model) if case.compile else model  # type: ignore[assignment]
        if wrap:
            self.model = wrap(self.model)
        # The first step allocates the optimizer's state and, where there is one, refreshes R.
        self.steps(1)
        every = decor["every"] if decor else 2
        # Of the ordinary steps, with all state in place: those that look at the output errors need more than others.
        self.peak_bytes = max(self._peak() for _ in range(every - 1))
        self.refresh_peak_bytes = self._peak() if decor else self.peak_bytes

    def steps(self, count: int) -> float:
        """Train `count` steps; returns their seconds."""
        start = self._now()
        for _ in range(count):
            loss = self._gradients()
            self._update()
        seconds = self._now() - start
        if count and not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()}: such steps measure nothing; lower --lr")
        return seconds

    def _gradients(self) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            # the authors' linear layer gives (batch, 1, classes)
            loss = F.cross_entropy(self.model(self.images).flatten(1), self.labels)
        loss.backward()
        return loss.detach()

    def _update(self) -> None:
        self.optimizer.step()
        if self.peer:
            self.peer.update(self.peer_layers)
        self.optimizer.zero_grad()

    def _peak(self) -> int:
        """Bytes at the highest point within the update of one step: weights, gradients, state and temporaries."""
        self._gradients()
        before = alive(self.plain_model, self.optimizer)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            others = torch.cuda.memory_allocated(self.device) - storage_bytes(before)  # images, and other arms
            self._update()
            return torch.cuda.max_memory_allocated(self.device) - others
        meter = PeakMemory(before)
        everything = meter.bytes
        del before  # gradients are let go of by `zero_grad`
        copied = everything - meter.bytes  # by `state_dict`: the originals, which nobody follows, are as large
        meter.peak_bytes = meter.bytes  # the copies are no part of the step
        with meter:
            self._update()
        return meter.peak_bytes + copied

    def held_bytes(self) -> int:
        """Weights, buffers and optimizer state: momentum and the like, and decorrelation's (R, statistics)."""
        return storage_bytes(alive(self.plain_model, self.optimizer))

    def check_refreshes(self, wanted: int) -> None:
        """Refuse a timing that would be a fiction: R was left alone, or refreshed in other steps than those timed."""
        layers = self.optimizer.state_dict()["timm_decor"]["layers"].values()
        skips, most = sum(layer["skips"] for layer in layers), max(layer["refreshes"] for layer in layers)
        if skips or most != wanted:
            raise RuntimeError(f"{skips} refreshes were skipped, and a layer had {most} of {wanted} that were timed")

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


PERIOD_MORE = 3  # steps between two refreshes that a block has beside those that are timed together


def decorrelated_block(steps: Callable[[int], float], count: int, every: int) -> dict[str, float]:
    """Time a decorrelated arm whose R is refreshed every `count + PERIOD_MORE` steps.

    A block begins two steps behind a refresh: one step that is not timed (the caches hold another arm's data then),
    `count` ordinary steps, the one with a refresh, and the one behind it, in which the engine finds out how long its
    steps are.

    Args:
        steps: of the arm; takes so many and returns their seconds.
        count: ordinary steps that are timed together.
        every: steps between two refreshes in training.

    Returns:
        Seconds of an "ordinary" step, of one with a "refresh", of the "measuring" one, and "amortised": what a run pays
        on average.
    """
    steps(1)
    ordinary = steps(count) / count
    refresh, measuring = steps(1), steps(1)
    amortised = ordinary + (refresh + measuring - 2 * ordinary) / every
    return {"ordinary": ordinary, "refresh": refresh, "measuring": measuring, "amortised": amortised}


class Worker:
    """An arm with another checkout's timm_decor, in a process of its own. The same verbs as `Arm`.

    Args:
        path: the checkout.
        case: the combination.
        options: of the command line.
        decor: DecorConfig's fields that were asked for; those that the checkout does not know are left out.

    Raises:
        UserError: that folder has no timm_decor, or one that refuses the fields.
    """

    def __init__(self, path: Path, case: Case, options: Options, decor: dict[str, Any]) -> None:
        answers, theirs = os.pipe()  # not stdout: anybody may print there
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs)],
            pass_fds=[theirs],
            env={**os.environ, "PYTHONPATH": str(path.resolve())},  # which comes before what is installed
            stdin=subprocess.PIPE,
            stdout=2,
            text=True,
        )
        os.close(theirs)
        self._answers = os.fdopen(answers)
        asked = {"case": dataclasses.asdict(case), "options": dataclasses.asdict(options), "decor": decor}
        try:
            told = self._ask({**asked, "path": str(path.resolve())})
        except BaseException:
            self.close()
            raise
        if "refused" in told:
            self.close()
            raise UserError(f"--baseline-path {path}: {told['refused']}")
        self.config, self.peak_bytes = told["config"], told["peak_bytes"]
        self.refresh_peak_bytes = told["refresh_peak_bytes"]

    def steps(self, count: int) -> float:
        """As `Arm.steps`."""
        return self._ask({"steps": count})["seconds"]

    def held_bytes(self) -> int:
        """As `Arm.held_bytes`."""
        return self._ask({"held": True})["bytes"]

    def check_refreshes(self, wanted: int) -> None:
        """As `Arm.check_refreshes`."""
        self._ask({"refreshes": wanted})

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._answers.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: there is no answer either
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        line = self._answers.readline()
        if not line:
            raise RuntimeError("the baseline's process ended; what it said is above")
        return json.loads(line)


def serve(answers: int) -> None:
    """Answer a `Worker`, whose end of the pipe is open as this number."""
    arm: Arm | None = None
    with os.fdopen(answers, "w") as out:
        for line in sys.stdin:
            asked = json.loads(line)
            if arm is None:
                arm, answer = _started(asked)
            elif "steps" in asked:
                answer = {"seconds": arm.steps(asked["steps"])}
            elif "refreshes" in asked:
                arm.check_refreshes(asked["refreshes"])
                answer = {}
            else:
                answer = {"bytes": arm.held_bytes()}
            print(json.dumps(answer), file=out, flush=True)


def _started(asked: dict[str, Any]) -> tuple[Arm | None, dict[str, Any]]:
    """The arm that a worker is asked for, and the answer."""
    # Without this a mistyped folder would measure the package that is installed, against itself.
    if Path(asked["path"]) not in Path(timm_decor.__file__).resolve().parents:
        return None, {"refused": "no checkout of this project: it has no timm_decor"}
    options = Options(**asked["options"])
    if options.threads:
        torch.set_num_threads(options.threads)
    fields = {spec.name for spec in dataclasses.fields(timm_decor.DecorConfig)}
    decor = {name: value for name, value in asked["decor"].items() if name in fields}
    try:
        config = timm_decor.DecorConfig(**decor).to_dict()
    except (ValueError, TypeError) as error:
        return None, {"refused": f"its DecorConfig says: {error}"}
    arm = Arm(Case(**asked["case"]), options, decor)
    memory = {"peak_bytes": arm.peak_bytes, "refresh_peak_bytes": arm.refresh_peak_bytes}
    return arm, {"config": config, **memory}


if __name__ == "__main__":
    serve(int(sys.argv[1]))
