"""What one decorrelated training step costs: time and memory against the same timm model trained plainly.

    python benchmarks/step_cost.py --model resnet18 --img-size 64 --batch-size 64 --threads 2 --json step_cost.json

Both models live in one process and train in alternating blocks, so that a slow minute of the machine meets both. Steps
that refresh R are timed apart from the others, one a block; the amortised step is what a run pays on average with a
refresh every `--decor-every` steps. The result is the median over blocks of (decorrelated / plain).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_decor
from timm_decor import DecorConfig
from timm_decor.training.runtime import cpu_name, versions

SMOKE = {"img_size": 64, "batch_size": 8, "blocks": 2, "steps_per_block": 2}


class Arm:
    """One model with its optimizer and its (fixed, random) batch.

    Args:
        args: the command line.
        decor: how to decorrelate; None for the plain model.
    """

    def __init__(self, args: argparse.Namespace, decor: DecorConfig | None) -> None:
        self.device = torch.device(args.device)
        self.amp = args.amp
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        held = self._reset_memory()
        torch.manual_seed(0)  # the same weights and batch for both arms
        is_fixed = timm.models.get_pretrained_cfg_value(args.model, "fixed_input_size")
        img_size = args.img_size if is_fixed else None  # timm drops None: most convolutional models take any size
        model: nn.Module = timm.create_model(args.model, num_classes=args.num_classes, img_size=img_size)
        if decor:
            timm_decor.decorrelate(model, decor)
        model.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        size = (args.batch_size, 3, args.img_size, args.img_size)
        self.images = torch.randn(size, device=self.device).contiguous(memory_format=layout)
        self.labels = torch.randint(args.num_classes, (args.batch_size,), device=self.device)
        self.optimizer = timm.optim.create_optimizer_v2(model, opt=args.opt, lr=args.lr, momentum=0.9)
        if decor:
            timm_decor.attach(model, self.optimizer)
        model.train()
        self.model = torch.compile(model) if args.compile else model
        self.loss = math.nan
        # The first step allocates the optimizer's state and, where there is one, refreshes R: the peak is in it, and a
        # second one sees all state in place.
        self.steps(1 + (decor.every if decor else 1))
        self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - held if self.device.type == "cuda" else None

    def steps(self, count: int) -> float:
        """Train `count` steps; returns their seconds."""
        start = self._now()
        for _ in range(count):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
                loss = F.cross_entropy(self.model(self.images), self.labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        seconds = self._now() - start
        self.loss = loss.item()
        if not math.isfinite(self.loss):
            raise RuntimeError(f"the loss is {self.loss}: such steps measure nothing; lower --lr")
        return seconds

    def state_bytes(self) -> int:
        """Memory of the optimizer's state: momentum and the like, and decorrelation's (R, statistics, W)."""
        return sum(t.numel() * t.element_size() for t in _tensors(self.optimizer.state_dict()))

    def skipped_refreshes(self) -> int:
        """Refreshes that left R alone, which would make the timing a fiction."""
        layers = self.optimizer.state_dict()["timm_decor"]["layers"]
        return sum(layer["skips"] for layer in layers.values())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _reset_memory(self) -> int:
        """Bytes that are allocated before this arm exists."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(branch)


def measure(args: argparse.Namespace, config: DecorConfig) -> dict[str, Any]:
    """Time both arms in alternating blocks.

    A block is one step that is not timed (the caches hold the other arm's data then), `steps_per_block` ordinary steps
    timed together, and for the decorrelated arm one step with a refresh.

    Returns:
        The result: seconds of every block, and the medians made of them.
    """
    length = args.steps_per_block + 2
    plain = Arm(args, None)
    decor = Arm(args, dataclasses.replace(config, every=length))  # has just done a step with a refresh
    blocks = []
    for index in range(args.blocks):
        block: dict[str, float] = {}
        for arm in (plain, decor) if index % 2 == 0 else (decor, plain):
            arm.steps(1)
            seconds = arm.steps(args.steps_per_block) / args.steps_per_block
            if arm is plain:
                block["plain"] = seconds
            else:
                block["ordinary"], block["refresh"] = seconds, arm.steps(1)
        block["amortised"] = block["ordinary"] + (block["refresh"] - block["ordinary"]) / config.every
        blocks.append(block)
    if skipped := decor.skipped_refreshes():
        raise RuntimeError(f"{skipped} refreshes were skipped: the timing would be too good")
    kinds = ("ordinary", "refresh", "amortised")
    return {
        "ratio": {kind: statistics.median(b[kind] / b["plain"] for b in blocks) for kind in kinds},
        "seconds": {kind: statistics.median(b[kind] for b in blocks) for kind in ("plain", *kinds)},
        "peak_bytes": {"plain": plain.peak_bytes, "decorrelated": decor.peak_bytes},
        "optimizer_state_bytes": {"plain": plain.state_bytes(), "decorrelated": decor.state_bytes()},
        "blocks": blocks,
    }


def describe_run(args: argparse.Namespace, config: DecorConfig) -> dict[str, Any]:
    """What a reader needs to repeat the measurement."""
    is_cuda = torch.device(args.device).type == "cuda"
    return {
        "command": " ".join(["python", *sys.argv]),
        "arguments": vars(args),
        "config": config.to_dict(),
        "versions": versions(),
        "machine": {
            "processor": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name(args.device) if is_cuda else None,
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""

    def row(name: str, seconds: float, ratio: float | None) -> str:
        return f"{name:<34}{seconds * 1e3:>10.1f} ms" + (f"{ratio:>9.3f}x" if ratio else "")

    def memory(name: str, sizes: dict[str, int]) -> str:
        return f"{name:<34}{sizes['plain'] / 2**20:>10.1f} MiB -> {sizes['decorrelated'] / 2**20:.1f} MiB"

    seconds, ratio, every = result["seconds"], result["ratio"], result["config"]["every"]
    lines = [
        row("plain step", seconds["plain"], None),
        row("decorrelated, no refresh", seconds["ordinary"], ratio["ordinary"]),
        row("decorrelated, with a refresh", seconds["refresh"], ratio["refresh"]),
        row(f"decorrelated, a refresh every {every}", seconds["amortised"], ratio["amortised"]),
        memory("optimizer state", result["optimizer_state_bytes"]),
    ]
    if result["peak_bytes"]["plain"] is not None:
        lines.append(memory("peak memory", result["peak_bytes"]))
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The command line; decorrelation's knobs come from DecorConfig's fields."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="resnet18", help="timm model, by its plain name")
    parser.add_argument("--img-size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step")
    parser.add_argument("--num-classes", type=int, default=1000, help="classes of the head")
    parser.add_argument("--opt", default="sgd", help="timm optimizer")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate: small, the labels are random")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of each arm")
    parser.add_argument("--steps-per-block", type=int, default=5, help="steps timed together; refreshes come on top")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--channels-last", action="store_true", help="channels-last memory layout")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result with every block there")
    parser.add_argument("--smoke", action="store_true", help=f"a seconds-long check that it runs: {SMOKE}")
    group = parser.add_argument_group("decorrelation")
    for spec in dataclasses.fields(DecorConfig):
        kind: Any = type(spec.default)
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        flag = f"--decor-{spec.name.removeprefix('decor_').replace('_', '-')}"
        group.add_argument(flag, dest=f"knob_{spec.name}", default=spec.default, help=spec.metadata["help"], **how)
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON; returns the result."""
    args = build_parser().parse_args(argv)
    if args.smoke:
        vars(args).update(SMOKE)
    knobs = {name.removeprefix("knob_"): vars(args).pop(name) for name in list(vars(args)) if name.startswith("knob_")}
    config = DecorConfig(**knobs)
    if args.threads:
        torch.set_num_threads(args.threads)
    result = describe_run(args, config) | measure(args, config)
    print(table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
