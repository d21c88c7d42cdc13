"""Files that are read from front to back: WebDataset's tar shards, and the parquet files that hfids/ streams.

timm's readers (`timm.data.readers`) find them: which files a split has, how many images, which classes. Which images
are read in which order is decided in `streams`: timm's own iteration evens workers out by repeating images and leaving
others out, and passes over what it cannot decode.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers.reader_factory import create_reader

from timm_decor.errors import UserError, first_line
from timm_decor.text import listed
from timm_decor.training.data.decoding import decode
from timm_decor.training.data.folders import class_map_file, read_class_map
from timm_decor.training.data.parquet import class_list, names_in
from timm_decor.training.data.sources import whole_label
from timm_decor.training.options import DataOptions

IMAGE_KEYS = "jpg;jpeg;png;webp"  # timm's, and jpeg
_NAME = re.compile(r"[\w.+=@%-]+(/[\w.+=@%-]+)*")  # what becomes part of a URL or, with pipe:, of a command


@dataclass(frozen=True)
class Sample:
    """An image that is not decoded yet.

    Attributes:
        index: in the split, from 0.
        fields: what its shard has of it, by extension or column.
        where: the shard and its key or row there.
    """

    index: int
    fields: dict[str, Any]
    where: str


class Shards:
    """A split in shards of known length; a `Source` that is slow for single images, which are read up to.

    Args:
        names: of the shards, for messages.
        lengths: images in each.
        mode: PIL colour mode.
        shuffle_size: (samples that are shuffled together, samples before the first one is given).

    Attributes:
        starts: the number of each shard's first image, and behind them that of all images.
    """

    def __init__(
        self, names: Sequence[str], lengths: Sequence[int], mode: str, shuffle_size: tuple[int, int], classes: list[str]
    ) -> None:
        self.names, self.starts = list(names), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.shuffle_size = shuffle_size
        self.class_names = classes
        self.num_classes: int | None = len(classes) or None
        self.labels: np.ndarray | None = None
        self.notes: list[str] = []
        self._mode = mode
        self._held: dict[int, Sample] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def samples(self, shard: int, first: int = 0) -> Iterator[Sample]:
        """A shard's images from its `first` on.

        Raises:
            UserError: it cannot be read, or holds more or fewer than it should.
        """
        length = int(self.starts[shard + 1] - self.starts[shard])
        at = first
        try:
            for fields, key in self._read(shard, first):
                if at == length:
                    at += 1
                    break
                yield Sample(int(self.starts[shard]) + at, fields, f"{self.names[shard]}, {key}")
                at += 1
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:  # pyarrow's are OSError and ValueError
            raise UserError(f"cannot read {self.names[shard]}: {first_line(error)}") from error
        if at != length:
            found = f"only {at}" if at < length else "more"
            raise UserError(f"{self.names[shard]} should hold {length} images and holds {found}: {self._remedy}")

    _remedy = ""

    def _read(self, shard: int, first: int) -> Iterator[tuple[dict[str, Any], str]]:
        """Fields, and how to name them in the shard, from its `first` on."""
        raise NotImplementedError

    def _encoded(self, fields: dict[str, Any]) -> bytes:
        raise NotImplementedError

    def _label(self, fields: dict[str, Any]) -> Any:
        raise NotImplementedError

    def hold(self, samples: Sequence[Sample]) -> None:
        """Have these at hand, instead of those before, so that they need not be looked for."""
        self._held = {sample.index: sample for sample in samples}

    def _sample(self, index: int) -> Sample:
        if index not in self._held:
            shard = int(np.searchsorted(self.starts, index, side="right")) - 1
            self.hold([next(self.samples(shard, index - int(self.starts[shard])))])
        return self._held[index]

    def image(self, index: int) -> Image.Image:
        return decode(io.BytesIO(self._encoded(self._sample(index).fields)), self._mode)

    def label(self, index: int) -> int:
        return whole_label(self._label(self._sample(index).fields))

    def where(self, index: int) -> str:
        return self._sample(index).where


def is_local(root: str) -> bool:
    """Whether shards are in a folder, and not at a URL or behind a command."""
    return "://" not in root and not root.startswith("pipe:")


class TarShards(Shards):
    """wds/: tar files in a folder, or at a URL that webdataset opens. An image is a few files that differ in extension.

    Args:
        options: of the data set.
        split: a name in _info.json; or a pattern of names, as `train-{0000..0009}.tar`, with `|` and a number of images
            where nothing else has it.
        mode: PIL colour mode.

    Raises:
        UserError: no such split, missing shards, shards whose lengths nobody knows, or of another sum.
    """

    _remedy = "write _info.json anew"

    def __init__(self, options: DataOptions, split: str, mode: str) -> None:
        root = str(options.data_dir)
        if find_spec("webdataset") is None:
            raise UserError(f"--dataset {options.dataset} needs webdataset: pip install 'timm-decor[data]'")
        local = is_local(root)
        pattern = "tar" in split or ".." in split  # as timm tells them apart
        if local and not pattern and not any(Path(root, name).is_file() for name in ("_info.json", "info.json")):
            raise UserError(
                f"{root} has no _info.json to name the shards of split '{split}'; without one a split is a "
                f"pattern of their names, as 'train-{{0000..0009}}.tar'"
            )
        # it would say on each process that there is no _info.json, which is no news
        logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.ERROR)
        try:
            reader = create_reader("wds/", root=root, split=split)
            names, total, lengths = _split_of(reader, split, pattern)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            hint = "" if local else "; is its _info.json there?"
            raise UserError(f"cannot open {options.dataset} in {root}: {first_line(error)}{hint}") from error
        odd = next((name for name in names if not _NAME.fullmatch(name) or ".." in name.split("/")), None)
        if odd is not None:
            raise UserError(f"{root}, split {split}: '{odd}' is no name of a shard")
        missing = [name for name in names if local and not Path(root, name).is_file()]
        if missing:
            raise UserError(f"{root}: {len(missing)} of {len(names)} shards are missing: {listed(missing, 3)}")
        self._urls = [os.path.join(root, name) for name in names]
        notes = []
        if lengths is None and local:
            lengths = [_count(url) for url in self._urls]
            notes.append(f"{root}, split {split}: images counted in {len(names)} shards; _info.json would save that")
        if lengths is None:
            raise UserError(
                f"{root}, split {split}: how many images each shard has is not known, so that they cannot be shared "
                f"out; an _info.json with shard_lengths says it (docs/imagenet.md), and shards in a folder are counted"
            )
        if len(lengths) != len(names):
            raise UserError(f"{root}, split {split}: {len(names)} shards are named, with the lengths of {len(lengths)}")
        if min(lengths, default=0) < 0:
            raise UserError(f"{root}, split {split}: a shard of {min(lengths)} images")
        if total and total != sum(lengths):
            raise UserError(f"{root}, split {split}: {total} images are announced, and its shards have {sum(lengths)}")
        self._image_keys = (options.input_key or IMAGE_KEYS).lower().split(";")
        self._target_key = options.target_key or reader.split_info.alt_label
        names_file = class_map_file(options)
        classes = read_class_map(names_file) if names_file else class_list(Path(root)) if local else []
        sizes = reader.sample_shuffle_size, reader.sample_initial_size
        super().__init__(names, lengths, mode, sizes, classes)
        self.notes += notes

    def _read(self, shard: int, first: int) -> Iterator[tuple[dict[str, Any], str]]:
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        url = self._urls[shard]
        stream = gopen(url)
        try:
            files = tar_file_expander([{"url": url, "stream": stream}])
            for fields in itertools.islice(group_by_keys(files), first, None):
                yield fields, fields["__key__"]
        finally:
            with contextlib.suppress(OSError):  # a command that is left before its end fails
                stream.close()

    def _encoded(self, fields: dict[str, Any]) -> bytes:
        for key in self._image_keys:
            if key in fields:
                return fields[key]  # type: ignore[no-any-return]
        raise ValueError(f"no {' or '.join(self._image_keys)} (--input-key); it has {_extensions(fields)}")

    def _label(self, fields: dict[str, Any]) -> Any:
        key = "json" if self._target_key else "cls"
        if key not in fields:
            raise ValueError(f"no label in .{key} (--target-key); it has {_extensions(fields)}")
        if not self._target_key:
            return fields[key]
        values = json.loads(fields[key])
        if self._target_key not in values:
            raise ValueError(f"no '{self._target_key}' in its json (--target-key); there: {', '.join(values)}")
        return values[self._target_key]


def _split_of(reader: Any, split: str, pattern: bool) -> tuple[list[str], int, list[int] | None]:
    """A split's shards, how many images it says that it has, and the lengths of its shards where they are known."""
    if not pattern:
        info = reader.split_info
        return list(info.filenames), int(info.num_samples), [int(length) for length in info.shard_lengths]
    from webdataset.shardlists import expand_urls

    # timm takes all shards of the split that a pattern's name resembles
    names, _, number = split.partition("|")
    files = expand_urls(names)
    known = {
        name: int(length)
        for each in reader.info.get("splits", {}).values()
        for name, length in zip(each["filenames"], each["shard_lengths"], strict=True)
    }
    return files, int(number or 0), [known[file] for file in files] if {*files} <= known.keys() else None


def _count(file: str) -> int:
    """The images in a tar file, by the names in it alone."""
    from webdataset.tariterators import base_plus_ext

    try:
        with tarfile.open(file) as tar:
            keys = (base_plus_ext(member.name)[0] for member in tar if member.isreg())
            return sum(1 for key, _ in itertools.groupby(key for key in keys if key) if not key.startswith("__"))
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error


def _extensions(fields: dict[str, Any]) -> str:
    return ", ".join(key for key in fields if not key.startswith("__")) or "nothing"


class ParquetShards(Shards):
    """hfids/NAME: the parquet files of a data set on the Hub, or of a folder, as Hugging Face `datasets` finds them.

    Args:
        options: of the data set; `data_dir` is where `datasets` keeps what it downloads.
        split: its name.
        mode: PIL colour mode.

    Raises:
        UserError: it cannot be found or is no parquet, no such split or column, or another number than its card says.
    """

    _remedy = "it has changed since the run began"

    def __init__(self, options: DataOptions, split: str, mode: str) -> None:
        name = str(options.dataset)
        if find_spec("datasets") is None:
            raise UserError(f"--dataset {name} needs Hugging Face datasets: pip install 'timm-decor[data]'")
        self._image_key, self._label_key = options.input_key or "image", options.target_key or "label"
        try:
            # the files know better than the data set's card how many images there are; the reader wants a number
            reader = create_reader(name, root=options.data_dir, split=split, num_samples=1, target_key=self._label_key)
            files = reader.builder.config.data_files or {}
            if split not in files:
                raise ValueError(f"no such split; splits: {', '.join(map(str, files)) or 'none'}")
            self._files = [str(file) for file in files[split]]
            other = next((file for file in self._files if not file.endswith(".parquet")), None)
            if other is not None:
                raise ValueError(f"{Path(other).name} is no parquet file, of which alone parts can be read: take hfds/")
            with ThreadPoolExecutor(16) as threads:  # on the Hub each takes two requests
                looked = list(threads.map(self._look_at, self._files))
            said = (reader.builder.info.splits or {}).get(split)
        except UserError:
            raise
        except Exception as error:  # datasets and the Hub raise errors of many libraries
            raise UserError(f"cannot open {name}, split {split}: {first_line(error)}") from error
        lengths = [length for length, _ in looked]
        total = said and said.num_examples
        if total and total != sum(lengths):
            raise UserError(f"{name}, split {split}: {total} images are announced, and its files have {sum(lengths)}")
        classes = sorted(reader.class_to_idx, key=lambda word: int(reader.class_to_idx[word]))
        classes = classes or next((names for _, names in looked if names), [])  # of a folder without a card
        names = [Path(file).name for file in self._files]
        super().__init__(names, lengths, mode, (reader.shuffle_size, reader.shuffle_size // 4), classes)

    def _look_at(self, file: str) -> tuple[int, list[str]]:
        """How many images are in a file, which has the columns, and the names that it has for its classes."""
        import pyarrow.parquet as pq

        with self._open(file) as opened:
            parquet = pq.ParquetFile(opened)
            columns = parquet.schema_arrow.names
            for key in (self._image_key, self._label_key):
                if key not in columns:
                    raise ValueError(f"{Path(file).name} has no column '{key}'; its columns: {', '.join(columns)}")
            return int(parquet.metadata.num_rows), names_in(parquet.schema_arrow.metadata or {}, self._label_key)

    @staticmethod
    def _open(file: str) -> Any:
        import fsspec  # it reads the addresses that datasets gives, as pyarrow's own file systems do not

        return fsspec.open(file, "rb")

    def _read(self, shard: int, first: int) -> Iterator[tuple[dict[str, Any], str]]:
        import pyarrow.parquet as pq

        with self._open(self._files[shard]) as opened:
            parquet, row = pq.ParquetFile(opened), 0
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if row + rows > first:
                    table = parquet.read_row_group(group, columns=[self._image_key, self._label_key])
                    for number in range(max(first - row, 0), rows):
                        fields = {name: table.column(name)[number].as_py() for name in table.column_names}
                        yield fields, f"row {row + number}"
                row += rows

    def _encoded(self, fields: dict[str, Any]) -> bytes:
        value = fields[self._image_key]
        data = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError("the row holds no image bytes")
        return data

    def _label(self, fields: dict[str, Any]) -> Any:
        if fields[self._label_key] is None:
            raise ValueError("no label")
        return fields[self._label_key]
