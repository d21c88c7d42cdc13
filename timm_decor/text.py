"""Text for people: tables, the names that were probably meant, and names from elsewhere made harmless."""

from __future__ import annotations

import csv
import difflib
import io
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence

# What a terminal would obey or cannot show: controls, halves of surrogate pairs (bytes of a file's name that are no
# UTF-8), line and paragraph separators.
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
_REORDERING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # of the text around them


def printable(text: str) -> str:
    r"""Text on one line, with `\x1b` and the like for characters that would reach a terminal as commands."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _UNPRINTABLE or char in _REORDERING
        else char
        for char in text
    )


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
    cells = [[printable(str(value)) for value in row] for row in (header, *rows)]
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
    return "\n".join("| " + " | ".join(markdown_cell(value) for value in line) + " |" for line in lines)


def markdown_cell(value: object) -> str:
    r"""A value that stays in its cell of a markdown table: `|` becomes `\|`, a new line `\n`."""
    # backslashes before a bar are doubled, or they would escape the backslash that escapes it
    return re.sub(r"(\\*)\|", lambda found: 2 * found[1] + r"\|", printable(str(value)))


def markdown_text(text: str) -> str:
    """A name in the prose of a markdown page: no markup, no HTML, no link, on one line."""
    return re.sub(r"([\\`*<|]|(?<=\])\()", r"\\\1", printable(text))


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as a CSV file. Text that a spreadsheet would take for a formula gets an apostrophe in front."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([_csv_cell(value) for value in row] for row in rows)
    return file.getvalue()


def _csv_cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = printable(value)
    if text.lstrip().startswith(("=", "+", "-", "@")):
        try:
            float(text)
        except ValueError:
            return f"'{text}"
    return text


def listed(names: Sequence[str], count: int = 3) -> str:
    """Names as a person would list them, cut after `count`: `a, b, c and 4 more`."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"


def counted(number: int, word: str, plural: str = "") -> str:
    """A number with its noun: `1 thread`, `2 threads`, `10 000 images`."""
    noun = word if number == 1 else plural or f"{word}s"
    return f"{number:,} {noun}".replace(",", "\N{NO-BREAK SPACE}" if number >= 10_000 else "")
