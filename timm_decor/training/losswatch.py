"""An epoch's loss: added up, and watched, without making a GPU wait at every step."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from timm_decor.training.errors import UserError


class NonFiniteLoss(UserError):
    """The loss or a weight became infinite or NaN; training stops, and the checkpoint before stays as it is."""

    def __init__(self, name: str, what: str, epoch: int, step: int) -> None:
        super().__init__(
            f"{name}: the {what} is not finite in epoch {epoch}, step {step}; earlier checkpoints are kept. "
            f"Try a lower --lr, a longer --warmup-epochs or --clip-grad"
        )


class LossWatch:
    """Adds up an epoch's loss and notices when it stops being finite.

    Args:
        accelerator: of the arm.
        interval: batches between two looks at the loss.
    """

    def __init__(self, accelerator: Accelerator, interval: int) -> None:
        self._accelerator = accelerator
        looking_is_free = accelerator.device.type == "cpu" and accelerator.num_processes == 1
        self._interval = 1 if looking_is_free else interval
        self._sums = torch.zeros(2, device=accelerator.device)
        self._bad = torch.zeros((), dtype=torch.int64, device=accelerator.device)  # first bad step, or 0
        self._last = self._sums[0]
        self._seen = 0

    def see(self, loss: Tensor, images: int, step: int) -> None:
        """Count a batch's mean loss."""
        self._sums += torch.stack((loss.float() * images, loss.new_tensor(images, dtype=torch.float32)))
        self._bad = torch.where((self._bad == 0) & ~torch.isfinite(loss), step, self._bad)
        self._last = loss
        self._seen += 1

    @property
    def due(self) -> bool:
        """Whether it is time to look."""
        return self._seen % self._interval == 0

    @property
    def last(self) -> float:
        """The last batch's loss."""
        return float(self._last)

    def first_bad_step(self) -> int | None:
        """The first update with a loss that is not finite, on any process; None where all were. Collective."""
        first = self._accelerator.gather(self._bad[None])
        return int(first[first > 0].min()) if bool(first.any()) else None

    def totals(self) -> tuple[float, float]:
        """The mean loss so far and the number of images, over all processes. Collective."""
        total, images = self._accelerator.reduce(self._sums, reduction="sum").tolist()
        return total / images, images

    def state_dict(self) -> dict[str, Any]:
        """This process's sums."""
        return {"sums": self._sums.cpu(), "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._sums = state["sums"].to(self._sums, copy=True)
        self._seen = state["seen"]
