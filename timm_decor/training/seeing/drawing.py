"""What all pictures share: names that are what they say, how two sides are told apart, ticks from end to end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm_decor.text import printable

# The decorrelated side and the plain one. The second is dashed and thinner, its marks are smaller, and it is drawn over
# the first: where both go the same way, both are seen.
MARKERS = ("o", "s")
STROKES: tuple[dict[str, Any], ...] = (
    {"linewidth": 3.4, "markersize": 6.5, "zorder": 2.1},
    {"linewidth": 1.6, "markersize": 3.5, "linestyle": (0, (4, 4)), "zorder": 2.2},
)


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


def whole_ticks(axis: Any, low: float, high: float, most: int, integer: bool = False) -> None:
    """Let an axis begin and end at a tick, so that what lies at its ends can be read as well.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`.
        low: the smallest value.
        high: the largest one.
        most: intervals between ticks.
        integer: at whole numbers alone.
    """
    from matplotlib.ticker import MaxNLocator

    if high <= low:  # a flat line, in the middle
        room = 0.05 * abs(high) or 1.0
        low, high = low - room, high + room
    ticks = MaxNLocator(most, integer=integer, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    axis.set_ticks(ticks)
    axis.axes.set(**{f"{axis.axis_name}lim": (ticks[0], ticks[-1])})
