"""train.py: a run from its command line to its files."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from timm.models import safe_model_name
from torch import nn
from torch.utils.data import DataLoader

from timm_decor.errors import UserError, first_line
from timm_decor.redact import without_secrets
from timm_decor.reporting import AttachReport, ConversionReport
from timm_decor.text import markdown_text, printable, wrapped
from timm_decor.training import build, find_lr
from timm_decor.training.args import as_recipe, decor_config, train_parser
from timm_decor.training.arm import Arm
from timm_decor.training.data.datasets import open_splits
from timm_decor.training.data.loaders import eval_loader, train_loader
from timm_decor.training.data.names import check_labels
from timm_decor.training.distill import make_distillation
from timm_decor.training.foreign import read_mapping
from timm_decor.training.keeping.checkpoints import Keeper, load_states
from timm_decor.training.keeping.folder import (
    ARGS_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    RESUME_FILE,
    RunFolder,
    holds_run,
)
from timm_decor.training.keeping.metadata import stored_metadata
from timm_decor.training.keeping.privacy import published, published_command, refuse_secrets, without_paths
from timm_decor.training.keeping.stopping import StopRequest
from timm_decor.training.optim import learning_rate
from timm_decor.training.runtime import (
    decided_by_one,
    follow_launcher,
    machine,
    make_accelerator,
    seed_everything,
    versions,
)
from timm_decor.training.seeing import compare, ending, report, trackers
from timm_decor.training.seeing.losswatch import NonFiniteLoss
from timm_decor.training.seeing.plot import save_picture
from timm_decor.training.seeing.timeleft import TimeLeft

AUTO = "auto"  # --resume: the run in --experiment's folder, if there is one


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """train.py's arguments, a recipe's (-c, or the args.yaml of the run to --resume) below the command line's.

    Raises:
        UserError: an argument or a recipe's key is unknown or refused, or a value is a secret.
    """
    parser = train_parser()
    args = parser.parse(argv)
    recipe = args.config
    if args.resume not in (None, AUTO) and not recipe:
        path = Path(args.resume)
        recipe = (path if path.is_dir() else path.parent) / ARGS_FILE
        if not recipe.is_file():
            raise UserError(f"nothing to resume: {recipe} does not exist")
    if recipe:
        args = parser.parse([*parser.recipe_words(str(recipe)), *argv])
    refuse_secrets(args)
    return args


def main(argv: Sequence[str]) -> None:
    """Train.

    Raises:
        UserError: anything that the person who called can put right, in one line.
    """
    args = parse(argv)
    decorrelated = build.is_decorrelated(args)
    build.check_model_name(args.model)
    if args.compare and not decorrelated:
        raise UserError(f"--compare needs a decorrelated model: use --model decor_{args.model}, or --decor")
    if args.initial_r and not decorrelated:
        raise UserError(f"--initial-r does nothing for plain {args.model}: use a {build.PREFIX} model, or --decor")
    trackers.check_available(args.log_with)
    decor_config(args)  # refuse a bad knob before the data are read
    told = follow_launcher(args)
    accelerator = make_accelerator(args.device, args.amp, args.amp_dtype, args.grad_accum_steps)
    folder = decided_by_one(accelerator, lambda: _find_lr_folder(args) if args.find_lr else _open_folder(args))
    with contextlib.ExitStack() as stack:
        decided_by_one(accelerator, lambda: stack.enter_context(folder.held()))
        if not accelerator.is_main_process:
            folder = RunFolder(folder.path, writes=False)
        for line in told:
            accelerator.print(line)
        _run(args, argv, accelerator, folder, decorrelated)


def _run(
    args: argparse.Namespace, argv: Sequence[str], accelerator: Accelerator, folder: RunFolder, decorrelated: bool
) -> None:
    """Read the data, make the model, train, and write what became of it."""
    if args.resume:
        _refuse_other_start(args, folder)
    channels = build.input_channels(args)
    train_source, eval_source = open_splits(args, "RGB" if channels == 3 else "L")
    for note in (*train_source.notes, *eval_source.notes):
        accelerator.print(note)
    seed_everything(args.seed)
    model = build.create(args, args.num_classes or train_source.num_classes, channels)
    if args.sync_bn:
        model = build.synchronized(model, args.freeze, accelerator.device, accelerator.num_processes)
    base = build.hub_name(model) if args.pretrained else None
    classes = build.class_count(model)
    check_labels(train_source, classes, f"split {args.train_split}")
    check_labels(eval_source, classes, f"split {args.val_split}")
    if args.eval_metric == "top5" and classes <= 5:
        raise UserError(f"--eval-metric top5 means nothing with {classes} classes")
    data_config = build.data_config(args, model, channels)
    build.check_images(model, data_config["input_size"], torch.device("cpu"), contextlib.nullcontext, args.model)
    loaders = (
        train_loader(args, train_source, data_config, classes, accelerator),
        eval_loader(args, eval_source, data_config, classes, accelerator),
    )
    distillation = make_distillation(args, model, data_config, accelerator)
    if args.find_lr:
        _find_lr(args, model, loaders, distillation, decorrelated, folder, argv)
        return
    arms = _make_arms(args, model, accelerator, loaders, decorrelated)
    folders = _arm_folders(args, folder, arms, accelerator.is_main_process)
    metadata = _metadata(args, model, data_config, classes, train_source.class_names)
    if args.resume:
        _load_states(args, arms, folder, folders, metadata)
        if _is_finished(arms, folders):
            done = " and ".join(dict.fromkeys(f"{arm.epoch} of {arm.epochs}" for arm in arms))
            accelerator.print(f"{ending.here(folder.path)} is finished: {done} epochs; --epochs N trains on")
            accelerator.end_training()
            return
    accelerator.print(
        wrapped(
            f"{args.model}: {len(train_source)} training and {len(eval_source)} evaluation images of "
            f"{'x'.join(map(str, data_config['input_size']))}, on {accelerator.num_processes} x "
            f"{accelerator.device.type}"
        )
    )
    for arm in arms:
        if arm.handle:
            accelerator.print("\n".join(_conversion_lines(arm.model.decor_report)))  # type: ignore[arg-type]
        how = arm.handle.summary if arm.handle else "plain"
        accelerator.print(wrapped(f"{arm.name}: {arm.args.opt} at learning rate {arm.args.lr:.4g}, {how}"))
        if arm.warmup_epochs >= arm.epochs:
            text = f"{arm.name}: a warm-up of {arm.warmup_epochs:g} epochs does not end within {arm.epochs}"
            accelerator.print(wrapped(f"{text}: the learning rate never reaches {arm.args.lr:.4g}"))
    if args.compare:
        _warm_up(arms, data_config["input_size"], args.batch_size)
    folder.write_args(as_recipe(args))  # not earlier: a resume that is refused leaves the run's own arguments alone
    trackers.start(accelerator, args, folder.path, compare.SIDES if args.compare else ())
    for arm, side in zip(arms, compare.SIDES if args.compare else ("",), strict=True):
        arm.log, arm.distillation = partial(trackers.log, accelerator, side), distillation
    with StopRequest(accelerator.num_processes, tells=accelerator.is_main_process) as stop:
        keepers = [
            Keeper(arm, at, metadata, args.recovery_interval, stop) for arm, at in zip(arms, folders, strict=True)
        ]
        _take_turns(list(zip(arms, keepers, strict=True)))

    context = {"config": published(args), "versions": versions(), "machine": machine(accelerator)}
    seen = []
    for arm, arm_folder in zip(arms, folders, strict=True):
        final = _report(arm)
        results = _results(arm, base, final, context) | {"sha256": arm_folder.digests()}
        arm_folder.write_json(RESULTS_FILE, results)
        if not arm.failure:
            arm_folder.forget_previous()
        accelerator.print(wrapped(_last_words(arm, final)))
        layers = tuple(row.name for row in final.rows) if final else ()
        seen.append(report.Seen(_side(arm), arm.observer.record(final), layers))
    title = f"{' and '.join(arm.name for arm in arms)} on {args.dataset or Path(args.data_dir or 'digits').name}"
    if accelerator.is_main_process:
        if args.compare:
            _write_comparison(arms, folder, context, f"{title}, {args.opt}")
        command = published_command("train.py", argv)
        folder.write_text(REPORT_FILE, report.render(seen, title, command, context))
        sides = [side for side, _ in zip(compare.SIDES, arms, strict=False)] if args.compare else [""]
        at = {side: arm_folder.path for side, arm_folder in zip(sides, folders, strict=True)}
        print(f"\n{ending.whereabouts(folder.path, at, args)}")
    accelerator.end_training()
    failures = [arm.failure for arm in arms if arm.failure]
    if failures:
        raise UserError("; ".join(failures))


def _open_folder(args: argparse.Namespace) -> RunFolder:
    if args.resume not in (None, AUTO):
        path = Path(args.resume)
        return RunFolder(path if path.is_dir() else path.parent)
    size = args.img_size or (args.input_size[-1] if args.input_size else "")
    name = "-".join(filter(None, (time.strftime("%Y%m%d-%H%M%S"), safe_model_name(args.model), str(size))))
    path = Path(args.output) / (args.experiment or name)
    here, sides = [path], [path / side for side in compare.SIDES]
    if args.resume == AUTO:
        if not args.experiment:
            raise UserError("--resume auto goes on with the run of --experiment NAME, which is missing")
        if any(holds_run(folder) for folder in (here if args.compare else sides)):
            kind = "a single model" if args.compare else "--compare"
            raise UserError(f"{path} holds a run of {kind}: go on with it as such, or take another --experiment")
    elif not args.experiment:
        return RunFolder.fresh(path)
    elif any(holds_run(folder) for folder in (*here, *sides)):
        raise UserError(f"{path} holds a run already: go on with it by --resume {path}, or take another --experiment")
    return RunFolder(path)


def _find_lr_folder(args: argparse.Namespace) -> RunFolder:
    """A folder that no run has: a search touches none of a run's files."""
    if args.resume:
        raise UserError("--find-lr tries learning rates before a run is begun: leave out --resume")
    low, high = args.find_lr
    if low > high:
        raise UserError(f"--find-lr {low:g} {high:g}: the lower one comes first")
    name = args.experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_model_name(args.model)}"
    return RunFolder.fresh(Path(args.output) / f"{name}-find-lr")


def _find_lr(
    args: argparse.Namespace,
    model: nn.Module,
    loaders: tuple[DataLoader[Any], DataLoader[Any]],
    distillation: nn.Module | None,
    decorrelated: bool,
    folder: RunFolder,
    argv: Sequence[str],
) -> None:
    """Short trainings over a grid of learning rates, of the model and, to compare, of its plain twin."""
    rates, searches, accelerator = find_lr.grid(*args.find_lr), [], None
    for side in compare.SIDES if args.compare else compare.SIDES[not decorrelated :][:1]:
        name, trials = _side_name(args, decorrelated=side != "plain"), []
        for lr in rates:
            accelerator = make_accelerator(args.device, args.amp, args.amp_dtype, args.grad_accum_steps)
            own = build.plain_twin(model) if side == "plain" else copy.deepcopy(model)
            mine = argparse.Namespace(**{**vars(args), "lr": lr})
            arm = Arm(name, own, mine, accelerator, *loaders, decorrelated=side != "plain")
            arm.distillation = distillation
            trials.append(find_lr.Trial(lr, arm.short_training(args.find_updates), args.find_updates))
            accelerator.free_memory()
            accelerator.print(f"{name}, {args.opt} at learning rate {lr:.4g}: training loss {trials[-1].loss:.4f}")
        searches.append(find_lr.Search(name, trials))
    assert accelerator is not None  # there is a rate
    for search in searches:
        accelerator.print(search.words)
    if accelerator.is_main_process:
        print(find_lr.table(searches))
        context = {"command": published_command("train.py", argv), "config": published(args)}
        context |= {"versions": versions(), "machine": machine(accelerator)}
        folder.write_json("find_lr.json", find_lr.as_json(searches, context))
        title = f"{args.opt}, {args.find_updates} updates a learning rate"
        find_lr.save_picture(searches, folder.path / "find_lr.png", title)
        print(f"picture: {folder.path / 'find_lr.png'}")
    accelerator.end_training()


def _side_name(args: argparse.Namespace, decorrelated: bool) -> str:
    """What a side is called: by its model, which --decor leaves as it is."""
    twin = build.twin_name(args.model)
    if not decorrelated:
        return without_paths(twin)
    return without_paths(args.model if args.model != twin else f"decorrelated {args.model}")


def _make_arms(
    args: argparse.Namespace,
    model: nn.Module,
    accelerator: Accelerator,
    loaders: tuple[DataLoader[Any], DataLoader[Any]],
    decorrelated: bool,
) -> list[Arm]:
    """The arm that was asked for and, to compare, its plain twin with the same initial weights."""
    mine = copy.copy(args)
    mine.lr = learning_rate(args, accelerator.num_processes)
    twin = copy.copy(mine)
    twin.model = build.twin_name(args.model)
    twin.lr = mine.lr if args.compare_lr is None else args.compare_lr
    twin.epochs = args.compare_epochs or args.epochs
    # copied before the first arm wraps and moves the model
    twin_model = build.plain_twin(model) if args.compare else None
    arms = [Arm(_side_name(args, decorrelated), model, mine, accelerator, *loaders, decorrelated=decorrelated)]
    if twin_model is not None:
        own = make_accelerator(args.device, args.amp, args.amp_dtype, args.grad_accum_steps)
        arms.append(Arm(_side_name(args, False), twin_model, twin, own, *loaders, decorrelated=False))
    return arms


def _arm_folders(args: argparse.Namespace, folder: RunFolder, arms: list[Arm], writes: bool) -> list[RunFolder]:
    if not args.compare:
        return [folder]
    return [RunFolder(folder.path / side, writes) for side, _ in zip(compare.SIDES, arms, strict=True)]


# They say how a run begins: on the way they would change nothing but the records.
_START = ("pretrained", "pretrained_path", "initial_checkpoint", "initial_r", "head_init_scale", "head_init_bias")


def _load_states(
    args: argparse.Namespace, arms: list[Arm], folder: RunFolder, folders: list[RunFolder], metadata: dict[str, str]
) -> None:
    paths = [Path(args.resume)] if args.resume != AUTO and not args.compare else [at.path for at in folders]
    changed = _changed(args, folder)
    if load_states(paths, arms, folders, metadata):
        goes_on = any(arm.epoch < arm.epochs for arm in arms)
        if goes_on:
            arms[0].accelerator.print("; ".join(f"{arm.name} goes on after update {arm.steps}" for arm in arms))
        if changed:
            words = ", ".join(f"{key} {change}" for key, change in changed.items())
            arms[0].accelerator.print(f"other arguments than before: {words}")
        for at in (folder, *folders) if goes_on else ():
            at.forget_results()
    elif args.resume != AUTO:
        raise UserError(f"nothing to resume: {paths[0] / RESUME_FILE} does not exist")


def _refuse_other_start(args: argparse.Namespace, folder: RunFolder) -> None:
    """Refuse to go on from another start than the run had: nothing but its records would change."""
    if not any(holds_run(at) for at in (folder.path, *(folder.path / side for side in compare.SIDES))):
        return  # it was ended before its first checkpoint, and begins
    changed = _changed(args, folder)
    for key in _START:
        if key in changed:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"{folder.path}: {flag} is for the start of a run ({changed[key]}); this one has begun")


def _changed(args: argparse.Namespace, folder: RunFolder) -> dict[str, str]:
    """The arguments that are not those that the run had before: `before -> now` by name."""
    try:
        before = read_mapping(folder.path / ARGS_FILE, "recipe")
        now = yaml.safe_load(yaml.safe_dump(as_recipe(args)))
        changed = {key: f"{before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]}
    except UserError:
        return {}  # a run that was killed before it wrote them
    return {key: printable(without_secrets(change)) for key, change in changed.items()}


def _conversion_lines(report: ConversionReport) -> list[str]:
    """What is decorrelated and, by reason, what is not: a few names of each, so that a large model stays readable."""
    groups: dict[str, list[str]] = {}
    for row in report.plain:
        groups.setdefault(row.plain_reason, []).append(row.name)
    lines = []
    for reason, names in groups.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"  {', '.join(names[:3])}{more}: {reason}")
    if len(lines) > 5:
        lines[5:] = [f"  and others, for {len(lines) - 5} more reasons"]
    return [wrapped(report.summary()), *(wrapped(line, "    ") for line in lines)]


def _metadata(
    args: argparse.Namespace, model: nn.Module, data_config: dict[str, Any], classes: int, label_names: list[str]
) -> dict[str, str]:
    """What a checkpoint says of itself, so that validate.py needs no further arguments."""
    architecture = build.architecture(args.model)
    if ":" in architecture:  # local-dir:... is a place on this machine, hf-hub:... says where its weights came from
        architecture = str(model.pretrained_cfg["architecture"])  # type: ignore[index]
    return stored_metadata(architecture, classes, data_config, args.model_kwargs, label_names)


def _warm_up(arms: list[Arm], input_size: tuple[int, int, int], batch_size: int) -> None:
    """One forward and backward pass on a copy: the first arm must not pay for what the device does only once."""
    model = build.plain_twin(arms[-1].model)
    model.__dict__.pop("forward", None)  # Accelerate's, which would run the model that was copied
    images = torch.zeros(batch_size, *input_size, device=next(model.parameters()).device)
    with arms[0].accelerator.autocast():
        loss = model.train()(images).sum()
    loss.backward()


def _take_turns(kept: list[tuple[Arm, Keeper]]) -> None:
    """Train all arms, an epoch each in turn, another one first each time: whatever slows the machine slows them all.

    Raises:
        NonFiniteLoss: the only arm diverged. One of two stops, which its `failure` says, and the other goes on.
        Stopped: a signal asked for it.
    """
    time_left = TimeLeft([arm for arm, _ in kept])
    sides = ("decor", "plain") if len(kept) > 1 else ("epoch",)
    heads = {arm.name: side for (arm, _), side in zip(kept, sides, strict=True)}
    for epoch in range(max(arm.epochs for arm, _ in kept)):
        for arm, keeper in kept if epoch % 2 == 0 else reversed(kept):
            if arm.epoch != epoch or epoch >= arm.epochs:  # resumed further on, with fewer epochs, or failed
                continue
            keeper.pause()
            arm.time_left, start = time_left, time.perf_counter()
            try:
                arm.train_epoch()
                if arm.evaluation_due:  # otherwise nothing stands between the epoch and its own checkpoint
                    keeper.save_trained()
                row = arm.finish_epoch()
            except NonFiniteLoss as error:
                if len(kept) == 1:
                    raise
                arm.failure = str(error)  # not the error, whose traceback would keep the loader's iterator
                arm.accelerator.print(arm.failure)
                continue
            keeper.save()
            time_left.end_epoch(arm, time.perf_counter() - start)
            arm.accelerator.print(wrapped(_epoch_line(heads[arm.name], arm.epochs, row)))


def _epoch_line(head: str, epochs: int, row: dict[str, Any]) -> str:
    scores = "".join(
        f", {kind} {row[f'{kind}_loss']:.3f}, top-1 {row[f'{kind}_top1']:.2f}%"
        for kind in ("eval", "ema")
        if f"{kind}_top1" in row
    )
    seconds = row["epoch_seconds"]
    return (
        f"{head} {row['epoch']}/{epochs}: loss {row['train_loss']:.3f}{scores}, lr {row['lr']:.2g}, "
        f"{seconds:.{0 if seconds >= 100 else 1}f} s, {row['images_per_s']:.0f} img/s"
    )


def _side(arm: Arm) -> compare.Side:
    return compare.Side(
        arm.name, without_paths(arm.args.model), arm.args.opt, arm.peak_lr, arm.epochs, arm.history, arm.failure,
        arm.chance, arm.evaluation_images,
    )  # fmt: skip


def _report(arm: Arm) -> AttachReport | None:
    """The handle's report; None for a plain arm, or where it cannot be computed, which must not cost the results."""
    try:
        return arm.handle.report() if arm.handle else None
    except RuntimeError as error:  # linear algebra that does not converge
        if arm.accelerator.is_main_process:
            print(f"train.py: {arm.name}: no report of R: {first_line(error)}", file=sys.stderr)
        return None


def _correlation(report: AttachReport | None) -> tuple[float, float] | None:
    known = report.mean_correlation() if report else None
    return known if known and all(map(math.isfinite, known)) else None


def _results(arm: Arm, base: str | None, report: AttachReport | None, context: dict[str, Any]) -> dict[str, Any]:
    correlation, observed = _correlation(report), arm.observer.record()
    return {
        "model": without_paths(arm.args.model),
        "decorrelated": arm.handle is not None,
        "base_model": base,
        "lr": arm.peak_lr,  # the highest that was reached
        "epochs": arm.epochs,
        "failure": arm.failure,
        "optimizer": {"name": arm.args.opt, "groups": arm.options},
        "decor": dataclasses.asdict(arm.handle.config) if arm.handle else None,
        "final": arm.history[-1] if arm.history else None,
        "best": arm.best,
        "mean_correlation": dict(zip(("before", "after"), correlation, strict=True)) if correlation else None,
        "ms_per_update": observed["ms_per_update"],
        "peak_memory_bytes": observed["peak_memory_bytes"],
        "refreshes": sum(row.refreshes for row in report.rows) if report else None,
        "skips": sum(row.skips for row in report.rows) if report else None,
        "layers": [
            {"name": row.name, "dim": row.dim, "refreshes": row.refreshes, "skips": row.skips}
            | {"correlation_before": row.correlation_before, "correlation_after": row.correlation_after}
            for row in (report.rows if report else ())
        ],
        **context,
    }


def _is_finished(arms: list[Arm], folders: list[RunFolder]) -> bool:
    """Whether nothing is left to do: all epochs are done, and their results were written behind them."""

    def has_results(arm: Arm, path: Path) -> bool:
        try:
            final = json.loads((path / RESULTS_FILE).read_text(encoding="utf-8"))["final"]
        except (OSError, ValueError, TypeError, KeyError):
            return False
        return bool(arm.history) and final == json.loads(json.dumps(arm.history[-1]))

    return all(arm.epoch >= arm.epochs and has_results(arm, at.path) for arm, at in zip(arms, folders, strict=True))


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


def _write_comparison(arms: list[Arm], folder: RunFolder, context: dict[str, Any], title: str) -> None:
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
