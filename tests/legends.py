"""What tests look for in a picture before it is closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib import pyplot


def legends(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], object]) -> int:
    """How many legends a picture has, of which none may reach into a panel.

    Args:
        monkeypatch: of the test.
        draw: draws and closes one figure.
    """
    found = []

    def look(figure: Any) -> None:
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        all_of_them = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        for legend in all_of_them:
            box = legend.get_window_extent(renderer)
            assert not any(box.overlaps(axes.get_window_extent(renderer)) for axes in figure.axes)
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1, "all of it is in the picture"
        found.append(len(all_of_them))

    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", look)
        draw()
    pyplot.close("all")
    (count,) = found
    return count
