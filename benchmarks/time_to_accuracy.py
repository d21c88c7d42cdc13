"""How soon decorrelated training is as accurate as tuned plain training: in steps, and in seconds.

    python benchmarks/time_to_accuracy.py tune   --preset cpu --data-dir ../shared/data/cifar10
    python benchmarks/time_to_accuracy.py report --preset cpu --data-dir ../shared/data/cifar10
    python benchmarks/time_to_accuracy.py table  --preset cpu --json RESULT_FILE

For each base optimizer (sgd, adamw) the arms are `plain` and `decorrelated` (DecorConfig's defaults), in the report
also `at plain's rate`, decorrelated with the learning rate that is plain's best; of muon, whose plain training people
would use instead, `plain` alone. Any other arm is given as NAME=JSON:
--arm 'dbp={"rule": "dbp", "structure": "full", "every": 1, "sample": 0.1, "preserve_function": false, "graft": false}'

`tune` chooses each arm's learning rate on the same grid for all arms of an optimizer, for N epochs, on
training images that are not trained on; where an arm's best lies at the edge, the grid grows for all arms. `report`
reads the learning rates from tune's file and trains on the training images; test accuracy is only reported. The target
is the mean accuracy of plain training after N epochs. Reported are (a) the accuracy of each arm after N epochs and (b)
the smallest budget with which the other arm reaches the target, each budget with a schedule of its own length, found by
bisection over a fixed list. The runs of N epochs of a seed train in turns, some tens of steps each, on one device or
core; seconds are those of training, refreshes of R included, evaluation and a run's warm-up (compilation, allocators)
excluded. The ratio of seconds is taken within such a group, over the turns in which none of its runs was slow.

Every finished run is in the result file at once, and a rerun skips it: a long report may be made in short commands.
Runs that train in turns end together, so a command must last for one seed's: where it does not, name fewer of --opt in
each. The rival's seconds are then not comparable with the others', and the table says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from study import protocol, tables
from study.presets import OPTIMIZERS, PRESETS, Preset
from study.results import RESULTS, Results
from study.stages import grids, open_bench, read_table, report, table_of, tune
from study.training import PLAIN
from timm_decor import DecorConfig
from timm_decor.errors import UserError, exit_code
from timm_decor.text import near, text_table

DEFAULT_ARM = "decorrelated"


def describe(rows: Sequence[protocol.Row]) -> str:
    """The table for a terminal."""
    return text_table(tables.HEADER, [tables.cells(row) for row in rows])


def tune_table(results: Results) -> str:
    """Held-out accuracy of every point, the chosen one of each arm marked."""
    lines = []
    for opt in dict.fromkeys(r.spec.opt for r in results.records):
        arms = dict.fromkeys(r.spec.arm for r in results.records if r.spec.opt == opt)
        for arm, measured in grids(results.records, opt, arms, results.settings["steps"]).items():
            best = protocol.best(measured) if measured else None
            for lr, decay in sorted(measured):
                mark = "<- chosen" if (lr, decay) == best else ""
                score = f"{measured[lr, decay]:.2f}"
                lines.append((opt, arm, f"{lr:g}", f"{decay:g}", score, mark))
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
    parser.add_argument(
        "--grid",
        type=int,
        metavar="N",
        help="tune: learning rates to begin with, of those of presets.py (default: all)",
    )
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
    bench = open_bench(make_preset(args), args.preset, args.stage, args.data_dir, args.json, args.device or "")
    committed = read_table(args.compare) if args.compare else []
    if args.stage == "tune":
        tune(bench, args.opt, arms, args.grid)
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
