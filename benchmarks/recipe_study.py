"""A network at its real size by a recipe of train.py: SGD and AdamW, plain and decorrelated, and plain Muon.

    python benchmarks/recipe_study.py -c recipes/imagenette_resnet18.yaml --data-dir ../shared/data/imagenette128 \\
        --json benchmarks/results/recipe/imagenette.json --work output/recipe/imagenette --epochs 5 20

Plain training's learning rate is its best over --tune-epochs, on a tenth of the training images that is held out, from
a grid that grows until the best lies inside; the decorrelated model takes that rate and has no say in it. Then each arm
trains on all training images for each of --epochs, with a schedule of its own, and the test images are reported on:
the end of the schedule, no epoch is picked. Everything else is the recipe's, for every arm.

Finished runs are in the result file at once, and are not made again; one that is stopped is gone on with from its
folder in --work. Several commands with other --opt, --seeds or --epochs may work on one file.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from study.protocol import best_rate
from study.rows import Rows
from study.script import accuracies, run_train
from study.training import PLAIN
from study.verdict import DEFAULT_ARM
from timm_decor.errors import UserError, exit_code
from timm_decor.training.foreign import read_mapping

# train.py's arguments for each optimizer, and the grid that plain training's rate is looked for on
OPTIMIZERS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "sgd": (["--opt", "nesterov", "--momentum", "0.9", "--weight-decay", "5e-4"], (0.05, 0.1, 0.2)),
    "adamw": (["--opt", "adamw", "--weight-decay", "0.05"], (1e-3, 2e-3, 4e-3)),
    "muon": (
        ["--opt", "muon", "--momentum", "0.95", "--weight-decay", "0.05", "--opt-kwargs", "nesterov=True"],
        (0.01, 0.02, 0.04),
    ),
}
RIVAL = "muon"
TRAINED, HELD_OUT = "train[:90%]", "train[90%:]"


def arms_of(opt: str) -> tuple[str, ...]:
    """The rival is trained plain alone."""
    return (PLAIN,) if opt == RIVAL else (PLAIN, DEFAULT_ARM)


def words_of(args: argparse.Namespace, model: str, key: dict[str, Any]) -> list[str]:
    """train.py's arguments for a run."""
    words = ["-c", str(args.config), "--data-dir", str(args.data_dir), *OPTIMIZERS[key["opt"]][0]]
    words += ["--model", model if key["arm"] == PLAIN else f"decor_{model}", "--lr", f"{key['lr']:g}"]
    words += ["--seed", str(key["seed"]), "--epochs", str(key["epochs"]), *args.words]
    if key["measured_on"] == "held-out":
        words += ["--train-split", TRAINED, "--val-split", HELD_OUT]
    return words


def train(args: argparse.Namespace, model: str, key: dict[str, Any]) -> dict[str, Any]:
    """A run's row."""
    folder = args.work / "-".join(str(value) for value in key.values())
    final = run_train(words_of(args, model, key), folder)["final"]
    column = "ema_top1" if "ema_top1" in final else "eval_top1"
    return {
        **key,
        "top1": final[column],
        "by_epoch": accuracies(folder, column),
        "train_loss": final["train_loss"],
        "steps": final["steps"],
        "seconds": round(final["seconds"], 1),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="train.py's recipe")
    parser.add_argument("--data-dir", type=Path, required=True, help="parquet files, in no order of their classes")
    parser.add_argument("--json", type=Path, required=True, help="result file, to add to")
    parser.add_argument("--work", type=Path, required=True, help="for the runs' folders")
    parser.add_argument("--opt", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS, help="(default: all)")
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--tune-epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("words", nargs="*", help="more arguments for train.py, behind --")
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    model = str(read_mapping(str(args.config), "recipe").get("model", "")).removeprefix("decor_")
    if not model:
        raise UserError(f"recipe {args.config} names no model")
    rows = Rows(args.json, None)

    def run(opt: str, arm: str, lr: float, seed: int, epochs: int, measured_on: str) -> float:
        key = {"opt": opt, "arm": arm, "lr": lr, "seed": seed, "epochs": epochs, "measured_on": measured_on}
        row = rows.find(key)
        if row is None:
            row = train(args, model, key)
            rows.add(row)
            print(f"{', '.join(map(str, key.values()))}: top-1 {row['top1']:.2f} %", file=sys.stderr, flush=True)
        return float(row["top1"])

    def held_out(opt: str, lr: float) -> float:
        return run(opt, PLAIN, lr, 0, args.tune_epochs, "held-out")

    for opt in args.opt:
        lr = best_rate(OPTIMIZERS[opt][1], partial(held_out, opt))
        for epochs in args.epochs:
            for seed in args.seeds:
                for arm in arms_of(opt):
                    run(opt, arm, lr, seed, epochs, "test")


if __name__ == "__main__":
    sys.exit(exit_code("recipe_study.py", main))
