"""Accuracy over the learning rate, from the records of a tune file: curves and a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from study.presets import OPTIMIZERS
from study.training import PLAIN, Record

DECORRELATED = "decorrelated"
Curves = dict[tuple[str, str], dict[float, list[float]]]  # (opt, arm): accuracies, a seed each, by learning rate


def curves(records: Sequence[Record], whole: int) -> Curves:
    """Accuracy after N epochs by learning rate, of each optimizer and arm; of the rates on the grid."""
    found: Curves = {}
    for record in sorted(records, key=lambda r: (list(OPTIMIZERS).index(r.spec.opt), r.spec.arm != PLAIN, r.spec.lr)):
        spec = record.spec
        if spec.arm in (PLAIN, DECORRELATED) and spec.steps == whole and spec.lr in OPTIMIZERS[spec.opt].lrs:
            found.setdefault((spec.opt, spec.arm), {}).setdefault(spec.lr, []).append(record.final)
    return found


def plain_best(found: Curves, opt: str) -> float:
    """Plain training's best learning rate in the mean over seeds, of equals the lowest: what 1x stands for."""
    points = found[opt, PLAIN]
    return max(sorted(points), key=lambda lr: statistics.mean(points[lr]))


def table(found: Curves) -> tuple[list[str], list[list[str]]]:
    """Header, and mean held-out accuracy in %, a row an arm, over multiples of plain training's best rate."""
    bases = {opt: plain_best(found, opt) for opt, _ in found}
    multiples = sorted({lr / bases[opt] for (opt, _), points in found.items() for lr in points})
    lines = []
    for (opt, arm), points in found.items():
        by_multiple = {lr / bases[opt]: f"{statistics.mean(values):.1f}" for lr, values in points.items()}
        lines.append([opt, arm, f"{bases[opt]:g}", *(by_multiple.get(multiple, "-") for multiple in multiples)])
    return ["optimizer", "arm", "lr at 1x", *(f"{multiple:g}x" for multiple in multiples)], lines
