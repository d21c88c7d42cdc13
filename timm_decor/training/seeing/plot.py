"""The picture of a training or a comparison: accuracy and loss against steps and against seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from timm_decor.training.seeing.compare import Side
from timm_decor.training.seeing.drawing import MARKERS, STROKES, label, plain_text, whole_ticks

COLOURS = ("#d1495b", "#30638e")  # decorrelated, plain: told apart in print and by the colour-blind


@plain_text()
def save_picture(sides: Sequence[Side], path: Path, title: str) -> None:
    """Draw one or two sides into a PNG file of 1500 x 1050 pixels.

    Args:
        sides: the decorrelated one first.
        path: the file.
        title: the figure's title.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    figure.suptitle(label(title, 110), fontsize=13)
    whose = "averaged weights'" if sides and sides[0].is_averaged else "evaluation"
    top1 = sides[0].accuracy if sides else "eval_top1"
    rows = (top1, f"{whose} top-1 accuracy (%)"), ("train_loss", "training loss")
    columns = ("steps", "optimizer steps"), ("seconds", "training time (s)")
    for line, (what, its_label) in zip(axes, rows, strict=True):
        for axis, (key, unit) in zip(line, columns, strict=True):
            drawn = [[row for row in side.history if row.get(what) is not None] for side in sides]
            for side, found, colour, marker, stroke in zip(sides, drawn, COLOURS, MARKERS, STROKES, strict=False):
                style = {"color": colour, "marker": marker, "label": label(side.name), **stroke}
                axis.plot([row[key] for row in found], [row[what] for row in found], clip_on=False, **style)
            values = [row[what] for found in drawn for row in found if math.isfinite(row[what])]
            if values:
                whole_ticks(axis.yaxis, min(values), max(values), 6)
                whole_ticks(axis.xaxis, 0, max(row[key] for found in drawn for row in found), 6, key == "steps")
            axis.set(xlabel=unit, ylabel=its_label)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(sides), frameon=False)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
