"""What one decorrelated training step costs: time and memory against the same timm model trained plainly.

    python benchmarks/step_cost.py --model resnet18 --img-size 64 128 --batch-size 64 --opt sgd adamw --threads 2 \
        --json step_cost.json --peer-path ../decorbp
    python benchmarks/step_cost.py --device cuda --img-size 64 224 --batch-size 64 256 --precision bfloat16 float32 \
        --compile no yes --channels-last --json step_cost_gpu.json

Arguments with several values give every combination of them. A combination's arms live in one process and train in
alternating blocks, so that a slow minute of the machine meets all of them. Steps that refresh R are timed apart from
the others, one a block; the amortised step is what a run pays on average with a refresh every `--decor-every` steps.
A ratio is the median over blocks of (arm / plain). --peer-path adds the authors' public code, a checkout of
github.com/artcogsys/decorbp (CC BY-NC, not part of this project): it updates every R in every step.

Each finished combination is in the file at once and a rerun skips it. A picture is drawn beside the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_decor
from study.peer import SETTINGS, Peer, describe
from study.pictures import case_text, step_cost_picture
from study.results import session
from timm_decor import DecorConfig, knobs
from timm_decor.errors import UserError, exit_code, first_line
from timm_decor.text import text_table

SMOKE = {"img_size": [32], "batch_size": [16], "blocks": 2, "steps_per_block": 2}


@dataclass(frozen=True)
class Case:
    """One combination."""

    model: str
    img_size: int
    batch_size: int
    opt: str
    precision: str
    compile: bool
    channels_last: bool


class Arm:
    """One model with its optimizer and its (fixed, random) batch.

    Args:
        case: the combination.
        args: the command line.
        decor: how to decorrelate; None for the plain model and the peer.
        peer: the authors' code, to be this arm.
    """

    def __init__(self, case: Case, args: argparse.Namespace, decor: DecorConfig | None, peer: Peer | None) -> None:
        self.device = torch.device(args.device)
        self.amp = case.precision == "bfloat16"
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        held = self._reset_memory()
        torch.manual_seed(0)  # the same weights and batch for all arms
        is_fixed = timm.models.get_pretrained_cfg_value(case.model, "fixed_input_size")
        img_size = case.img_size if is_fixed else None  # timm drops None: most convolutional models take any size
        model: nn.Module = timm.create_model(case.model, num_classes=args.num_classes, img_size=img_size)
        if decor:
            timm_decor.decorrelate(model, decor)
        if peer:
            model = peer.convert(model)
        model.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        size = (case.batch_size, 3, case.img_size, case.img_size)
        self.images = torch.randn(size, device=self.device).contiguous(memory_format=layout)
        self.labels = torch.randint(args.num_classes, (case.batch_size,), device=self.device)
        self.optimizer = timm.optim.create_optimizer_v2(model, opt=case.opt, lr=args.lr, momentum=0.9)
        if decor:
            timm_decor.attach(model, self.optimizer)
        self.peer, self.peer_layers = peer, peer.layers(model) if peer else []
        model.train()
        self.plain_model = model
        self.model = torch.compile(model) if case.compile else model
        # The first step allocates the optimizer's state and, where there is one, refreshes R: the peak is in it, and a
        # second one sees all state in place.
        self.steps(1 + (decor.every if decor else 1))
        self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - held if self.device.type == "cuda" else None

    def steps(self, count: int) -> float:
        """Train `count` steps; returns their seconds."""
        start = self._now()
        for _ in range(count):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
                # the authors' linear layer gives (batch, 1, classes)
                loss = F.cross_entropy(self.model(self.images).flatten(1), self.labels)
            loss.backward()
            self.optimizer.step()
            if self.peer:
                self.peer.update(self.peer_layers)
            self.optimizer.zero_grad()
        seconds = self._now() - start
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()}: such steps measure nothing; lower --lr")
        return seconds

    def held_bytes(self) -> int:
        """Weights, buffers and optimizer state: momentum and the like, and decorrelation's (R, statistics, W)."""
        tensors = [*self.plain_model.parameters(), *self.plain_model.buffers()]
        tensors += _tensors(self.optimizer.state_dict())
        return sum(t.numel() * t.element_size() for t in tensors)

    def check_refreshes(self, wanted: int) -> None:
        """Refuse a timing that would be a fiction: R was left alone, or refreshed in other steps than those timed."""
        layers = self.optimizer.state_dict()["timm_decor"]["layers"].values()
        skips, most = sum(layer["skips"] for layer in layers), max(layer["refreshes"] for layer in layers)
        if skips or most != wanted:
            raise RuntimeError(f"{skips} refreshes were skipped, and a layer had {most} of {wanted} that were timed")

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


def measure(case: Case, args: argparse.Namespace, config: DecorConfig, peer: Peer | None) -> dict[str, Any]:
    """Time a combination's arms in alternating blocks.

    A block is one step that is not timed (the caches hold another arm's data then), `steps_per_block` ordinary steps
    timed together, and for the decorrelated arm one step with a refresh. The peer, whose steps are all alike and many
    times as long, gets one timed step.

    Returns:
        The result: seconds of every block, and the medians made of them.
    """
    length = args.steps_per_block + 2
    torch._dynamo.reset()  # one case's compiled graphs do not weigh on the next
    plain = Arm(case, args, None, None)
    decor = Arm(case, args, dataclasses.replace(config, every=length), None)  # has just done a step with a refresh
    theirs, note = _peer_arm(case, args, peer)
    arms = [arm for arm in (plain, decor, theirs) if arm]
    blocks = []
    for index in range(args.blocks):
        block: dict[str, float] = {}
        for arm in arms if index % 2 == 0 else reversed(arms):
            arm.steps(1)
            if arm is theirs:
                block["peer"] = arm.steps(1)
                continue
            seconds = arm.steps(args.steps_per_block) / args.steps_per_block
            if arm is plain:
                block["plain"] = seconds
            else:
                block["ordinary"], block["refresh"] = seconds, arm.steps(1)
        block["amortised"] = block["ordinary"] + (block["refresh"] - block["ordinary"]) / config.every
        blocks.append(block)
    decor.check_refreshes(2 + args.blocks)
    kinds = [kind for kind in ("ordinary", "refresh", "amortised", "peer") if kind in blocks[0]]
    named = dict(zip(("plain", "decorrelated", "peer"), arms, strict=False))
    return {
        "case": dataclasses.asdict(case),
        "ratio": {kind: statistics.median(b[kind] / b["plain"] for b in blocks) for kind in kinds},
        "seconds": {kind: statistics.median(b[kind] for b in blocks) for kind in ("plain", *kinds)},
        "peak_bytes": {name: arm.peak_bytes for name, arm in named.items()},
        "held_bytes": {name: arm.held_bytes() for name, arm in named.items()},
        "peer": note,
        "blocks": blocks,
    }


def _peer_arm(case: Case, args: argparse.Namespace, peer: Peer | None) -> tuple[Arm | None, str | None]:
    """The authors' code as an arm, and which layers it decorrelates or why it does not run."""
    if peer is None:
        return None, None
    try:
        arm = Arm(case, args, None, peer)
    except (RuntimeError, TypeError, UserError) as error:  # it was not written for autocast, or for this model
        return None, f"does not run: {first_line(error)}"
    return arm, f"decorrelates {describe(arm.peer_layers)}"


def open_file(args: argparse.Namespace, config: DecorConfig) -> dict[str, Any]:
    """The result file: what a reader needs to repeat it, and the combinations that are done.

    Raises:
        UserError: there is one, of another configuration, code version or machine, whose ratios do not belong here.
    """
    made_by = session(torch.device(args.device), args.threads, 1)
    head = {
        **made_by,
        "config": config.to_dict(),
        "peer_settings": SETTINGS if args.peer_path else None,
        "steps_per_block": args.steps_per_block,
    }
    if args.json and args.json.is_file():
        old = json.loads(args.json.read_text(encoding="utf-8"))
        for key in ("config", "versions", "machine", "peer_settings", "steps_per_block"):
            if old.get(key) != head[key]:
                raise UserError(f"{args.json} was measured with another {key}: name another --json, or remove it")
        return {**old, "command": head["command"], "commit": head["commit"]}
    return {**head, "results": []}


def table(results: list[dict[str, Any]]) -> str:
    """The results for people."""
    rows = []
    for result in results:
        ratio, seconds, held, name = result["ratio"], result["seconds"], result["held_bytes"], case_text(result["case"])
        bytes_ = result["peak_bytes"] if result["peak_bytes"]["plain"] is not None else held
        for arm, kind in (("plain", None), ("decorrelated", "amortised"), ("peer", "peer")):
            if arm in held:
                time_ = f"{seconds[kind or 'plain'] * 1e3:.1f}"
                rows.append((name, arm, time_, f"{ratio[kind]:.3f}x" if kind else "1", f"{bytes_[arm] / 2**20:.1f}"))
        if result["peer"]:
            rows.append((name, f"peer {result['peer']}", "", "", ""))
    return text_table(("combination", "arm", "ms a step", "ratio", "MiB"), rows)


def build_parser() -> argparse.ArgumentParser:
    """The command line; decorrelation's knobs come from DecorConfig's fields."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["resnet18"], help="timm models, by their plain names")
    parser.add_argument("--img-size", type=int, nargs="+", default=[64], help="height and width in pixels")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64], help="images a step")
    parser.add_argument("--opt", nargs="+", default=["sgd"], help="timm optimizers")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="autocast")
    parser.add_argument("--compile", nargs="+", choices=("no", "yes"), default=["no"], help="torch.compile the models")
    parser.add_argument("--channels-last", action="store_true", help="channels-last memory layout")
    parser.add_argument("--num-classes", type=int, default=1000, help="classes of the head")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate: small, the labels are random")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of each arm")
    parser.add_argument("--steps-per-block", type=int, default=5, help="steps timed together; refreshes come on top")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--peer-path", type=Path, metavar="FOLDER", help="a checkout of github.com/artcogsys/decorbp")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there, and a picture beside it")
    parser.add_argument("--smoke", action="store_true", help=f"a seconds-long check that it runs: {SMOKE}")
    group = parser.add_argument_group("decorrelation (its defaults are DecorConfig's)")
    knobs.add_arguments(group)
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    if args.smoke:
        vars(args).update(SMOKE)
    config = knobs.from_arguments(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    peer = Peer(args.peer_path) if args.peer_path else None
    record = open_file(args, config)
    values = (args.model, args.img_size, args.batch_size, args.opt, args.precision)
    for (model, img_size, batch_size, opt, precision), compiled in itertools.product(
        itertools.product(*values), args.compile
    ):
        case = Case(model, img_size, batch_size, opt, precision, compiled == "yes", args.channels_last)
        if any(result["case"] == dataclasses.asdict(case) for result in record["results"]):
            continue
        record["results"].append(measure(case, args, config, peer))
        print(table(record["results"][-1:]), flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record["results"]))
    if args.json:
        step_cost_picture(record, args.json.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(exit_code("step_cost.py", main))
