"""What a checkpoint of train.py says of itself, in the metadata of its safetensors file, and how that is believed.

Whoever wrote the file wrote the metadata. So it is read as a stranger's: it can name an architecture that is registered
here and how to call it, but no place from which anything would be fetched or loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from timm.data.transforms import str_to_pil_interp
from timm.models import is_model, list_models

from timm_decor.errors import UserError, load_failure
from timm_decor.models import PREFIX
from timm_decor.text import near
from timm_decor.training.foreign import Fields, json_value, parse_json, text_list
from timm_decor.training.parser import CROP_PCT

_NEEDED = ("architecture", "num_classes", "data_config", "model_kwargs")
_CROP_MODES = ("center", "squash", "border")
_LARGEST = 4096  # pixels of a side: more would only fill the memory
# Arguments of timm's create_model by which weights or configurations are fetched from elsewhere.
_PLACES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


@dataclass(frozen=True)
class CheckpointMetadata:
    """What is needed to use a checkpoint without further arguments.

    Attributes:
        architecture: a registered name.
        num_classes: of the model.
        data_config: timm's: input_size, mean, std, interpolation, crop_pct, crop_mode.
        model_kwargs: further arguments of the model.
        label_names: by class index; empty where they are not known.
        epoch: after which the weights were written, from 1; None where the file does not say it.
    """

    architecture: str
    num_classes: int
    data_config: dict[str, Any]
    model_kwargs: dict[str, Any]
    label_names: list[str]
    epoch: int | None = None

    @classmethod
    def read(cls, path: str | Path) -> CheckpointMetadata | None:
        """Read a file's metadata.

        Returns:
            None for a file that says nothing of the kind: timm's own, and all that are no safetensors files.

        Raises:
            UserError: the file cannot be read, or its metadata are not what train.py writes.
        """
        path = str(path)
        if not path.endswith(".safetensors"):
            return None
        if not Path(path).is_file():
            raise UserError(f"no checkpoint file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                found = dict(file.metadata() or {})
                shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118  # no mapping
        except Exception as error:  # on arbitrary bytes the library's errors have no common base
            raise UserError(f"{path} is not a checkpoint: {load_failure(error)}") from error
        if not set(_NEEDED[1:]) & found.keys():
            return None
        metadata = cls._parsed(path, found)
        if metadata.num_classes > max((size for shape in shapes for size in shape), default=0):
            raise UserError(f"{path}: num_classes is {metadata.num_classes}, and none of its tensors is as large")
        return metadata

    @classmethod
    def _parsed(cls, path: str, found: dict[str, str]) -> CheckpointMetadata:
        missing = next((key for key in _NEEDED if key not in found), None)
        if missing:
            raise UserError(f"{path} does not say its {missing}: it is damaged, or no checkpoint of train.py")
        numbers = Fields(path, {key: _whole(found[key]) for key in ("num_classes", "epoch") if key in found})
        classes = numbers.whole("num_classes")
        model_kwargs = parse_json(found["model_kwargs"], f"{path}: model_kwargs").values
        place = next((name for name in _PLACES if name in model_kwargs), None)
        if place:
            raise UserError(f"{path}: model_kwargs has {place}: a checkpoint may not say what else is to be loaded")
        return cls(
            _architecture(path, found["architecture"]),
            classes,
            _data_config(parse_json(found["data_config"], f"{path}: data_config")),
            model_kwargs,
            _label_names(path, found.get("label_names", "[]"), classes),
            numbers.whole("epoch") if "epoch" in found else None,
        )


def stored_metadata(
    architecture: str,
    num_classes: int,
    data_config: Mapping[str, Any],
    model_kwargs: Mapping[str, Any],
    label_names: Sequence[str],
) -> dict[str, str]:
    """The metadata to store, which `CheckpointMetadata.read` reads back."""
    return {
        "architecture": architecture,
        "num_classes": str(num_classes),
        "data_config": json.dumps(data_config),
        # where the first weights came from is no part of what the model is
        "model_kwargs": json.dumps({key: value for key, value in model_kwargs.items() if key not in _PLACES}),
        "label_names": json.dumps(label_names if len(label_names) == num_classes else []),
    }


def _whole(text: str) -> int | str:
    """A number where the text is one."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else text


def _architecture(path: str, name: str) -> str:
    if ":" in name or "/" in name or not is_model(name):
        known = [] if ":" in name or "/" in name else list_models()
        raise UserError(
            f"{path}: architecture is {name!r}, which is no model of timm and no {PREFIX} one, and a "
            f"checkpoint may name nothing else{near(name, known)}"
        )
    return name


def _data_config(fields: Fields) -> dict[str, Any]:
    size = fields.wholes("input_size", 3, _LARGEST)
    try:
        str_to_pil_interp(fields.text("interpolation"))
    except KeyError as error:
        raise fields.wrong("interpolation", "bilinear, bicubic or another that timm knows") from error
    return {
        "input_size": size,
        "interpolation": fields.text("interpolation"),
        "mean": fields.numbers("mean", size[0]),
        "std": fields.numbers("std", size[0], positive=True),
        "crop_pct": fields.number("crop_pct", *CROP_PCT),
        "crop_mode": fields.text("crop_mode", _CROP_MODES),
    }


def _label_names(path: str, text: str, classes: int) -> list[str]:
    where = f"{path}: label_names"
    names = text_list(json_value(text, where), where)
    if len(names) not in (0, classes):
        raise UserError(f"{where} has {len(names)} names for {classes} classes")
    return names
