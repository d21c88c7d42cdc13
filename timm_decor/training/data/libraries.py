"""Data sets that timm's `create_dataset` opens for us: torchvision's, and those of Hugging Face `datasets`."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from timm_decor.training.data.decoding import decode, to_mode
from timm_decor.training.data.sources import rows_of, whole_label

_ALL = slice(None)


class TimmDataset:
    """A data set of torch/... or hfds/..., as timm's `create_dataset` makes it.

    Args:
        dataset: that.
        name: of the data set, for messages.
        mode: PIL colour mode.
        rows: a part of it, as `split_of` reads it.

    Raises:
        UserError: no image is left.
    """

    def __init__(self, dataset: Any, name: str, mode: str, rows: slice = _ALL) -> None:
        # timm's ImageDataset skips samples that do not decode; reading below it lets them be named instead
        self._reader = getattr(dataset, "reader", None)
        self._dataset = dataset
        self._name = name
        self._mode = mode
        self._rows = rows_of(rows, len(dataset), name)
        self._last: tuple[int, Any, Any] | None = None
        classes = getattr(dataset, "classes", None) or getattr(self._reader, "class_to_idx", None) or {}
        self.num_classes: int | None = len(classes) or None
        by_label = sorted(classes, key=lambda name: classes[name]) if isinstance(classes, dict) else classes
        self.class_names = [str(name) for name in by_label]
        self.notes: list[str] = []
        targets = getattr(dataset, "targets", None)  # torchvision's name for all labels
        known = isinstance(targets, list) and all(isinstance(label, int) for label in targets)
        self.labels: np.ndarray | None = np.array(targets)[self._rows] if known else None

    def __len__(self) -> int:
        return len(self._rows)

    def _item(self, index: int) -> tuple[Any, Any]:
        if self._last is None or self._last[0] != index:  # image and label are asked for one after the other
            source = self._dataset if self._reader is None else self._reader
            image, label = source[int(self._rows[index])][:2]
            self._last = (index, image, label)
        return self._last[1], self._last[2]

    def image(self, index: int) -> Image.Image:
        self._last = None
        image = self._item(index)[0]
        if isinstance(image, Image.Image):
            return to_mode(image, self._mode)
        with image:
            return decode(image, self._mode)

    def label(self, index: int) -> int:
        label = self._item(index)[1]
        if label is None:
            raise ValueError("no label")
        return whole_label(label)

    def where(self, index: int) -> str:
        return f"{self._name}, image {int(self._rows[index])}"
