"""validate.py: evaluates a checkpoint or timm's pretrained weights."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from timm_decor.training import build
from timm_decor.training.args import validate_parser
from timm_decor.training.datasets import open_source
from timm_decor.training.errors import UserError
from timm_decor.training.evaluate import evaluate
from timm_decor.training.folder import RunFolder
from timm_decor.training.loaders import eval_loader
from timm_decor.training.runtime import make_accelerator, seed_everything


def main(argv: Sequence[str]) -> None:
    """Evaluate, print the result as JSON on stdout and write it to --results-file.

    Raises:
        UserError: anything that the person who called can put right, in one line.
    """
    args = validate_parser().parse(argv)
    if args.checkpoint and args.pretrained:
        raise UserError("--checkpoint and --pretrained exclude each other")
    if args.use_ema and not args.checkpoint:
        raise UserError("--use-ema needs --checkpoint")
    ignored = _fill_from_checkpoint(args)
    if not args.model:
        raise UserError("--model is needed: the checkpoint does not say what it is")
    args.pretrained = not args.checkpoint
    accelerator = make_accelerator(args.device, args.amp, args.amp_dtype)
    results_folder = RunFolder(Path(args.results_file).parent) if args.results_file else None

    channels = build.input_channels(args)
    source = open_source(args, args.split, "RGB" if channels == 3 else "L")
    seed_everything(args.seed)
    model = build.create(args, args.num_classes or (source.num_classes if args.checkpoint else None), channels)
    if args.checkpoint:
        build.load_weights(model, args.checkpoint, args.use_ema)
    if ignored and accelerator.is_main_process:  # not before the weights fit: a refusal stays one line
        print(f"validate.py: {ignored}", file=sys.stderr)
    data_config = build.data_config(args, model, channels)
    loader = eval_loader(args, source, data_config, build.class_count(model), accelerator)
    build.place(model, accelerator.device, args.channels_last)
    runnable = torch.compile(model, backend=args.torchcompile) if args.torchcompile else model
    metrics = evaluate(runnable, loader, accelerator, args.channels_last)  # type: ignore[arg-type]

    result: dict[str, Any] = {
        "model": args.model,
        "top1": round(metrics.top1, 4),
        "top1_err": round(100 - metrics.top1, 4),
    }
    if metrics.top5 is not None:
        result |= {"top5": round(metrics.top5, 4), "top5_err": round(100 - metrics.top5, 4)}
    result |= {
        "loss": round(metrics.loss, 6),
        "images": metrics.images,
        "images_per_s": round(metrics.images / metrics.seconds, 1),
        "param_count": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "img_size": data_config["input_size"][-1],
        "crop_pct": data_config["crop_pct"],
        "interpolation": data_config["interpolation"],
    }
    if accelerator.is_main_process:
        print(json.dumps(result, indent=4))
        if results_folder:
            results_folder.write_text(Path(args.results_file).name, _formatted(result, args.results_format))
    accelerator.end_training()


def _fill_from_checkpoint(args: argparse.Namespace) -> str | None:
    """Take from a checkpoint of train.py what the command line leaves open.

    Returns:
        What to say where the checkpoint is of another model, so that nothing was taken; None otherwise.
    """
    metadata = build.safetensors_metadata(args.checkpoint or "")
    args.model = args.model or metadata.get("architecture")
    if "data_config" not in metadata:
        return None
    mine, its = build.architecture(args.model), build.architecture(metadata["architecture"])
    if mine != its:
        return f"{args.checkpoint} is of {its}, not {mine}: its data configuration and number of classes are not used"
    args.num_classes = args.num_classes or int(metadata["num_classes"])
    args.model_kwargs = args.model_kwargs or json.loads(metadata["model_kwargs"])
    saved = json.loads(metadata["data_config"])
    if args.img_size is None and args.input_size is None:
        args.input_size = [args.in_chans or saved["input_size"][0], *saved["input_size"][1:]]
    elif args.img_size is not None and args.in_chans is None:
        args.in_chans = saved["input_size"][0]
    for name in ("mean", "std", "crop_pct", "interpolation"):
        if getattr(args, name) is None:
            setattr(args, name, saved[name])
    return None


def _formatted(result: dict[str, Any], results_format: str) -> str:
    if results_format == "json":
        return json.dumps(result, indent=4) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, result.keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerow(result)
    return text.getvalue()
