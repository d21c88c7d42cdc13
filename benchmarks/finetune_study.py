"""Fine-tuning a ResNet-18 at plain training's own learning rate: plain and decorrelated, from the same weights.

    python benchmarks/finetune_study.py --data-dir ../shared/data/flowers102 \\
        --recipe recipes/finetune_flowers102.yaml --json benchmarks/results/finetune/flowers102.json

For each optimizer the learning rate is plain training's best on a part of the training images that is held out (a
quarter, the same of each class); the decorrelated model has no say in it. Then both train on all training images with
that rate, and the test images are reported on. train.py trains, from the weights of --pretrained-path. Finished runs
are in the result file, and are not made again.

--arms decorrelated with-r compares beginning with the R of those weights (for weights that have a decor.safetensors
beside them) with beginning with the identity: what a published R is worth.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from study.protocol import best_rate
from study.rows import Rows
from study.script import ROOT, run_train
from timm_decor.errors import exit_code

WEIGHTS = ROOT / "hub" / "staged" / "resnet18.whiten_tin_r64" / "model.safetensors"
LRS = {"nesterov": (0.025, 0.05, 0.1, 0.2, 0.4), "adamw": (5e-4, 1e-3, 2e-3, 4e-3)}
ARMS = ("plain", "decorrelated", "with-r")
DECAYS = {"nesterov": 5e-4, "adamw": 0.05}


def hold_out(folder: Path, to: Path, share: float = 0.25) -> None:
    """Parquet files of a part of the training images as `train`, and of the rest of each class as `test`."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "train.parquet")
    labels, rng = np.array(table["label"].to_pylist()), np.random.default_rng(0)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held[rows[: round(share * len(rows))]] = True
    to.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.filter(~held), to / "train.parquet")
    pq.write_table(table.filter(held), to / "test.parquet")
    if (folder / "classes.json").is_file():
        (to / "classes.json").write_bytes((folder / "classes.json").read_bytes())


def train(args: argparse.Namespace, data: Path, key: dict[str, Any]) -> dict[str, Any]:
    """One run of train.py; its final row."""
    with tempfile.TemporaryDirectory() as out:
        words = ["-c", str(args.recipe), "--data-dir", str(data)]
        words += ["--model", "resnet18" if key["arm"] == "plain" else "decor_resnet18"]
        words += ["--no-pretrained", "--pretrained-path", str(args.pretrained_path)]
        if key["arm"] == "with-r":
            words += ["--initial-r", str(args.pretrained_path.with_name("decor.safetensors"))]
        words += ["--opt", key["opt"], "--lr", str(key["lr"]), "--device", args.device]
        words += ["--weight-decay", str(DECAYS[key["opt"]]), "--seed", str(key["seed"]), "--val-interval", "1000"]
        final = run_train([*words, *args.words], Path(out) / "run")["final"]
    return {**key, "top1": final["eval_top1"], "train_loss": final["train_loss"], "seconds": round(final["seconds"], 1)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument(
        "--pretrained-path", type=Path, default=WEIGHTS, metavar="FILE", help="default: Tiny ImageNet's, of hub/staged"
    )
    parser.add_argument("--json", type=Path, required=True, help="result file, to add to")
    parser.add_argument("--opt", nargs="+", default=list(LRS), choices=LRS)
    parser.add_argument("--arms", nargs="+", default=["plain", "decorrelated"], choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("words", nargs="*", help="more arguments for train.py, behind --")
    args = parser.parse_args(argv)
    rows = Rows(args.json, None)

    def run(data: Path, key: dict[str, Any]) -> dict[str, Any]:
        found = rows.find(key)
        if found is None:
            found = train(args, data, key)
            rows.add(found)
        print(found, flush=True)
        return found

    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder)
        hold_out(args.data_dir, held)

        def tuned(opt: str) -> float:
            key = {"opt": opt, "arm": "plain", "seed": 0, "measured_on": "held-out"}
            return best_rate(LRS[opt], lambda lr: float(run(held, {**key, "lr": lr})["top1"]))

        for opt in args.opt:
            lr = tuned(opt)
            for seed in args.seeds:
                for arm in args.arms:
                    run(args.data_dir, {"opt": opt, "arm": arm, "lr": lr, "seed": seed, "measured_on": "test"})


if __name__ == "__main__":
    sys.exit(exit_code("finetune_study.py", main))
