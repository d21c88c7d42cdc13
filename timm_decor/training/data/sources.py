"""Where images come from: every source is a sequence of PIL images with labels, and can say where each one lies."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from timm_decor.errors import UserError, first_line
from timm_decor.text import near

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "val", "valid", "eval", "test")


class Source(Protocol):
    """Labelled images.

    Attributes:
        num_classes: number of classes, or None where the source does not know.
        class_names: the classes' names by label, or empty where the source does not know.
    """

    num_classes: int | None
    class_names: list[str]

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
        self._labels = labels[chosen]
        self._mode = mode

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index]).convert(self._mode)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def where(self, index: int) -> str:
        return f"digits, image {index}"


@dataclass
class ParquetColumns:
    """Which columns to read; None looks for the names that Hugging Face data sets use."""

    image: str | None = None
    label: str | None = None


class Parquet:
    """Parquet files in the layout of the Hugging Face `datasets` image feature.

    `<split>*.parquet`, in the folder or its `data/`, with a column `image` (bytes, or a struct of bytes and path) and
    an integer column `label`; class names in `classes.json` or in the files' own metadata are optional.
    """

    def __init__(self, root: Path, split: str, mode: str, columns: ParquetColumns) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        name, rows = split_of(split)
        self._files = _parquet_files(root, name)
        tables = []
        for file in self._files:
            try:
                table = pq.read_table(file)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"cannot read {file}: {first_line(error)}") from error
            image = _column(file, table.column_names, columns.image, ("image", "img"))
            label = _column(file, table.column_names, columns.label, ("label", "labels", "fine_label"))
            if not pa.types.is_integer(table.schema.field(label).type):
                raise UserError(f"{file}: column '{label}' holds {table.schema.field(label).type}, not integer labels")
            tables.append((table.column(image), table.column(label)))
        self._lengths = np.array([len(images) for images, _ in tables])
        self._images = pa.chunked_array([chunk for images, _ in tables for chunk in images.chunks])
        labels = np.concatenate([column.to_numpy(zero_copy_only=False) for _, column in tables])
        self._rows = rows_of(rows, len(labels), f"{root}, split {split}")
        self._labels = labels
        self._mode = mode
        if not np.issubdtype(labels.dtype, np.integer):  # nulls turn the column into floats
            raise UserError(f"{self.where(int(np.flatnonzero(np.isnan(labels))[0]))}: no label")
        self.class_names = _class_names(root, table.schema.metadata or {}, label)
        self.num_classes: int | None = len(self.class_names) or int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Image.Image:
        value = self._images[int(self._rows[index])].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise ValueError("the row holds no image bytes")
        return Image.open(io.BytesIO(data)).convert(self._mode)

    def label(self, index: int) -> int:
        return int(self._labels[self._rows[index]])

    def where(self, index: int) -> str:
        row = int(self._rows[index])
        file = int(np.searchsorted(np.cumsum(self._lengths), row, side="right"))
        value = self._images[row].as_py()
        path = value.get("path") if isinstance(value, dict) else None
        named = f" ({path})" if path else ""
        return f"{self._files[file].name}, row {row - int(self._lengths[:file].sum())}{named}"


def _parquet_files(root: Path, name: str) -> list[Path]:
    wanted = TRAIN_NAMES if name in TRAIN_NAMES else EVAL_NAMES if name == "validation" else (name,)
    found = sorted(root.glob("*.parquet")) or sorted((root / "data").glob("*.parquet"))
    if not found:
        raise UserError(f"no *.parquet files in {root}")
    for word in wanted:
        files = [file for file in found if re.match(rf"{word}(\W|_|\d|$)", file.stem)]
        if files:
            return files
    raise UserError(f"{root} has no {wanted[0]}*.parquet; it has: {', '.join(file.name for file in found[:5])}")


def _column(file: Path, names: list[str], asked: str | None, usual: tuple[str, ...]) -> str:
    for name in (asked,) if asked else usual:
        if name in names:
            return name
    raise UserError(f"{file} has no column '{asked or usual[0]}'; its columns: {', '.join(names)}")


def _class_names(root: Path, metadata: dict[bytes, bytes], label: str) -> list[str]:
    path = root / "classes.json"
    try:
        if path.is_file():
            return list(json.loads(path.read_text()))
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return list(features.get(label, {}).get("names", []))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from error


class TimmDataset:
    """A data set made by timm's `create_dataset` or torchvision: image folders, torch/..., hfds/..."""

    def __init__(self, dataset: Any, name: str, mode: str) -> None:
        # timm's ImageDataset skips samples that do not decode; reading below it lets them be named instead
        self._reader = getattr(dataset, "reader", None)
        self._dataset = dataset
        self._name = name
        self._mode = mode
        self._last: tuple[int, Any, Any] | None = None
        classes = getattr(dataset, "classes", None) or getattr(self._reader, "class_to_idx", None) or {}
        self.num_classes: int | None = len(classes) or None
        by_label = sorted(classes, key=lambda name: classes[name]) if isinstance(classes, dict) else classes
        self.class_names = [str(name) for name in by_label]

    def __len__(self) -> int:
        return len(self._dataset)

    def _item(self, index: int) -> tuple[Any, Any]:
        if self._last is None or self._last[0] != index:  # image and label are asked for one after the other
            source = self._dataset if self._reader is None else self._reader
            image, label = source[index][:2]
            self._last = (index, image, label)
        return self._last[1], self._last[2]

    def image(self, index: int) -> Image.Image:
        self._last = None
        image = self._item(index)[0]
        if isinstance(image, Image.Image):
            return image.convert(self._mode)
        with image:
            return Image.open(image).convert(self._mode)

    def label(self, index: int) -> int:
        label = self._item(index)[1]
        if label is None:
            raise ValueError("no label")
        return int(label)

    def where(self, index: int) -> str:
        if self._reader is not None and hasattr(
            self._reader, "samples"
        ):  # image folders; other readers have no file names to give
            return str(self._reader.filename(index, absolute=True))
        return f"{self._name}, image {index}"


class Cached:
    """A source with every image decoded once, as uint8 pixels in memory."""

    def __init__(self, source: Source) -> None:
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self._source = source
        self._items = []
        for index in range(len(source)):
            image, label = read(source, index)
            self._items.append((np.asarray(image), label))
        shapes = {pixels.shape for pixels, _ in self._items}
        if len(shapes) == 1:  # one array instead of many: forked workers then share its pages
            stacked = np.stack([pixels for pixels, _ in self._items])
            self._items = [(stacked[i], label) for i, (_, label) in enumerate(self._items)]

    def __len__(self) -> int:
        return len(self._items)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._items[index][0])

    def label(self, index: int) -> int:
        return self._items[index][1]

    def where(self, index: int) -> str:
        return self._source.where(index)


def decoded_bytes(source: Source) -> int:
    """The memory that `Cached` would need, judged by the first images."""
    some = [np.asarray(read(source, index)[0]).nbytes for index in range(min(16, len(source)))]
    return int(np.mean(some) * len(source))
