"""Does a family gain by default? Each by a small member, plain and decorrelated at plain training's own rate.

    python benchmarks/zoo_study.py --data-dir ../shared/data/cifar10 --out benchmarks/results/zoo
    python benchmarks/zoo_study.py ... --family deit --arm 'damping 8={"damping": 8}' --leave-plain '*.qkv' --seeds 0

The settings are in study/families.py: CIFAR-10 scaled to 64 px, flips and shifts, batches of 128, two epochs of 25 600
training images, a linear warm-up over a tenth of the steps and a linear decay, one CPU core; top-1 on 5 000
training images that are not trained on. The learning rate is plain training's best on seed 0, from a grid that grows
where the best lies at its edge; the decorrelated model has no say in it. `decorrelated` is the `decor_` twin as it
comes. Other arms: `--arm NAME=JSON` with other fields of DecorConfig; `--leave-plain PATTERN` leaves more layers plain
(wildcards over names, a comma joins two); `--every-layer` leaves none.

A file a family; finished runs are in it at once, and are not made again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import timm.optim
import torch
import torch.nn.functional as F
from torch import nn

import timm_decor
from study.families import FAMILIES, Setting
from study.images import Batches, Split, load
from study.presets import OPTIMIZERS
from study.protocol import best_rate
from study.rows import Rows
from study.training import PLAIN, schedule
from study.verdict import DEFAULT_ARM
from timm_decor import DecorConfig
from timm_decor.convert import reconverted
from timm_decor.errors import UserError, exit_code
from timm_decor.text import near, text_table

BATCH = 128
SHIFT = 2  # pixels of CIFAR-10's 32
IMG_SIZE = 64  # to which they are scaled
EVERY_LAYER = "every layer"
Make = Callable[[Setting, int], nn.Module]  # a model, given its number of classes


def create(setting: Setting, num_classes: int, prefix: str = "") -> nn.Module:
    """The family's member, or with the prefix its twin; for a seed both start with the same weights."""
    is_fixed = timm.models.get_pretrained_cfg_value(setting.model, "fixed_input_size")
    img_size = IMG_SIZE if is_fixed else None  # timm drops None: a convolutional network takes any size
    return timm.create_model(prefix + setting.model, num_classes=num_classes, img_size=img_size, **setting.kwargs)


def with_config(config: DecorConfig) -> Make:
    """The twin with another configuration."""

    def make(setting: Setting, num_classes: int) -> nn.Module:
        model = create(setting, num_classes, timm_decor.models.PREFIX)
        reconverted(model, config)
        return model

    return make


def leaving_plain(patterns: str | None) -> Make:
    """The twin with these layers plain as well; None leaves none plain, of those either that a twin does."""

    def make(setting: Setting, num_classes: int) -> nn.Module:
        twin = create(setting, num_classes, timm_decor.models.PREFIX)
        left_out: dict[str, str] = twin.decor_report.left_out  # type: ignore[union-attr,assignment]

        def wanted(name: str, layer: nn.Module) -> bool:
            if patterns is None:
                return True
            return name not in left_out and not any(fnmatch.fnmatch(name, part) for part in patterns.split(","))

        return timm_decor.decorrelate(twin, None, wanted)

    return make


def train(args: argparse.Namespace, setting: Setting, make: Make, lr: float, seed: int, split: Split) -> dict[str, Any]:
    """One run: top-1 in %, mean loss of the last epoch, CPU seconds of training, R's scale at the end."""
    torch.manual_seed(seed)
    model = make(setting, split.num_classes)
    optim = OPTIMIZERS[setting.opt]
    optimizer = timm.optim.create_optimizer_v2(
        model, optim.name, lr=lr, weight_decay=optim.weight_decays[0], **optim.kwargs
    )
    handle = timm_decor.attach(model, optimizer) if hasattr(model, "decor_report") else None
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = Batches(split.train, BATCH, SHIFT, seed)
    steps = batches.steps_per_epoch * args.epochs
    begin = time.process_time()
    for epoch in range(args.epochs):
        losses: list[float] = []
        plan = batches.plan(batches.steps_per_epoch)
        for i in range(batches.steps_per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(epoch * batches.steps_per_epoch + i, steps)
            x, y = batches.batch(plan, i)
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.amp):
                loss = F.cross_entropy(model(scaled(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if not all(map(math.isfinite, losses)):
            break
    seconds = time.process_time() - begin
    scale = None if handle is None else handle.scale
    right = correct(model, split, setting)
    return {
        "top1": round(100 * right / len(split.measured), 3),
        "loss": round(mean, 5) if math.isfinite(mean := statistics.mean(losses)) else None,  # None: it diverged
        "seconds": round(seconds, 1),
        "scale": scale,
    }


@torch.no_grad()
def correct(model: nn.Module, split: Split, setting: Setting) -> int:
    """How many of the measured images a model gets right."""
    model.eval()
    right = 0
    for start in range(0, len(split.measured), 500):
        rows = slice(start, start + 500)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.amp):
            output = model(scaled(split.measured.normalized(rows)))
        right += int((output.argmax(1) == split.measured.labels[rows]).sum())
    return right


def scaled(images: torch.Tensor) -> torch.Tensor:
    """Images at the size that is trained."""
    return F.interpolate(images, size=IMG_SIZE, mode="bilinear")


def arm(text: str) -> tuple[str, Make]:
    """`NAME=JSON` as an arm."""
    name, equals, fields = text.partition("=")
    try:
        if not equals or name in ("", PLAIN, DEFAULT_ARM):
            raise ValueError("write NAME=JSON, with the fields of DecorConfig that are not its defaults")
        return name, with_config(DecorConfig.from_json(fields))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with train*.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder of result files, to add to")
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--arm", type=arm, action="append", default=[], metavar="NAME=JSON", help="another arm")
    parser.add_argument("--leave-plain", nargs="*", default=[], metavar="PATTERN", help="an arm each")
    parser.add_argument("--every-layer", action="store_true", help="an arm in which no layer is left plain")
    parser.add_argument("--epochs", type=int, default=2, help="default: 2")
    parser.add_argument("--train-images", type=int, default=25_600, help="default: 25600")
    parser.add_argument("--held-out", type=int, default=5_000, help="training images to measure on (default: 5000)")
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    for name in args.family:
        if name not in FAMILIES:
            raise UserError(f"no setting for family {name!r}{near(name, FAMILIES)}; there are {', '.join(FAMILIES)}")
    arms: dict[str, Make] = {PLAIN: create, DEFAULT_ARM: with_config(DecorConfig()), **dict(args.arm)}
    arms |= {f"{pattern} plain": leaving_plain(pattern) for pattern in args.leave_plain}
    arms |= {EVERY_LAYER: leaving_plain(None)} if args.every_layer else {}
    torch.set_num_threads(1)
    split = load(args.data_dir, args.train_images, args.held_out)
    for family in args.family:
        study(args, family, arms, split)


def study(args: argparse.Namespace, family: str, arms: dict[str, Make], split: Split) -> None:
    """Measure a family, and print its table."""
    setting, rows = FAMILIES[family], Rows(args.out / f"{family}.json", threads=1)
    asked = {key: getattr(args, key) for key in ("epochs", "train_images", "held_out")}
    same = json.loads(
        json.dumps({"model": setting.model, "kwargs": setting.kwargs, "opt": setting.opt, "amp": setting.amp, **asked})
    )

    def run(name: str, lr: float, seed: int) -> float:
        key = {"arm": name, "lr": lr, "seed": seed, "setting": same}
        row = rows.find(key)
        if row is None:
            row = {**key, **train(args, setting, arms[name], lr, seed, split)}
            rows.add(row)
            words = f"{family}, {name}, lr {lr:g}, seed {seed}: top-1 {row['top1']:.2f} %, loss {row['loss']}"
            print(f"{words}, {row['seconds']:.0f} s", file=sys.stderr, flush=True)
        return float(row["top1"])

    best = best_rate(setting.lrs, lambda lr: run(PLAIN, lr, 0))
    scores: dict[str, list[float]] = {name: [] for name in arms}
    for seed in args.seeds:
        for name in arms:
            scores[name].append(run(name, best, seed))
    table = [(name, f"{statistics.mean(s):.2f}", ", ".join(f"{x:.1f}" for x in s)) for name, s in scores.items()]
    print(f"{family}: {setting}, {setting.opt} at {best:g}")
    print(text_table(("arm", "top-1 %", "of each seed"), table), flush=True)


if __name__ == "__main__":
    sys.exit(exit_code("zoo_study.py", main))
