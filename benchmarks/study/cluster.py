"""The time of a training step on n GPUs, from counts: a model of cost, with its assumptions. Pure.

Nothing here was measured on such machines. What is assumed:

  * Weak scaling: every process has the batch that was counted, so that its forward, backward and statistics stay what
    they are as n grows.
  * Arithmetic takes its operations over a rate: forward and backward at one of bfloat16, what decorrelation multiplies
    at one of float32, and a factorisation (eigh, QR, Cholesky) a fixed time a matrix, because those of a refresh are
    narrow. What moves memory alone (sums, copies, the optimizer's own step) takes no time.
  * A collective goes round one ring at the speed of its slowest link: within a node the GPUs' own, across nodes the
    network of a node, which all its GPUs share. Of B bytes an all-reduce sends 2 (n - 1) / n B over each link, an
    all-gather or reduce-scatter (n - 1) / n B, a broadcast B; and each of its 2 (n - 1) or n - 1 steps waits for a
    link. An all-reduce may take a tree instead, which sends 2 B and waits for fewer links. What is faster is taken,
    with the waits and the shares of a link's speed that NCCL's own model has (`PROTOCOLS`). Speeds are nominal.
  * The gradients' all-reduce hides behind the backward pass (two thirds of forward and backward), FSDP2's collectives
    behind both; what does not fit there is waited for. Nothing hides what decorrelation sends.
  * Refreshes are shared out as the engine does it, by whole layers: the busiest process is waited for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from timm_decor.errors import UserError

# Bytes a second and direction, nominal: what a product's page or standard says, not what anybody measured.
NVLINK = 450e9  # NVLink 4: 900 GB/s a GPU, both directions together (NVIDIA H100 SXM's data sheet)
NETWORKS = {  # of a node
    "10 GbE": 10e9 / 8,  # IEEE 802.3ae
    "100 Gb/s": 100e9 / 8,  # 100 GbE, or InfiniBand EDR
    "200 Gb/s": 200e9 / 8,  # InfiniBand HDR
    "400 Gb/s": 400e9 / 8,  # InfiniBand NDR, or 400 GbE
    "8 x 400 Gb/s": 8 * 400e9 / 8,  # one NDR port a GPU, as in NVIDIA's DGX H100
}
DDP_BUCKET = 25 * 2**20  # DistributedDataParallel's default


class Protocol(NamedTuple):
    """A way to send: seconds before it moves, that a step waits within a node and between nodes, share of the speed."""

    tree: bool
    start: float
    node_step: float
    network_step: float
    share: float


# NCCL's baseLat, hwLat and bandwidth factors (github.com/NVIDIA/nccl, src/graph/tuning.cc): Simple and LL.
PROTOCOLS = (
    Protocol(False, 8.4e-6, 3.4e-6, 9.6e-6, 1.0),
    Protocol(False, 3.6e-6, 1.8 * 0.47e-6, 2.7e-6, 1 / 4),
    Protocol(True, 0.0, 28e-6, 50e-6, 0.9),
    Protocol(True, 4.4e-6, 1.8 * 0.52e-6, 5.0e-6, 0.9 / 3.8),
)


def _field(default: float, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Machine:
    """GPUs and what is between them."""

    rate: float = _field(2e14, "FLOP/s of forward and backward: a fifth of an H100's nominal 989e12 in bfloat16")
    rate32: float = _field(3e13, "FLOP/s of decorrelation's products: 45%% of an H100's nominal 67e12 in float32")
    matrix_seconds: float = _field(1e-3, "seconds of a factorisation: a guess, no GPU has run it here")
    node: float = _field(NVLINK, "bytes/s between GPUs of a node: NVLink 4, nominal")
    network: float = _field(NETWORKS["400 Gb/s"], "bytes/s between nodes, of a node: 400 Gb/s, nominal")
    per_node: float = _field(8, "GPUs a node")


# How often a ring of n goes round, in (n - 1) steps each.
_ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}


def sending(sent: Mapping[str, Mapping[str, int]], n: int, machine: Machine) -> float:
    """Seconds of collectives, one after the other.

    Args:
        sent: by kind {"calls", "bytes"}.
        n: processes, a GPU each.
        machine: that they are on.
    """
    if n == 1:
        return 0.0
    return sum(
        each["calls"] * min(_seconds(kind, each["bytes"] / each["calls"], n, machine, way) for way in _ways(kind))
        for kind, each in sent.items()
    )


def _ways(kind: str) -> list[Protocol]:
    return [way for way in PROTOCOLS if kind == "all_reduce" or not way.tree]


def _seconds(kind: str, size: float, n: int, machine: Machine, way: Protocol) -> float:
    """Of one collective of so many bytes."""
    local = min(n, int(machine.per_node))
    nodes = -(-n // local)
    speed = way.share * (machine.node if nodes == 1 else min(machine.node, machine.network))
    if way.tree:
        waiting = 2 * ((local - 1) * way.node_step + math.ceil(math.log2(nodes)) * way.network_step)
        return way.start + waiting + 2 * size / speed
    rounds = _ROUNDS[kind]
    sending = size if kind == "broadcast" else rounds * (n - 1) / n * size
    return way.start + rounds * ((n - nodes) * way.node_step + (nodes - 1) * way.network_step) + sending / speed


def gradients(count: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """What plain DDP sends at each step: gradients in buckets, and the buffers of BatchNorm."""
    size, buffers = count["weight_bytes"], count["buffer_bytes"]
    sent = {"all_reduce": {"calls": -(-size // DDP_BUCKET), "bytes": size}}
    return {**sent, "broadcast": {"calls": 1, "bytes": buffers}} if buffers else sent


def average(kinds: Mapping[str, Any], of: Callable[[Any], float], every: int, output_every: int) -> float:
    """A step's mean of something, from what it is in each kind of step.

    Args:
        kinds: counts by the kind's name: "refresh + look", "ordinary"...
        of: the something.
        every: steps between two refreshes.
        output_every: steps between two looks at the output errors.
    """
    ordinary = of(kinds["ordinary"])
    look = of(kinds["look"]) - ordinary if "look" in kinds else 0.0
    mean = ordinary + look / output_every
    for name, kind in kinds.items():
        words = name.split(" + ")
        if "refresh" in words or "measure" in words:  # both once between two refreshes
            mean += (of(kind) - ordinary - look * ("look" in words)) / every
    return mean


class Step(NamedTuple):
    """Seconds of a step, amortised over a period of refreshes.

    Attributes:
        compute: forward and backward.
        waiting: for the plain model's collectives, where they do not hide.
        products: decorrelation's, with every process the same or its rows'.
        statistics: second moments of a process's own inputs.
        refresh: L and R of the busiest process's layers.
        wire: what decorrelation sends.
    """

    compute: float
    waiting: float
    products: float
    statistics: float
    refresh: float
    wire: float

    @property
    def plain(self) -> float:
        """Of the plain model."""
        return self.compute + self.waiting

    @property
    def added(self) -> tuple[float, float, float, float]:
        """Decorrelation's parts, as shares of the plain step."""
        products, statistics, refresh, wire = (part / self.plain for part in self[2:])
        return products, statistics, refresh, wire


def step(count: Mapping[str, Any], n: int, machine: Machine, every: int | None = None, way: str = "ddp") -> Step:
    """A step on n GPUs.

    Args:
        count: of a model.
        n: GPUs, one of those for which its refresh was shared out.
        machine: they and their links.
        every: steps between two refreshes; None for those that were counted.
        way: "ddp" or "fsdp".

    Raises:
        UserError: nobody has counted how a refresh is shared out among n.
    """
    every, busiest = every or count["every"], count["refresh"]["busiest"]
    if str(n) not in busiest:
        raise UserError(f"--ranks {n}: a refresh was shared out among {', '.join(busiest)}")
    kinds, looks = count[way], count["output_every"]
    compute = count["plain_work"]["flops"] / machine.rate
    hidden = compute * 2 / 3 if way == "ddp" else compute
    sent = gradients(count) if way == "ddp" else count["plain_fsdp"]
    share = busiest[str(n)]
    return Step(
        compute,
        max(0.0, sending(sent, n, machine) - hidden),
        average(kinds, lambda kind: kind["work"]["flops"], every, looks) / machine.rate32,
        count["statistics_work"]["flops"] / machine.rate32 / every,
        (share["flops"] / machine.rate32 + share["matrices"] * machine.matrix_seconds) / every,
        average(kinds, lambda kind: sending(kind["sent"], n, machine), every, looks),
    )


def sent_bytes(sent: Mapping[str, Mapping[str, int]]) -> int:
    """Of all collectives."""
    return sum(each["bytes"] for each in sent.values())


COUNTS_HEADER = (
    "model", "optimizer", "structure", "gradients, MB a step", "refresh, MB", "mean step, MB", "of the gradients",
    "FSDP2 plain, MB a step", "FSDP2 mean step, MB", "R, MB", "moments, MB", "refresh, GFLOP",
)  # fmt: skip


def count_cells(count: Mapping[str, Any]) -> list[str]:
    """A model's counts under COUNTS_HEADER. MB are 10^6 bytes."""

    def mean(way: str) -> float:
        kinds = count[way]
        return average(kinds, lambda kind: sent_bytes(kind["sent"]), count["every"], count["output_every"])

    refresh = next(kind for name, kind in count["ddp"].items() if "refresh" in name)
    return [
        count["model"], count["opt"], count["structure"], _mb(count["weight_bytes"]), _mb(sent_bytes(refresh["sent"])),
        _mb(mean("ddp")), f"{mean('ddp') / count['weight_bytes']:.1%}", _mb(sent_bytes(count["plain_fsdp"])),
        _mb(mean("fsdp")), _mb(count["r_bytes"]), _mb(count["moment_bytes"]),
        f"{count['refresh']['busiest']['1']['flops'] / 1e9:.1f}",
    ]  # fmt: skip


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f}" if size >= 10e6 else f"{size / 1e6:.1f}"


PLAN_HEADER = (
    "model", "optimizer", "way", "GPUs", "plain step, ms", "waiting", "products", "statistics", "refresh", "wire",
    "added",
)  # fmt: skip


def plan_rows(
    count: Mapping[str, Any], ranks: Sequence[int], machine: Machine, every: int | None = None
) -> list[list[str]]:
    """What a model costs on each number of GPUs, in both ways, under PLAN_HEADER."""
    rows = []
    for way in ("ddp", "fsdp"):
        for n in ranks:
            found = step(count, n, machine, every, way)
            shares = [f"{share:.1%}" for share in (*found.added, sum(found.added))]
            plain = [f"{found.plain * 1e3:.1f}", f"{found.waiting / found.plain:.0%}"]
            rows.append([count["model"], count["opt"], {"ddp": "DDP", "fsdp": "FSDP2"}[way], str(n), *plain, *shares])
    return rows
