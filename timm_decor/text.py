"""Text for people: tables, and the names that were probably meant."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable, Sequence


def closest(name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.6) -> list[str]:
    """The known names that are closest to a wrong one, the best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)


def near(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to `name`, as text to append to a message: `; near: a, b`, or nothing."""
    matches = closest(name, known, count)
    return f"; near: {', '.join(matches)}" if matches else ""


def wrapped(text: str, indent: str = "  ") -> str:
    """A line of words for a terminal of 80 columns: where it is longer, it goes on in indented lines."""
    return textwrap.fill(text, 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns padded to equal width, numbers to the right, a rule under the header."""
    cells = [[str(value) for value in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
    align = [str.rjust if number else str.ljust for number in numeric]
    lines = ["  ".join(align[i](row[i], widths[i]) for i in range(len(header))) for row in cells]
    return "\n".join([lines[0].rstrip(), "  ".join("-" * w for w in widths), *(line.rstrip() for line in lines[1:])])


def _is_number(text: str) -> bool:
    return not text.strip("0123456789.,eE+-%x ") or text in ("nan", "inf")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same table for a markdown page."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)


def listed(names: Sequence[str], count: int = 3) -> str:
    """Names as a person would list them, cut after `count`: `a, b, c and 4 more`."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"
