"""scikit-learn's handwritten digits: the data set that needs no download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from timm_decor.errors import UserError
from timm_decor.text import near
from timm_decor.training.data.sources import EVAL_NAMES, TRAIN_NAMES, rows_of, split_of


class Digits:
    """scikit-learn's 1 797 handwritten digits, 8 x 8, split 80/20 in each class, always the same way."""

    num_classes: int | None = 10
    class_names = [str(digit) for digit in range(10)]

    def __init__(self, split: str, mode: str) -> None:
        from sklearn.datasets import load_digits

        name, rows = split_of(split)
        if name not in TRAIN_NAMES + EVAL_NAMES:
            raise UserError(f"digits has no split {name!r}{near(name, TRAIN_NAMES + EVAL_NAMES)}; splits: train, test")
        pixels, labels = load_digits(return_X_y=True)
        rank_in_class = np.zeros(len(labels), dtype=int)
        for label in range(10):
            members = np.flatnonzero(labels == label)
            rank_in_class[members] = np.arange(len(members))
        # every fifth image of a class is a test image: stratified, and no random numbers to depend on
        chosen = np.flatnonzero((rank_in_class % 5 == 4) == (name in EVAL_NAMES))
        chosen = chosen[rows_of(rows, len(chosen), f"digits {split}")]
        self._pixels = np.round(pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self.labels: np.ndarray | None = labels[chosen]
        self._mode = mode
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self._pixels)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index]).convert(self._mode)

    def label(self, index: int) -> int:
        assert self.labels is not None
        return int(self.labels[index])

    def where(self, index: int) -> str:
        return f"digits, image {index}"
