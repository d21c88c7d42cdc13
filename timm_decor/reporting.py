"""What a handle reports of its layers."""

from __future__ import annotations

from dataclasses import dataclass

from timm_decor.table import text_table


@dataclass(frozen=True)
class AttachedRow:
    """One layer in the report of a handle.

    Attributes:
        name: the layer's name in the model.
        dim: D, the length of one group's patch.
        correlation_before: mean absolute correlation between different entries of the layer's input x (of 1024 of
            them, where it has more).
        correlation_after: the same for z = R x; both from the statistics that R was last refreshed with, None before.
        condition: condition number of R.
        refreshes: refreshes of R so far.
        skips: refreshes that were due but left R alone, because the statistics could not be used.
    """

    name: str
    dim: int
    correlation_before: float | None
    correlation_after: float | None
    condition: float
    refreshes: int
    skips: int


@dataclass(frozen=True)
class AttachReport:
    """State of every attached layer; `str()` gives a table."""

    step: int
    rows: tuple[AttachedRow, ...]

    def mean_correlation(self) -> tuple[float, float] | None:
        """Correlation before and after R, averaged over layers; None before the first refresh."""
        pairs = [(r.correlation_before, r.correlation_after) for r in self.rows]
        known = [(before, after) for before, after in pairs if before is not None and after is not None]
        if not known:
            return None
        return sum(b for b, _ in known) / len(known), sum(a for _, a in known) / len(known)

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.4f}"

        cells = [
            (r.name, r.dim, number(r.correlation_before), number(r.correlation_after))
            + (f"{r.condition:.3g}", r.refreshes, r.skips)
            for r in self.rows
        ]
        header = ("layer", "D", "correlation before", "after", "condition of R", "refreshes", "skips")
        return f"after {self.step} steps\n" + text_table(header, cells)
