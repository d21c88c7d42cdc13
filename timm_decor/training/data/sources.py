"""Where images come from: every source is a sequence of PIL images with labels, and can say where each one lies."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from timm_decor.errors import UserError, first_line

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "val", "valid", "eval", "test")


class Source(Protocol):
    """Labelled images.

    Attributes:
        num_classes: number of classes, or None where the source does not know.
        class_names: the classes' names by label, or empty where the source does not know.
        labels: of all images, (N,), or None where that would take decoding them.
        notes: what a person should know of it, a line each: what was left out, and why.
    """

    num_classes: int | None
    class_names: list[str]
    labels: np.ndarray | None
    notes: list[str]

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """The image, decoded, in the source's colour mode. May raise anything: `read` turns it into a UserError."""

    def label(self, index: int) -> int: ...

    def where(self, index: int) -> str:
        """File, row or path, for messages."""


def read(source: Source, index: int) -> tuple[Image.Image, int]:
    """One decoded image with its label.

    Raises:
        UserError: the image cannot be decoded, or its label is out of range; both named by `where`.
    """
    try:
        image, label = source.image(index), source.label(index)
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise UserError(f"cannot decode image {source.where(index)}: {first_line(error)}") from error
    if label < 0:
        raise UserError(f"image {source.where(index)} has label {label}: labels start at 0")
    return image, label


def whole_label(value: Any) -> int:
    """A label as a number; text is read, and a fraction is no label.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str | bytes):
        return int(value)
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"label {value!r} is no whole number") from None


def split_of(text: str) -> tuple[str, slice]:
    """A split's name and rows: `train`, `train[:1000]`, `train[20%:80%]`.

    Returns:
        The name, and a slice whose bounds are ints (rows) or floats (shares), to be resolved by `rows_of`.

    Raises:
        UserError: not of that form.
    """
    match = re.fullmatch(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?", text)
    if not match:
        raise UserError(f"split {text!r}: write a name, or a name with rows as in train[:1000] or train[:20%]")

    def bound(word: str | None) -> int | float | None:
        if word is None:
            return None
        return float(word[:-1]) / 100 if word.endswith("%") else int(word)

    return match[1], slice(bound(match[2]), bound(match[3]))


def rows_of(rows: slice, length: int, what: str) -> np.ndarray:
    """The row numbers that a slice from `split_of` selects out of `length`.

    Raises:
        UserError: none is left.
    """

    def bound(value: int | float | None) -> int | None:
        return round(value * length) if isinstance(value, float) else value

    chosen = np.arange(length)[bound(rows.start) : bound(rows.stop)]
    if not len(chosen):
        raise UserError(f"{what}: no images")
    return chosen


class Cached:
    """A source whose images are decoded once and kept as uint8 pixels, as far as there is room for them.

    Args:
        source: labelled images.
        limit: bytes; what is beyond them is decoded whenever it is asked for. None for no limit.
    """

    def __init__(self, source: Source, limit: int | None = None) -> None:
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.notes = source.notes
        self._source = source
        kept: list[np.ndarray] = []
        labels, room = [], float("inf") if limit is None else limit
        for index in range(len(source)):
            image, label = read(source, index)
            pixels = np.asarray(image)
            room -= pixels.nbytes
            if room < 0:
                break
            kept.append(pixels)
            labels.append(label)
        # one array instead of many, where that is possible: forked workers then share its pages
        self._kept: Sequence[np.ndarray] | np.ndarray = kept
        if len({pixels.shape for pixels in kept}) == 1:
            self._kept = np.stack(kept)
        self.labels = np.array(labels) if len(labels) == len(source) else source.labels

    def __len__(self) -> int:
        return len(self._source)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._kept[index]) if index < len(self._kept) else self._source.image(index)

    def label(self, index: int) -> int:
        return self._source.label(index) if self.labels is None else int(self.labels[index])

    def where(self, index: int) -> str:
        return self._source.where(index)


def decoded_bytes(source: Source) -> int:
    """The memory that `Cached` would need, judged by the first images."""
    some = [np.asarray(read(source, index)[0]).nbytes for index in range(min(16, len(source)))]
    return int(np.mean(some) * len(source))
