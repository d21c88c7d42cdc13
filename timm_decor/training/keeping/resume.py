"""A run's folder, and how a run goes on in it: from which states, with which arguments, and when all is done."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from timm.models import safe_model_name

from timm_decor.errors import UserError
from timm_decor.redact import without_secrets
from timm_decor.text import printable
from timm_decor.training.foreign import read_mapping
from timm_decor.training.keeping.checkpoints import Trained, has_begun, load_states, was_evaluated
from timm_decor.training.keeping.folder import ARGS_FILE, RESULTS_FILE, RESUME_FILE, RunFolder, holds_run
from timm_decor.training.keeping.privacy import PRIVATE, cleaned
from timm_decor.training.options import FolderOptions, ImageOptions, StartOptions
from timm_decor.training.seeing.compare import SIDES

AUTO = "auto"  # --resume: the run in --experiment's folder, if there is one
# They say how a run begins: on the way they would change nothing but the records.
_START_FILES = ("pretrained_path", "initial_checkpoint", "initial_r")
_START = ("pretrained", *_START_FILES, "head_init_scale", "head_init_bias")

# What changes nothing of what is trained: places, and what a person sees on the way.
NO_MATTER = (
    *PRIVATE, "workers", "pin_mem", "cache_images", "log_interval", "log_with", "project_name", "report_mistakes",
    "checkpoint_hist", "recovery_interval", "dist_timeout", "validation_batch_size", "val_num_samples",
)  # fmt: skip


def open_folder(options: FolderOptions, model: str, image: ImageOptions, compare: bool) -> RunFolder:
    """The folder of a run that begins, or of the one to go on with.

    Args:
        options: which one.
        model: its name, for a folder that has none.
        image: their size, for the same.
        compare: whether two models are trained in it.

    Raises:
        UserError: it holds another run, or cannot be made.
    """
    if options.resume not in (None, AUTO):
        path = Path(options.resume)
        return RunFolder(path if path.is_dir() else path.parent)
    size = image.img_size or (image.input_size[-1] if image.input_size else "")
    name = "-".join(filter(None, (time.strftime("%Y%m%d-%H%M%S"), safe_model_name(model), str(size))))
    path = Path(options.output) / (options.experiment or name)
    here, sides = [path], [path / side for side in SIDES]
    if options.resume == AUTO:
        if not options.experiment:
            raise UserError("--resume auto goes on with the run of --experiment NAME, which is missing")
        if any(holds_run(folder) for folder in (here if compare else sides)):
            kind = "a single model" if compare else "--compare"
            raise UserError(f"{path} holds a run of {kind}: go on with it as such, or take another --experiment")
    elif not options.experiment:
        return RunFolder.fresh(path)
    elif any(holds_run(folder) for folder in (*here, *sides)):
        raise UserError(f"{path} holds a run already: go on with it by --resume {path}, or take another --experiment")
    return RunFolder(path)


def refuse_other_start(recipe: Mapping[str, Any], folder: RunFolder) -> None:
    """Refuse to go on from another start than the run had: nothing but its records would change.

    Args:
        recipe: the arguments now.
        folder: of the run.

    Raises:
        UserError: names the argument.
    """
    if not has_begun(folder.path):
        return  # it was ended before its first checkpoint, and begins
    changed = _changed(recipe, folder)
    for key in _START:
        if key in changed:
            flag = f"--{key.replace('_', '-')}"
            words = _shown(*changed[key])
            raise UserError(f"{folder.path}: {flag} is for the start of a run ({words}); this one has begun")


def without_what_is_gone(start: StartOptions, folder: RunFolder) -> tuple[StartOptions, list[str]]:
    """The start of a run that has begun without files that are not there any more, and those files.

    Its state takes their place: a cluster's node that goes on with a run need not have them.
    """
    if not has_begun(folder.path):
        return start, []
    gone = {name: file for name in _START_FILES if (file := getattr(start, name)) and not Path(file).is_file()}
    none: dict[str, Any] = dict.fromkeys(gone)
    if "pretrained_path" in gone:
        none["pretrained"] = False  # --pretrained beside it, timm's habit, would now mean other weights
    return replace(start, **none), list(gone.values())


def go_on(
    resume: str,
    recipe: Mapping[str, Any],
    arms: Sequence[Trained],
    folder: RunFolder,
    folders: Sequence[RunFolder],
    metadata: dict[str, str],
) -> bool:
    """Let arms go on from their newest usable checkpoints, and say what is other than before. Collective.

    Args:
        resume: --resume.
        recipe: the arguments now.
        arms: as they were made.
        folder: of the run.
        folders: of the arms.
        metadata: as the keepers have it.

    Returns:
        Whether nothing is left to do: all epochs are done, and their results were written behind them.

    Raises:
        UserError: there is no checkpoint, or one of something else.
    """
    paths = [Path(resume)] if resume != AUTO and len(arms) == 1 else [at.path for at in folders]
    changed, accelerator = _changed(recipe, folder), arms[0].accelerator
    if load_states(paths, arms, folders, metadata):
        _refuse_cut(arms, "--compare-epochs" if recipe.get("compare_epochs") else "--epochs")
        goes_on = any(arm.epoch < arm.epochs for arm in arms)
        if goes_on:
            accelerator.print("; ".join(f"{arm.name} goes on after update {arm.steps}" for arm in arms))
        if changed:
            words = ", ".join(f"{key} {_shown(*change)}" for key, change in changed.items())
            accelerator.print(f"other arguments than before: {words}")
        finished = _is_finished(arms, folders)
        if not finished:  # also where only the records are left to write: they are those of other arguments
            matter = {key: change for key, change in changed.items() if key not in NO_MATTER}
            folder.note_changes(
                max(arm.steps for arm in arms), {key: (_text(was), _text(now)) for key, (was, now) in matter.items()}
            )
        for at in (folder, *folders) if goes_on else ():
            at.forget_results()
        return finished
    if resume != AUTO:
        raise UserError(f"nothing to resume: {paths[0] / RESUME_FILE} does not exist")
    return False


def _refuse_cut(arms: Sequence[Trained], flag_of_twin: str) -> None:
    """Refuse to end a run where its last epoch would be one that has no figures, or that is not the last.

    Raises:
        UserError: says where it would end: after --epochs, and with those that the schedule adds.
    """
    for arm, flag in zip(arms, ("--epochs", flag_of_twin), strict=False):
        if arm.epoch < arm.epochs or not arm.history:
            continue
        if arm.progress is not None:
            raise UserError(
                f"{arm.name}: epoch {arm.epoch + 1} has begun, and it would end after {arm.epochs}: more {flag}"
            )
        if not was_evaluated(arm.history[-1]):
            raise UserError(
                f"{arm.name}: epoch {arm.epoch} was not evaluated, as the last one is: more {flag} than that"
            )


def _changed(recipe: Mapping[str, Any], folder: RunFolder) -> dict[str, tuple[Any, Any]]:
    """The arguments that are not those that the run had before: (before, now) by name."""
    try:
        before = read_mapping(folder.path / ARGS_FILE, "recipe")
    except UserError:
        return {}  # a run that was killed before it wrote them
    now = yaml.safe_load(yaml.safe_dump(dict(recipe)))
    return {key: (before[key], now[key]) for key in now if key in before and before[key] != now[key]}


def _shown(before: Any, now: Any) -> str:
    """On the screen of who changed it."""
    return printable(without_secrets(f"{before} -> {now}"))


def _text(value: Any) -> str:
    """In a file that may be published."""
    return printable(str(cleaned(value)))


def _is_finished(arms: Sequence[Trained], folders: Sequence[RunFolder]) -> bool:
    """See `go_on`."""

    def has_results(arm: Trained, path: Path) -> bool:
        try:
            final = json.loads((path / RESULTS_FILE).read_text(encoding="utf-8"))["final"]
        except (OSError, ValueError, TypeError, KeyError):
            return False
        return bool(arm.history) and final == json.loads(json.dumps(arm.history[-1]))

    return all(arm.epoch >= arm.epochs and has_results(arm, at.path) for arm, at in zip(arms, folders, strict=True))
