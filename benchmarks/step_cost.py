"""What one decorrelated training step costs: time and memory against the same timm model trained plainly.

    python benchmarks/step_cost.py --model resnet18 --img-size 64 128 --batch-size 64 --opt sgd adamw --threads 2 \
        --json step_cost.json --peer-path ../decorbp
    python benchmarks/step_cost.py --device cuda --img-size 64 224 --batch-size 64 256 --precision bfloat16 float32 \
        --compile no yes --channels-last --json step_cost_gpu.json

Arguments with several values give every combination of them. A combination's arms live in one process and train in
alternating blocks, so that a slow minute of the machine meets all of them. Steps that refresh R, and those behind them,
are timed apart from the others, one a block; the amortised step is what a run pays on average with a refresh every
`--decor-every` steps.
A ratio is the median over blocks of (arm / plain). --peer-path adds the authors' public code, a checkout of
github.com/artcogsys/decorbp (CC BY-NC, not part of this project): it updates every R in every step. --baseline-path
adds the engine of another checkout of this project, in a process of its own that takes its turns with the others; its
knobs are its own defaults, with `--decor-every` of this run and the --decor-* arguments that are given and it knows.

Memory is held (weights, buffers, optimizer state) and at its peak within the update of a step, the highest of all steps
without a refresh: gradients and what the step itself makes come on top; on a CPU what an operation needs inside of
itself is not seen. A refresh has a peak of its own.

Each finished combination is in the file at once and a rerun skips it. A picture is drawn beside the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from study.arm import PERIOD_MORE, Arm, Case, Options, Worker, decorrelated_block
from study.peer import SETTINGS, Peer, describe
from study.pictures import case_text, step_cost_picture
from study.results import commit_of, replace_text, session
from timm_decor import DecorConfig, knobs
from timm_decor.errors import UserError, exit_code, first_line
from timm_decor.text import text_table
from timm_decor.training.args import decor_config

SMOKE = {"img_size": [32], "batch_size": [16], "blocks": 2, "steps_per_block": 2}


def measure(case: Case, args: argparse.Namespace, config: DecorConfig, peer: Peer | None) -> dict[str, Any]:
    """Time a combination's arms in alternating blocks.

    A block is one step that is not timed (the caches hold another arm's data then) and `steps_per_block` steps timed
    together; the decorrelated arm's is `decorrelated_block`. The peer, whose steps are all alike and many times as
    long, gets one timed step.

    Returns:
        The result: seconds of every block, and the medians made of them.
    """
    length = args.steps_per_block + PERIOD_MORE
    torch._dynamo.reset()  # one case's compiled graphs do not weigh on the next
    options = Options(args.device, args.num_classes, args.lr, args.threads)
    # The worker first: what it refuses is said at once. While it is not asked for steps it waits.
    asked = {**args.asked_knobs, "every": length}
    baseline = Worker(args.baseline_path, case, options, asked) if args.baseline_path else None
    try:
        return _measure(case, args, config, options, baseline, peer)
    finally:
        if baseline:
            baseline.close()


def _measure(
    case: Case,
    args: argparse.Namespace,
    config: DecorConfig,
    options: Options,
    baseline: Worker | None,
    peer: Peer | None,
) -> dict[str, Any]:
    plain = Arm(case, options, None)
    decor = Arm(case, options, {**config.to_dict(), "every": args.steps_per_block + PERIOD_MORE})
    theirs, note = _peer_arm(case, options, peer)
    every: dict[str, Any] = {"plain": plain, "decorrelated": decor, "baseline": baseline, "peer": theirs}
    named = {name: arm for name, arm in every.items() if arm}
    arms = list(named.values())
    decorrelated = [arm for arm in (decor, baseline) if arm]
    for each in decorrelated:  # has just done a step with a refresh; a block begins behind the next
        each.steps(1)
    blocks = []
    for index in range(args.blocks):
        block: dict[str, float] = {}
        for arm in arms if index % 2 == 0 else reversed(arms):
            if arm in decorrelated:
                prefix = "baseline " if arm is baseline else ""
                times = decorrelated_block(arm.steps, args.steps_per_block, config.every)
                block |= {f"{prefix}{kind}": seconds for kind, seconds in times.items()}
                continue
            arm.steps(1)
            if theirs is not None and arm is theirs:
                block["peer"] = theirs.steps(1)
            else:
                block["plain"] = arm.steps(args.steps_per_block) / args.steps_per_block
        if baseline:
            block["baseline"] = block["baseline amortised"]
        blocks.append(block)
    for checked in decorrelated:
        checked.check_refreshes(2 + args.blocks)
    kinds = [
        kind for kind in ("ordinary", "refresh", "measuring", "amortised", "baseline", "peer") if kind in blocks[0]
    ]
    return {
        "case": dataclasses.asdict(case),
        "ratio": {kind: statistics.median(b[kind] / b["plain"] for b in blocks) for kind in kinds},
        "seconds": {kind: statistics.median(b[kind] for b in blocks) for kind in ("plain", *kinds)},
        "peak_bytes": {name: arm.peak_bytes for name, arm in named.items()},
        "refresh_peak_bytes": {name: arm.refresh_peak_bytes for name, arm in named.items()},
        "held_bytes": {name: arm.held_bytes() for name, arm in named.items()},
        "baseline_config": {**baseline.config, "every": config.every} if baseline else None,
        "peer": note,
        "blocks": blocks,
    }


def _peer_arm(case: Case, options: Options, peer: Peer | None) -> tuple[Arm | None, str | None]:
    """The authors' code as an arm, and which layers it decorrelates or why it does not run."""
    if peer is None:
        return None, None
    try:
        arm = Arm(case, options, None, peer)
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
        "baseline": commit_of(args.baseline_path) if args.baseline_path else None,
        "steps_per_block": args.steps_per_block,
    }
    if args.json and args.json.is_file():
        old = json.loads(args.json.read_text(encoding="utf-8"))
        for key in ("config", "versions", "machine", "peer_settings", "baseline", "steps_per_block"):
            if _of_the_device(key, old.get(key)) != _of_the_device(key, head[key]):
                raise UserError(f"{args.json} was measured with another {key}: name another --json, or remove it")
        if any("measuring" not in result["ratio"] for result in old["results"]):
            raise UserError(f"{args.json} is of before the step behind a refresh was timed: name another --json")
        return {**old, "command": head["command"], "commit": head["commit"]}
    return {**head, "results": []}


def _of_the_device(key: str, value: Any) -> Any:
    """Of a machine with an accelerator the accelerator alone: a host is lent by the hour, and another one goes on."""
    return value["accelerator"] if key == "machine" and value and value.get("accelerator") else value


def table(results: list[dict[str, Any]]) -> str:
    """The results for people."""
    rows = []
    for result in results:
        ratio, seconds, held, name = result["ratio"], result["seconds"], result["held_bytes"], case_text(result["case"])
        peak = result["peak_bytes"]
        for arm, kind in (("plain", None), ("decorrelated", "amortised"), ("baseline", "baseline"), ("peer", "peer")):
            if arm in held:
                time_ = f"{seconds[kind or 'plain'] * 1e3:.1f}"
                memory = (f"{held[arm] / 2**20:.1f}", f"{peak[arm] / 2**20:.1f}" if peak[arm] else "-")
                rows.append((name, arm, time_, f"{ratio[kind]:.3f}x" if kind else "1", *memory))
        if result["peer"]:
            rows.append((name, f"peer {result['peer']}", "", "", "", ""))
    return text_table(("combination", "arm", "ms a step", "ratio", "held, MiB", "peak in a step"), rows)


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
    parser.add_argument(
        "--baseline-path", type=Path, metavar="FOLDER", help="another checkout of this project, as an arm: its engine"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there, and a picture beside it")
    parser.add_argument("--smoke", action="store_true", help=f"a seconds-long check that it runs: {SMOKE}")
    group = parser.add_argument_group("decorrelation (its defaults are DecorConfig's)")
    knobs.add_arguments(group)
    return parser


def asked_knobs(argv: list[str]) -> dict[str, Any]:
    """The knobs that a command line gives, also those given at their defaults: another version may have others."""
    parser = build_parser()
    names = {spec.name: knobs.dest(spec.name) for spec in dataclasses.fields(DecorConfig)}
    parser.set_defaults(**dict.fromkeys(names.values()))
    given = vars(parser.parse_args(argv))
    return {name: given[dest] for name, dest in names.items() if given[dest] is not None}


def main(argv: list[str]) -> None:
    if reason := knobs.removed(argv):
        raise UserError(reason)
    args = build_parser().parse_args(argv)
    if args.smoke:
        vars(args).update(SMOKE)
    config = decor_config(args)
    args.asked_knobs = asked_knobs(argv)
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
            replace_text(args.json, json.dumps(record, indent=1) + "\n")
    print(table(record["results"]))
    if args.json:
        step_cost_picture(record, args.json.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(exit_code("step_cost.py", main))
