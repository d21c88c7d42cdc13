"""What docs/scaling.md says of scaling.py's results: tables, from the result files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study import cluster
from study.cluster import NETWORKS, Machine
from timm_decor.text import markdown_table

EVERY = (20, 50, 100, 200)  # steps between two refreshes, that are offered
LIMIT = 0.05  # of a plain step, for what `every` thins out
GPUS = (8, 64, 512)
PLANNED = ((8, "-"), (64, "100 Gb/s"), (64, "400 Gb/s"), (512, "400 Gb/s"))
WAYS = {"ddp": "DDP", "fsdp": "FSDP2"}
PARTS = ("products", "statistics", "refresh", "wire")


def read(path: Path) -> list[dict[str, Any]]:
    """A result file's results."""
    return list(json.loads(path.read_text(encoding="utf-8"))["results"])


def settings(counts: Sequence[Mapping[str, Any]]) -> str:
    """What to set: what a step takes more by default, which part that is, and the `every` that is often enough."""
    rows = []
    for count, way in _ways(counts):
        cells = []
        for n in GPUS:
            found = cluster.step(count, n, Machine(), way=way)
            largest = max(zip(found.added, PARTS, strict=True))[1]
            cells.append(f"{sum(found.added):.0%}, {largest}; {_enough(count, n, way)}")
        rows.append((count["model"], count["opt"], WAYS[way], *cells))
    return markdown_table(("model", "optimizer", "way", *(f"{n} GPUs" for n in GPUS)), rows)


def _ways(counts: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
    """By default's structure, in both ways."""
    return [(count, way) for count in counts if count["structure"] == "kronecker" for way in WAYS]


def _enough(count: Mapping[str, Any], n: int, way: str) -> str:
    """The smallest `every` with which statistics, refresh and wire come to no more than LIMIT of a plain step."""
    for every in EVERY:
        if sum(cluster.step(count, n, Machine(), every, way).added[1:]) <= LIMIT:
            return f"`every={every}`"
    return "no `every`"


def plan(counts: Sequence[Mapping[str, Any]]) -> str:
    """The parts of a step, for some sizes: a ResNet with SGD, the others with AdamW."""
    rows = []
    usual = [(count, way) for count, way in _ways(counts) if (count["opt"] == "sgd") == ("resnet" in count["model"])]
    for count, way in usual:
        for n, network in PLANNED:
            speed = NETWORKS.get(network, Machine().network)
            found = cluster.step(count, n, Machine(network=speed), way=way)
            plain = f"{found.plain * 1e3:.0f}" + (f", {found.waiting / found.plain:.0%}" if found.waiting else "")
            shares = (f"{share:.1%}" for share in (*found.added, sum(found.added)))
            rows.append((f"{count['model']}, {count['opt']}, {WAYS[way]}", str(n), network, plain, *shares))
    header = ("", "GPUs", "between nodes", "plain step, ms, of it waiting", *PARTS, "added")
    return markdown_table(header, rows)


def sent(counts: Sequence[Mapping[str, Any]]) -> str:
    """What is sent and held, by model."""
    return markdown_table(cluster.COUNTS_HEADER, [cluster.count_cells(count) for count in counts])


def shared_out(counts: Sequence[Mapping[str, Any]]) -> str:
    """A refresh's work on the busiest process, and the layer at which it stops falling."""
    rows = []
    ranks = ("1", "2", "4", "8", "16", "32", "64", "128")
    for count in counts:
        busiest, largest = count["refresh"]["busiest"], count["refresh"]["largest_layer"]
        cells = [f"{busiest[n]['flops'] / 1e9:.1f}, {busiest[n]['matrices']}" for n in ranks]
        name = f"{largest['name']}: {largest['flops'] / 1e9:.1f}, {largest['matrices']}"
        rows.append((_name(count), *cells, name))
    return markdown_table(("", *(f"of {n}" for n in ranks), "largest layer"), rows)


def _name(count: Mapping[str, Any]) -> str:
    structure = "" if count["structure"] == "kronecker" else f", {count['structure']}"
    return f"{count['model']}, {count['opt']}{structure}"


TABLES = {"settings": settings, "plan": plan, "sent": sent, "shared_out": shared_out}


TIME_HEADER = (
    "model", "processes", "plain step, ms", "ordinary", "with a refresh", "amortised", "refresh alone, in plain steps",
)  # fmt: skip


def time_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Measured ratios, a row a number of processes."""
    case, rows = result["case"], []
    for size, found in result["processes"].items():
        name = f"{case['model']}, {case['img_size']} px, batch {case['batch_size']} each, {case['opt']}"
        ratio = found["ratio"]
        shown = [f"{ratio[kind]:.2f}" for kind in ("ordinary", "refresh", "amortised", "refresh alone")]
        shared = " (sharing cores)" if int(size) > result["cores"] else ""
        rows.append((name, f"{size}{shared}", f"{found['seconds']['plain'] * 1e3:.0f}", *shown))
    return rows


def measured(record: Mapping[str, Any]) -> str:
    """The table of `scaling.py time`, and its conditions."""
    results, machine = record["results"], record["machine"]
    blocks = len(next(iter(results[0]["processes"].values()))["blocks"])
    text = (
        f"Measured on {machine['processor']}, {results[0]['cores']} cores, gloo, one thread a process; medians of "
        f"{blocks} alternating blocks, a refresh every {results[0]['config']['every']} steps. Ratios are to the plain "
        f"model on as many processes, in the same blocks."
    )
    return f"{text}\n\n{markdown_table(TIME_HEADER, [row for result in results for row in time_rows(result)])}"
