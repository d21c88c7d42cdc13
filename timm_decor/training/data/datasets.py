"""--dataset and --data-dir into sources of images: which kind, which folder, which split."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map

from timm_decor.errors import UserError, first_line
from timm_decor.text import near
from timm_decor.training.data.sources import (
    EVAL_NAMES,
    TRAIN_NAMES,
    Cached,
    Digits,
    Parquet,
    ParquetColumns,
    Source,
    TimmDataset,
    decoded_bytes,
)

_KINDS = ("digits", "parquet", "folder", "torch/", "hfds/")
_CACHE_LIMIT = 2**30  # bytes of decoded images that are cached without being asked


def open_source(args: argparse.Namespace, split: str, mode: str) -> Source:
    """The labelled images of one split, checked as far as that is possible without decoding them all.

    Args:
        args: the data arguments of train.py or validate.py.
        split: name of the split, with rows if the data set knows them.
        mode: PIL colour mode, RGB or L.

    Raises:
        UserError: unknown kind, missing or empty folder, no such split, missing column.
    """
    name = args.dataset or ("folder" if args.data_dir else "digits")
    kind = name.split("/", 1)[0].lower()
    if kind == "digits":
        source: Source = Digits(split, mode)
    elif kind == "parquet":
        source = Parquet(_existing(args.data_dir, name), split, mode, ParquetColumns(args.input_key, args.target_key))
    elif kind in ("folder", "torch", "hfds") and ("/" in name or kind == "folder"):
        source = _timm_source(args, name, kind, split, mode)
    else:
        raise UserError(f"unknown dataset '{name}'{near(name, _KINDS)}; datasets: {', '.join(_KINDS)}")
    if not len(source):
        raise UserError(f"{name}, split {split}: no images")
    cache = args.cache_images
    if cache is None:
        cache = kind in ("digits", "parquet") and decoded_bytes(source) < _CACHE_LIMIT
    return Cached(source) if cache else source


def _existing(data_dir: str | None, name: str) -> Path:
    if not data_dir:
        raise UserError(f"--dataset {name} needs --data-dir")
    root = Path(data_dir)
    if not root.exists():
        raise UserError(f"data folder {root} does not exist")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder")
    if not any(root.iterdir()):
        raise UserError(f"data folder {root} is empty")
    return root


def _timm_source(args: argparse.Namespace, name: str, kind: str, split: str, mode: str) -> Source:
    if kind == "hfds" and find_spec("datasets") is None:
        raise UserError(f"--dataset {name} needs Hugging Face datasets: pip install 'timm-decor[data]'")
    try:
        if kind == "folder":
            return _folder(args, split, mode)
        if kind == "torch":
            dataset = create_dataset(name, root=args.data_dir, split=split, download=args.dataset_download)
        else:
            dataset = create_dataset(
                name,
                root=args.data_dir,
                split=split,
                input_img_mode=mode,
                input_key=args.input_key or "image",
                target_key=args.target_key or "label",
            )
        return TimmDataset(dataset, name, mode)
    except (RuntimeError, ValueError, OSError, AssertionError, ImportError, KeyError, TypeError) as error:
        raise UserError(f"cannot open {name}, split {split}: {first_line(error)}") from error


def _folder(args: argparse.Namespace, split: str, mode: str) -> Source:
    root = _existing(args.data_dir, "folder")
    folder = _split_folder(root, split)
    if args.class_map:
        class_map = load_class_map(args.class_map, str(root))
    else:
        # the training folder numbers the classes, also for an evaluation split that lacks some of them
        train = next((root / word for word in TRAIN_NAMES if (root / word).is_dir()), folder)
        names = sorted(path.name for path in train.iterdir() if path.is_dir())
        class_map = {label: i for i, label in enumerate(names)}
        strangers = {path.name for path in folder.iterdir() if path.is_dir()} - set(names)
        if strangers:
            raise UserError(f"{folder} has class '{min(strangers)}', which {train} has not")
    if not class_map:
        raise UserError(f"no class folders in {folder}: images are expected in {folder}/<class>/")
    source = TimmDataset(create_dataset("", root=str(folder), class_map=class_map, search_split=False), "", mode)
    source.num_classes = len(class_map)
    return source


def _split_folder(root: Path, split: str) -> Path:
    wanted = TRAIN_NAMES if split in TRAIN_NAMES else EVAL_NAMES if split == "validation" else (split,)
    for word in wanted:
        if (root / word).is_dir():
            return root / word
    have = sorted(path.name for path in root.iterdir())[:5]
    raise UserError(f"{root} has no folder '{wanted[0]}' for split '{split}'; it has: {', '.join(have)}")
