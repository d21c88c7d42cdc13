"""Names in pictures: what matplotlib draws is what they say, whatever they say."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from timm_decor.text import printable


@contextmanager
def plain_text() -> Iterator[None]:
    """Text made and drawn in here is no formula, and a letter that the font lacks is a box, not a warning."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support")  # some scripts' joined letters
        yield


def label(name: str, most: int = 48) -> str:
    """A name for a picture: on one line, and cut where it is longer than `most`."""
    name = printable(name)
    if name.startswith("_"):  # which matplotlib leaves out of legends
        name = f" {name}"
    return name if len(name) <= most else name[: most - 1] + "…"
