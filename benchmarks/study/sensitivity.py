"""Accuracy over the learning rate, from the records of a tune file: curves and a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from study.presets import OPTIMIZERS
from study.training import PLAIN, Record

DECORRELATED = "decorrelated"
_FACTORS = [lr / OPTIMIZERS["sgd"].plain_lr for lr in OPTIMIZERS["sgd"].lrs]  # those of all optimizers
HEADER = ["optimizer", "arm", "lr at 1x", *(f"{factor:g}x" for factor in _FACTORS)]
Curves = dict[tuple[str, str], dict[float, list[float]]]  # (opt, arm): accuracies, a seed each, by learning rate


def curves(records: Sequence[Record], whole: int) -> Curves:
    """Accuracy after N epochs by learning rate, of each optimizer and arm; of the rates on the grid."""
    found: Curves = {}
    for record in sorted(records, key=lambda r: (list(OPTIMIZERS).index(r.spec.opt), r.spec.arm != PLAIN, r.spec.lr)):
        spec = record.spec
        if spec.arm in (PLAIN, DECORRELATED) and spec.steps == whole and spec.lr in OPTIMIZERS[spec.opt].lrs:
            found.setdefault((spec.opt, spec.arm), {}).setdefault(spec.lr, []).append(record.final)
    return found


def rows(found: Curves) -> list[list[str]]:
    """Mean held-out accuracy in %, a row an arm."""
    lines = []
    for (opt, arm), points in found.items():
        settings = OPTIMIZERS[opt]
        cells = [f"{statistics.mean(points[lr]):.1f}" if lr in points else "-" for lr in settings.lrs]
        lines.append([opt, arm, f"{settings.plain_lr:g}", *cells])
    return lines
