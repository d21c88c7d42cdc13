"""When an arm's state is written, and from which file it is read."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from timm_decor.errors import Stopped, UserError
from timm_decor.text import counted, listed, wrapped
from timm_decor.training.keeping.folder import (
    EMA_SUFFIX,
    EPOCH_FILE,
    RESUME_FILE,
    RunFolder,
    find_resume,
    holds_run,
    read_resume,
)
from timm_decor.training.keeping.progress import is_whole
from timm_decor.training.keeping.stopping import StopRequest
from timm_decor.training.options import KeepOptions
from timm_decor.training.runtime import decided_by_one
from timm_decor.training.seeing.compare import SIDES


class Trained(Protocol):
    """What is kept: training/arm.py's Arm, as far as it matters here."""

    name: str
    accelerator: Accelerator
    model: nn.Module
    ema: Any
    history: list[dict[str, Any]]
    epochs: int
    progress: Any
    pause: Callable[..., None]

    @property
    def epoch(self) -> int: ...

    @property
    def steps(self) -> int: ...

    @property
    def best(self) -> dict[str, Any] | None: ...

    @property
    def ranked(self) -> list[dict[str, Any]]: ...

    @property
    def metric_column(self) -> str: ...

    def check_finite(self) -> None: ...

    def timm_weights(self, model: nn.Module) -> dict[str, Tensor]: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any], path: str) -> None: ...


class Keeper:
    """Writes one arm's checkpoints: at the end of an epoch, every so many updates, and when it is asked to stop.

    Args:
        arm: whose `pause` is set.
        folder: where they go.
        metadata: text in the files of weights.
        keep: which checkpoints.
        stop: tells of signals.
        run: the run's folder: that of both sides of a comparison.
    """

    def __init__(
        self, arm: Trained, folder: RunFolder, metadata: dict[str, str], keep: KeepOptions, stop: StopRequest, run: Path
    ) -> None:
        self.arm, self.folder, self._run = arm, folder, run
        self._metadata = metadata
        self._keep = keep
        self._stop = stop
        self._saved = arm.steps  # updates that are in resume.pt, or none were done
        arm.pause = self.pause

    def pause(self, within: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Save where a recovery checkpoint is due; save and leave where a signal asks for it. Collective.

        Args:
            within: entered for saving, where there is something to save.

        Raises:
            Stopped: the state is saved.
            NonFiniteLoss: there is nothing that is worth saving.
        """
        signum, steps = self._stop.asked(), self.arm.steps
        interval = self._keep.recovery_interval
        due = interval > 0 and steps % interval == 0
        if (signum or due) and steps != self._saved:
            with within():
                self.arm.check_finite()
                self._write_resume()
        if signum:
            where = f"{self.arm.name} stopped by {signal.Signals(signum).name} after update {steps}"
            # of a comparison the other side may have come further
            some = steps or has_begun(self._run)
            saved = f"go on with the same command and --resume {self._run}" if some else "there is nothing yet"
            raise Stopped(signum, f"{where}; {saved}" if self.arm.accelerator.is_main_process else "")

    def save_trained(self) -> None:
        """Write the state of an epoch that is trained and not yet evaluated: whatever evaluation meets. Collective.

        Raises:
            NonFiniteLoss: there is nothing that is worth saving.
        """
        self.arm.check_finite()
        self._write_resume()

    def save(self) -> None:
        """Write all files of a finished epoch: weights, what training needs to go on, summary.csv. Collective."""
        arm, folder = self.arm, self.folder
        row, best, column = arm.history[-1], arm.best, arm.metric_column
        metadata = self._metadata | {"epoch": str(row["epoch"]), "metric": column, "value": str(row.get(column))}
        folder.write_weights("last", arm.timm_weights(arm.model), metadata)
        if arm.ema:
            folder.write_weights(f"last{EMA_SUFFIX}", arm.timm_weights(arm.ema.module), metadata)
        else:  # a run that was resumed without its average
            folder.forget_average("last")
        if best is row:
            folder.link_weights("last", "best")
        folder.link_weights("last", f"checkpoint-{row['epoch']}")
        kept = {row["epoch"] for row in arm.ranked[: self._keep.checkpoint_hist]}
        # a run that was resumed with another metric, or with an average, cannot rank those before: they stay
        unranked = {row["epoch"] for row in arm.history if column not in row and was_evaluated(row)}
        folder.forget_epochs(row["epoch"] for row in arm.history if row["epoch"] not in kept | unranked)
        self._write_resume()
        folder.keep_epoch()
        folder.write_summary(arm.history)

    def _write_resume(self) -> None:
        self.folder.write_resume(self.arm.state() | {"label_names": json.loads(self._metadata["label_names"])})
        self._saved = self.arm.steps


def has_begun(run: Path) -> bool:
    """Whether a run, or a side of a comparison, has left its files in the folder of a run."""
    return any(holds_run(at) for at in (run, *(run / side for side in SIDES)))


def was_evaluated(row: Mapping[str, Any]) -> bool:
    return any(column.startswith(("eval_", "ema_")) for column in row)


def load_states(
    paths: Sequence[Path], arms: Sequence[Trained], folders: Sequence[RunFolder], metadata: dict[str, str]
) -> bool:
    """Let arms go on from their newest usable checkpoints. Collective.

    Args:
        paths: per arm, its folder or one file; an arm whose folder holds no checkpoint starts from the beginning.
        arms: the arms.
        folders: their folders, which are put in order: the remains of a killed run go.
        metadata: as the keepers have it; its classes must be those of the checkpoints.

    Returns:
        Whether any arm had a checkpoint.

    Raises:
        UserError: a checkpoint that cannot be used, with none before it that can; or one of something else.
    """
    accelerator = arms[0].accelerator
    found, ends = [], set()
    for arm, path in zip(arms, paths, strict=True):
        file, wrong, state = _newest(accelerator, path)
        found.append((file, wrong))
        if file is not None:
            name = str(file.parent if file.name == RESUME_FILE else file)
            _check_classes(state.get("label_names"), json.loads(metadata["label_names"]), name)
            if not state.get("progress"):
                ends.add(file)
            if _is_for_others(state, accelerator.num_processes):
                state = _end_of_epoch(arm, file, state)
            if state:
                arm.load_state(state, name)
                _tell_of_processes(arm, state.get("plan"))
    going_on = [(arm, folder) for arm, folder in zip(arms, folders, strict=True) if arm.epoch < arm.epochs]
    decided_by_one(accelerator, partial(_pick_best, going_on))
    accelerator.wait_for_everyone()  # none must look while one tidies up
    for arm, folder, (file, wrong) in zip(arms, folders, found, strict=True):
        folder.remove_unfinished()
        if file is not None and file in ends and arm.epoch < arm.epochs:
            folder.keep_epoch(file.name)  # a finished run that trains on has none
        if file is not None and wrong:
            accelerator.print(f"{wrong}; going on from {file.name} instead, update {arm.steps}")
            folder.set_aside_damaged()
        if arm.history:
            folder.write_summary(arm.history)  # it comes after the checkpoint, and may have been forestalled
    return any(file is not None for file, _ in found)


def _pick_best(going_on: Sequence[tuple[Trained, RunFolder]]) -> None:
    """Let best.safetensors be the best by what decides now, where something else decided before.

    Raises:
        UserError: its checkpoint is not there; nothing was changed.
    """
    links = []
    for arm, folder in going_on:
        row, has = arm.best, folder.epoch_of("best")
        if row is None or has in (None, row["epoch"]):
            continue
        name = f"checkpoint-{row['epoch']}"
        if (folder.path / f"{name}.safetensors").is_file():
            links.append((folder, name))
        elif has <= arm.epoch:  # a later one is of a killed run, and will be made again
            raise UserError(
                f"{folder.path}: by {arm.metric_column} epoch {row['epoch']} was the best, and {name} was not kept: go "
                f"on with what decided before, by which it was epoch {has}"
            )
    for folder, name in links:
        folder.link_weights(name, "best")


def _newest(accelerator: Accelerator, path: Path) -> tuple[Path | None, str, dict[str, Any]]:
    """The newest usable state of a folder, or that of a file: each process checks and reads it once. Collective.

    Returns:
        The file, None where there is none; what is wrong with a newer one; and the state.
    """
    read: dict[str, Any] = {}  # by the process that decides which file it is; the others read that one

    def decide() -> tuple[Path | None, str]:
        file, wrong, state = find_resume(path)
        read.update(state)
        return file, wrong

    file, wrong = decided_by_one(accelerator, decide) if path.is_dir() else (path, "")
    return file, wrong, read or (read_resume(file) if file is not None else {})


def _is_for_others(state: dict[str, Any], processes: int) -> bool:
    """Whether a state is of the middle of an epoch that another number of processes share."""
    progress = state.get("progress")
    return progress is not None and not is_whole(progress) and progress["plan"]["processes"] != processes


def _end_of_epoch(arm: Trained, file: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The state at the end of the epoch before, and a line that says so; empty where no epoch was done.

    Raises:
        UserError: epochs were done, and that state is not there.
    """
    before = file.with_name(EPOCH_FILE)
    earlier = read_resume(before) if before.is_file() else {}
    begun, was = len(state["history"]) + 1, state["progress"]["plan"]["processes"]
    if not earlier and state["history"]:
        raise UserError(
            f"{file} is of the middle of epoch {begun} on {was} processes, and {before.name}, from which others could "
            f"go on, is missing: go on with {was}"
        )
    back = f"the end of epoch {len(earlier['history'])}" if earlier else "the start"
    why = (
        f"{was} processes were in the middle of epoch {begun}, which {arm.accelerator.num_processes} cannot go on with"
    )
    arm.accelerator.print(wrapped(f"{arm.name}: {why}: back to {back}"))
    return earlier


def _tell_of_processes(arm: Trained, before: dict[str, int] | None) -> None:
    """Say that there are other processes than before, which no argument shows."""
    now, was = arm.accelerator.num_processes, (before or {}).get("processes")
    if was not in (None, now):
        text = f"{counted(now, 'process', 'processes')} now, {was} before; each has --batch-size images in an update"
        arm.accelerator.print(wrapped(f"{arm.name}: {text}"))


def _check_classes(before: list[str] | None, now: list[str], name: str) -> None:
    """Refuse data whose classes are other ones, or numbered otherwise; where either side has no names, go on."""
    if not before or not now or before == now:
        return
    gone, new = [c for c in before if c not in now], [c for c in now if c not in before]
    how = [f"{words} {listed(names)}" for words, names in (("lack", gone), ("also have", new)) if names]
    words = " and ".join(how) or "are numbered otherwise"
    raise UserError(f"{name}: the data's classes are not those it was trained on: they {words}")
