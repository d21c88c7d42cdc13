"""The report's charts: matplotlib draws them as SVG whose colours are the page's, so that they suit light and dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from timm_decor.training.seeing.drawing import MARKERS, STROKES, label, plain_text, whole_ticks

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
# A page of 400 pixels shows the picture at about its own size: what is legible in it is legible there.
_WIDTH = 4.6  # inches
_SIZE = 10.0  # points
_MOST_MARKERS = 20  # points of a line that are marked
_MOST_TICKS = 7  # that a heat map's scale has room for with their numbers
_MOST_LABELS = 64  # layers named beside a heat map
_LONGEST = 30  # letters of such a name


@dataclass(frozen=True)
class Line:
    """Attributes:
    x: one value a point.
    y: the same.
    side: 0 or 1, for colour, marker and stroke.
    faint: drawn thin, without markers, behind the others.
    """

    x: Sequence[float]
    y: Sequence[float]
    side: int
    faint: bool = False


@plain_text()
def lines(title: str, x_label: str, drawn: Sequence[Line], whole_x: bool = False) -> str:
    """A line chart as SVG. What its lines are, and its title, are for the page to say, in text that wraps.

    Args:
        title: for those who hear the page.
        x_label: of the x axis, which starts at 0.
        drawn: the lines; a single point shows as its marker.
        whole_x: whether x has whole numbers alone.
    """
    figure = _figure(2.5)
    axes = figure.add_subplot()
    for line in drawn:
        colour = SIDES[line.side]
        if line.faint:
            axes.plot(line.x, line.y, color=colour, linewidth=0.7, alpha=0.45, zorder=1.9)
        else:
            marker = MARKERS[line.side] if len(line.x) <= _MOST_MARKERS else ""
            axes.plot(line.x, line.y, color=colour, clip_on=False, marker=marker, **STROKES[line.side])
            if len(line.x) == 1:  # a single point tells nothing by its place
                at = {"xytext": (-6, 5), "textcoords": "offset points", "ha": "right"}
                axes.annotate(f"{line.y[0]:.4g}", (line.x[0], line.y[0]), color=_TEXT, fontsize=_SIZE, **at)
    _style(axes, x_label)
    axes.grid(color=_FAINT, linewidth=0.5, alpha=0.5)
    low, high = _limits([line for line in drawn if not line.faint], [line for line in drawn if line.faint])
    whole_ticks(axes.yaxis, low, high, 5)
    whole_ticks(axes.xaxis, 0, max(max(line.x) for line in drawn), 5, integer=whole_x)
    return _svg(figure, title)


def _limits(bold: list[Line], faint: list[Line]) -> tuple[float, float]:
    """What the bold lines span, and nearly all of the faint ones: a spike must not flatten the rest."""
    values = np.array([value for line in bold for value in line.y] or [0.0])
    thin = np.array([value for line in faint for value in line.y])
    low, high = values.min(), values.max()
    if len(thin):
        low, high = min(low, np.quantile(thin, 0.005)), max(high, np.quantile(thin, 0.995))
    return float(low), float(high)


def ratio_ticks(values: Any) -> list[float]:
    """Ticks from below the values to above them for a scale of ratios: 1, 2, 5, 10..., or where it is long 1, 3, 10...

    Args:
        values: numbers; those that are not above 0, and below a thousandth of the largest, are left to the first tick.
    """
    values = values[np.isfinite(values) & (values > 0)]
    high = max(float(values.max()), 1e-6) if len(values) else 1.0
    low = max(float(values.min()), high / 1000) if len(values) else high / 10
    for digits in ((1, 2, 5), (1, 3)):
        series = [float(f"{digit}e{power}") for power in range(-10, 4) for digit in digits]
        last = next(i for i, tick in enumerate(series) if tick >= high)
        first = min(last - 1, max(i for i, tick in enumerate(series) if tick <= low))
        ticks = series[first : last + 1]
        if len(ticks) <= _MOST_TICKS:
            break
    return ticks


@plain_text()
def heat_map(title: str, rows: Sequence[str], steps: Sequence[int], values: Any, ticks: Sequence[float]) -> str:
    """Values of layers over training as SVG, the first layer on top. A colour is a ratio: small values differ, too.

    Args:
        title: for those who hear the page.
        rows: the layers' names.
        steps: update of each column.
        values: (layers, columns), NaN where there is none.
        ticks: of `ratio_ticks`; values beyond them have the first one's colour, or the last one's.
    """
    from matplotlib.colors import LogNorm

    low, high, every = ticks[0], ticks[-1], _every(rows)
    figure = _figure(1.0 + 0.185 * len(rows) / every)
    axes = figure.add_subplot()
    image = axes.imshow(
        np.clip(values, low, high), aspect="auto", norm=LogNorm(low, high), cmap="viridis", interpolation="nearest"
    )
    _style(axes, "optimizer step")
    axes.set_yticks(range(0, len(rows), every), [_short(row) for row in rows[::every]])
    columns = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
    axes.set_xticks(columns, [str(steps[column]) for column in columns])
    bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.05, pad=0.02, aspect=30)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_ticks(ticks, labels=[f"{tick:g}" if _has_room(tick, ticks) else "" for tick in ticks])
    bar.minorticks_off()
    bar.ax.tick_params(colors=_TEXT, labelsize=_SIZE, length=2)
    return _svg(figure, title)


def _has_room(tick: float, ticks: Sequence[float]) -> bool:
    """Whether a tick has its number beside it: of many the two ends, and powers of ten that are far from them."""
    low, high = ticks[0], ticks[-1]
    if len(ticks) <= _MOST_TICKS or tick in (low, high):
        return True
    return f"{tick:e}".startswith("1.0") and tick > 9 * low and high > 9 * tick


def _every(rows: Sequence[str]) -> int:
    return -(-len(rows) // _MOST_LABELS)


def named_rows(rows: Sequence[str]) -> str:
    """Which rows a heat map has names for, where it is not all: a sentence, or nothing."""
    every = _every(rows)
    return f"Every {every}. layer is named." if every > 1 else ""


def _short(name: str) -> str:
    """A layer's name; where it is long, its end, in which neighbours differ."""
    name = label(name, 1000)
    return name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :]


@plain_text()
def stacked_bars(title: str, names: Sequence[str], parts: Sequence[dict[str, float]], colours: dict[str, str]) -> str:
    """A horizontal bar a name, made of parts, as SVG.

    Args:
        title: for those who hear the page.
        names: of the bars, above each.
        parts: of each bar, by name.
        colours: of the parts, out of `PHASES`; in this order.
    """
    figure = _figure(0.4 + 0.5 * len(names))
    axes = figure.add_subplot()
    for row, (name, values) in enumerate(zip(names, parts, strict=True)):
        left = 0.0
        for part, colour in colours.items():
            axes.barh(row, values.get(part, 0.0), left=left, color=colour, height=0.5)
            left += values.get(part, 0.0)
        axes.text(0, row - 0.29, label(name), color=_TEXT, fontsize=_SIZE, va="bottom")
    _style(axes, "")
    axes.set_yticks([])
    axes.set_ylim(len(names) - 0.65, -0.75)
    axes.spines["left"].set_visible(False)
    whole_ticks(axes.xaxis, 0, max(sum(values.values()) for values in parts), 5)
    axes.grid(axis="x", color=_FAINT, linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    return _svg(figure, title)


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _style(axes: Any, x_label: str) -> None:
    axes.set_xlabel(x_label, fontsize=_SIZE, color=_TEXT)
    axes.tick_params(colors=_TEXT, labelsize=_SIZE, length=2)
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
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label(title, 90))}"', 1)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg
