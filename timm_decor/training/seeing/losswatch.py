"""An epoch's loss: added up, and watched, without making a GPU wait at every step."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from timm_decor.errors import UserError


class NonFiniteLoss(UserError):
    """The loss or a weight became infinite or NaN; training stops, and the checkpoint before stays as it is."""

    def __init__(self, name: str, what: str, epoch: int, step: int) -> None:
        super().__init__(
            f"{name}: the {what} is not finite in epoch {epoch}, step {step}; earlier checkpoints are kept. "
            f"Try a lower --lr, a longer --warmup-epochs or --clip-grad"
        )


class LossWatch:
    """Adds up an epoch's loss and right answers, and notices a loss that is not finite.

    Args:
        accelerator: of the arm.
        interval: batches between two looks at the loss.
    """

    def __init__(self, accelerator: Accelerator, interval: int) -> None:
        self._accelerator = accelerator
        looking_is_free = accelerator.device.type == "cpu" and accelerator.num_processes == 1
        self._interval = 1 if looking_is_free else interval
        self._sums = torch.zeros(3, device=accelerator.device)  # loss, right answers, images
        self._bad = torch.zeros((), dtype=torch.int64, device=accelerator.device)  # first bad step, or 0
        self._last = self._sums[0]
        self._seen = 0

    def see(self, loss: Tensor, output: Tensor, labels: Tensor, step: int) -> None:
        """Count a batch: its mean loss, and the images of which the likeliest label is right (or the largest part)."""
        images = len(output)
        right = (output.argmax(1) == (labels.argmax(1) if labels.ndim == 2 else labels)).sum()
        # not as new_tensor, which copies from the host and waits for the device
        self._sums += torch.stack((loss.float() * images, right.float(), self._sums.new_full((), images)))
        self._bad = torch.where((self._bad == 0) & ~torch.isfinite(loss), step, self._bad)
        self._last = loss
        self._seen += 1

    @property
    def due(self) -> bool:
        """Whether it is time to look."""
        return self._seen % self._interval == 0

    def figures(self) -> tuple[float, float]:
        """The last batch's loss, and the epoch's accuracy so far (%, of this process)."""
        loss, _, right, images = torch.cat((self._last.float()[None], self._sums)).tolist()
        return loss, 100 * right / images

    def check(self, name: str, epoch: int) -> None:
        """Refuse to go on after a loss that is not finite, on any process. Collective.

        Args:
            name: of the arm.
            epoch: from 1.

        Raises:
            NonFiniteLoss: names the first such update.
        """
        first = self._accelerator.gather(self._bad[None])
        if bool(first.any()):
            raise NonFiniteLoss(name, "loss", epoch, int(first[first > 0].min()))

    def totals(self) -> tuple[float, float, float]:
        """The mean loss so far, the accuracy (%) and the number of images, over all processes. Collective."""
        loss, right, images = self._accelerator.reduce(self._sums, reduction="sum").tolist()
        return loss / images, 100 * right / images, images

    def state_dict(self) -> dict[str, Any]:
        """This process's sums."""
        return {"sums": self._sums.cpu(), "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._sums = state["sums"].to(self._sums, copy=True)
        self._seen = state["seen"]
