"""Smaller training images in the first epochs: --progressive-size.

A step costs about as much as its images have pixels, and early on a network learns what small images show as well.
Public fast recipes do so (fastai's progressive resizing; EfficientNetV2, arXiv 2104.00298; ffcv's ImageNet recipes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from timm_decor.errors import UserError
from timm_decor.training.parser import sizes_and_shares


@dataclass(frozen=True)
class Progression:
    """The size of the training images in each epoch.

    Attributes:
        stages: (first epoch, counted from 0; input size (C, H, W)), by epoch; the first begins at 0.
    """

    stages: tuple[tuple[int, tuple[int, int, int]], ...]

    @classmethod
    def of(cls, text: str | None, input_size: Sequence[int], epochs: int) -> Progression:
        """As --progressive-size says; with None `input_size` throughout.

        Args:
            text: see `sizes_and_shares`. A share that comes to no epoch is passed over.
            input_size: (C, H, W) of evaluation.
            epochs: to share out. Those beyond, of a cool-down, are of the last size.

        Raises:
            UserError: the images are not square, so that one number is no size of theirs.
        """
        channels, height, width = input_size
        if text is None:
            return cls(((0, (channels, height, width)),))
        if height != width:
            raise UserError(f"--progressive-size is of square images, and these have {height} x {width} pixels")
        begins: dict[int, int] = {}
        gone = 0.0
        for size, share in sizes_and_shares(text):
            if round(gone * epochs) < max(1, epochs):
                begins[round(gone * epochs)] = size  # the later one of two that begin together
            gone += share
        return cls(tuple((first, (channels, size, size)) for first, size in begins.items()))

    @property
    def input_sizes(self) -> list[tuple[int, int, int]]:
        """Those that occur."""
        return list(dict.fromkeys(size for _, size in self.stages))

    def input_size(self, epoch: int) -> tuple[int, int, int]:
        """(C, H, W) of an epoch, counted from 0."""
        return next(size for first, size in reversed(self.stages) if first <= epoch)

    def work(self, epoch: int) -> float:
        """What an epoch costs, in units of one with the largest images: its share of their pixels."""
        pixels = [height * width for _, height, width in self.input_sizes]
        _, height, width = self.input_size(epoch)
        return height * width / max(pixels)

    def __str__(self) -> str:
        """`48 px, 64 px from epoch 13 on`; epochs counted from 1 as in all that is printed."""
        named = [f"{size[-1]} px" + (f" from epoch {first + 1} on" if first else "") for first, size in self.stages]
        return ", ".join(named)
