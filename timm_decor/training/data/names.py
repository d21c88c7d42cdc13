"""Classes have names: labels are compared by them, never assumed to be numbered alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from timm_decor.errors import UserError
from timm_decor.text import near
from timm_decor.training.data.sources import Source


class Renumbered:
    """A source whose labels are numbered as another list of class names says.

    Args:
        source: labelled images; kept under that name.
        names: the classes' names by their new label.
        numbers: new label by old label; -1 for classes without images.
    """

    def __init__(self, source: Source, names: Sequence[str], numbers: np.ndarray) -> None:
        self.source, self._numbers = source, numbers
        self.class_names = list(names)
        self.num_classes: int | None = len(names)
        self.labels = None if source.labels is None else numbers[source.labels]
        self.notes = source.notes

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> Image.Image:
        return self.source.image(index)

    def label(self, index: int) -> int:
        return int(self._numbers[self.source.label(index)])

    def where(self, index: int) -> str:
        return self.source.where(index)


def numbered_as(source: Source, names: Sequence[str], its: str, others: str) -> Source:
    """The source with its labels numbered as `names` are, by name.

    Args:
        source: as it is, where it does not know its classes' names.
        names: of the other side, by label; nothing is done where it is empty.
        its: what the source is, for messages.
        others: whose names those are.

    Raises:
        UserError: the source has images of a class that the other side does not know, or a name stands for two.
    """
    mine = source.class_names
    if not mine or not names or list(mine) == list(names):
        return source
    for side, known in ((its, mine), (others, names)):
        twice = next((name for i, name in enumerate(known) if name in known[:i]), None)
        if twice is not None:
            raise UserError(f"{side} has two classes '{twice}', so that classes cannot be matched by name")
    number = {name: label for label, name in enumerate(names)}
    used = range(len(mine)) if source.labels is None else np.unique(source.labels)
    for label in used:
        if mine[label] not in number:
            raise UserError(f"{its} has class '{mine[label]}', which {others} has not{near(mine[label], names)}")
    return Renumbered(source, names, np.array([number.get(name, -1) for name in mine]))


def check_labels(source: Source, classes: int, its: str) -> None:
    """Refuse labels that the model has no class for, where the source knows all of them without decoding images.

    Raises:
        UserError: names the first one.
    """
    if source.labels is None:
        return
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= classes))
    if len(wrong):
        label, more = int(source.labels[wrong[0]]), f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"{its}: image {source.where(int(wrong[0]))} has label {label}{more}; with {classes} classes "
            f"labels are 0 to {classes - 1}"
        )
