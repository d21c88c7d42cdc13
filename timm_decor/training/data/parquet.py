"""Parquet files in the layout in which the Hugging Face Hub keeps image data sets."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from timm_decor.errors import UserError, first_line
from timm_decor.text import listed
from timm_decor.training.data.decoding import decode
from timm_decor.training.data.sources import EVAL_NAMES, TRAIN_NAMES, rows_of, split_of
from timm_decor.training.foreign import json_value, read_text, text_list


@dataclass
class ParquetColumns:
    """Which columns to read; None looks for the names that Hugging Face data sets use."""

    image: str | None = None
    label: str | None = None


class Parquet:
    """Parquet files in the layout of the Hugging Face `datasets` image feature.

    `<split>*.parquet`, in the folder or its `data/`, with a column `image` (bytes, or a struct of bytes and path) and
    an integer column `label`. Class names are optional: the files' own metadata number their labels, and
    `classes.json` says which numbers they have here; files without metadata are numbered as it is.

    Args:
        root: the folder.
        split: name, with rows if wanted.
        mode: PIL colour mode.
        columns: where they are not called as usual.

    Raises:
        UserError: no such files, some of a set that are not there, a column that is missing or of another type, a
            label that is missing, class names that contradict each other.
    """

    def __init__(self, root: Path, split: str, mode: str, columns: ParquetColumns) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        name, rows = split_of(split)
        self._files = _parquet_files(root, name)
        self._mode = mode
        self.notes: list[str] = []
        given = class_list(root)
        self.class_names = given
        images: list[Any] = []
        labels: list[np.ndarray] = []
        for file in self._files:
            try:
                table = pq.read_table(file)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"cannot read {file}: {first_line(error)}") from error
            image = _column(file, table.column_names, columns.image, ("image", "img"))
            label = _column(file, table.column_names, columns.label, ("label", "labels", "fine_label"))
            if not pa.types.is_integer(table.schema.field(label).type):
                raise UserError(f"{file}: column '{label}' holds {table.schema.field(label).type}, not integer labels")
            column = table.column(label)
            if column.null_count:
                missing = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
                raise UserError(f"{file.name}, row {missing}: no label")
            images.append(_as_type(table.column(image), images[0].type if images else None, file))
            own = names_in(table.schema.metadata or {}, label)
            self.class_names = self.class_names or own
            labels.append(_renumbered(column.to_numpy(zero_copy_only=False), own, self.class_names, file))
        self._lengths = np.array([len(column) for column in images])
        self._images = pa.chunked_array([chunk for column in images for chunk in column.chunks])
        every = np.concatenate(labels)
        self._rows = rows_of(rows, len(every), f"{root}, split {split}")
        self.labels: np.ndarray | None = every[self._rows]
        self.num_classes: int | None = len(self.class_names) or int(every.max()) + 1

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Image.Image:
        value = self._images[int(self._rows[index])].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise ValueError("the row holds no image bytes")
        return decode(io.BytesIO(data), self._mode)

    def label(self, index: int) -> int:
        assert self.labels is not None
        return int(self.labels[index])

    def where(self, index: int) -> str:
        row = int(self._rows[index])
        file = int(np.searchsorted(np.cumsum(self._lengths), row, side="right"))
        value = self._images[row].as_py()
        path = value.get("path") if isinstance(value, dict) else None
        named = f" ({path})" if path else ""
        return f"{self._files[file].name}, row {row - int(self._lengths[:file].sum())}{named}"


def _parquet_files(root: Path, name: str) -> list[Path]:
    wanted = TRAIN_NAMES if name in TRAIN_NAMES else EVAL_NAMES if name == "validation" else (name,)
    here, below = (sorted(at.glob("[!.]*.parquet")) for at in (root, root / "data"))
    found = here or below
    if not found:
        raise UserError(f"no *.parquet files in {root}")
    for word in wanted:
        files = [file for file in found if re.match(rf"{word}(\W|_|\d|$)", file.stem)]
        files = [file for file in files if _set_of(file)[0] == word] or files  # train beside train_noisy
        if files:
            _check_all_there(files)
            return files
    raise UserError(f"{root} has no {wanted[0]}*.parquet; it has: {', '.join(file.name for file in found[:5])}")


def _check_all_there(files: list[Path]) -> None:
    """Refuse a part of a set, train-00000-of-00002 without train-00001-of-00002, and two sets at once."""
    matches = [match for file in files if (match := re.search(r"-(\d+)-of-(\d+)", file.stem))]
    for total in {match[2] for match in matches}:
        there = {int(match[1]) for match in matches if match[2] == total}
        missing = sorted(set(range(int(total))) - there)
        if missing:
            example = next(match for match in matches if match[2] == total)
            first = f"{example.string[: example.start()]}-{missing[0]:0{len(example[1])}}-of-{total}.parquet"
            raise UserError(f"{files[0].parent}: {len(missing)} of {int(total)} files are missing: {first} ...")
    twice = len({match[1] for match in matches}) < len(matches)  # of two revisions
    if twice or len({_set_of(file) for file in files}) > 1:
        names = listed([file.name for file in files], 4)
        raise UserError(f"{files[0].parent} holds files of more than one set for one split: {names}")


def _as_type(column: Any, wanted: Any, file: Path) -> Any:
    """Images of one file as those of the first: `large_binary` is `binary`, a struct is not."""
    import pyarrow as pa

    if wanted is None or column.type == wanted:
        return column
    try:
        return column.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{file}: its images are {column.type}, those of the first file {wanted}") from error


def _set_of(file: Path) -> tuple[str, str]:
    """What files of one set share: of `train-00000-of-00002-ab12` (train, 00002), of `train_3` (train, "").

    The Hub's older sets have another ending in each file.
    """
    if numbered := re.fullmatch(r"(.*)-\d+-of-(\d+)(-\w+)?", file.stem):
        return numbered[1], numbered[2]
    return re.sub(r"[\W_]*\d+$", "", file.stem), ""


def _column(file: Path, names: list[str], asked: str | None, usual: tuple[str, ...]) -> str:
    for name in (asked,) if asked else usual:
        if name in names:
            return name
    raise UserError(f"{file} has no column '{asked or usual[0]}'; its columns: {', '.join(names)}")


def class_list(root: Path) -> list[str]:
    """The names in classes.json; empty without one."""
    path = root / "classes.json"
    return text_list(json_value(read_text(path), str(path)), str(path)) if path.is_file() else []


def names_in(metadata: dict[bytes, bytes], label: str) -> list[str]:
    """The names that Hugging Face `datasets` writes into a file; empty where there are none, or it is not its form."""
    try:
        names = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _renumbered(labels: np.ndarray, own: list[str], names: list[str], file: Path) -> np.ndarray:
    """A file's labels, numbered by its own names, as `names` number them."""
    if not own or own == names:
        return labels
    wrong = np.flatnonzero((labels < 0) | (labels >= len(own)))
    if len(wrong):
        raise UserError(f"{file.name}, row {wrong[0]} has label {labels[wrong[0]]}; the file names {len(own)} classes")
    number = {name: label for label, name in enumerate(names)}
    stranger = next((own[label] for label in np.unique(labels) if own[label] not in number), None)
    if stranger is not None:
        raise UserError(f"{file} has class '{stranger}', which is not among the other files' or classes.json's names")
    return np.array([number.get(name, -1) for name in own])[labels]
