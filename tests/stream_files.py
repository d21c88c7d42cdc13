"""Small data sets to be streamed: tar shards and parquet files of 8 x 8 images, each of its own grey."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

LENGTHS = (7, 3, 11, 1, 16, 2)  # images in each shard: 40, in no order and of no common size
CLASSES = 3


def encoded(grey: int, size: int = 8) -> bytes:
    """A png."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), grey, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """A shard of samples: a key, and bytes by extension."""
    with tarfile.open(path, "w") as tar:
        for key, fields in samples:
            for extension, data in fields.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_info(folder: Path, lengths: Sequence[int] = LENGTHS, total: int | None = None) -> None:
    """_info.json of two splits, which are the same shards."""
    names = [f"train-{number:04d}.tar" for number in range(len(lengths))]
    split = {"filenames": names, "shard_lengths": list(lengths), "num_samples": total or sum(lengths)}
    splits = {name: {"name": name, **split} for name in ("train", "validation")}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))


def write_shards(folder: Path, lengths: Sequence[int] = LENGTHS) -> Path:
    """Image i, of all shards together, has grey i and label i % CLASSES in .cls; its json has `other`, one more."""
    folder.mkdir(parents=True, exist_ok=True)
    grey = 0
    for number, length in enumerate(lengths):
        samples = []
        for i in range(grey, grey + length):
            fields = {"png": encoded(i), "cls": b"%d" % (i % CLASSES), "json": json.dumps({"other": i % CLASSES + 1})}
            samples.append((f"{i:05d}", {key: v if isinstance(v, bytes) else v.encode() for key, v in fields.items()}))
        write_tar(folder / f"train-{number:04d}.tar", samples)
        grey += length
    write_info(folder, lengths)
    return folder


def write_parquets(folder: Path, lengths: Sequence[int] = LENGTHS) -> Path:
    """The same as Hugging Face `datasets` writes parquet, in row groups of four; the classes are a, b, c."""
    folder.mkdir(parents=True, exist_ok=True)
    label = {"names": ["a", "b", "c"], "_type": "ClassLabel"}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    grey = 0
    for split, number, length in (*(("train", *pair) for pair in enumerate(lengths)), ("test", 0, 5)):
        rows = range(grey, grey + length)
        table = pa.table({
            "image": [{"bytes": encoded(i), "path": f"{i}.png"} for i in rows],
            "label": pa.array([i % CLASSES for i in rows], pa.int64()),
        })  # fmt: skip
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        total = len(lengths) if split == "train" else 1
        pq.write_table(table, folder / f"{split}-{number:05d}-of-{total:05d}.parquet", row_group_size=4)
        grey += length
    return folder
