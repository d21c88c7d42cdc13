"""Training without backpropagation: does decorrelation rescue it, as arXiv 2407.10780 claims?

    python benchmarks/without_backpropagation.py --json benchmarks/results/without_backpropagation/digits.json

A small network learns scikit-learn's handwritten digits from gradients that no backward pass made:

  * forward gradients (arXiv 2202.08587): along a random direction V the loss changes at the rate d, which one forward
    pass with tangents gives (torch.func.jvp); d V is an unbiased estimate of the gradient;
  * weight perturbation: d from the difference of two losses, at W and at W + eps V.

Each is trained plainly and decorrelated: V is drawn white in W's coordinates, so that the kernels move along L V R
(`handle.kernel_direction`), and the estimate goes into the step as `handle.kernel_gradient(d V)`. Statistics are
recorded with gradients off (`handle.recording`). Backpropagation stands beside them.

Learning rates are chosen on images that are neither trained on nor reported on, from one grid for all arms, which grows
until the best is inside of it; the steps are equal; reported is the accuracy on test images, three seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, jvp

import timm_decor
from study.results import replace_text, session
from timm_decor.errors import exit_code
from timm_decor.text import text_table

EVERY = 20
# Without a scale: a plain step along an estimate is no measure for one that was drawn in other coordinates.
CONFIG = timm_decor.DecorConfig(every=EVERY, sample=1.0, sides="input", graft=False)
ESTIMATORS = ("backpropagation", "forward gradients", "weight perturbation")
ARMS: dict[str, timm_decor.DecorConfig | None] = {"plain": None, "decorrelated": CONFIG}
GRID_STEP, FIRST_GRID = 2.0, {"backpropagation": (0.05, 0.4), "forward gradients": (0.0005, 0.016)}
EPS = 1e-3
SEEDS = (0, 1, 2)


class Digits:
    """1797 images of 8 x 8: 1000 to train on, 300 to choose learning rates, the rest to report."""

    def __init__(self) -> None:
        x, y = load_digits(return_X_y=True)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]
        self.train, self.held_out, self.test = [
            (x[s], y[s]) for s in (slice(1000), slice(1000, 1300), slice(1300, None))
        ]


def network() -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(
    data: Digits, estimator: str, config: timm_decor.DecorConfig | None, lr: float, seed: int, steps: int, batch: int
) -> nn.Sequential:
    """A network after `steps` steps of SGD with momentum, along a cosine of learning rates."""
    torch.manual_seed(seed)
    model = network()
    if config:
        timm_decor.decorrelate(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    handle = timm_decor.attach(model, optimizer) if config else None
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x, y = data.train
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,))
        if estimator == "backpropagation":
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
        else:
            estimate(model, x[rows], y[rows], estimator, handle)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def estimate(model: nn.Module, x: Tensor, y: Tensor, estimator: str, handle: timm_decor.DecorHandle | None) -> None:
    """Set each parameter's gradient to d V, V a random direction and d the rate of the loss along it."""
    parameters = dict(model.named_parameters())
    drawn = {name: torch.randn_like(p) for name, p in parameters.items()}
    direction = handle.kernel_direction(drawn) if handle else drawn
    if handle and handle.refresh_due:  # the tangents' own pass cannot be recorded
        with handle.recording():
            model(x)

    def loss(values: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (x,)), y)

    values = {name: p.detach() for name, p in parameters.items()}
    if estimator == "forward gradients":
        rate = jvp(loss, (values,), (direction,))[1]
    else:
        ahead = {name: value + EPS * direction[name] for name, value in values.items()}
        rate = (loss(ahead) - loss(values)) / EPS
    own = {name: rate * value for name, value in drawn.items()}
    gradients = handle.kernel_gradient(own) if handle else own
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]


@torch.no_grad()
def accuracy(model: nn.Module, images: tuple[Tensor, Tensor]) -> float:
    """Top-1, in percent."""
    x, y = images
    return 100 * float((model.eval()(x).argmax(1) == y).float().mean())


def tune(data: Digits, estimator: str, arm: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy on held-out images by learning rate; the best is inside of the grid."""
    low, high = FIRST_GRID.get(estimator, FIRST_GRID["forward gradients"])
    rates = [low]
    while rates[-1] < high:
        rates.append(rates[-1] * GRID_STEP)
    found: dict[float, float] = {}
    while True:
        for lr in rates:
            if lr not in found:
                model = train(data, estimator, ARMS[arm], lr, SEEDS[0], args.steps, args.batch_size)
                found[lr] = accuracy(model, data.held_out)
        best = _best(found)
        rates = [best / GRID_STEP, best * GRID_STEP]
        if args.smoke or all(lr in found for lr in rates):
            return [{"lr": lr, "held_out_top1": found[lr]} for lr in sorted(found)]


def _best(found: dict[float, float]) -> float:
    """The learning rate with the highest accuracy; of several the lowest."""
    return min(found, key=lambda lr: (-found[lr], lr))


def table(results: list[dict[str, Any]]) -> str:
    """The results for people."""
    rows = [
        (r["estimator"], r["arm"], f"{r['lr']:g}", f"{statistics.mean(r['test_top1']):.1f}",
         ", ".join(f"{top1:.1f}" for top1 in r["test_top1"]), f"{r['ms_a_step']:.2f}")
        for r in results
    ]  # fmt: skip
    return text_table(("gradients", "arm", "lr", "test top-1, %", "each seed", "ms a step"), rows)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="of each run")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there")
    parser.add_argument("--smoke", action="store_true", help="a seconds-long check that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps = 2 * EVERY
    torch.set_num_threads(1)
    data, results = Digits(), []
    for estimator in ESTIMATORS:
        for arm, config in ARMS.items():
            tried = tune(data, estimator, arm, args)
            lr = _best({each["lr"]: each["held_out_top1"] for each in tried})
            start, models = time.perf_counter(), []
            for seed in SEEDS:
                models.append(train(data, estimator, config, lr, seed, args.steps, args.batch_size))
            seconds = (time.perf_counter() - start) / len(SEEDS) / args.steps
            results.append(
                {
                    "estimator": estimator, "arm": arm, "lr": lr, "tried": tried, "ms_a_step": round(1e3 * seconds, 3),
                    "test_top1": [round(accuracy(model, data.test), 3) for model in models],
                    "train_top1": [round(accuracy(model, data.train), 3) for model in models],
                }
            )  # fmt: skip
            print(table(results[-1:]), file=sys.stderr, flush=True)
    print(table(results))
    if args.json:
        settings = {"steps": args.steps, "batch_size": args.batch_size, "seeds": SEEDS, "config": CONFIG.to_dict()}
        record = {**session(torch.device("cpu"), 1, 1), "settings": settings, "results": results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        replace_text(args.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code("without_backpropagation.py", main))
