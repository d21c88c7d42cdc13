"""What to leave plain in a family: a timm model on CIFAR-10, plain, decorrelated, and with layers left out.

    python benchmarks/zoo_study.py --data-dir ../shared/data/cifar10 --model mobilenetv3_small_075 \
        --lr 8e-3 1.6e-2 --without '*.se.*' --json benchmarks/results/zoo/mobilenetv3.json

Short runs on one CPU core: 12 800 training images, scaled up, a linear warm-up over a tenth of the steps and a linear
decay; top-1 on 4 000 training images that are not trained on. Arms: the plain model; the model with every layer
decorrelated; without the layers of each --without (wildcards over names; `depthwise` stands for depthwise convolutions;
a comma joins two). Each arm sees every learning rate.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import timm
import timm.optim
import torch
import torch.nn.functional as F
from torch import nn

import timm_decor
from study.images import Images, Split, load
from timm_decor.errors import exit_code
from timm_decor.text import text_table

BATCH = 128
EVERY_LAYER = "every layer"


def is_left_out(pattern: str, name: str, layer: nn.Module) -> bool:
    """Whether one of a comma-joined list of wildcards stands for this layer."""
    for part in pattern.split(","):
        if part == "depthwise":
            if isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels:
                return True
        elif fnmatch.fnmatch(name, part):
            return True
    return False


def train(args: argparse.Namespace, arm: str, lr: float, seed: int, split: Split) -> dict[str, object]:
    """One run: top-1 in %, mean loss of the last epoch, CPU seconds of training."""
    torch.manual_seed(seed)
    model = timm.create_model(args.model, num_classes=split.num_classes, **args.model_kwargs)
    if arm != "plain":
        without = arm.removeprefix("without ") if arm != EVERY_LAYER else ""
        config = timm_decor.DecorConfig.from_dict(args.decor)
        timm_decor.decorrelate(model, config, lambda name, layer: not is_left_out(without, name, layer))
    optimizer = timm.optim.create_optimizer_v2(model, args.opt, lr=lr, momentum=0.9, weight_decay=args.weight_decay)
    if arm != "plain":
        timm_decor.attach(model, optimizer)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(split.train) // BATCH
    steps = per_epoch * args.epochs
    begin = time.process_time()
    losses: list[float] = []
    for step in range(steps):
        if step % per_epoch == 0:
            order, losses = torch.randperm(len(split.train), generator=generator), []
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / (0.1 * steps)) * (steps - step) / steps
        rows = order[step % per_epoch * BATCH :][:BATCH]
        x = scaled(split.train, rows, args.img_size)
        x = x.flip(3) if torch.rand((), generator=generator) < 0.5 else x
        loss = F.cross_entropy(model(x), split.train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = time.process_time() - begin
    model.eval()
    right, held_out = 0, split.measured
    with torch.no_grad():
        for rows in torch.arange(len(held_out)).split(500):
            right += int((model(scaled(held_out, rows, args.img_size)).argmax(1) == held_out.labels[rows]).sum())
    top1 = 100 * right / len(held_out)
    result = {"arm": arm, "lr": lr, "seed": seed, "top1": top1, "loss": statistics.mean(losses), "seconds": seconds}
    print(f"{arm}, lr {lr:g}, seed {seed}: top-1 {top1:.2f} %, {seconds:.0f} s", file=sys.stderr, flush=True)
    return result


def scaled(images: Images, rows: torch.Tensor, size: int) -> torch.Tensor:
    """Normalised images at another size."""
    return F.interpolate(images.normalized(rows), size=size, mode="bilinear")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with train.parquet")
    parser.add_argument("--model", required=True, help="a timm model")
    parser.add_argument("--model-kwargs", type=json.loads, default={}, metavar="JSON", help="for the model")
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="PATTERN", help="layers to leave plain: an arm each"
    )
    parser.add_argument("--lr", type=float, nargs="+", required=True, help="learning rates, each for every arm")
    parser.add_argument("--opt", default="adamw", help="timm optimizer (default: adamw)")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="default: 0.05")
    parser.add_argument("--img-size", type=int, default=64, help="pixels to scale the images to (default: 64)")
    parser.add_argument("--epochs", type=int, default=4, help="default: 4")
    parser.add_argument("--train-images", type=int, default=12_800, help="default: 12800")
    parser.add_argument("--held-out", type=int, default=4_000, help="training images to measure on (default: 4000)")
    parser.add_argument("--seeds", type=int, default=1, help="default: 1")
    parser.add_argument("--decor", type=json.loads, default={}, metavar="JSON", help="DecorConfig's other fields")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every run there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    split = load(args.data_dir, args.train_images, args.held_out)
    runs: list[dict[str, object]] = []
    for seed in range(args.seeds):
        for arm in ("plain", EVERY_LAYER, *(f"without {pattern}" for pattern in args.without)):
            for lr in args.lr:
                runs.append(train(args, arm, lr, seed, split))
                if args.json:
                    write(args, runs)
    rows = []
    for arm, lr in dict.fromkeys((str(run["arm"]), float(str(run["lr"]))) for run in runs):
        scores = [float(str(run["top1"])) for run in runs if (run["arm"], run["lr"]) == (arm, lr)]
        each = ", ".join(f"{score:.1f}" for score in scores)
        rows.append((arm, f"{lr:g}", f"{statistics.mean(scores):.1f}", each))
    print(text_table(("arm", "lr", "top-1 %", "of each seed"), rows))


def write(args: argparse.Namespace, runs: list[dict[str, object]]) -> None:
    """The result file: how it was made, and every run."""
    shown = {"data_dir": args.data_dir.name, "json": args.json.name}
    record = {
        "arguments": {key: shown.get(key, value) for key, value in vars(args).items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
        | {"timm_decor": timm_decor.__version__},
        "machine": f"{platform.machine()} CPU, 1 thread",
        "runs": runs,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code("zoo_study.py", main))
