"""What a run writes behind its last epoch: results, comparison, report, and the last words on the screen."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor

from timm_decor.errors import UserError, first_line, message
from timm_decor.reporting import AttachReport
from timm_decor.text import markdown_text, wrapped
from timm_decor.training import build
from timm_decor.training.adjust import with_own_eps
from timm_decor.training.arm import Arm
from timm_decor.training.keeping.folder import EMA_SUFFIX, REPORT_FILE, RESULTS_FILE, RunFolder
from timm_decor.training.keeping.metadata import CheckpointMetadata
from timm_decor.training.keeping.privacy import without_path, without_paths
from timm_decor.training.optim import group_options
from timm_decor.training.options import TrainOptions
from timm_decor.training.runtime import decided_by_one, is_sharded
from timm_decor.training.seeing import compare, ending, report
from timm_decor.training.seeing.losswatch import NonFiniteLoss
from timm_decor.training.seeing.mistakes import Mistakes
from timm_decor.training.seeing.plot import save_picture


def finish(
    options: TrainOptions,
    arms: Sequence[Arm],
    folder: RunFolder,
    folders: Sequence[RunFolder],
    mistakes: Sequence[Mistakes | None],
    base: str | None,
    command: str,
    context: dict[str, Any],
) -> None:
    """Write all of it. Collective.

    Args:
        options: of the run.
        arms: trained.
        folder: of the run.
        folders: of the arms.
        mistakes: of the arms' best checkpoints, as far as they are known.
        base: the Hub's name of the weights that training began with.
        command: the command line, to show to others.
        context: what every result has: arguments, versions, machine.
    """
    seen = []
    for arm, arm_folder, wrong in zip(arms, folders, mistakes, strict=True):
        final = _report(arm)
        arm_folder.write_json(RESULTS_FILE, _results(arm, base, final, context) | {"sha256": arm_folder.digests()})
        if not arm.failure:
            arm_folder.forget_previous()
        arm.accelerator.print(wrapped(_last_words(arm, final)))
        layers = tuple(row.name for row in final.rows) if final else ()
        seen.append(report.Seen(_side(arm), arm.observer.record(final), layers, wrong))
    if not arms[0].accelerator.is_main_process:
        return
    title = _title(options, arms)
    if options.compare.compare:
        _write_comparison(arms, folder, context, f"{title}, {options.optimizer.opt}")
    folder.write_text(REPORT_FILE, report.render(seen, title, command, context))
    sides = compare.SIDES if options.compare.compare else ("",)
    at = {side: arm_folder.path for side, arm_folder in zip(sides, folders, strict=True)}
    where = ending.whereabouts(folder.path, at, options.data, options.split.val_split, options.update.model_ema)
    print(f"\n{where}")


def finish_early(
    options: TrainOptions, arms: Sequence[Arm], folder: RunFolder, command: str, context: dict[str, Any], why: Exception
) -> None:
    """Write the report of a run that was stopped, or came to grief, as far as it had come. `--resume` takes it away.

    Args:
        options: of the run.
        arms: as they are.
        folder: of the run.
        command: the command line, to show to others.
        context: what every result has.
        why: what ended it.
    """
    records = [arm.observer.record() for arm in arms]
    if not arms[0].accelerator.is_main_process or not any(record["curve"] for record in records):
        return
    seen = [
        report.Seen(_side(arm), record, tuple(arm.handle.names) if arm.handle else ())
        for arm, record in zip(arms, records, strict=True)
    ]
    done = " and ".join(f"{arm.name} {arm.epoch} of {arm.epochs} epochs" for arm in arms)
    words = f"Not finished: {done}."
    if isinstance(why, NonFiniteLoss):  # others may name a place on this machine
        words += f" {why}"
    try:
        folder.write_text(REPORT_FILE, report.render(seen, _title(options, arms), command, context, words))
    except UserError as error:  # a full disk, which is why it ended
        print(f"no report: {message(error)}", file=sys.stderr)
    else:
        print(ending.whereabouts_of_report(folder.path))


def find_mistakes(arm: Arm, folder: RunFolder) -> Mistakes | None:
    """What an arm's best checkpoint gets wrong on the evaluation images, by one more evaluation. Collective.

    Args:
        arm: trained; its own weights stay what they are.
        folder: of its checkpoints.

    Returns:
        None where there is no such checkpoint, where it cannot be evaluated, which must not cost the results, and on
        all processes but the main one.
    """
    if arm.failure or arm.best is None:
        return None
    try:
        return _mistakes_of_best(arm, folder)
    except (UserError, RuntimeError) as error:
        if arm.accelerator.is_main_process:
            print(f"{arm.name}: the report does without mistakes: {first_line(error)}", file=sys.stderr)
        return None


def _mistakes_of_best(arm: Arm, folder: RunFolder) -> Mistakes | None:
    accelerator, file = arm.accelerator, folder.path / f"best{EMA_SUFFIX if arm.ema else ''}.safetensors"
    if is_sharded(accelerator):  # a whole copy may be more than a device holds
        raise UserError("the model is cut over the processes; validate.py writes them of a checkpoint")
    model = with_own_eps(build.plain_copy(arm.model))

    def load() -> int | None:
        build.load_weights(model, str(file))
        metadata = CheckpointMetadata.read(file)
        return metadata.epoch if metadata else None

    epoch = decided_by_one(accelerator, load)
    broadcast(model.state_dict())  # only the main process's disk is sure to have the file
    seen: list[Tensor] = []
    arm.evaluate(model, seen)
    if not accelerator.is_main_process:
        return None
    return Mistakes.of(file.name, epoch, arm.evaluation_source, torch.cat(seen).numpy(), build.class_count(model))


def _title(options: TrainOptions, arms: Sequence[Arm]) -> str:
    data = without_path(options.data.dataset or Path(options.data.data_dir or "digits").name)
    return f"{' and '.join(arm.name for arm in arms)} on {data}"


def _side(arm: Arm) -> compare.Side:
    return compare.Side(
        arm.name, without_paths(arm.options.model), arm.options.optimizer.opt, arm.schedule.peak_lr, arm.epochs,
        arm.history, arm.failure, arm.chance, len(arm.evaluation_source), arm.metric_column,
    )  # fmt: skip


def _report(arm: Arm) -> AttachReport | None:
    """The handle's report; None for a plain arm, or where it cannot be computed, which must not cost the results."""
    try:
        return arm.handle.report() if arm.handle else None
    except RuntimeError as error:  # linear algebra that does not converge
        if arm.accelerator.is_main_process:
            print(f"{arm.name}: no report of R: {first_line(error)}", file=sys.stderr)
        return None


def _correlation(report: AttachReport | None) -> tuple[float, float] | None:
    known = report.mean_correlation() if report else None
    return known if known and all(map(math.isfinite, known)) else None


def _results(arm: Arm, base: str | None, report: AttachReport | None, context: dict[str, Any]) -> dict[str, Any]:
    correlation, observed = _correlation(report), arm.observer.record()
    return {
        "model": without_paths(arm.options.model),
        "decorrelated": arm.handle is not None,
        "base_model": base,
        "lr": arm.schedule.peak_lr,  # the highest that was reached
        "epochs": arm.epochs,
        "failure": arm.failure,
        "optimizer": {"name": arm.options.optimizer.opt, "groups": group_options(arm.optimizer)},
        "decor": dataclasses.asdict(arm.handle.config) if arm.handle else None,
        "final": arm.history[-1] if arm.history else None,
        "best": arm.best,
        "mean_correlation": dict(zip(("before", "after"), correlation, strict=True)) if correlation else None,
        "ms_per_update": observed["ms_per_update"],
        "peak_memory_bytes": observed["peak_memory_bytes"],
        "load": observed["load"],
        "refreshes": sum(row.refreshes for row in report.rows) if report else None,
        "skips": sum(row.skips for row in report.rows) if report else None,
        "layers": [
            {"name": row.name, "dim": row.dim, "refreshes": row.refreshes, "skips": row.skips}
            | {"correlation_before": row.correlation_before, "correlation_after": row.correlation_after}
            for row in (report.rows if report else ())
        ],
        **context,
    }


def _last_words(arm: Arm, report: AttachReport | None) -> str:
    best, column, correlation = arm.best, arm.metric_column, _correlation(report)
    text = f"{arm.name}: best {column} {best[column]:.4g} in epoch {best['epoch']}" if best else arm.name
    if correlation:
        text += f"; mean correlation of layer inputs {correlation[0]:.3f}, after R {correlation[1]:.3f}"
    rows = report.rows if report else ()
    skips = sum(row.skips for row in rows)
    if skips:
        text += f"; {skips} of {skips + sum(row.refreshes for row in rows)} refreshes of R skipped"
    return text


def _write_comparison(arms: Sequence[Arm], folder: RunFolder, context: dict[str, Any], title: str) -> None:
    sides = (_side(arms[0]), _side(arms[1]))
    if not all(side.evaluated for side in sides):
        return  # one diverged before there was anything to compare
    table, words = compare.markdown(sides), compare.verdict(sides)
    folder.write_json("compare.json", compare.as_json(sides, context))
    folder.write_text(
        "compare.md", f"# {markdown_text(title)}\n\n{table}\n{words}\n\n![accuracy and loss](compare.png)\n"
    )
    picture = folder.path / "compare.png"
    save_picture(sides, picture, title)
    print(f"\n{table}\n{wrapped(words, '')}")
