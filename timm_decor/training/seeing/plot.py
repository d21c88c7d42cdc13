"""The picture of a training or a comparison: accuracy and loss against steps and against seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm_decor.training.seeing.compare import Side
from timm_decor.training.seeing.drawing import label, plain_text

COLOURS = ("#d1495b", "#30638e")  # decorrelated, plain: told apart in print and by the colour-blind
MARKERS = ("o", "s")


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
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex="col", sharey="row", layout="constrained")
    figure.suptitle(label(title, 110), fontsize=13)
    for column, (key, unit) in enumerate((("steps", "optimizer steps"), ("seconds", "training time (s)"))):
        accuracy, loss = axes[0][column], axes[1][column]
        for side, colour, marker in zip(sides, COLOURS, MARKERS, strict=False):
            style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.8, "label": label(side.name)}
            rows = side.evaluated
            accuracy.plot([r[key] for r in rows], [r["eval_top1"] for r in rows], **style)
            loss.plot([r[key] for r in side.history], [r["train_loss"] for r in side.history], **style)
        accuracy.set_title(f"against {unit.split(' (')[0]}", fontsize=11)
        loss.set_xlabel(unit)
        for axis in (accuracy, loss):
            axis.grid(alpha=0.3)
            axis.set_xlim(left=0)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=key == "steps"))
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("evaluation top-1 accuracy (%)")
    axes[1][0].set_ylabel("training loss")
    axes[0][0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
