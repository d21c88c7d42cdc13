"""--dataset and --data-dir into sources of images: which kind, which folder, which split."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from timm.data import create_dataset

from timm_decor.errors import UserError, first_line
from timm_decor.text import near
from timm_decor.training.data.digits import Digits
from timm_decor.training.data.folders import Folder, class_map_file
from timm_decor.training.data.libraries import TimmDataset
from timm_decor.training.data.names import numbered_as
from timm_decor.training.data.parquet import Parquet, ParquetColumns
from timm_decor.training.data.shards import ParquetShards, TarShards, is_local
from timm_decor.training.data.sources import EVAL_NAMES, TRAIN_NAMES, Cached, Source, decoded_bytes, split_of
from timm_decor.training.options import DataOptions, SplitOptions

_KINDS = ("digits", "parquet", "folder", "torch/", "hfds/", "wds/", "hfids/")
_CHECK_THEIR_SPLITS = ("imagenet", "places365", "inaturalist", "inat")  # those of torchvision that have names for them
_CACHE_LIMIT = 2**30  # bytes of decoded images that are cached without being asked


def open_source(options: DataOptions, split: str, mode: str, num_samples: int | None = None) -> Source:
    """The labelled images of one split, checked as far as that is possible without decoding them all.

    Args:
        options: where they are.
        split: name of the split, with rows if the data set knows them.
        mode: PIL colour mode, RGB or L.
        num_samples: images that there should be; None for any number.

    Raises:
        UserError: unknown kind, missing or empty folder, no such split, missing column, another number of images.
    """
    name = options.dataset or ("folder" if options.data_dir else "digits")
    kind, _, rest = name.partition("/")
    kind = kind.lower()
    if rest and kind in ("digits", "parquet", "folder"):
        raise UserError(f"--dataset {name}: {kind} takes no name; its images are those of --data-dir FOLDER")
    if kind == "digits" and options.data_dir:
        raise UserError(f"--dataset digits comes with scikit-learn, not from {options.data_dir}: leave out --data-dir, "
                        f"or name another --dataset")  # fmt: skip
    if kind == "digits":
        source: Source = Digits(split, mode)
    elif kind == "parquet":
        source = Parquet(_existing(options.data_dir, name), split, mode, _columns(options))
    elif kind == "folder":
        source = Folder(_existing(options.data_dir, name), split, mode, class_map_file(options))
    elif kind in ("torch", "hfds") and "/" in name:
        source = _timm_source(options, name, kind, split, mode)
    elif kind in ("wds", "hfids") and "/" in name:
        source = _shards(options, name, kind, split, mode)
    else:
        raise UserError(f"unknown dataset '{name}'{near(name, _KINDS)}; datasets: {', '.join(_KINDS)}")
    if not len(source):
        raise UserError(f"{name}, split {split}: no images")
    if num_samples not in (None, len(source)):
        raise UserError(
            f"{name}, split {split}: it has {len(source)} images, not the {num_samples} that were asked for"
        )
    if options.cache_images:
        return Cached(source)
    small = options.cache_images is None and kind in ("digits", "parquet") and decoded_bytes(source) < _CACHE_LIMIT
    return Cached(source, _CACHE_LIMIT) if small else source


def open_splits(options: DataOptions, splits: SplitOptions, mode: str) -> tuple[Source, Source]:
    """train.py's two splits, the evaluation split numbered as the training split is, by the classes' names.

    Args:
        options: where the images are.
        splits: their names.
        mode: PIL colour mode, RGB or L.

    Raises:
        UserError: as `open_source`, or the evaluation split has a class that the training split does not have.
    """
    train = open_source(options, splits.train_split, mode, splits.train_num_samples)
    evaluation = open_source(options, splits.val_split, mode, splits.val_num_samples)
    its, others = f"split {splits.val_split}", f"split {splits.train_split}"
    evaluation = numbered_as(evaluation, train.class_names, its, others)
    if bool(train.class_names) != bool(evaluation.class_names):
        named, other = (others, its) if train.class_names else (its, others)
        evaluation.notes.append(f"{other} has no class names: its labels are taken to be numbered as {named} is")
    return train, evaluation


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


def _shards(options: DataOptions, name: str, kind: str, split: str, mode: str) -> Source:
    if options.cache_images:
        raise UserError(f"--cache-images: what {name} streams is not kept; parquet and folder can be")
    if kind == "hfids":
        return ParquetShards(options, split, mode)
    if not options.data_dir or is_local(options.data_dir):
        _existing(options.data_dir, name)
    return TarShards(options, split, mode)


def _timm_source(options: DataOptions, name: str, kind: str, split: str, mode: str) -> Source:
    if kind == "hfds" and find_spec("datasets") is None:
        raise UserError(f"--dataset {name} needs Hugging Face datasets: pip install 'timm-decor[data]'")
    try:
        if kind == "torch":
            word, rows = _torch_split(name, split)
            dataset = create_dataset(name, root=options.data_dir, split=word, download=options.dataset_download)
        else:
            rows = slice(None)  # datasets cuts itself
            dataset = create_dataset(
                name,
                root=options.data_dir,
                split=split,
                input_img_mode=mode,
                input_key=options.input_key or "image",
                target_key=options.target_key or "label",
            )
        return TimmDataset(dataset, name, mode, rows)
    except (RuntimeError, ValueError, OSError, AssertionError, ImportError, KeyError, TypeError) as error:
        raise UserError(f"cannot open {name}, split {split}: {first_line(error)}") from error


def _torch_split(name: str, split: str) -> tuple[str, slice]:
    """What timm is to open, and the part of it.

    timm takes what is no word of its own for training for the test images, and cuts `[:1000]` off.

    Raises:
        UserError: a word that torchvision would not look at.
    """
    kind, slash, text = split.rpartition("/")  # of inaturalist, as kingdom/2021_train
    word, rows = split_of(text)
    if word not in (*TRAIN_NAMES, *EVAL_NAMES) and name.rsplit("/", 1)[-1].lower() not in _CHECK_THEIR_SPLITS:
        known = ", ".join((TRAIN_NAMES[0], *EVAL_NAMES))
        raise UserError(f"{name} has no split '{word}'{near(word, (*TRAIN_NAMES, *EVAL_NAMES))}; splits: {known}")
    return f"{kind}{slash}{word}", rows


def _columns(options: DataOptions) -> ParquetColumns:
    return ParquetColumns(options.input_key, options.target_key)
