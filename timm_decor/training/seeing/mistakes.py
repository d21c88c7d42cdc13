"""What a model gets wrong: the confusion matrix, and the images with the highest loss as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from timm_decor.text import csv_text
from timm_decor.training.data.sources import Source
from timm_decor.training.seeing.drawing import label, plain_text

MOST_PICTURES = 36
_MOST_NUMBERS = 20  # classes up to which each cell of the matrix shows its count
_MOST_NAMES = 50  # classes up to which the axes name them


def confusion(seen: Any, classes: int) -> Any:
    """Counts, (classes, classes): row is the label, column what was predicted.

    Args:
        seen: (N, 4), as `evaluate` collects it.
        classes: of the model.
    """
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (seen[:, 0].astype(int), seen[:, 1].astype(int)), 1)
    return counts


@plain_text()
def write_confusion(counts: Any, names: Sequence[str], path: Path) -> None:
    """The matrix as a CSV file, and beside it as a picture that shows the share of each row."""
    rows = [[name, *row] for name, row in zip(names, counts.tolist(), strict=True)]
    path.write_text(
        csv_text([["label", *(f"predicted {name}" for name in names)], *rows]), encoding="utf-8", newline=""
    )
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
    if len(names) <= _MOST_NUMBERS:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    right, total = int(np.trace(counts)), int(counts.sum())
    axes.set_title(f"{right} of {total} images right ({100 * right / total:.2f} %)", fontsize=10)
    figure.savefig(path.with_suffix(".png"), dpi=130, format="png")


def write_worst(source: Source, seen: Any, names: Sequence[str], path: Path) -> None:
    """The images with the highest loss, as the data set has them, each with its label and what was predicted."""
    shown = []
    for index in np.argsort(-seen[:, 2], kind="stable")[:MOST_PICTURES]:
        right, predicted, loss, confidence = seen[index]
        first, second = (label(names[int(number)], 18) for number in (right, predicted))
        text = f"{first}\n{second} {100 * confidence:.0f} %, loss {loss:.1f}"
        shown.append((int(index), text, "#b02a3c" if int(right) != int(predicted) else "black"))
    write_sheet(source, shown, "highest loss first: label, then what was predicted", path)


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
    figure.savefig(path, dpi=130, format="png")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
