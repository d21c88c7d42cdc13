"""What a model gets wrong: the confusion matrix, and the images with the highest loss, in files and for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from timm_decor.text import csv_text
from timm_decor.training.data.sources import Source, read
from timm_decor.training.keeping.folder import RunFolder
from timm_decor.training.seeing.drawing import label, plain_text

MOST_PICTURES = 36
MOST_NUMBERS = 20  # classes up to which each cell of the matrix shows its count
_MOST_NAMES = 50  # classes up to which the axes name them
_IN_REPORT = 12  # images with the highest loss
_IN_SAMPLE = 12
_THUMBNAIL = 128  # pixels of their longer side


@dataclass(frozen=True)
class Judged:
    """An image and what a model makes of it.

    Attributes:
        index: in the split, from 0.
        label: its class.
        predicted: what it was taken for.
        loss: its cross-entropy.
        confidence: the prediction's probability.
    """

    index: int
    label: int
    predicted: int
    loss: float
    confidence: float


@dataclass(frozen=True)
class Mistakes:
    """What the report shows of a checkpoint's mistakes.

    Attributes:
        weights: the checkpoint's file.
        epoch: after which it was written; None where it does not say so.
        names: of the classes.
        counts: `confusion`.
        worst: the images with the highest loss, the highest first, and each as a small picture's data: URL.
    """

    weights: str
    epoch: int | None
    names: list[str]
    counts: Any
    worst: list[tuple[Judged, str]]

    @classmethod
    def of(cls, weights: str, epoch: int | None, source: Source, seen: Any, classes: int) -> Mistakes:
        """What there is to show.

        Args:
            weights: the checkpoint's file.
            epoch: after which it was written.
            source: the images.
            seen: (N, 4), as `evaluate` collects it.
            classes: of the model.
        """
        worst = [(wrong, _url(read(source, wrong.index)[0])) for wrong in worst_of(seen, _IN_REPORT)]
        return cls(weights, epoch, class_names(source, classes), confusion(seen, classes), worst)


def class_names(source: Source, classes: int) -> list[str]:
    """A name for each class of the model: the data's, or its number."""
    names = list(source.class_names)[:classes]
    return names + [str(number) for number in range(len(names), classes)]


def confusion(seen: Any, classes: int) -> Any:
    """Counts, (classes, classes): row is the label, column what was predicted.

    Args:
        seen: (N, 4), as `evaluate` collects it.
        classes: of the model.
    """
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (seen[:, 0].astype(int), seen[:, 1].astype(int)), 1)
    return counts


def right_of(counts: Any) -> str:
    """How many images are right, in words."""
    right, total = int(np.trace(counts)), int(counts.sum())
    return f"{right} of {total} images right ({100 * right / total:.2f} %)"


def confused_pairs(counts: Any, most: int) -> Iterator[tuple[int, int, int]]:
    """The pairs of classes that are confused most often: label, what was predicted, how often."""
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    for place in np.argsort(-wrong, axis=None, kind="stable")[:most]:
        row, column = divmod(int(place), len(counts))
        if not wrong[row, column]:
            return
        yield row, column, int(wrong[row, column])


def worst_of(seen: Any, most: int) -> list[Judged]:
    """The images with the highest loss, the highest first."""
    return [_seen_of(seen, place) for place in np.argsort(-seen[:, 2], kind="stable")[:most]]


def _seen_of(seen: Any, place: int) -> Judged:
    given, predicted, loss, confidence = seen[place]
    return Judged(int(place), int(given), int(predicted), float(loss), float(confidence))


@plain_text()
def write_confusion(counts: Any, names: Sequence[str], path: Path) -> None:
    """The matrix as a CSV file, and beside it as a picture that shows the share of each row."""
    rows = [[name, *row] for name, row in zip(names, counts.tolist(), strict=True)]
    table = csv_text([["label", *(f"predicted {name}" for name in names)], *rows])
    RunFolder(path.parent).write_bytes(path.name, table.encode())
    shown = [label(name) for name in names]
    size = min(14.0, max(4.5, 1.8 + 0.42 * len(names)))
    figure = _figure(size, 0.88 * size)
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02, label="share of the label's images")
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if len(names) <= _MOST_NAMES:
        axes.set_xticks(range(len(names)), shown, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), shown, fontsize=8)
    if len(names) <= MOST_NUMBERS:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    axes.set_title(right_of(counts), fontsize=10)
    _save(figure, path.with_suffix(".png"))


def write_worst(source: Source, seen: Any, names: Sequence[str], path: Path) -> None:
    """The images with the highest loss, as the data set has them, each with its label and what was predicted."""
    shown = [(wrong, f", loss {wrong.loss:.1f}") for wrong in worst_of(seen, MOST_PICTURES)]
    _write_predicted(source, shown, names, "highest loss first: label, then what was predicted", path)


def write_sample(source: Source, seen: Any, names: Sequence[str], path: Path) -> None:
    """Images from all over the split, chosen before anything is known of them, with label and prediction."""
    places = np.linspace(0, len(seen) - 1, min(_IN_SAMPLE, len(seen))).round().astype(int)
    shown = [(_seen_of(seen, place), "") for place in places]
    _write_predicted(source, shown, names, "label, then what was predicted", path)


def _write_predicted(
    source: Source, shown: Sequence[tuple[Judged, str]], names: Sequence[str], heading: str, path: Path
) -> None:
    sheet = []
    for seen, more in shown:
        first, second = (label(names[number], 18) for number in (seen.label, seen.predicted))
        text = f"{first}\n{second} {100 * seen.confidence:.0f} %{more}"
        sheet.append((seen.index, text, "#b02a3c" if seen.label != seen.predicted else "black"))
    write_sheet(source, sheet, heading, path)


@plain_text()
def write_sheet(source: Source, shown: Sequence[tuple[int, str, str]], heading: str, path: Path) -> None:
    """Images on one picture.

    Args:
        source: the images.
        shown: which of them, `MOST_PICTURES` at most: number, text and the text's colour.
        heading: above all of them.
        path: a png.
    """
    columns = min(6, len(shown))
    rows = -(-len(shown) // columns)
    figure = _figure(1.75 * columns, 2.05 * rows + 0.4)
    figure.suptitle(heading, fontsize=10)
    for place, (index, text, colour) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(np.asarray(source.image(index)), cmap="gray", interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(text, fontsize=7.5, color=colour)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, dpi=130, format="png")
    RunFolder(path.parent).write_bytes(path.name, data.getvalue())


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _url(image: Image.Image) -> str:
    """A small picture as a data: URL, without what else the file says of it."""
    small = max(image.size) <= _THUMBNAIL // 2  # every pixel counts
    image = image.copy()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    kind = "png" if small else "jpeg"
    data = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(data, kind, **({} if small else {"quality": 80}))
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
