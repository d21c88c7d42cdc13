"""python -m timm_decor.list: the zoo as a table, made from the code.

python -m timm_decor.list                     # one row a family
python -m timm_decor.list 'decor_resnet*'     # one row a model
python -m timm_decor.list --layers decor_resnet18
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch
from torch import nn

from timm_decor.config import DecorConfig, structures
from timm_decor.convert import reconverted
from timm_decor.models import FAMILIES, PREFIX, Family
from timm_decor.reporting import ConversionReport
from timm_decor.text import markdown_table, text_table

# The default first.
LISTED = sorted(structures(), key=lambda name: name != DecorConfig().structure)
HEADER = (
    "params, M",
    "decorrelated layers",
    *(f"{structure}, MiB" for structure in LISTED),
    "left plain",
)
FAMILY_HEADER = ("family", "members", "for example", *HEADER, "accuracy")


def model_row(name: str) -> tuple[str, ...]:
    """What `HEADER` names, for one model; no weights are allocated.

    Memory is that of R and of the statistics it is refreshed from. A structure that leaves more layers plain than the
    default (max_dim, 1x1 kernels) is marked with their number.
    """
    model = _without_weights(name)
    report = reconverted(model)
    memory = []
    for structure in LISTED:
        other = _report_with(model, structure)
        if other is None:
            memory.append("-")
            continue
        more = len(other.plain) - len(report.plain)
        memory.append(f"{(other.bytes + other.moment_bytes) / 2**20:.1f}" + (f" ({more} plain)" if more > 0 else ""))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (f"{parameters / 1e6:.1f}", str(len(report.decorrelated)), *memory, plain_reasons(report))


def plain_reasons(report: ConversionReport) -> str:
    """Why layers were left plain, and how many; "-" for none."""
    counts = Counter(row.plain_reason for row in report.plain)
    return "; ".join(f"{count}: {reason}" for reason, count in counts.items()) or "-"


def family_rows(families: Sequence[Family]) -> Iterator[tuple[str, ...]]:
    """One row a family: its module in timm's registry, how many members, its example's row, what was measured."""
    for family in families:
        yield (
            PREFIX + family.module,
            str(len(_members(family))),
            PREFIX + family.example,
            *model_row(PREFIX + family.example),
            family.measured,
        )


def _members(family: Family) -> list[str]:
    return timm.list_models(module=PREFIX + family.module)


def page(families: Sequence[Family]) -> str:
    """Families and all their members, as a page of markdown."""
    config = DecorConfig()
    parts = [
        "# The zoo\n",
        f"Made by `make zoo` with timm {timm.__version__}. Memory is that of R, of SGD's L on the output side "
        f"and of their statistics, in MiB of float32, by structure (the default is {config.structure}, rank "
        f"{config.rank}); in brackets, how many layers more than with the default stay plain.\n",
        markdown_table(FAMILY_HEADER, list(family_rows(families))),
    ]
    for family in families:
        rows = [(f"`{name}`", *model_row(name)) for name in _members(family)]
        parts += [f"\n## {PREFIX}{family.module}\n", markdown_table(("model", *HEADER), rows)]
    return "\n".join(parts) + "\n"


def _without_weights(name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except NotImplementedError:  # RegNet calls torch.unique, which torch 2.3 does not have on meta
        return timm.create_model(name)


def _report_with(model: nn.Module, structure: str) -> ConversionReport | None:
    try:
        return reconverted(model, DecorConfig(structure=structure))
    except ValueError:  # no layer of this model fits the structure
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for arguments that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m timm_decor.list", description="List the decorrelated twins of timm's models."
    )
    parser.add_argument("filter", nargs="*", help="wildcards over names: one row a model, instead of one a family")
    parser.add_argument("--layers", action="store_true", help="every layer of each model: D, memory, why it is plain")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write families with all members there, as markdown")
    parser.add_argument("--markdown", action="store_true", help="for a README")
    args = parser.parse_args(argv)
    names = timm.list_models(args.filter) if args.filter else []
    names = [name for name in names if name.startswith(PREFIX)]
    if args.filter and not names:
        print(
            f"no decor_ model matches {' '.join(args.filter)}; all: python -m timm_decor.list 'decor_*'",
            file=sys.stderr,
        )
        return 2
    if args.page:
        chosen = [family for family in FAMILIES if not names or set(names) & set(_members(family))]
        args.page.write_text(page(chosen))
        return 0
    if args.layers:
        for name in names or [PREFIX + family.example for family in FAMILIES]:
            print(f"{name}\n{_without_weights(name).decor_report}\n")
        return 0
    table = markdown_table if args.markdown else text_table
    if names:
        print(table(("model", *HEADER), [(name, *model_row(name)) for name in names]))
    else:
        print(table(FAMILY_HEADER, list(family_rows(FAMILIES))))
    return 0
