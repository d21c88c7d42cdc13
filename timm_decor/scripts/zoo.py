"""timm-decor list (python -m timm_decor.list): the zoo as a table, made from the code.

timm-decor list                     # one row a family
timm-decor list 'resnet*'           # one row a model
timm-decor list --layers resnet18
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from string import ascii_lowercase

import timm
import torch
from timm.models import split_model_name_tag
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
HEADER = ("params, M", "layers", *(f"{structure}, MiB" for structure in LISTED), "left plain")
FAMILY_HEADER = ("family: example", "members", "params, M", "layers", "MiB", "left plain", "accuracy")


class Notes:
    """Why layers stay plain: each reason once, under a letter that stands in the tables."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def marked(self, report: ConversionReport) -> str:
        """How many layers stay plain for which reason, as in `26 a, 3 b`; "-" for none."""
        counts = Counter(self._letter(row.plain_reason) for row in report.plain)
        return ", ".join(f"{count} {letter}" for letter, count in sorted(counts.items())) or "-"

    def _letter(self, reason: str) -> str:
        number = len(self._letters)
        return self._letters.setdefault(reason, ascii_lowercase[number % 26] * (number // 26 + 1))

    def lines(self) -> list[str]:
        """A line a letter."""
        return [f"({letter}) {reason}" for reason, letter in self._letters.items()]

    def sentence(self) -> str:
        """The same in one, for a page."""
        return f"Left plain: {'; '.join(self.lines()) or 'none'}."


def model_row(name: str, notes: Notes) -> tuple[str, ...]:
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
        memory.append(_mebibytes(other) + (f" ({more} plain)" if more > 0 else ""))
    return (_parameters(model), str(len(report.decorrelated)), *memory, notes.marked(report))


def family_rows(families: Sequence[Family], notes: Notes) -> Iterator[tuple[str, ...]]:
    """What `FAMILY_HEADER` names: a row a family, of its example and of the default structure."""
    for family in families:
        model = _without_weights(PREFIX + family.example)
        report = reconverted(model)
        yield (
            f"{PREFIX}{family.module}: {family.example}",
            str(len(_members(family))),
            _parameters(model),
            str(len(report.decorrelated)),
            _mebibytes(report),
            notes.marked(report),
            family.measured,
        )


def _parameters(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}"


def _mebibytes(report: ConversionReport) -> str:
    return f"{(report.bytes + report.moment_bytes) / 2**20:.1f}"


def _members(family: Family) -> list[str]:
    return timm.list_models(module=PREFIX + family.module)


def page(families: Sequence[Family]) -> str:
    """Families and all their members, as a page of markdown."""
    config, notes = DecorConfig(), Notes()
    table = markdown_table(FAMILY_HEADER, list(family_rows(families, notes)))
    members = []
    for family in families:
        rows = [(f"`{name}`", *model_row(name, notes)) for name in _members(family)]
        members += [f"\n## {PREFIX}{family.module}\n", markdown_table(("model", *HEADER), rows)]
    head = (
        f"Made by `make zoo` with timm {timm.__version__}. Memory is that of R, of SGD's L on the output side "
        f"and of their statistics, in MiB of float32: in the first table with the default structure "
        f"({config.structure}, rank {config.rank}), in the others by structure; in brackets, how many layers more than "
        f"with the default stay plain. {notes.sentence()} Accuracy is the example's against its plain model's, at "
        f"plain training's learning rate ([families.md](families.md))."
    )
    return "\n".join(["# The zoo\n", head, "", table, *members]) + "\n"


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
        notes, table = Notes(), markdown_table if args.markdown else text_table
        if names:
            print(table(("model", *HEADER), [(name, *model_row(name, notes)) for name in names]))
        else:
            print(table(FAMILY_HEADER, list(family_rows(FAMILIES, notes))))
        if lines := notes.lines():
            print("\n" + (notes.sentence() if args.markdown else "\n".join(lines)))


def _twins(wanted: Sequence[str]) -> list[str]:
    """The twins that names or wildcards mean: `resnet18` means `decor_resnet18`.

    Raises:
        UserError: one of them means none.
    """
    known = timm.list_models(f"{PREFIX}*")
    found: set[str] = set()
    everything = f"; all of them: '{PREFIX}*'"
    for name in wanted:
        word = split_model_name_tag(name)[0]  # all tags of a model have the same layers
        matches = fnmatch.filter(known, word) or fnmatch.filter(known, PREFIX + word)
        if not matches:
            hint = "" if set(word) & set("*?[") else near(PREFIX + word.removeprefix(PREFIX), known)
            why = "is a model of timm without a twin" if timm.is_model(word) else "is no model that has a twin"
            raise UserError(f"'{name}' {why}{hint or everything}")
        found |= {*matches}
    return [name for name in known if name in found]  # in timm's order
