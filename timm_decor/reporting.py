"""What `decorrelate` and a handle report of their layers."""

from __future__ import annotations

from dataclasses import dataclass

from timm_decor.config import DecorConfig
from timm_decor.plan import LayerPlan
from timm_decor.text import text_table


@dataclass(frozen=True)
class LayerRow:
    """One layer in the report of `decorrelate`.

    Attributes:
        name: the module's name in the model.
        kind: its class.
        plan: what is done to it; None where it stays plain. Before `attach` it is what SGD gets.
        weight_bytes: memory of the weight.
        plain_reason: why the layer stays plain, or "" for a decorrelated one.
    """

    name: str
    kind: str
    plan: LayerPlan | None
    weight_bytes: int
    plain_reason: str = ""

    @property
    def dim(self) -> int:
        """D, the length of the vector that R decorrelates (one group's patch); 0 where the layer stays plain."""
        return self.plan.shape.dim if self.plan else 0

    @property
    def bytes(self) -> int:
        """Memory of R (and of R^-1 where it is kept) and of L; 0 where the layer stays plain."""
        return self.plan.bytes if self.plan else 0

    @property
    def moment_bytes(self) -> int:
        """Memory of the running second moments that they are refreshed from; 0 where the layer stays plain."""
        return self.plan.moment_bytes if self.plan else 0


@dataclass(frozen=True)
class ConversionReport:
    """What `decorrelate` did, as `model.decor_report`; `str()` gives a table."""

    config: DecorConfig
    rows: tuple[LayerRow, ...]
    left_out: dict[str, str]  # reason by name of the layers that were left plain on request

    @property
    def bytes(self) -> int:
        """Memory of every R together."""
        return sum(row.bytes for row in self.rows)

    @property
    def moment_bytes(self) -> int:
        """Memory of every running second moment together."""
        return sum(row.moment_bytes for row in self.rows)

    @property
    def decorrelated(self) -> tuple[LayerRow, ...]:
        return tuple(row for row in self.rows if not row.plain_reason)

    @property
    def plain(self) -> tuple[LayerRow, ...]:
        return tuple(row for row in self.rows if row.plain_reason)

    def summary(self) -> str:
        """One line: how many layers, of what structure, R's memory against the weights'."""
        weights = sum(row.weight_bytes for row in self.rows)
        ratio = (self.bytes + self.moment_bytes) / weights
        return (
            f"{len(self.decorrelated)} layers decorrelated ({self.config.rule}, {self.config.structure}), "
            f"{len(self.plain)} left plain; R takes {self.bytes / 2**20:.1f} MiB, its statistics "
            f"{self.moment_bytes / 2**20:.1f} MiB: {ratio:.2f}x the weights"
        )

    def __str__(self) -> str:
        cells = [
            (row.name, row.kind, *(f"{n:,}" if n else "" for n in (row.dim, row.bytes, row.moment_bytes)))
            + (row.plain_reason,)
            for row in self.rows
        ]
        header = ("layer", "kind", "D", "bytes of R", "of its statistics", "left plain because")
        return text_table(header, cells) + "\n" + self.summary()


@dataclass(frozen=True)
class AttachedRow:
    """One layer in the report of a handle.

    Attributes:
        name: the layer's name in the model.
        dim: D, the length of one group's patch.
        structure: of its R.
        correlation_before: mean absolute correlation between different entries of the layer's input x (of 1024 of
            them, where it has more), centred where the statistics are.
        correlation_after: the same for z = R x; both from the statistics that R was last refreshed with, None before.
        condition: condition number of R; None where it was not asked for.
        refreshes: refreshes of R so far.
        skips: refreshes that were due but left R alone, because the statistics could not be used.
        unrecorded: forward passes for the next refresh whose inputs could not be recorded (nested tensors, vmap).
    """

    name: str
    dim: int
    structure: str
    correlation_before: float | None
    correlation_after: float | None
    condition: float | None
    refreshes: int
    skips: int
    unrecorded: int = 0


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
            (r.name, r.dim, r.structure, number(r.correlation_before), number(r.correlation_after))
            + ("-" if r.condition is None else f"{r.condition:.3g}", r.refreshes, r.skips)
            for r in self.rows
        ]
        header = ("layer", "D", "structure", "correlation before", "after", "condition of R", "refreshes", "skips")
        return f"after {self.step} steps\n" + text_table(header, cells)
