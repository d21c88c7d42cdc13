"""From an image's bytes to upright pixels in a colour mode, without losing what 16-bit images hold."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps

_MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def decode(file: IO[bytes] | Path, mode: str) -> Image.Image:
    """A decoded image as a person would see it.

    Args:
        file: encoded, in any format that Pillow reads.
        mode: PIL colour mode, RGB or L.

    Raises:
        ValueError: pixels of 32 bits, whose brightest value nobody knows; Pillow raises more than that.
    """
    with Image.open(file) as image:
        return to_mode(image, mode)


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Turn an image the way up that its EXIF data say, and convert it; see `decode`."""
    return _to_8_bits(_upright(image)).convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data raise whatever their parser meets; the image itself may be fine
        return image
    return ImageOps.exif_transpose(image) if orientation != 1 else image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Pillow's `convert` would clip brighter pixels to white."""
    if image.mode in _MODES_16_BIT or (image.mode == "I" and image.format == "PNG"):  # older Pillows open those as I
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits (mode {image.mode}), and nothing says how bright the brightest is")
    return image
