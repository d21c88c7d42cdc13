"""The presets: everything that decides what a run is and how it is timed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Optimizer:
    """A base optimizer as timm makes it, and the grid that every arm's learning rate is chosen on.

    Attributes:
        name: timm's.
        kwargs: for `timm.optim.create_optimizer_v2`.
        weight_decays: the values to tune over; the first is used where nothing was tuned.
        lrs: learning rates, a geometric series from half of `plain_lr` to sixteen times; tuning extends it where the
            best lies at its edge.
    """

    name: str
    kwargs: dict[str, Any]
    weight_decays: tuple[float, ...]
    lrs: tuple[float, ...]

    @property
    def plain_lr(self) -> float:
        """Plain training's learning rate in the cpu preset: what people have."""
        return self.lrs[1]


# Muon with the momentum and the Nesterov step that its authors use; timm's defaults are weaker. Biases and BatchNorm
# are not decayed (timm's default), so that nothing but the learning rate stands between the arms.
OPTIMIZERS = {
    "sgd": Optimizer("sgd", {"momentum": 0.9}, (5e-4,), (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)),
    "adamw": Optimizer("adamw", {}, (0.05,), (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128)),
    "muon": Optimizer("muon", {"momentum": 0.95, "nesterov": True}, (0.05,), (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)),
}


@dataclass(frozen=True)
class Preset:
    """A setting of the benchmark.

    Attributes:
        model: `small_resnet` or a timm model.
        stem: `small` or `timm`, see networks.create.
        epochs: N, the budget whose accuracy with plain training is the target.
        batch_size: images a step.
        train_images: None for all.
        held_out: training images to tune on.
        shift: pixels of zeros around an image for the random crop.
        budgets: shares of N epochs that a search may try.
        rival: the optimizer whose plain training is searched for the others' targets, too; "" for none.
        seeds: number of seeds.
        amp: bfloat16 autocast.
        channels_last: memory format of the model.
        compile: torch.compile.
        turn: steps that a run trains before it is the next one's turn; a multiple of DecorConfig.every, so that each
            turn has as many refreshes.
        threads: torch's, a worker; None for torch's own choice.
        workers: processes that train at the same time; each of them trains whole groups of runs, in turns.
        generated: pixels of generated images; 0 for a data set.
    """

    model: str
    stem: str
    epochs: float
    batch_size: int
    train_images: int | None
    held_out: int
    shift: int
    seeds: int
    amp: bool
    turn: int
    threads: int | None
    workers: int
    budgets: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    rival: str = "muon"
    channels_last: bool = True
    compile: bool = False
    generated: int = 0

    def settings(self) -> dict[str, Any]:
        """What changes a run's accuracy; runs of different settings do not share a result file."""
        apart = ("rival", "seeds", "turn", "threads", "workers", "compile", "channels_last")
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in apart}


PRESETS = {
    "gpu": Preset("resnet18", "small", 5, 128, None, 5000, 4, seeds=2, amp=True, turn=40, threads=None, workers=4),
    "cpu": Preset("small_resnet", "timm", 2, 128, 40_000, 10_000, 2, 3, amp=False, turn=40, threads=1, workers=2),
    "smoke": Preset(
        "small_resnet", "timm", 2, 32, 256, 1, 2, 2, amp=False, turn=3, threads=1, workers=1, budgets=(0.5, 0.75),
        generated=16,
    ),
}  # fmt: skip
