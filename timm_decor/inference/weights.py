"""The weights that somebody names on a command line: the model, its classes and how it wants its images."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from torch import nn

from timm_decor.errors import UserError
from timm_decor.training import build
from timm_decor.training.keeping.folder import EMA_SUFFIX
from timm_decor.training.keeping.metadata import CheckpointMetadata
from timm_decor.training.options import CreateOptions, ImageOptions
from timm_decor.training.validation import completed, not_used


@dataclass(frozen=True)
class Opened:
    """A trained model and what is known of it.

    Attributes:
        model: with its weights.
        name: its architecture.
        model_kwargs: further arguments that it was made with.
        names: of its classes; their numbers where nobody knows names.
        data_config: timm's: input_size, mean, std, interpolation, crop_pct, crop_mode.
        notes: what is peculiar about it, a line each.
    """

    model: nn.Module
    name: str
    model_kwargs: dict[str, Any]
    names: list[str]
    data_config: dict[str, Any]
    notes: list[str]

    @property
    def mode(self) -> str:
        """PIL's name of the colours that it wants."""
        return "RGB" if self.data_config["input_size"][0] == 3 else "L"


def open_model(
    weights: str, model_name: str | None, use_ema: bool | None, image: ImageOptions, create: CreateOptions
) -> Opened:
    """A trained model and what is known of it.

    Args:
        weights: a checkpoint, a folder with one, or the name of a model with pretrained weights.
        model_name: what a checkpoint is of that does not say it itself.
        use_ema: take the checkpoint's averaged weights; None: of a folder, if it was they that made its best epoch the
            best.
        image: how images become tensors, as far as it is not left to the weights.
        create: how the model is made, likewise.

    Raises:
        UserError: no such weights, or they do not fit.
    """
    checkpoint, notes = _checkpoint(weights), []
    if use_ema is None:
        use_ema = Path(weights).is_dir() and Path(weights, f"best{EMA_SUFFIX}.safetensors").is_file()
    if checkpoint is None:
        name = weights
        if model_name or use_ema:
            raise UserError("--model and --use-ema are for a checkpoint, not for a model's own weights")
        channels = build.input_channels(image)
        model = build.create(weights, create, create.num_classes, channels, pretrained=True)
        build.refuse_new_head(model, weights, create.num_classes)
        names = [_in_words(name) for name in build.pretrained_names(model)]
    else:
        metadata = CheckpointMetadata.read(checkpoint)
        name = model_name or (metadata.architecture if metadata else "")
        if not name:
            raise UserError("--model is needed: the checkpoint does not say what it is")
        names = []
        if metadata is not None and build.architecture(name) == build.architecture(metadata.architecture):
            image, create = completed(image, create, metadata)
            names = metadata.label_names
        elif metadata is not None:
            notes.append(not_used(checkpoint, name, metadata))
        channels = build.input_channels(image)
        model = build.create(name, create, create.num_classes, channels)
        build.load_weights(model, checkpoint, use_ema)
    classes = build.class_count(model)
    if len(names) != classes:  # nobody knows them
        names = [str(number) for number in range(classes)]
    # a repository's name says nothing of the architecture; its config.json does
    known_as = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or name)
    data_config = build.data_config(image, model, channels)
    return Opened(model, build.architecture(known_as), create.arguments, names, data_config, notes)


def _checkpoint(weights: str) -> str | None:
    """The file that WEIGHTS means: of a folder the best one; None for a model's name.

    Raises:
        UserError: a folder without one.
    """
    path = Path(weights)
    if path.is_dir():
        places = [path / f"{name}.safetensors" for name in ("best", "last", "model")]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise UserError(f"{weights} holds no {', '.join(place.name for place in places)}: name a checkpoint")
        return str(file)
    return weights if path.is_file() or weights.endswith(build.CHECKPOINT_ENDINGS) else None


def _in_words(name: str) -> str:
    """ImageNet's synset as a word; other names as they are."""
    try:
        words = str(_synsets().label_name_to_description(name, detailed=False))
    except KeyError:
        return name
    return words.partition(",")[0]  # the others mean the same


@functools.cache
def _synsets() -> ImageNetInfo:
    return ImageNetInfo("imagenet22k")
