"""train.py: a run from its command line to its files."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from timm_decor.errors import Stopped, UserError
from timm_decor.knobs import changed_flags
from timm_decor.reporting import ConversionReport
from timm_decor.text import wrapped
from timm_decor.training import build, find_lr, results
from timm_decor.training.args import decor_config, train_parser, usual_decay_epochs
from timm_decor.training.arm import Arm, batch_norm_explained
from timm_decor.training.data.datasets import open_splits
from timm_decor.training.data.loaders import eval_loader, train_loader, worker_count
from timm_decor.training.data.names import check_labels
from timm_decor.training.data.progressive import Progression
from timm_decor.training.distill import make_distillation
from timm_decor.training.keeping import resume
from timm_decor.training.keeping.checkpoints import Keeper
from timm_decor.training.keeping.folder import ARGS_FILE, RunFolder
from timm_decor.training.keeping.metadata import CheckpointMetadata, stored_metadata
from timm_decor.training.keeping.privacy import refuse_secrets
from timm_decor.training.keeping.record import Record
from timm_decor.training.keeping.stopping import StopRequest
from timm_decor.training.optim import learning_rate
from timm_decor.training.options import TrainOptions
from timm_decor.training.runtime import (
    decided_by_one,
    follow_launcher,
    is_sharded,
    launched_for_fsdp,
    machine,
    make_accelerator,
    others_needed,
    restarts,
    seed_everything,
    slow_precision,
    versions,
)
from timm_decor.training.seeing import compare, ending, trackers
from timm_decor.training.seeing.losswatch import NonFiniteLoss
from timm_decor.training.seeing.timeleft import TimeLeft
from timm_decor.training.without_effect import idle, refuse_class_map, refuse_forgotten


def parse(argv: Sequence[str], is_begun: bool = False) -> argparse.Namespace:
    """train.py's arguments: the command line's above a recipe's (-c), that above the args.yaml of the run to --resume.

    Args:
        argv: the command line.
        is_begun: it is that of a run which has begun; so is one to --resume. What does nothing in it is not refused.

    Raises:
        UserError: an argument or a recipe's key is unknown or refused, or a value is a secret, or a recipe's
            command.
    """
    parser = train_parser()
    args = parser.parse(argv)
    recipes = [args.config] if args.config else []
    if args.resume not in (None, resume.AUTO):
        path = Path(args.resume)
        own = (path if path.is_dir() else path.parent) / ARGS_FILE
        if not own.is_file():
            raise UserError(f"nothing to resume: {own} does not exist")
        recipes.insert(0, str(own))
    if recipes:
        given, args = args.data_dir, parser.parse([*parser.recipe_words(*recipes), *argv])
        if str(args.data_dir).startswith("pipe:") and not given:
            raise UserError(
                f"recipe {' and '.join(recipes)}: --data-dir is a command to run: give it on the command line"
            )
    refuse_secrets(args)
    if not (is_begun or args.resume):
        refuse_forgotten(args, parser)
        refuse_class_map(args)
    if args.decay_epochs is None:
        args.decay_epochs = usual_decay_epochs(args.sched)
    return args


def main(argv: Sequence[str], prog: str = "train.py") -> None:
    """Train.

    Args:
        argv: the command line.
        prog: the program, for what is written down of it.

    Raises:
        UserError: anything that the person who called can put right, in one line.
    """
    with others_needed():
        _main(argv, prog)


def _main(argv: Sequence[str], prog: str) -> None:
    args = parse(argv)
    decorrelated = build.is_decorrelated(args.model, args.decor, changed_flags(args))
    build.check_model_name(args.model)
    if args.compare and not decorrelated:
        raise UserError(f"--compare needs a decorrelated model: use --model decor_{args.model}, or --decor")
    if args.initial_r and not decorrelated:
        raise UserError(f"--initial-r does nothing for plain {args.model}: use a {build.PREFIX} model, or --decor")
    trackers.check_available(args.log_with)
    decor_config(args)  # refuse a bad knob before the data are read
    told = restarts() + follow_launcher(args) + idle(args, train_parser())
    options, record = TrainOptions.of(args), Record.of(prog, argv, args)
    accelerator = _accelerator(options)
    folder = decided_by_one(accelerator, lambda: _open_folder(options))
    with contextlib.ExitStack() as stack:
        decided_by_one(accelerator, lambda: stack.enter_context(folder.held()))
        if not accelerator.is_main_process:
            folder = RunFolder(folder.path, writes=False)
        if launched_for_fsdp() and not is_sharded(accelerator):
            kind = f"{accelerator.num_processes} x {accelerator.device.type}"
            told.append(
                f"accelerate's FSDP is for several GPUs, and not followed on {kind}: each process has the whole model"
            )
        for line in told + slow_precision(accelerator):
            accelerator.print(line)
        stack.callback(folder.remove_if_empty)  # of a run that is refused nothing stays
        _run(options, record, accelerator, folder, decorrelated)


def _accelerator(options: TrainOptions) -> Accelerator:
    """One of its own for each arm."""
    device = options.device
    steps = options.update.grad_accum_steps
    return make_accelerator(device.device, device.amp, device.amp_dtype, steps, options.dist_timeout)


def _open_folder(options: TrainOptions) -> RunFolder:
    if options.search.find_lr:
        return find_lr.open_folder(options.folder, options.model, *options.search.find_lr)
    return resume.open_folder(options.folder, options.model, options.image, options.compare.compare)


def _run(
    options: TrainOptions, record: Record, accelerator: Accelerator, folder: RunFolder, decorrelated: bool
) -> None:
    """Read the data, make the model, train, and write what became of it."""
    gone: list[str] = []
    if options.folder.resume:
        resume.refuse_other_start(record.recipe, folder)
        start, gone = resume.without_what_is_gone(options.start, folder)
        options = replace(options, start=start)
    made = _make(options, accelerator)
    on = machine(accelerator) | {"workers": worker_count(options.loader)}
    context: dict[str, Any] = {"config": record.config, "versions": versions(), "machine": on}
    if options.search.find_lr:
        context = {"command": record.command, **context}
        find_lr.search(options, made.model, made.loaders, made.distillation, decorrelated, folder, context)
        return
    context["images"] = dict(zip(("training", "evaluation"), made.images, strict=True))
    arms = _make_arms(options, made, accelerator, decorrelated)
    folders = _arm_folders(options, folder, accelerator.is_main_process)
    metadata = _metadata(options.model, options.create.arguments, made.model, made.data_config, made.class_names)
    if options.folder.resume:
        try:
            finished = resume.go_on(options.folder.resume, record.recipe, arms, folder, folders, metadata)
        except UserError:
            for at in folders:  # a comparison's are made for it where there were none
                at.remove_if_empty()
            raise
        if gone and not all(arm.steps or arm.history for arm in arms):
            raise UserError(build.no_checkpoint(gone[0]))
        if finished:
            done = " and ".join(dict.fromkeys(f"{arm.epoch} of {arm.epochs}" for arm in arms))
            accelerator.print(f"{ending.here(folder.path)} is finished: {done} epochs; --epochs N trains on")
            accelerator.end_training()
            return
    context["changed"] = folder.changes()
    _announce(options, made, arms)
    if options.compare.compare:
        _warm_up(arms, made.data_config["input_size"], options.loader.batch_size)
    folder.write_args(record.recipe)  # not earlier: a resume that is refused leaves the run's own arguments alone
    context["starts"] = folder.note_start(max(arm.steps for arm in arms), on, context["versions"])
    sides = compare.SIDES if options.compare.compare else ()
    trackers.start(accelerator, options.watch, record.config, folder.path, sides)
    for arm, side in zip(arms, sides or ("",), strict=True):
        arm.log, arm.distillation = partial(trackers.log, accelerator, side), made.distillation
    with StopRequest(accelerator.num_processes, accelerator.is_main_process, options.dist_timeout) as stop:
        keepers = [
            Keeper(arm, at, metadata, options.keep, stop, folder.path) for arm, at in zip(arms, folders, strict=True)
        ]
        try:
            _take_turns(list(zip(arms, keepers, strict=True)))
            wanted = options.watch.report_mistakes  # before results.json: with it a run is finished
            mistakes = [
                results.find_mistakes(arm, at) if wanted else None for arm, at in zip(arms, folders, strict=True)
            ]
        except (Stopped, UserError) as error:
            results.finish_early(options, arms, folder, record.command, context, error)
            raise
    results.finish(options, arms, folder, folders, mistakes, made.base, record.command, context)
    accelerator.end_training()
    failures = [arm.failure for arm in arms if arm.failure]
    if failures:
        raise UserError("; ".join(failures))


@dataclass(frozen=True)
class _Made:
    """What a run is made of.

    Attributes:
        model: with the weights that training begins with.
        base: the Hub's name of those weights, where it has them.
        data_config: timm's: input_size, mean, std, interpolation, crop_pct, crop_mode.
        progression: the training images' size in each epoch.
        class_names: the data's, by label; empty where they have none.
        loaders: of training and of evaluation.
        images: in each of them.
        distillation: a teacher's opinion, or None.
    """

    model: nn.Module
    base: str | None
    data_config: dict[str, Any]
    progression: Progression
    class_names: list[str]
    loaders: tuple[DataLoader[Any], DataLoader[Any]]
    images: tuple[int, int]
    distillation: nn.Module | None


def _make(options: TrainOptions, accelerator: Accelerator) -> _Made:
    """Open the data, make the model, and see that they fit together."""
    channels, split, seed = build.input_channels(options.image), options.split, options.seed
    train_source, eval_source = open_splits(options.data, split, "RGB" if channels == 3 else "L")
    for note in (*train_source.notes, *eval_source.notes):
        accelerator.print(note)
    seed_everything(seed)
    start, layer, wanted = options.start, options.layer, options.create.num_classes or train_source.num_classes
    model = build.create_to_train(options.model, options.create, start, layer, options.decor, wanted, channels)
    if layer.sync_bn:
        model = build.synchronized(model, start.freeze, accelerator.device, accelerator.num_processes)
    base = build.hub_name(model) if start.pretrained and not start.pretrained_path else None
    classes = build.class_count(model)
    for name in ("initial_checkpoint", "pretrained_path"):
        if note := _of_other_classes(name, getattr(start, name), train_source.class_names, classes):
            accelerator.print(note)
    check_labels(train_source, classes, f"split {split.train_split}")
    check_labels(eval_source, classes, f"split {split.val_split}")
    if options.evaluation.eval_metric == "top5" and classes <= 5:
        raise UserError(f"--eval-metric top5 means nothing with {classes} classes")
    data_config = build.data_config(options.image, model, channels)
    progression = _progression(options, data_config["input_size"])
    for input_size in dict.fromkeys((tuple(data_config["input_size"]), *progression.input_sizes)):
        build.check_images(model, input_size, torch.device("cpu"), contextlib.nullcontext, options.model)
    loader, size = options.loader, options.evaluation.validation_batch_size
    loaders = (
        train_loader(
            loader, options.augment, options.label, train_source, data_config, progression, classes, seed, accelerator
        ),
        eval_loader(
            replace(loader, batch_size=size or loader.batch_size), eval_source, data_config, classes, seed, accelerator
        ),
    )
    channels_last = options.device.channels_last
    names = train_source.class_names
    distillation = make_distillation(
        options.distill, model, options.model, data_config, names, accelerator, channels_last
    )
    if distillation is not None:
        distillation.check_images(progression.input_sizes)
    images = len(train_source), len(eval_source)
    return _Made(model, base, data_config, progression, train_source.class_names, loaders, images, distillation)


def _of_other_classes(name: str, path: str | None, names: Sequence[str], classes: int) -> str:
    """What to say where a head that training begins with knows other classes by name than there are here.

    Args:
        name: of the argument.
        path: of the weights.
        names: of the classes here; empty where they are not known.
        classes: of the model; of other numbers of them the head is a new one.

    Raises:
        UserError: they are the same ones, numbered otherwise: the head would be wrong for each.
    """
    saved = CheckpointMetadata.read(path or "")
    theirs = list(saved.label_names) if saved else []
    if not theirs or not names or theirs == list(names) or len(theirs) != classes:
        return ""
    flag = f"--{name.replace('_', '-')}"
    if sorted(theirs) == sorted(names):
        here, other = next((i, name) for i, name in enumerate(names) if theirs[i] != name)
        raise UserError(
            f"{flag} {path} numbers the classes otherwise: '{other}' is {theirs.index(other)} there and {here} here; "
            f"give the data its numbers (--class-map, or classes.json beside parquet files)"
        )
    return f"{flag}: its head knows other classes ('{theirs[0]}', ...), and is trained on from there"


def _progression(options: TrainOptions, input_size: Sequence[int]) -> Progression:
    """The training images' size in each epoch.

    Raises:
        UserError: the twin of a comparison has other epochs, and would see other images in them.
    """
    text, epochs = options.augment.progressive_size, options.compare.compare_epochs
    if text is None or options.search.find_lr:  # a rate is wanted that the largest images can take
        return Progression.of(None, input_size, 0)
    if epochs not in (None, options.schedule.epochs):
        raise UserError(
            f"--progressive-size with --compare-epochs {epochs}: the twins see the same images, "
            f"so they need the same --epochs, {options.schedule.epochs}"
        )
    return Progression.of(text, input_size, options.schedule.epochs)


def _make_arms(options: TrainOptions, made: _Made, accelerator: Accelerator, decorrelated: bool) -> list[Arm]:
    """The arm that was asked for and, to compare, its plain twin with the same initial weights."""
    images = options.loader.batch_size * accelerator.num_processes * options.update.grad_accum_steps
    lr, other = learning_rate(options.optimizer, images), options.compare
    # copied before the first arm wraps and moves the model
    twin = build.plain_twin(made.model) if other.compare else None
    name = build.side_name(options.model, decorrelated)
    arms = [Arm(name, made.model, options, lr, accelerator, *made.loaders, decorrelated=decorrelated)]
    if twin is not None:
        schedule = replace(options.schedule, epochs=other.compare_epochs or options.schedule.epochs)
        its = replace(options, model=build.twin_name(options.model), schedule=schedule)
        name, lr = build.side_name(options.model, False), lr if other.compare_lr is None else other.compare_lr
        arms.append(Arm(name, twin, its, lr, _accelerator(options), *made.loaders, decorrelated=False))
    return arms


def _arm_folders(options: TrainOptions, folder: RunFolder, writes: bool) -> list[RunFolder]:
    if not options.compare.compare:
        return [folder]
    return [RunFolder(folder.path / side, writes) for side in compare.SIDES]


def _metadata(
    name: str, model_kwargs: dict[str, Any], model: nn.Module, data_config: dict[str, Any], class_names: list[str]
) -> dict[str, str]:
    """What a checkpoint says of itself, so that validate.py needs no further arguments."""
    architecture = build.architecture(name)
    if ":" in architecture:  # local-dir:... is a place on this machine, hf-hub:... says where its weights came from
        architecture = str(model.pretrained_cfg["architecture"])  # type: ignore[index]
    return stored_metadata(architecture, build.class_count(model), data_config, model_kwargs, class_names)


def _announce(options: TrainOptions, made: _Made, arms: list[Arm]) -> None:
    """Say what is about to be trained."""
    accelerator, (training, evaluation) = arms[0].accelerator, made.images
    accelerator.print(
        wrapped(
            f"{options.model}: {training} training and {evaluation} evaluation images of "
            f"{'x'.join(map(str, made.data_config['input_size']))}, on {accelerator.num_processes} x "
            f"{accelerator.device.type}"
        )
    )
    if len(made.progression.stages) > 1:
        accelerator.print(wrapped(f"training images: {made.progression}"))
    for arm in arms:
        if arm.handle:
            accelerator.print("\n".join(_conversion_lines(arm.model.decor_report)))  # type: ignore[arg-type]
        how = arm.handle.summary if arm.handle else "plain"
        accelerator.print(wrapped(f"{arm.name}: {options.optimizer.opt} at learning rate {arm.lr:.4g}, {how}"))
        if arm.schedule.warmup_epochs >= arm.epochs:
            text = f"{arm.name}: a warm-up of {arm.schedule.warmup_epochs:g} epochs does not end within {arm.epochs}"
            accelerator.print(wrapped(f"{text}: the learning rate never reaches {arm.lr:.4g}"))


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


def _warm_up(arms: list[Arm], input_size: tuple[int, int, int], batch_size: int) -> None:
    """One forward and backward pass on a copy: the first arm must not pay for what the device does only once."""
    if is_sharded(arms[0].accelerator):
        return  # no copy of a sharded model can be made
    model = build.plain_copy(arms[-1].model)
    images = torch.zeros(batch_size, *input_size, device=next(model.parameters()).device)
    with arms[0].accelerator.autocast(), batch_norm_explained(arms[-1].name, batch_size, input_size[-1]):
        output = model.train()(images)
        parts = output if isinstance(output, tuple) else (output,)  # of a model with a distillation head two
        loss = torch.stack([part.sum() for part in parts]).sum()
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
