"""How soon decorrelated training is as accurate as tuned plain training: in steps, and in seconds.

    python benchmarks/time_to_accuracy.py tune   --preset cpu --data-dir ../shared/data/cifar10
    python benchmarks/time_to_accuracy.py report --preset cpu --data-dir ../shared/data/cifar10
    python benchmarks/time_to_accuracy.py table  --preset cpu --json benchmarks/results/time_to_accuracy/cpu_cifar10.json

For each base optimizer (sgd, adamw, muon) the arms are `plain` and `decorrelated` (DecorConfig's defaults), and any
other: --arm 'dbp={"rule": "dbp", "structure": "full", "every": 1, "sample": 0.1, "preserve_function": false}'.

`tune` chooses each arm's learning rate on the same grid for all arms of an optimizer, on training images that are not
trained on, with one seed; where an arm's best lies at the edge, the grid grows for all arms. `report` reads the learning
rates from tune's file and trains on the training images; test accuracy is only reported. The target is the mean
accuracy of plain training after N epochs. Reported are (a) the accuracy of each arm after N epochs and (b) the smallest
budget with which the other arm reaches the target, each budget with a schedule of its own length, found by bisection
over a fixed list. All runs of a seed train in turns, some tens of steps each, on one device or one core, so that a
noisy machine slows all of them alike; seconds are those of training, refreshes of R included, evaluation and the first
steps of a process (compilation, allocators) excluded. The ratio of the arms' seconds is taken within such a group.

Every finished run is in the result file at once, and a rerun skips it: a long report may be made in short commands.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from study import protocol, tables
from study.images import Split, generate, load
from study.presets import OPTIMIZERS, PRESETS, Preset
from study.results import Results, session
from study.training import PLAIN, Record, Spec, train_in_turns
from timm_decor import DecorConfig
from timm_decor.table import text_table
from timm_decor.training.errors import UserError, exit_code, near

RESULTS = Path(__file__).parent / "results" / "time_to_accuracy"
DEFAULT_ARM = "decorrelated"
MAX_EXTENSIONS = 8


@dataclass
class Bench:
    """One stage on one preset and data set.

    Attributes:
        preset: the setting.
        data_dir: parquet files; None for generated images.
        tunes: measure on held-out training images.
        device: where to train.
        results: the stage's file.
        made_by: the session that new runs are of.
        whole: steps of N epochs.
    """

    preset: Preset
    data_dir: Path | None
    tunes: bool
    device: torch.device
    results: Results
    made_by: dict[str, Any]
    whole: int

    def run(self, groups: Sequence[Sequence[Spec]]) -> None:
        """Train groups of runs; each group in turns, groups on the preset's workers."""
        groups = [group for group in groups if group]
        begin = time.time_ns()
        jobs = [(list(group), f"{begin}-{number}") for number, group in enumerate(groups)]
        if self.preset.workers == 1 or len(jobs) == 1:
            for job in jobs:
                _train_group(self, *job)
        else:
            context = multiprocessing.get_context("spawn")  # a fork of a process that has torch's threads may hang
            with ProcessPoolExecutor(min(self.preset.workers, len(jobs)), context) as pool:
                for future in [pool.submit(_train_group, self, *job) for job in jobs]:
                    future.result()
        if groups:
            self.results = Results.open(self.results.path, self.results.settings)


_splits: dict[tuple[Any, ...], Split] = {}  # a worker reads the images once


def _train_group(bench: Bench, specs: list[Spec], group: str) -> None:
    preset = bench.preset
    if preset.threads:
        torch.set_num_threads(preset.threads)
    key = (bench.data_dir, bench.tunes, preset.train_images, bench.device)
    if key not in _splits:
        _splits[key] = _load(preset, bench.data_dir, bench.tunes).to(bench.device)
    train_in_turns(specs, preset, _splits[key], group, lambda record: bench.results.add(record, bench.made_by))


def _load(preset: Preset, data_dir: Path | None, tunes: bool) -> Split:
    if preset.generated:
        return generate(preset.train_images or 256, preset.generated, tunes)
    if data_dir is None:
        raise UserError("--data-dir is needed: a folder with train*.parquet and test*.parquet")
    return load(data_dir, preset.train_images, preset.held_out if tunes else None)


def tune(bench: Bench, opts: Sequence[str], arms: dict[str, str | None]) -> None:
    """Measure every arm on its optimizer's grid, and let the grid grow until no arm's best lies at its edge."""
    lrs = {opt: set(OPTIMIZERS[opt].lrs) for opt in opts}
    decays = {opt: set(OPTIMIZERS[opt].weight_decays) for opt in opts}
    for _ in range(MAX_EXTENSIONS + 1):
        wanted = [
            Spec(opt, arm, config, lr, decay, seed, bench.whole)
            for opt in opts
            for lr in sorted(lrs[opt])
            for decay in sorted(decays[opt])
            for arm, config in arms.items()
            for seed in range(bench.preset.seeds)
        ]
        bench.run([[spec] for spec in wanted if bench.results.find(spec) is None])
        grew = False
        for opt in opts:
            for arm in arms:
                lr, decay = protocol.best(_scores(bench.results.records, opt, arm))
                for values, value in ((lrs[opt], lr), (decays[opt], decay)):
                    more = protocol.beyond(sorted(values), value)
                    if more is not None:
                        values.add(more)
                        grew = True
        if not grew:
            return
    raise UserError(
        f"after {MAX_EXTENSIONS} extensions of the grid the best is still at its edge: see {bench.results.path}"
    )


def _scores(records: Sequence[Record], opt: str, arm: str) -> dict[protocol.Point, float]:
    return protocol.scores(r for r in records if (r.spec.opt, r.spec.arm) == (opt, arm))


def report(bench: Bench, tuned: Results, opts: Sequence[str], arms: dict[str, str | None]) -> None:
    """Train every arm for N epochs, then search each arm's smallest budget to plain's accuracy."""
    points = {}
    for opt in opts:
        for arm, config in arms.items():
            records = [r for r in tuned.records if (r.spec.opt, r.spec.arm) == (opt, arm)]
            points[opt, arm] = protocol.chosen(protocol.scores(records), f"{opt} {arm}")
            if not same_config(records[0].spec.config, config):
                raise UserError(
                    f"{tuned.path.name} tuned arm {arm} with another configuration: run the tune stage again"
                )

    def spec(opt: str, arm: str, seed: int, budget: float) -> Spec:
        steps = protocol.budget_steps(budget, bench.whole)
        return Spec(opt, arm, arms[arm], *points[opt, arm], seed, steps)

    def missing(specs: list[Spec]) -> list[Spec]:
        return [each for each in specs if bench.results.find(each) is None]

    wholes = []
    for seed in range(bench.preset.seeds):
        by_opt = [[spec(opt, arm, seed, 1.0) for arm in arms] for opt in opts]
        # An optimizer's arms train in turns or not at all: seconds of different hours are not compared.
        wholes.append([each for group in by_opt if missing(group) for each in group])
    bench.run(wholes)
    while True:
        wanted: list[list[Spec]] = [[] for _ in range(bench.preset.seeds)]
        for row in table_of(bench):
            if row.opt in opts and row.arm in arms and row.unfinished:
                reached = {budget: top1 >= row.target for budget, top1 in row.tried.items()}
                _, budget = protocol.smallest_first((*bench.preset.budgets, 1.0), reached)
                assert budget is not None  # that is what unfinished means
                for seed, group in enumerate(wanted):
                    group += missing([spec(row.opt, row.arm, seed, budget)])
        if not any(wanted):
            return
        bench.run(_balanced(wanted, bench.preset.workers))


def _balanced(groups: list[list[Spec]], workers: int) -> list[list[Spec]]:
    """Searches need not train beside plain: where there are several workers, each run is a job of its own."""
    return groups if workers == 1 else [[each] for group in groups for each in group]


def same_config(one: str | None, other: str | None) -> bool:
    """Whether two configurations are equal, field by field."""
    return (one and json.loads(one)) == (other and json.loads(other))


def table_of(bench: Bench) -> list[protocol.Row]:
    """The table of the stage's file."""
    return protocol.rows(bench.results.records, bench.whole, bench.preset.budgets, bench.preset.seeds)


def read_table(path: Path) -> list[protocol.Row]:
    """The table of a report's file, by the settings that it was made with."""
    results = Results.read(path)
    seeds = len({record.spec.seed for record in results.records})
    return protocol.rows(results.records, results.settings["steps"], results.settings["budgets"], seeds)


def describe(rows: Sequence[protocol.Row]) -> str:
    """The table for a terminal."""
    return text_table(tables.HEADER, [tables.cells(row) for row in rows])


def tune_table(results: Results) -> str:
    """Held-out accuracy of every point, the chosen one of each arm marked."""
    lines = []
    for opt, arm in dict.fromkeys((r.spec.opt, r.spec.arm) for r in results.records):
        measured = _scores(results.records, opt, arm)
        best = protocol.best(measured)
        for lr, decay in sorted(measured):
            mark = "<- chosen" if (lr, decay) == best else ""
            lines.append((opt, arm, f"{lr:g}", f"{decay:g}", f"{measured[lr, decay]:.2f}", mark))
    return text_table(("optimizer", "arm", "lr", "weight decay", "held-out top-1 %", ""), lines)


def parse_arm(text: str) -> tuple[str, str]:
    """`name={"rule": ...}` as (name, configuration as JSON)."""
    name, equals, config = text.partition("=")
    try:
        if not equals or not name or name == PLAIN:
            raise ValueError("write NAME=JSON, with the fields of DecorConfig that are not its defaults")
        return name, DecorConfig.from_json(config).to_json()
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tune", "report", "table"), help="table: print what a result file holds")
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True, help="the setting")
    parser.add_argument("--data-dir", type=Path, help="folder with train*.parquet and test*.parquet")
    parser.add_argument("--opt", nargs="+", default=list(OPTIMIZERS), help=f"of {', '.join(OPTIMIZERS)} (default: all)")
    parser.add_argument("--arm", type=parse_arm, action="append", default=[], metavar="NAME=JSON", help="another arm")
    parser.add_argument("--json", type=Path, help="the stage's result file (default: by preset and data set)")
    parser.add_argument("--tune-json", type=Path, help="report: tune's file (default: by preset and data set)")
    parser.add_argument("--compare", type=Path, metavar="JSON", help="report: print the table beside this file's")
    parser.add_argument("--device", help="default: cuda for the gpu preset, else cpu")
    group = parser.add_argument_group("in place of the preset's values (see study/presets.py)")
    for name, kind in (("model", str), ("stem", str), ("epochs", float), ("seeds", int), ("batch_size", int)):
        group.add_argument(f"--{name.replace('_', '-')}", type=kind)
    for name in ("train_images", "held_out", "shift", "turn", "threads", "workers"):
        group.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in ("amp", "compile", "channels_last"):
        group.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction)
    return parser


def make_preset(args: argparse.Namespace) -> Preset:
    """The preset with what the command line says otherwise; tuning takes one seed unless told."""
    fields = {spec.name for spec in dataclasses.fields(Preset)}
    given = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    preset = PRESETS[args.preset]
    if args.stage == "tune":
        given.setdefault("seeds", 1)
    return dataclasses.replace(preset, **given)


def make_device(args: argparse.Namespace) -> torch.device:
    """The device that was asked for.

    Raises:
        UserError: it is not there.
    """
    name = args.device or ("cuda" if args.preset == "gpu" else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} is not available here; the cpu preset needs no GPU") from error
    return device


def open_bench(args: argparse.Namespace, preset: Preset) -> Bench:
    """What the stage runs on. Counts the images without decoding them."""
    device = make_device(args)
    tunes = args.stage == "tune"
    count = preset.train_images or _count(args.data_dir)
    per_epoch = count // preset.batch_size
    whole = round(preset.epochs * per_epoch)
    if whole < 1:
        raise UserError(f"{count} images, batch {preset.batch_size} and {preset.epochs} epochs make no step")
    name = "generated" if preset.generated else args.data_dir.resolve().name if args.data_dir else None
    settings = {**preset.settings(), "data": name, "images": count, "steps": whole, "stage": args.stage}
    made_by = session(device, preset.threads, preset.workers)
    path = args.json or RESULTS / f"{args.preset}_{name}{'_tune' if tunes else ''}.json"
    return Bench(preset, args.data_dir, tunes, device, Results.open(path, settings), made_by, whole)


def _count(data_dir: Path | None) -> int:
    from timm_decor.training.sources import Parquet, ParquetColumns

    if data_dir is None:
        raise UserError("--data-dir is needed: a folder with train*.parquet and test*.parquet")
    return len(Parquet(data_dir, "train", "RGB", ParquetColumns()))


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    for opt in args.opt:
        if opt not in OPTIMIZERS:
            raise UserError(
                f"no settings for optimizer {opt!r}{near(opt, OPTIMIZERS)}; there are {', '.join(OPTIMIZERS)}"
            )
    if args.stage == "table":
        if args.json is None:
            raise UserError("table needs --json, a result file")
        results = Results.read(args.json)
        print(tune_table(results) if results.settings["stage"] == "tune" else describe(read_table(args.json)))
        return
    arms: dict[str, str | None] = {PLAIN: None, DEFAULT_ARM: DecorConfig().to_json(), **dict(args.arm)}
    bench = open_bench(args, make_preset(args))
    committed = read_table(args.compare) if args.compare else []
    stale = [r for r in bench.results.records if not same_config(r.spec.config, arms.get(r.spec.arm, r.spec.config))]
    if stale:
        names = ", ".join(sorted({record.spec.arm for record in stale}))
        print(f"{len(stale)} runs of {names} were made with another configuration: removed", file=sys.stderr)
        bench.results.drop(stale)
    if args.stage == "tune":
        tune(bench, args.opt, arms)
        print(tune_table(bench.results))
        return
    tuned_path = args.tune_json or RESULTS / f"{args.preset}_{bench.results.settings['data']}_tune.json"
    report(bench, Results.read(tuned_path), args.opt, arms)
    print(describe(table_of(bench)))
    if args.compare:
        lines, outside = tables.compared(table_of(bench), committed, bench.preset.budgets)
        print()
        print(text_table(("figure", "committed", "here", "may differ by", ""), lines))
        print(f"{len(lines) - outside} of {len(lines)} figures are within the spread of {args.compare.name}")


if __name__ == "__main__":
    sys.exit(exit_code("time_to_accuracy.py", main))
