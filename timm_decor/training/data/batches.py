"""From images to finished batches: decoded, augmented, normalised, mixed.

All of their randomness is a function of seed, epoch and first image alone; see `loaders`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset

from timm_decor.errors import UserError, first_line
from timm_decor.training.data.progressive import Progression
from timm_decor.training.data.sources import Source, read
from timm_decor.training.runtime import mixed_seed

Transform = Callable[[Any], Any]


@dataclass(frozen=True)
class BySize:
    """The transform of an epoch, by the size of its images."""

    transforms: Mapping[tuple[int, int, int], Transform]
    progression: Progression

    def __call__(self, epoch: int) -> Transform:
        return self.transforms[self.progression.input_size(epoch)]


class Batches(Dataset[Any]):
    """A source seen through a transform; `__getitems__` gives a finished batch.

    Args:
        source: labelled images.
        transforms: of an epoch's size: PIL image to a uint8 tensor (or array) of shape (C, H, W).
        mean: per channel, of pixel values in [0, 1].
        std: the same.
        num_classes: labels at or above it are refused.
        seed: of every random choice made here.
        erase: random erasing of a normalised batch, in place.
        mixup: turns (images, labels) into mixed images and soft labels of shape (N, num_classes).
        mixup_off_epoch: from that epoch on nothing is mixed; 0 for never.
    """

    def __init__(
        self,
        source: Source,
        transforms: BySize,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_classes: int,
        seed: int,
        erase: RandomErasing | None = None,
        mixup: Mixup | None = None,
        mixup_off_epoch: int = 0,
    ) -> None:
        self.source = source
        self._transforms = transforms
        self._mean = 255 * torch.tensor(mean).view(1, -1, 1, 1)
        self._std = 255 * torch.tensor(std).view(1, -1, 1, 1)
        self._num_classes = num_classes
        self._seed = seed
        self._erase = erase
        self._mixup = mixup
        self._mixup_off_epoch = mixup_off_epoch
        # shared memory, because persistent workers hold their own copy of this object
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def epoch(self) -> int:
        """Whose random numbers the next batches use."""
        return int(self._epoch)

    @property
    def plan(self) -> dict[str, int]:
        """What the order depends on beside batch size, processes, seed and epoch: nothing."""
        return {}

    def input_size(self, epoch: int) -> tuple[int, int, int]:
        """See `Progression.input_size`."""
        return self._transforms.progression.input_size(epoch)

    def work(self, epoch: int) -> float:
        """See `Progression.work`."""
        return self._transforms.progression.work(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose random numbers the next batches use."""
        self._epoch.fill_(epoch)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        epoch = self.epoch
        with _random_numbers_of(mixed_seed(self._seed, epoch, indices[0])):
            transform = self._transforms(epoch)
            samples = [self._sample(index, transform) for index in indices]
            images = torch.stack([torch.as_tensor(image) for image, _ in samples]).float()
            images.sub_(self._mean).div_(self._std)
            labels = torch.tensor([label for _, label in samples])
            if self._erase is not None:
                images = self._erase(images)
            if self._mixup is not None:
                self._mixup.mixup_enabled = not self._mixup_off_epoch or epoch < self._mixup_off_epoch
                images, labels = self._mixup(images, labels)
        return images, labels

    def _sample(self, index: int, transform: Transform) -> tuple[Any, int]:
        image, label = read(self.source, index)
        if label >= self._num_classes:
            raise UserError(
                f"image {self.source.where(index)} has label {label}, but the model has {self._num_classes} classes"
            )
        try:
            return transform(image), label
        except Exception as error:  # timm's and torchvision's raise whatever comes
            raise UserError(f"cannot augment image {self.source.where(index)}: {first_line(error)}") from error


@contextlib.contextmanager
def _random_numbers_of(seed: int) -> Iterator[None]:
    """Seed the CPU generators, and put them back as they were afterwards."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU's generators as well
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
