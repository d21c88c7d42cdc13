"""How far an epoch has come, and how that is saved so that the epoch goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from timm_decor.errors import UserError
from timm_decor.training.runtime import random_state
from timm_decor.training.seeing.losswatch import LossWatch


@dataclass
class Progress:
    """How far an epoch has come.

    Attributes:
        losses: its loss so far.
        steps: optimizer updates of the whole run.
        batches: of this process.
        lr: learning rate of the last update.
        seconds: spent in training, at the last update.
        random: after `load`, the random numbers to go on with when the first batch is there.
    """

    losses: LossWatch
    steps: int
    batches: int = 0
    lr: float = 0.0
    seconds: float = 0.0
    random: dict[str, Any] | None = None

    def state(self, accelerator: Accelerator, models: Sequence[nn.Module], plan: dict[str, int]) -> dict[str, Any]:
        """What `load` reads, in tensors and plain Python types. Collective: every process has its own part of it.

        Args:
            accelerator: of the arm.
            models: those with running statistics: the model and its average.
            plan: what decides which batches the epoch has, by the names of the arguments.
        """
        own = {
            # not there yet if this very epoch was resumed and has not begun to go on
            "random": self.random or random_state(accelerator.device),
            "losses": self.losses.state_dict(),
            "statistics": [_running_statistics(model) for model in models],
        }
        return {
            "steps": self.steps,
            "batches": self.batches,
            "lr": self.lr,
            "seconds": self.seconds,
            "plan": plan,
            "processes": gather_object([own]),
        }

    def load(
        self, saved: dict[str, Any], accelerator: Accelerator, models: Sequence[nn.Module], plan: dict[str, int]
    ) -> None:
        """Take over what `state` gave; arguments as there.

        Raises:
            UserError: batches of the epoch are left, and they are other ones now.
        """
        before, whole, parts = saved["plan"], is_whole(saved), saved["processes"]
        other = [f"{name} {before.get(name, 'unknown')} (here {value})" for name, value in plan.items()
                 if before.get(name) != value]  # fmt: skip
        if other and not whole:
            raise UserError(
                f"its last checkpoint is of the middle of an epoch, with {', '.join(other)}: "
                f"that can change only between epochs"
            )
        own = (
            parts[accelerator.process_index] if len(parts) == accelerator.num_processes else _joined(parts, accelerator)
        )
        for model, statistics in zip(models, own["statistics"], strict=False):  # an average may have come or gone
            model.load_state_dict(statistics, strict=False)
        self.losses.load_state_dict(own["losses"])
        self.random = own["random"]
        self.steps, self.batches = saved["steps"], plan["batches"] if whole else saved["batches"]
        self.lr, self.seconds = saved["lr"], saved["seconds"]


def is_whole(saved: dict[str, Any]) -> bool:
    """Whether all batches of the epoch were trained with when `state` was called: only its evaluation is left."""
    return bool(saved["batches"] == saved["plan"]["batches"])


def _joined(parts: list[dict[str, Any]], accelerator: Accelerator) -> dict[str, Any]:
    """What processes had of an epoch without batches to come, for another number of them: the first has the sums."""
    sums = sum(part["losses"]["sums"] for part in parts)
    own = sums if accelerator.is_main_process else torch.zeros_like(sums)
    return parts[0] | {"losses": parts[0]["losses"] | {"sums": own}}


def _running_statistics(model: nn.Module) -> dict[str, Any]:
    """BatchNorm's, which every process has of its own images while an epoch lasts."""
    return {name: value.cpu() for name, value in model.state_dict().items() if "running_" in name}
