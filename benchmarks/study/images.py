"""Images held decoded in memory, on the device that trains: what is timed is the model, not a loader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_decor.errors import UserError
from timm_decor.training.data.parquet import Parquet, ParquetColumns
from timm_decor.training.data.sources import read

CLASSES = 10  # of generated images


@dataclass
class Images:
    """Labelled images.

    Attributes:
        pixels: uint8, (N, 3, H, W).
        labels: int64, (N,).
        mean: of the training images, float32, (3,), in units of 255.
        std: likewise.
    """

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        """The same images on a device."""
        return Images(*(tensor.to(device) for tensor in (self.pixels, self.labels, self.mean, self.std)))

    def normalized(self, rows: Tensor | slice) -> Tensor:
        """Some images as float32 of about zero mean and unit variance, (n, 3, H, W)."""
        shape = (3, 1, 1)
        return (self.pixels[rows].float() / 255 - self.mean.view(shape)) / self.std.view(shape)


@dataclass
class Split:
    """What a run trains on and what it is measured on.

    Attributes:
        name: the data set's, for result files.
        train: training images.
        measured: test images, or training images that are not trained on.
        measured_on: `test` or `held-out`.
    """

    name: str
    train: Images
    measured: Images
    measured_on: str

    @property
    def num_classes(self) -> int:
        return int(max(self.train.labels.max(), self.measured.labels.max())) + 1

    def to(self, device: torch.device) -> Split:
        """The same images on a device."""
        return Split(self.name, self.train.to(device), self.measured.to(device), self.measured_on)


def load(folder: Path, train_images: int | None, held_out: int | None) -> Split:
    """Read `train*.parquet` and, to report, `test*.parquet` of a folder.

    Which training images are used and which are held out does not depend on the seed of a run. Reporting on all
    training images and tuning on all but the held-out ones are the same call with and without `held_out`.

    Args:
        folder: of parquet files with columns image (bytes) and label.
        train_images: how many to train on; None for all (that are not held out).
        held_out: to tune: how many other training images to measure on; the test images are not opened then.

    Raises:
        UserError: no such files, too few images, or images of different sizes.
    """
    source = Parquet(folder, "train", "RGB", ParquetColumns())
    order = np.random.default_rng(0).permutation(len(source))
    available = len(source) - (held_out or 0)
    if available < (train_images or 1):
        raise UserError(f"{folder} has {len(source)} training images; {train_images or 1} + {held_out} are asked for")
    train = _decode(source, np.sort(order[: train_images or available]))
    if held_out:
        measured = _decode(source, np.sort(order[len(source) - held_out :]))
    else:
        test = Parquet(folder, "test", "RGB", ParquetColumns())
        measured = _decode(test, np.arange(len(test)))
    return _split(folder.resolve().name, train, measured, "held-out" if held_out else "test")


def generate(count: int, size: int, tunes: bool) -> Split:
    """Images that need no data: a smooth pattern a class, in noise.

    Args:
        count: of training images.
        size: height and width in pixels.
        tunes: measure on 200 images that stand for held-out training images, or on the 200 that stand for the test.
    """
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(CLASSES, 3, size // 4, size // 4)).repeat(4, 2).repeat(4, 3)
    labels = rng.integers(0, CLASSES, count + 400)
    noisy = patterns[labels] + 1.5 * rng.normal(size=(count + 400, 3, size, size))
    pixels = torch.from_numpy((128 + 32 * noisy).clip(0, 255).astype(np.uint8))
    target = torch.from_numpy(labels)
    rows = slice(count, count + 200) if tunes else slice(count + 200, None)
    train, measured = (pixels[:count], target[:count]), (pixels[rows], target[rows])
    return _split("generated", train, measured, "held-out" if tunes else "test")


def _split(name: str, train: tuple[Tensor, Tensor], measured: tuple[Tensor, Tensor], measured_on: str) -> Split:
    share = train[0].float() / 255
    mean, std = share.mean((0, 2, 3)), share.std((0, 2, 3))
    return Split(name, Images(*train, mean, std), Images(*measured, mean, std), measured_on)


def _decode(source: Parquet, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    pixels, labels = [], []
    for row in rows:
        image, label = read(source, int(row))
        pixels.append(np.asarray(image))
        labels.append(label)
        if pixels[-1].shape != pixels[0].shape:
            raise UserError(f"image {source.where(int(row))} is {image.size}, others are not: one size is needed")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


@dataclass
class Plan:
    """Which images a number of steps take, and how each of them is flipped and shifted.

    Attributes:
        rows: int64, (steps, batch).
        flips: bool, (steps, batch).
        shifts: int64, (steps, batch, 2): top and left edge of the crop out of the padded image.
    """

    rows: Tensor
    flips: Tensor
    shifts: Tensor


class Batches:
    """The stream of training batches: every image once an epoch, in an order that depends on the seed alone.

    Args:
        images: on the device that trains.
        batch_size: images a step; what is left of an epoch after the last full batch is not used.
        shift: zeros padded around an image before a crop of the old size; 0 for none.
        seed: of orders, flips and shifts; equal for the runs that are compared.
    """

    def __init__(self, images: Images, batch_size: int, shift: int, seed: int) -> None:
        self.images, self.batch_size, self.shift = images, batch_size, shift
        self.steps_per_epoch = len(images) // batch_size
        if not self.steps_per_epoch:
            raise UserError(f"{len(images)} training images do not fill a batch of {batch_size}")
        self._generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every machine
        self._order = torch.empty(0, dtype=torch.int64)

    def plan(self, steps: int) -> Plan:
        """The next steps' plan, on the images' device; must not reach past the end of an epoch."""
        count = steps * self.batch_size
        if not len(self._order):
            full = self.steps_per_epoch * self.batch_size
            self._order = torch.randperm(len(self.images), generator=self._generator)[:full]
        rows, self._order = self._order[:count], self._order[count:]
        flips = torch.rand(count, generator=self._generator) < 0.5
        shifts = torch.randint(2 * self.shift + 1, (count, 2), generator=self._generator)
        device, shape = self.images.pixels.device, (steps, self.batch_size)
        return Plan(rows.view(shape).to(device), flips.view(shape).to(device), shifts.view(*shape, 2).to(device))

    def batch(self, plan: Plan, step: int) -> tuple[Tensor, Tensor]:
        """Images, float32 (batch, 3, H, W) in channels-last memory, and labels (batch,)."""
        rows = plan.rows[step]
        x = self.images.normalized(rows)
        return augmented(x, plan.flips[step], plan.shifts[step], self.shift), self.images.labels[rows]


def augmented(x: Tensor, flips: Tensor, shifts: Tensor, padding: int) -> Tensor:
    """Flip and shift each image by its own amount, in one gather.

    Args:
        x: (n, C, H, W).
        flips: bool, (n,): whether to mirror left and right.
        shifts: (n, 2): row and column at which the crop of the padded image starts, 0 to 2 * padding.
        padding: zeros on each side.

    Returns:
        (n, C, H, W), in channels-last memory.
    """
    count, _, height, width = x.shape
    rows = torch.arange(height, device=x.device) + shifts[:, :1]
    columns = torch.arange(width, device=x.device).expand(count, -1)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + shifts[:, 1:]
    which = torch.arange(count, device=x.device)[:, None, None]
    padded = F.pad(x, (padding,) * 4) if padding else x
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
