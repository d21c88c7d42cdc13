"""timm-decor list (python -m timm_decor.list): the zoo as a table, made from the code.

timm-decor list                     # one row a family
timm-decor list 'resnet*'           # one row a model
timm-decor list --layers resnet18
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence

import timm
import torch
from torch import nn

from timm_decor.config import DecorConfig, structures
from timm_decor.convert import reconverted
from timm_decor.errors import UserError
from timm_decor.models import FAMILIES, PREFIX, Family
from timm_decor.reporting import ConversionReport
from timm_decor.scripts.args import list_parser
from timm_decor.text import markdown_table, near, text_table

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
        f"{config.rank}); in brackets, how many layers more than with the default stay plain. "
        "Accuracy is a small member's against its plain model's, at plain training's learning rate "
        "([families.md](families.md)).\n",
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


def main(argv: Sequence[str], prog: str = "timm_decor.list") -> None:
    """List.

    Args:
        argv: the command line.
        prog: the program, for messages.

    Raises:
        UserError: no model of that name, or a page that cannot be written.
    """
    args = list_parser(prog).parse(argv)
    names = _twins(args.filter)
    if args.page:
        chosen = [family for family in FAMILIES if not names or set(names) & set(_members(family))]
        try:
            args.page.write_text(page(chosen), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {args.page}: {error.strerror}") from error
    elif args.layers:
        for name in names or [PREFIX + family.example for family in FAMILIES]:
            print(f"{name}\n{_without_weights(name).decor_report}\n")
    else:
        table = markdown_table if args.markdown else text_table
        if names:
            print(table(("model", *HEADER), [(name, *model_row(name)) for name in names]))
        else:
            print(table(FAMILY_HEADER, list(family_rows(FAMILIES))))


def _twins(wanted: Sequence[str]) -> list[str]:
    """The twins that names or wildcards mean: `resnet18` means `decor_resnet18`.

    Raises:
        UserError: one of them means none.
    """
    known = timm.list_models(f"{PREFIX}*")
    found: set[str] = set()
    everything = f"; all of them: '{PREFIX}*'"
    for word in wanted:
        matches = fnmatch.filter(known, word) or fnmatch.filter(known, PREFIX + word)
        if not matches:
            hint = "" if set(word) & set("*?[") else near(PREFIX + word.removeprefix(PREFIX), known)
            why = "is a model of timm without a twin" if timm.is_model(word) else "is no model that has a twin"
            raise UserError(f"'{word}' {why}{hint or everything}")
        found |= {*matches}
    return [name for name in known if name in found]  # in timm's order
