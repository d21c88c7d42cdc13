"""The report's charts: matplotlib draws them as SVG whose colours are the page's, so that they suit light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from timm_decor.training.seeing.drawing import label, plain_text

# What matplotlib draws with, and the CSS variable that takes its place.
_COLOURS = {
    "#010101": "var(--text)",
    "#020202": "var(--faint)",
    "#0a0001": "var(--side0)",
    "#0a0002": "var(--side1)",
    "#0b0001": "var(--phase0)",
    "#0b0002": "var(--phase1)",
    "#0b0003": "var(--phase2)",
    "#0b0004": "var(--phase3)",
    "#0b0005": "var(--phase4)",
    "#0b0006": "var(--phase5)",
}
_TEXT, _FAINT = "#010101", "#020202"
SIDES = ("#0a0001", "#0a0002")
PHASES = tuple(colour for colour in _COLOURS if colour.startswith("#0b"))
_MARKERS = ("o", "s")
_WIDTH = 4.6  # inches; at a phone's width the text is about as large as the page's small print
_MOST_LABELS = 32  # layers named beside a heat map


@dataclass(frozen=True)
class Line:
    """Attributes:
    name: in the legend; "" for none.
    x: one value a point.
    y: the same.
    side: 0 or 1, for colour and marker.
    faint: drawn thin, without markers, behind the others.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    side: int
    faint: bool = False


@plain_text()
def lines(title: str, x_label: str, drawn: Sequence[Line], legend: bool = False) -> str:
    """A line chart as SVG.

    Args:
        title: says what is drawn, with its unit.
        x_label: of the x axis, which starts at 0.
        drawn: the lines; a single point shows as its marker.
        legend: name the lines.
    """
    figure = _figure(2.7)
    axes = figure.add_subplot()
    for line in sorted(drawn, key=lambda line: not line.faint):
        colour = SIDES[line.side]
        if line.faint:
            axes.plot(line.x, line.y, color=colour, linewidth=0.6, alpha=0.45)
        else:
            marker = {"marker": _MARKERS[line.side], "markersize": 4 if len(line.x) <= 40 else 0}
            axes.plot(line.x, line.y, color=colour, linewidth=1.7, label=label(line.name), **marker)
            if len(line.x) == 1:  # a single point tells nothing by its place
                at = {"xytext": (-6, 5), "textcoords": "offset points", "ha": "right"}
                axes.annotate(f"{line.y[0]:.4g}", (line.x[0], line.y[0]), color=_TEXT, fontsize=8, **at)
    _style(axes, title, x_label)
    axes.grid(color=_FAINT, linewidth=0.5, alpha=0.5)
    axes.set_xlim(left=0)
    low, high = _limits([line for line in drawn if not line.faint], [line for line in drawn if line.faint])
    axes.set_ylim(low, high)
    if legend:
        axes.legend(frameon=False, fontsize=8, labelcolor=_TEXT, loc="best")
    return _svg(figure, title)


def _limits(bold: list[Line], faint: list[Line]) -> tuple[float, float]:
    """Room for the bold lines, and for nearly all of the faint ones: a spike must not flatten the rest."""
    values = np.array([value for line in bold for value in line.y] or [0.0])
    thin = np.array([value for line in faint for value in line.y])
    low, high = values.min(), values.max()
    if len(thin):
        low, high = min(low, np.quantile(thin, 0.005)), max(high, np.quantile(thin, 0.995))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return float(low - room), float(high + room)


@plain_text()
def heat_map(title: str, rows: Sequence[str], steps: Sequence[int], values: Any, top: float) -> str:
    """Values of layers over training as SVG, the first layer on top.

    Args:
        title: says what is drawn.
        rows: the layers' names.
        steps: update of each column.
        values: (layers, columns), NaN where there is none.
        top: the value of the last colour; the first one's is 0.
    """
    figure = _figure(1.1 + 0.15 * min(len(rows), 40))
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", vmin=0, vmax=top, cmap="viridis", interpolation="nearest")
    _style(axes, title, "optimizer step")
    every = -(-len(rows) // _MOST_LABELS)
    axes.set_yticks(
        range(0, len(rows), every), [label(row) for row in rows[::every]], fontsize=7 if len(rows) <= 40 else 6.5
    )
    columns = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
    axes.set_xticks(columns, [str(steps[column]) for column in columns])
    bar = figure.colorbar(image, ax=axes, location="right", fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=_TEXT, labelsize=7, length=2)
    return _svg(figure, title)


@plain_text()
def stacked_bars(title: str, names: Sequence[str], parts: Sequence[dict[str, float]], colours: dict[str, str]) -> str:
    """A horizontal bar a name, made of parts, as SVG.

    Args:
        title: says what is drawn, with its unit.
        names: of the bars.
        parts: of each bar, by name.
        colours: of the parts, out of `PHASES`; in this order.
    """
    figure = _figure(0.75 + 0.38 * len(names))
    axes = figure.add_subplot()
    for row, values in enumerate(parts):
        left = 0.0
        for part, colour in colours.items():
            axes.barh(row, values.get(part, 0.0), left=left, color=colour, height=0.62)
            left += values.get(part, 0.0)
    _style(axes, title, "")
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="x", color=_FAINT, linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    return _svg(figure, title)


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _style(axes: Any, title: str, x_label: str) -> None:
    axes.set_title(label(title, 90), fontsize=9, color=_TEXT, loc="left")
    axes.set_xlabel(x_label, fontsize=8, color=_TEXT)
    axes.tick_params(colors=_TEXT, labelsize=7.5, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)


def _svg(figure: Any, title: str) -> str:
    """The figure as an `<svg>` element to stand in a page beside others."""
    import matplotlib

    text = io.StringIO()
    # text stays text; a salt of its own keeps ids apart from those of other charts
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label(title, 90), "svg.image_inline": True}):
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # matplotlib's own names of parts, the same in every chart
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r'<svg role="img"\1', svg, count=1)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg
