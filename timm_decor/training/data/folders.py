"""Image folders: <root>/<split>/<class>/..., numbered as timm numbers them."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from timm_decor.errors import UserError
from timm_decor.text import listed
from timm_decor.training.data.decoding import decode
from timm_decor.training.data.sources import EVAL_NAMES, TRAIN_NAMES, split_of
from timm_decor.training.options import DataOptions


class Folder:
    """Every image that Pillow reads below the class folders of a split; its label is the first folder's.

    Files and folders whose names begin with a dot are passed over. What else is left out is counted in `notes`.

    Args:
        root: with a folder for each split.
        split: its name; no part of it.
        mode: PIL colour mode.
        class_map: text file, a class name a line, by label; None numbers the training split's folders as timm does.

    Raises:
        UserError: no such split, a part of one, no images, or a class folder that the training split does not have.
    """

    def __init__(self, root: Path, split: str, mode: str, class_map: Path | None = None) -> None:
        name, rows = split_of(split)
        if rows != slice(None, None):  # they are in the order of their classes, so that a part would lack some
            raise UserError(f"split {split!r}: a part of a folder would lack whole classes; give the whole, {name}")
        folder = _split_folder(root, name)
        self._mode = mode
        self.notes: list[str] = []
        # the training folder numbers the classes, also for an evaluation split that lacks some of them
        train = next((root / word for word in TRAIN_NAMES if (root / word).is_dir()), folder)
        self.class_names = read_class_map(class_map) if class_map else _class_names(train)
        if not self.class_names:
            raise UserError(f"no class folders with images in {train}: images are expected in {train}/<class>/")
        self.num_classes: int | None = len(self.class_names)
        number = {name: label for label, name in enumerate(self.class_names)}
        found: list[tuple[str, int]] = []
        left_out: Counter[str] = Counter()
        for at, files in visible_files(folder):
            below = os.path.relpath(at, folder).split(os.sep)[0]  # "." for files in no class folder
            label = number.get(below)
            for file in files:
                if not is_readable(file):
                    left_out[f"'{os.path.splitext(file)[1]}' is no image format that Pillow reads"] += 1
                elif at == str(folder):
                    left_out["not in a class folder"] += 1
                elif label is None and class_map:
                    left_out[f"class map {class_map} has no '{below}'"] += 1
                elif label is None:
                    raise UserError(f"{folder} has class '{below}', which {train} has not")
                else:
                    found.append((os.path.join(at, file), label))
        self.notes += [f"{folder}: {count} files left out: {why}" for why, count in sorted(left_out.items())]
        empty = sorted({*self.class_names} - {self.class_names[label] for _, label in found})
        if empty and (class_map or folder == train):
            source = f", which class map {class_map} names" if class_map else ""
            self.notes.append(f"{folder} has no images of {listed(empty)}{source}")
        found.sort(key=lambda item: name_order(item[0]))
        if not found:
            raise UserError(f"{folder}, split {split}: no images")
        self._paths = [path for path, _ in found]
        self.labels: np.ndarray | None = np.array([label for _, label in found])

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> Image.Image:
        return decode(Path(self._paths[index]), self._mode)

    def label(self, index: int) -> int:
        assert self.labels is not None
        return int(self.labels[index])

    def where(self, index: int) -> str:
        return self._paths[index]


@functools.cache
def readable_endings() -> frozenset[str]:
    """File name endings of the formats that this Pillow opens, in lower case, with their dot."""
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def class_map_file(options: DataOptions) -> Path | None:
    """--class-map, which timm looks for in the data folder as well."""
    if not options.class_map:
        return None
    places = (Path(options.class_map), Path(options.data_dir or "", options.class_map))
    return next((path for path in places if path.is_file()), places[0])


def read_class_map(path: Path) -> list[str]:
    """Class names by label: a text file with a name a line, as timm reads it.

    Raises:
        UserError: no such file, no text, a name twice, or an empty line before the last name.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"cannot read class map {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:  # among them timm's .pkl, which could call anything as it loads
        raise UserError(f"class map {path} is no text: a class name a line is expected") from error
    while lines and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line:
            raise UserError(f"class map {path}, line {number}: an empty line is no class, and would number those after")
        if line in lines[: number - 1]:
            raise UserError(f"class map {path}, line {number}: '{line}' is there twice")
    if not lines:
        raise UserError(f"class map {path} is empty")
    return lines


def _split_folder(root: Path, split: str) -> Path:
    wanted = TRAIN_NAMES if split in TRAIN_NAMES else EVAL_NAMES if split == "validation" else (split,)
    for word in wanted:
        if (root / word).is_dir():
            return root / word
    have = sorted(path.name for path in root.iterdir())[:5]
    raise UserError(f"{root} has no folder '{wanted[0]}' for split '{split}'; it has: {', '.join(have)}")


def _class_names(folder: Path) -> list[str]:
    """The class folders that hold an image, in timm's order."""
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted((name for name in names if _holds_image(folder / name)), key=name_order)


def name_order(name: str) -> tuple[list[Any], str]:
    """timm's: numbers in names count as numbers, capitals do not; names that are alike in that keep an order, too."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))], name


def _holds_image(folder: Path) -> bool:
    return any(is_readable(file) for _, files in visible_files(folder) for file in files)


def is_readable(name: str) -> bool:
    """Whether a file's name ends as those of images do."""
    return os.path.splitext(name)[1].lower() in readable_endings()


def visible_files(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders, from this one down, each with its files; without names that begin with a dot."""
    for at, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield at, [name for name in files if not name.startswith(".")]
