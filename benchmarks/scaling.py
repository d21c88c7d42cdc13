"""What decorrelation costs on many processes: counted, planned from the counts, and measured on a few of them.

    python benchmarks/scaling.py count --json benchmarks/results/scaling/counts.json
    python benchmarks/scaling.py plan benchmarks/results/scaling/counts.json --ranks 8 64 512
    python benchmarks/scaling.py time --json benchmarks/results/scaling/cpu.json

`count` needs no quiet machine and no GPU: it lets the engine step on tensors without values (study/counting.py) and
notes, by model, what it sends at each kind of step, what it holds, and what it computes. `plan` makes of those counts
the time of a step on 8 to 512 GPUs (study/cluster.py has the model and its assumptions); its rates and speeds are
arguments. `time` trains on 1, 2 and 4 gloo processes of this machine, in turns with the plain model; it wants a quiet
one (study/ranks.py).

What is finished is in the file at once, and a rerun skips it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from study import cluster
from study import scaling_pages as pages
from study.arm import Case
from study.results import replace_text, session
from timm_decor import DecorConfig
from timm_decor.errors import UserError, exit_code
from timm_decor.text import text_table

MODELS = ("resnet50", "convnext_base", "vit_base_patch16_224", "vit_huge_patch14_224")
TIME_SMOKE = {
    "model": ["test_vit"], "img_size": [32], "batch_size": [4], "opt": ["sgd"], "processes": [1, 2], "blocks": 2,
    "steps_per_block": 2,
}  # fmt: skip
SMOKE_MODEL = ("test_vit", (("img_size", 32), ("depth", 1)))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    _count_arguments(stages.add_parser("count", help="bytes, memory and arithmetic, from the engine"))
    _plan_arguments(stages.add_parser("plan", help="the time of a step on many GPUs, from a file of counts"))
    _time_arguments(stages.add_parser("time", help="a step and a refresh on a few processes of this machine"))
    args = parser.parse_args(argv)
    args.run(args)


def _count_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", default=MODELS, help="timm models, by their plain names")
    parser.add_argument("--opt", nargs="+", default=["sgd", "adamw"], help="timm optimizers")
    parser.add_argument("--structure", nargs="+", default=["kronecker"], help="structures of R")
    parser.add_argument("--batch-size", type=int, default=64, help="images a process")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="the result file")
    parser.add_argument("--smoke", action="store_true", help="a very small model: a check that it runs")
    parser.set_defaults(run=count)


def count(args: argparse.Namespace) -> None:
    from study.counting import Counted
    from study.counting import count as counted

    name, kwargs = SMOKE_MODEL
    models: list[tuple[str, Any]] = [(name, kwargs)] if args.smoke else [(model, ()) for model in args.model]
    for (model, kwargs), opt, structure in itertools.product(models, args.opt, args.structure):
        case = Counted(model, opt, DecorConfig(structure=structure), args.batch_size, kwargs)
        if _has(args.json, case.key):
            continue
        result = counted(case)
        _add(args.json, result)
        print(text_table(cluster.COUNTS_HEADER, [cluster.count_cells(result)]), flush=True)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("counts", type=Path, help="what `count` wrote")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512], help="GPUs")
    parser.add_argument("--every", type=int, nargs="+", default=[DecorConfig().every], help="steps between refreshes")
    for field in dataclasses.fields(cluster.Machine):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=float, default=field.default, help=field.metadata["help"])
    parser.set_defaults(run=plan)


def plan(args: argparse.Namespace) -> None:
    machine = cluster.Machine(**{field.name: vars(args)[field.name] for field in dataclasses.fields(cluster.Machine)})
    for every in args.every:
        rows = [
            cells for result in results(args.counts) for cells in cluster.plan_rows(result, args.ranks, machine, every)
        ]
        print(f"a refresh every {every} steps")
        print(text_table(cluster.PLAN_HEADER, rows))


def _time_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", default=["resnet18"], help="timm models, by their plain names")
    parser.add_argument("--img-size", type=int, nargs="+", default=[64], help="height and width in pixels")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32], help="images a step, of each process")
    parser.add_argument("--opt", nargs="+", default=["sgd", "adamw"], help="timm optimizers")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="that train together; no two alike")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of each arm")
    parser.add_argument("--steps-per-block", type=int, default=5, help="steps timed together; refreshes come on top")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="the result file")
    parser.add_argument("--smoke", action="store_true", help=f"a seconds-long check that it runs: {TIME_SMOKE}")
    parser.set_defaults(run=time_)


def time_(args: argparse.Namespace) -> None:
    from study.ranks import measure

    if args.smoke:
        vars(args).update(TIME_SMOKE)
    timed = (
        [result["processes"] for result in results(args.json) if "processes" in result] if args.json.is_file() else []
    )
    if any("measuring" not in each["ratio"] for processes in timed for each in processes.values()):
        raise UserError(f"{args.json} is of before the step behind a refresh was timed: name another --json")
    for model, size, batch, opt in itertools.product(args.model, args.img_size, args.batch_size, args.opt):
        case = Case(model, size, batch, opt, "float32", compile=False, channels_last=False)
        for processes in args.processes:
            if processes < 1:
                raise UserError(f"--processes {processes}: must be 1 or more")
        if _has(args.json, {"case": dataclasses.asdict(case)}):
            continue
        result = measure(case, args.processes, args.blocks, args.steps_per_block)
        _add(args.json, result)
        print(text_table(pages.TIME_HEADER, pages.time_rows(result)), flush=True)


def results(path: Path) -> list[dict[str, Any]]:
    """What is in a result file.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}: `python benchmarks/scaling.py count --json {path}` makes it")
    return list(json.loads(path.read_text(encoding="utf-8"))["results"])


def _has(path: Path, key: dict[str, Any]) -> bool:
    return path.is_file() and any(key.items() <= result.items() for result in results(path))


def _add(path: Path, result: dict[str, Any], threads: int = 1) -> None:
    """One more result in the file, beside how and where the last of them was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = results(path) if path.is_file() else []
    head = session(torch.device("cpu"), threads, 1)
    replace_text(path, json.dumps({**head, "results": [*old, result]}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code("scaling.py", main))
