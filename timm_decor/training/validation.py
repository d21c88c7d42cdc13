"""validate.py: evaluates checkpoints, or timm's pretrained weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import TestTimePoolHead
from torch import nn

from timm_decor.errors import UserError, message
from timm_decor.text import csv_text, markdown_table, printable, text_table
from timm_decor.training import build
from timm_decor.training.args import validate_parser
from timm_decor.training.data.datasets import open_source
from timm_decor.training.data.loaders import eval_loader
from timm_decor.training.data.names import check_labels, numbered_as
from timm_decor.training.data.sources import Source
from timm_decor.training.evaluate import evaluate
from timm_decor.training.keeping.folder import EMA_SUFFIX, RESUME_FILES, RunFolder
from timm_decor.training.keeping.metadata import CheckpointMetadata
from timm_decor.training.options import CreateOptions, ImageOptions, ResultOptions, ValidateOptions
from timm_decor.training.runtime import (
    follow_launcher,
    make_accelerator,
    others_needed,
    seed_everything,
    slow_precision,
)
from timm_decor.training.seeing.mistakes import class_names, confusion, write_confusion, write_sample, write_worst
from timm_decor.training.without_effect import idle, refuse_class_map

Row = dict[str, Any]
_NARROW = ("checkpoint", "top1", "top5", "loss")  # columns of the table on a terminal; others where there is room
_WIDE = ("images_per_s", "img_size", "model")


def main(argv: Sequence[str], prog: str = "validate.py") -> None:
    """Evaluate, print the result on stdout and write what was asked for.

    It is printed as JSON (a list for several checkpoints); several on a terminal are a table, unless --json asks.

    Args:
        argv: the command line.
        prog: the program, for messages.

    Raises:
        UserError: anything that the person who called can put right, in one line. Of several checkpoints, those that
            can be evaluated are, before that.
    """
    with others_needed():
        _main(argv, prog)


def _main(argv: Sequence[str], prog: str) -> None:
    parser = validate_parser()
    args = parser.parse(argv)
    refuse_class_map(args)
    told = follow_launcher(args) + idle(args, parser)
    options = ValidateOptions.of(args)
    weights, result, device = options.weights, options.result, options.device
    if weights.checkpoint and weights.pretrained:
        raise UserError("--checkpoint and --pretrained exclude each other")
    if weights.use_ema and not weights.checkpoint:
        raise UserError("--use-ema needs --checkpoint")
    checkpoints = find_checkpoints(weights.checkpoint)
    several = len(checkpoints) > 1
    if several and result.pictures:
        raise UserError(f"{' and '.join(result.pictures)}: for one checkpoint, not several")
    accelerator = make_accelerator(device.device, device.amp, device.amp_dtype, timeout=options.dist_timeout)
    say = partial(_say, prog) if accelerator.is_main_process else _nothing
    for line in told + slow_precision(accelerator):
        say(line)
    for file in (result.results_file, *result.pictures.values()):
        if file:
            RunFolder(Path(file).parent, accelerator.is_main_process)

    rows, failures = [], []
    for name, checkpoint in checkpoints:
        try:
            row = _evaluate(options, checkpoint, accelerator, say)
        except UserError as error:
            if not several:
                raise
            failures.append(name)
            say(f"{name} is left out: {message(error)}")
            continue
        rows.append({"checkpoint": name, **row} if several else row)
        if several:
            say(f"{name}: top-1 {row['top1']:.2f}%, loss {row['loss']:.4f}")
    rows.sort(key=lambda row: -row["top1"])
    if accelerator.is_main_process and rows:
        if several and not result.json and sys.stdout.isatty():
            print(_table(rows, shutil.get_terminal_size().columns))
        else:
            print(json.dumps(rows if several else rows[0], indent=4))
        if result.results_file:
            path = Path(result.results_file)
            form = result.results_format or {".json": "json", ".md": "md"}.get(path.suffix, "csv")
            RunFolder(path.parent).write_text(path.name, _formatted(rows, form, several))
    accelerator.end_training()
    if failures:
        raise UserError(f"{len(failures)} of {len(checkpoints)} checkpoints could not be evaluated: {failures[0]}, ...")


def find_checkpoints(paths: Sequence[str]) -> list[tuple[str, str | None]]:
    """The files that --checkpoint stands for: (name for the results, path).

    Names are those inside of a folder, or, where two would be alike, the paths. In folders and below them everything
    that ends like a checkpoint is taken, but neither the averaged weights beside their own (--use-ema takes those) nor
    the states to resume from, and a file with two names (best, last) only once.

    Raises:
        UserError: a folder without checkpoints, or a path where nothing is.
    """
    if not paths:
        return [("", None)]
    found: list[tuple[str, str | None]] = []
    for text in paths:
        path = Path(text)
        if not path.is_dir():
            if not path.is_file():
                raise UserError(build.no_checkpoint(text))
            found.append((path.name, text))
            continue
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.name.endswith(build.CHECKPOINT_ENDINGS) and file.is_file() and file.name not in RESUME_FILES
            if not file.stem.endswith(EMA_SUFFIX)
        ]
        if not inside:
            raise UserError(f"{text} holds no checkpoints: files that end in {', '.join(build.CHECKPOINT_ENDINGS)}")
        once: dict[tuple[int, int], Path] = {}
        for file in inside:
            status = file.stat()
            once.setdefault((status.st_dev, status.st_ino) if status.st_ino else (0, len(once)), file)
        found += [(str(file.relative_to(path)), str(file)) for file in once.values()]
    if len({name for name, _ in found}) < len(found):  # of several runs
        return [(str(file), file) for _, file in found]
    return found


def _evaluate(
    options: ValidateOptions, checkpoint: str | None, accelerator: Accelerator, say: Callable[[str], None]
) -> Row:
    """One checkpoint's row; its path, or None for timm's weights; `say` is what tells of its peculiarities."""
    metadata = CheckpointMetadata.read(checkpoint or "")
    name = options.model or (metadata.architecture if metadata else None)
    if not name:
        raise UserError("--model is needed: the checkpoint does not say what it is")
    ignored, trained_size = "", None
    if metadata is not None:
        mine, its = build.architecture(name), build.architecture(metadata.architecture)
        if mine == its:
            image, create = completed(options.image, options.create, metadata)
            options, trained_size = replace(options, image=image, create=create), metadata.data_config["input_size"]
        else:
            ignored = not_used(str(checkpoint), name, metadata)
    device, wanted, channels = options.device, options.create.num_classes, build.input_channels(options.image)
    source = open_source(options.data, options.split, "RGB" if channels == 3 else "L", options.num_samples)
    seed_everything(options.seed)
    known_by_data = source.num_classes if checkpoint else None
    model = build.create(name, options.create, wanted or known_by_data, channels, pretrained=not checkpoint)
    if checkpoint:
        build.load_weights(model, checkpoint, options.weights.use_ema)
    else:
        build.refuse_new_head(model, name, wanted)
    if ignored:  # not before the weights fit: a refusal stays one line
        say(ignored)
    # timm's own weights are evaluated as timm's validate.py does: where they have a size for tests, at that
    data_config = build.data_config(options.image, model, channels, metadata is None and not options.use_train_size)
    classes = build.class_count(model)
    names, whose = (metadata.label_names if metadata else []), str(checkpoint)
    if not checkpoint:
        names, whose = build.pretrained_names(model), f"the weights of {name}"
    source = _numbered_as_the_model(source, f"split {options.split}", classes, names, whose, checkpoint, say)
    parameters = sum(p.numel() for p in model.parameters())
    if options.test_pool:
        model = pooled_over_windows(model, trained_size, data_config["input_size"])
        data_config["crop_pct"] = 1.0  # as timm's validate.py: it sees the whole image
    loader = eval_loader(options.loader, source, data_config, classes, options.seed, accelerator)
    build.place(model, accelerator.device, device.channels_last)
    build.check_images(model, data_config["input_size"], accelerator.device, accelerator.autocast, name)
    runnable = build.compiled(model, device)
    seen: list[torch.Tensor] | None = [] if options.result.pictures else None
    metrics = evaluate(runnable, loader, accelerator, device.channels_last, seen)
    if seen and accelerator.is_main_process:
        _write_mistakes(options.result, loader.dataset.source, torch.cat(seen).numpy(), classes)  # type: ignore[attr-defined]
    row: Row = {"model": name, "top1": round(metrics.top1, 4), "top1_err": round(100 - metrics.top1, 4)}
    if metrics.top5 is not None:
        row |= {"top5": round(metrics.top5, 4), "top5_err": round(100 - metrics.top5, 4)}
    return row | {
        "loss": round(metrics.loss, 6),
        "images": metrics.images,
        "images_per_s": round(metrics.images / metrics.seconds, 1),
        "param_count": round(parameters / 1e6, 2),
        "img_size": data_config["input_size"][-1],
        "crop_pct": data_config["crop_pct"],
        "interpolation": data_config["interpolation"],
    }


def completed(
    image: ImageOptions, create: CreateOptions, metadata: CheckpointMetadata
) -> tuple[ImageOptions, CreateOptions]:
    """What the command line leaves open, as a checkpoint of train.py says it."""
    saved = metadata.data_config
    if image.img_size is None and image.input_size is None:
        size = [image.in_chans or saved["input_size"][0], *saved["input_size"][1:]]
        image = replace(image, input_size=size)
    elif image.img_size is not None and image.in_chans is None:
        image = replace(image, in_chans=saved["input_size"][0])
    names = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
    image = replace(image, **{name: saved[name] for name in names if getattr(image, name) is None})
    model_kwargs = {**metadata.model_kwargs, **create.model_kwargs}
    its_pool = model_kwargs.pop("global_pool", None)
    create = replace(
        create,
        num_classes=create.num_classes or metadata.num_classes,
        model_kwargs=model_kwargs,
        gp=create.gp or its_pool,
    )
    return image, create


def not_used(checkpoint: str, name: str, metadata: CheckpointMetadata) -> str:
    """What to say of a checkpoint that is taken for another model than it says."""
    its, mine = build.architecture(metadata.architecture), build.architecture(name)
    return f"{checkpoint} is of {its}, not {mine}: its data configuration and number of classes are not used"


def _numbered_as_the_model(
    source: Source,
    its: str,
    classes: int,
    names: Sequence[str],
    whose: str,
    checkpoint: str | None,
    say: Callable[[str], None],
) -> Source:
    """The images with labels as the model numbers classes: by name, where both sides have names; else that is said.

    Args:
        source: the images.
        its: the split, for messages.
        classes: how many the model has.
        names: of the model's classes; empty where nobody knows.
        whose: the weights, for messages.
        checkpoint: their file; None for timm's.
        say: says it.

    Raises:
        UserError: the data have classes that the model does not know.
    """
    if not checkpoint and not set(source.class_names) & set(names):
        names = []  # names in other words: ImageNet's synsets are numbers to most
        if source.class_names and len(source.class_names) != classes:
            raise UserError(f"{its} has {len(source.class_names)} classes and {whose} have {classes}, by other "
                            f"names: a --class-map that lists {classes} names numbers the folders")  # fmt: skip
    source = numbered_as(source, names, its, whose)
    if source.class_names and not names:
        first = ", ".join(f"{label} {name}" for label, name in enumerate(source.class_names[:3]))
        say(
            f"{whose} does not name its classes: they are taken to be numbered as the data are ({first} ...)",
        )
    check_labels(source, classes, its)
    return source


def _write_mistakes(result: ResultOptions, source: Source, seen: Any, classes: int) -> None:
    names = class_names(source, classes)
    if result.confusion_matrix:
        write_confusion(confusion(seen, classes), names, Path(result.confusion_matrix))
    if result.worst_images:
        write_worst(source, seen, names, Path(result.worst_images))
    if result.sample_images:
        write_sample(source, seen, names, Path(result.sample_images))


def pooled_over_windows(
    model: nn.Module, trained: tuple[int, int, int] | None, size: tuple[int, int, int]
) -> TestTimePoolHead:
    """timm's pooling for images larger than those of training: averages over windows of training's size, then both.

    Args:
        model: with its weights.
        trained: (C, H, W) of training; None for what timm says of the pretrained weights.
        size: of the images to come.

    Raises:
        UserError: the images are not larger, or the model's head does more than pool and classify.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    before = tuple(trained or cfg.get("input_size") or size)
    if size[-1] <= before[-1] or size[-2] <= before[-2]:
        raise UserError(f"--test-pool is for images larger than training's {before[-1]} px: give --img-size")
    name = type(model).__name__
    refusal = UserError(f"--test-pool: {name} does more with its last feature map than to pool and classify it")
    model.eval()
    example = torch.rand(1, *before, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            expected, features = model(example), model.forward_features(example)  # type: ignore[operator]
            pooled = TestTimePoolHead(model, original_pool=features.shape[-2:])
            same = features.dim() == 4 and torch.allclose(pooled(example), expected, rtol=1e-3, atol=1e-4)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise refusal from error
    if not same:  # such as a norm behind the pooling, which timm's wrapper would leave out
        raise refusal
    return pooled


def _formatted(rows: list[Row], form: str, several: bool) -> str:
    if form == "json":
        return json.dumps(rows if several else rows[0], indent=4) + "\n"
    names = list(dict.fromkeys(name for row in rows for name in row))
    if form == "md":
        return markdown_table(names, [[row.get(name, "") for name in names] for row in rows]) + "\n"
    return csv_text([names, *([row.get(name, "") for name in names] for row in rows)])


def _table(rows: list[Row], columns: int) -> str:
    """The rows for a terminal, with the columns that fit into it."""

    def with_names(names: Sequence[str]) -> str:
        return text_table(names, [[row.get(name, "") for name in names] for row in rows])

    names = [name for name in _NARROW if any(name in row for row in rows)]
    table = with_names(names)
    for name in _WIDE:
        wider = with_names([*names, name])
        if max(map(len, wider.splitlines())) > columns:
            break
        names, table = [*names, name], wider
    return table


def _say(prog: str, text: str) -> None:
    print(f"{prog}: {printable(text)}", file=sys.stderr)


def _nothing(text: str) -> None:
    """What processes other than the main one say."""
