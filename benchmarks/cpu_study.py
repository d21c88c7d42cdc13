"""Plain against decorrelated training of a small BatchNorm ResNet on CIFAR-10: accuracy at equal epochs, and seconds.

The setting that DecorConfig's defaults were chosen in: 25 000 training images, batch 128, flips, a linear warm-up over
a tenth of the steps and a linear decay; sized for one CPU core. Learning rates are tuned on an equal grid against
10 000 training images that are not trained on; the test images are only reported on.

    python benchmarks/cpu_study.py tune --data-dir ../shared/data/cifar10 --json benchmarks/results/cpu_study_tune.json
    python benchmarks/cpu_study.py report --data-dir ../shared/data/cifar10 --json benchmarks/results/cpu_study.json \
        --arm plain:0.2:3 --arm plain:0.2:6 --arm decor:0.8:3 --seeds 3

An arm is `plain|decor:LEARNING_RATE:EPOCHS`. The arms of one seed train in turns, an epoch each, so that a noisy
machine slows all of them alike; seconds are training seconds, refreshes included and evaluation excluded.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import timm
import timm.optim
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import timm_decor
from timm_decor.table import text_table

BATCH = 128
TRAIN_IMAGES = 25_000
HELD_OUT = 10_000
GRID = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_chs != out_chs:
            self.shortcut = nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, stride, bias=False), nn.BatchNorm2d(out_chs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


def small_resnet(num_classes: int) -> nn.Sequential:
    """8 convolutions, 0.3 M parameters, 12 MMACs at 32 px."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes),
    )  # fmt: skip


@dataclass
class Data:
    """Images as normalised float32 (N, 3, 32, 32), labels as int64 (N,)."""

    x: Tensor
    y: Tensor

    @classmethod
    def read(cls, path: Path) -> Data:
        table = pq.read_table(path)
        images = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in table["image"].to_pylist()]
        pixels = torch.stack([torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8) for im in images])
        x = pixels.view(-1, *images[0].size[::-1], 3).permute(0, 3, 1, 2).float() / 255
        mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.243, 0.261])
        return cls((x - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.tensor(table["label"].to_pylist()))

    def __getitem__(self, index: Tensor | slice) -> Data:
        return Data(self.x[index], self.y[index])


@dataclass
class Arm:
    """One training run, advanced an epoch at a time; `result` is what the JSON file holds of it."""

    kind: str
    lr: float
    epochs: int
    seed: int
    opt: str
    config: timm_decor.DecorConfig
    accuracy: list[float] = field(default_factory=list)  # %, after each epoch
    train_loss: list[float] = field(default_factory=list)  # mean of each epoch
    seconds: list[float] = field(default_factory=list)  # training seconds of each epoch

    def start(self, train: Data, num_classes: int) -> None:
        """Make the model (the same initial weights for every arm of a seed) and its optimizer."""
        torch.manual_seed(self.seed)
        self.model: nn.Module = small_resnet(num_classes)
        if self.kind == "decor":
            timm_decor.decorrelate(self.model, self.config)
        self.optimizer = timm.optim.create_optimizer_v2(
            self.model, self.opt, lr=self.lr, momentum=0.9, weight_decay=5e-4, filter_bias_and_bn=False
        )
        if self.kind == "decor":
            timm_decor.attach(self.model, self.optimizer)
        self.order = torch.Generator().manual_seed(self.seed)
        self.steps_per_epoch = len(train.x) // BATCH

    def train_epoch(self, train: Data) -> None:
        """One pass over the training images."""
        self.model.train()
        total, begin = 0.0, time.perf_counter()
        total_steps = self.epochs * self.steps_per_epoch
        order = torch.randperm(len(train.x), generator=self.order)
        for i in range(self.steps_per_epoch):
            step = len(self.accuracy) * self.steps_per_epoch + i
            share = min(1.0, (step + 1) / (0.1 * total_steps)) * (total_steps - step) / total_steps
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * share
            batch = train[order[i * BATCH : (i + 1) * BATCH]]
            flip = torch.rand((), generator=self.order) < 0.5
            loss = F.cross_entropy(self.model(batch.x.flip(3) if flip else batch.x), batch.y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        self.seconds.append(time.perf_counter() - begin)
        self.train_loss.append(total / self.steps_per_epoch)

    @torch.no_grad()
    def evaluate(self, test: Data) -> None:
        """Top-1 accuracy in %."""
        self.model.eval()
        right = 0
        for start in range(0, len(test.x), 1000):
            part = test[start : start + 1000]
            right += int((self.model(part.x).argmax(1) == part.y).sum())
        self.accuracy.append(100 * right / len(test.x))

    @property
    def name(self) -> str:
        return f"{self.kind} {self.opt} lr {self.lr:g}, {self.epochs} epochs"

    def result(self) -> dict[str, object]:
        values = asdict(self)
        if self.kind == "plain":
            del values["config"]
        return values


def train_in_turns(arms: list[Arm], train: Data, test: Data) -> None:
    """Train every arm to its end, an epoch each in turn."""
    num_classes = int(train.y.max()) + 1
    for arm in arms:
        arm.start(train, num_classes)
    while unfinished := [arm for arm in arms if len(arm.accuracy) < arm.epochs]:
        for arm in unfinished:
            arm.train_epoch(train)
            arm.evaluate(test)
            print(
                f"seed {arm.seed}, {arm.name}: epoch {len(arm.accuracy)}, loss {arm.train_loss[-1]:.3f}, "
                f"top-1 {arm.accuracy[-1]:.2f} %, {arm.seconds[-1]:.1f} s",
                file=sys.stderr,
                flush=True,
            )


def summary(arms: list[Arm]) -> str:
    """One row an arm: final accuracy of each seed, their mean, the last epoch's loss, seconds."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(arm.name, []).append(arm)
    rows = []
    for name, runs in groups.items():
        final = [run.accuracy[-1] for run in runs]
        seconds = statistics.median(sum(run.seconds) for run in runs)
        loss = statistics.mean(run.train_loss[-1] for run in runs)
        each = ", ".join(f"{value:.2f}" for value in final)
        rows.append((name, f"{statistics.mean(final):.2f}", each, f"{loss:.3f}", f"{seconds:.1f}"))
    return text_table(("arm", "top-1 %", "of each seed", "train loss", "seconds"), rows)


def parse_arm(text: str) -> tuple[str, float, int]:
    """`decor:0.8:3` as (kind, learning rate, epochs)."""
    try:
        kind, lr, epochs = text.split(":")
        if kind not in ("plain", "decor"):
            raise ValueError
        return kind, float(lr), int(epochs)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not plain|decor:LEARNING_RATE:EPOCHS") from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tune", "report"), help="tune on held-out training images, or report on test")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every run there")
    parser.add_argument("--opt", default="sgd", help="timm optimizer (default: sgd)")
    parser.add_argument("--arm", type=parse_arm, action="append", metavar="KIND:LR:EPOCHS", help="an arm; repeatable")
    parser.add_argument("--grid", type=float, nargs="+", default=GRID, help="tune: learning rates of both kinds")
    parser.add_argument("--epochs", type=int, default=3, help="tune: epochs (default: 3)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--train-images", type=int, default=TRAIN_IMAGES, help="images to train on")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="tune: training images to measure on")
    parser.add_argument("--decor", default="{}", metavar="JSON", help="DecorConfig fields that are not the defaults")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    everything = Data.read(args.data_dir / "train.parquet")
    shuffled = torch.randperm(len(everything.x), generator=torch.Generator().manual_seed(0))
    train = everything[shuffled[: args.train_images]]
    test = everything[shuffled[-args.held_out :]] if args.stage == "tune" else Data.read(args.data_dir / "test.parquet")
    if args.stage == "tune" and args.train_images + args.held_out > len(everything.x):
        parser.error(f"--train-images and --held-out take more than the {len(everything.x)} training images there are")
    config = timm_decor.DecorConfig.from_dict(json.loads(args.decor))
    grid = [(kind, lr, args.epochs) for kind in ("plain", "decor") for lr in args.grid]
    chosen = args.arm or (grid if args.stage == "tune" else parser.error("report needs --arm"))

    arms: list[Arm] = []
    for seed in range(args.seeds):
        arms += (turn := [Arm(kind, lr, epochs, seed, args.opt, config) for kind, lr, epochs in chosen])
        train_in_turns(turn, train, test)
        if args.json:
            write(args, arms)
    print(summary(arms))


def write(args: argparse.Namespace, arms: list[Arm]) -> None:
    """The result file: how it was made, and every run."""
    shown = {"data_dir": args.data_dir.name, "json": args.json.name}
    record = {
        "arguments": {key: shown.get(key, value) for key, value in vars(args).items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "timm_decor": timm_decor.__version__,
        },
        "machine": f"{platform.machine()} CPU, {args.threads} thread(s)",
        "runs": [arm.result() for arm in arms],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
