"""Evaluation: loss and accuracy over every image of a loader, on every process."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from timm_decor.training.data.streams import NO_IMAGE


@dataclass(frozen=True)
class Metrics:
    """Attributes:
    loss: mean cross-entropy.
    top1: accuracy in %.
    top5: accuracy in %, None with five classes or fewer.
    images: how many were seen.
    seconds: wall-clock time, data loading included.
    """

    loss: float
    top1: float
    top5: float | None
    images: int
    seconds: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Accelerator,
    channels_last: bool = False,
    seen: list[Tensor] | None = None,
) -> Metrics:
    """Evaluate a model, in evaluation mode, on all images of a prepared loader; each image counts once.

    Args:
        model: gives logits (N, classes).
        loader: images in the order of their source.
        accelerator: what prepared the loader.
        channels_last: memory layout of the images.
        seen: takes a tensor (N, 4) a batch, on the CPU: label, predicted label, loss and confidence of each image, in
            the source's order.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device="cpu" if accelerator.device.type == "mps" else accelerator.device)
    classes = 0
    start = time.perf_counter()
    for images, labels in loader:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            output = model(images)
        output = output.float()
        classes = output.shape[1]
        losses = functional.cross_entropy(output, labels, reduction="none", ignore_index=NO_IMAGE)
        top = output.topk(min(5, classes), dim=1).indices
        ranked = top == labels[:, None]
        rows = torch.stack([row.float() for row in (labels, top[:, 0], losses, output.softmax(1).amax(1))], dim=1)
        # on several processes the last batch is padded; gather_for_metrics drops the padding
        rows, ranked = accelerator.gather_for_metrics((rows, ranked))
        is_image = rows[:, 0] != NO_IMAGE
        if seen is not None:
            seen.append(rows[is_image].cpu())
        # A stream's padding has neither loss nor right answers. To leave it out by an index would wait for the device.
        batch = torch.stack((rows[:, 2].sum(), ranked[:, 0].sum(), ranked.any(1).sum(), is_image.sum()))
        sums += batch.to(sums)
    loss, top1, top5, images_seen = sums.tolist()
    return Metrics(
        loss=loss / images_seen,
        top1=100 * top1 / images_seen,
        top5=100 * top5 / images_seen if classes > 5 else None,
        images=int(images_seen),
        seconds=time.perf_counter() - start,
    )
