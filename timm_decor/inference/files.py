"""Images by their paths: files, folders and wildcards, those that do not decode among them."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from timm_decor.errors import UserError, first_line
from timm_decor.training.data.decoding import decode
from timm_decor.training.data.folders import is_readable, name_order, visible_files

FINE, BROKEN = 0, 1  # the labels of `Files`


class Files:
    """A source of images whose label says whether they could be decoded; one that could not is a black square.

    So a broken image among thousands stops nothing, and is known by its label behind loader and workers.

    Args:
        paths: the files.
        mode: PIL colour mode.
    """

    num_classes: int | None = 2
    labels: np.ndarray | None = None

    def __init__(self, paths: Sequence[str], mode: str) -> None:
        self.class_names: list[str] = []
        self.notes: list[str] = []
        self._paths, self._mode = paths, mode
        self._broken = -1  # the last image that did not decode: `read` asks for its label next

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> Image.Image:
        try:
            return decode(Path(self._paths[index]), self._mode)
        except Exception:  # decoders raise whatever they like on broken bytes
            self._broken = index
            return Image.new(self._mode, (64, 64))

    def label(self, index: int) -> int:
        return BROKEN if index == self._broken else FINE

    def where(self, index: int) -> str:
        return self._paths[index]

    def why_broken(self, index: int) -> str:
        """What is wrong with an image, in a line."""
        try:
            decode(Path(self._paths[index]), self._mode)
        except Exception as error:
            return f"cannot decode image {self._paths[index]}: {first_line(error)}"
        return f"image {self._paths[index]} could not be decoded at first"


def find_images(paths: Sequence[str]) -> list[str]:
    """The files that paths stand for, each once, folders and wildcards in the order of names.

    In folders and below them, and by wildcards (`**` as well): all that ends as images do. A file that is named is
    taken whatever it is called.

    Raises:
        UserError: a path where nothing is, or a folder or a wildcard without images.
    """
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            inside = [os.path.join(at, file) for at, files in visible_files(Path(path)) for file in files]
        elif os.path.exists(path):
            found.append(path)
            continue
        else:
            inside = [file for file in glob.glob(path, recursive=True) if os.path.isfile(file)]
            if not inside and not glob.has_magic(path):
                raise UserError(f"no file or folder {path}")
        images = sorted((file for file in inside if is_readable(file)), key=name_order)
        if not images:
            raise UserError(f"{path}: no images")
        found += images
    return list(dict.fromkeys(found))
