"""When an arm's state is written, and from which file it is read."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from timm_decor.errors import Stopped, UserError
from timm_decor.training.keeping.folder import EMA_SUFFIX, RESUME_FILE, RunFolder, find_resume, read_resume
from timm_decor.training.keeping.stopping import StopRequest

T = TypeVar("T")


class Trained(Protocol):
    """What is kept: training/arm.py's Arm, as far as it matters here."""

    name: str
    args: argparse.Namespace
    accelerator: Accelerator
    model: nn.Module
    ema: Any
    history: list[dict[str, Any]]
    pause: Callable[[], None]

    @property
    def steps(self) -> int: ...

    @property
    def best(self) -> dict[str, Any] | None: ...

    @property
    def ranked(self) -> list[dict[str, Any]]: ...

    @property
    def metric_column(self) -> str: ...

    def check_finite(self) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any], path: str) -> None: ...


class Keeper:
    """Writes one arm's checkpoints: at the end of an epoch, every so many updates, and when it is asked to stop.

    Args:
        arm: whose `pause` is set.
        folder: where they go.
        metadata: text in the files of weights.
        interval: updates between recovery checkpoints, 0 for none.
        stop: tells of signals.
    """

    def __init__(
        self, arm: Trained, folder: RunFolder, metadata: dict[str, str], interval: int, stop: StopRequest
    ) -> None:
        self.arm, self.folder = arm, folder
        self._metadata = metadata
        self._interval = interval
        self._stop = stop
        self._saved = arm.steps  # updates that are in resume.pt, or none were done
        arm.pause = self.pause

    def pause(self) -> None:
        """Save where a recovery checkpoint is due; save and leave where a signal asks for it. Collective.

        Raises:
            Stopped: the state is saved.
            NonFiniteLoss: there is nothing that is worth saving.
        """
        signum, steps = self._stop.asked(), self.arm.steps
        due = self._interval > 0 and steps % self._interval == 0
        if (signum or due) and steps != self._saved:
            self.arm.check_finite()
            self._write_resume()
        if signum:
            where = f"{self.arm.name} stopped by {signal.Signals(signum).name} after update {steps}"
            saved = f"go on with the same command and --resume {self.folder.path}" if steps else "there is nothing yet"
            raise Stopped(signum, f"{where}; {saved}" if self.arm.accelerator.is_main_process else "")

    def save(self) -> None:
        """Write all files of a finished epoch: weights, what training needs to go on, summary.csv. Collective."""
        arm, folder = self.arm, self.folder
        row, best, column = arm.history[-1], arm.best, arm.metric_column
        metadata = self._metadata | {"epoch": str(row["epoch"]), "metric": column, "value": str(row.get(column))}
        folder.write_weights("last", arm.model.state_dict(), metadata)
        if arm.ema:
            folder.write_weights(f"last{EMA_SUFFIX}", arm.ema.module.state_dict(), metadata)
        if best is row:
            folder.link_weights("last", "best")
        folder.link_weights("last", f"checkpoint-{row['epoch']}")
        folder.keep_epochs({row["epoch"] for row in arm.ranked[: arm.args.checkpoint_hist]})
        self._write_resume()
        folder.write_summary(arm.history)

    def _write_resume(self) -> None:
        self.folder.write_resume(self.arm.state())
        self._saved = self.arm.steps


def load_states(paths: Sequence[Path], arms: Sequence[Trained], folders: Sequence[RunFolder]) -> bool:
    """Let arms go on from their newest usable checkpoints. Collective.

    Args:
        paths: per arm, its folder or one file; an arm whose folder holds no checkpoint starts from the beginning.
        arms: the arms.
        folders: their folders, which are put in order: the remains of a killed run go.

    Returns:
        Whether any arm had a checkpoint.

    Raises:
        UserError: a checkpoint that cannot be used, with none before it that can; or one of something else.
    """
    accelerator = arms[0].accelerator
    # one process decides: the others must not look while it tidies up
    found = _decided_by_one(accelerator, lambda: [find_resume(path) if path.is_dir() else (path, "") for path in paths])
    for arm, (file, _) in zip(arms, found, strict=True):
        if file is not None:
            arm.load_state(read_resume(file), str(file.parent if file.name == RESUME_FILE else file))
    accelerator.wait_for_everyone()
    for arm, folder, (file, wrong) in zip(arms, folders, found, strict=True):
        folder.remove_unfinished()
        if file is not None and wrong:
            accelerator.print(f"{wrong}; going on from {file.name} instead, update {arm.steps}")
            folder.set_aside_damaged()
        if arm.history:
            folder.write_summary(arm.history)  # it comes after the checkpoint, and may have been forestalled
    return any(file is not None for file, _ in found)


def _decided_by_one(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What the main process found, or its `UserError`, on all processes."""
    box: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            box = [decide()]
        except UserError as error:
            box = [error]
    answer = broadcast_object_list(box)[0]
    if isinstance(answer, UserError):
        raise answer
    return answer  # type: ignore[no-any-return]
