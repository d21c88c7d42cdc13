"""What docs/tutorial.md tells a person to type, and what it says that comes back.

For tests/test_tutorial.py, and for check_dist.py, which types it in the environment of the built wheel.
"""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
LEFT_OUT = "..."
# What differs from machine to machine: numbers with a point, and those in front of these units.
_VARIES = re.compile(r"\d[\d,]*\.\d+(?:e[-+]\d+)?|\d[\d,]*(?= (?:img/s|bytes))")
_NUMBER = r"(\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?)"
_ACCURACY = re.compile(r'(top-1|"top1":) $')
_POINTS = 6.0  # by which an accuracy may differ from the page's: a dozen of its 200 images


@dataclass(frozen=True)
class Step:
    """A block of the page that something is printed by.

    Attributes:
        language: `sh`, one command; or `python`.
        code: what is typed.
        output: what comes back, as the page has it.
    """

    language: str
    code: str
    output: str

    @property
    def words(self) -> list[str]:
        """The command's words; Python is a command, too."""
        if self.language == "python":
            return ["python", "-c", self.code]
        return shlex.split(self.code.replace("\\\n", " "))


def steps() -> list[Step]:
    """The page's blocks of code with a block of output behind them, in order; those without are not to be run."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    return [
        Step(block[1], block[2], output[2])
        for block, output in itertools.pairwise(blocks)
        if output[1] == "output" and not text[block.end() : output.start()].strip()
    ]


def difference(step: Step, printed: str) -> str:
    """Where what was printed is not what the page says: the part that is missing, or the accuracy; "" where it is."""
    rest = _even(printed)
    for part in filter(None, map(_even, step.output.split(LEFT_OUT))):
        pattern = _NUMBER.join(map(re.escape, _VARIES.split(part)))
        found = re.search(pattern, rest)
        if found is None:
            return part
        for said, got in zip(_VARIES.finditer(part), found.groups(), strict=True):
            if _ACCURACY.search(part[: said.start()]) and abs(_value(said[0]) - _value(got)) > _POINTS:
                return f"accuracy {said[0]}: it is {got}"
        rest = rest[found.end() :]
    return ""


def _even(text: str) -> str:
    """Text without what its numbers' widths decide: where lines break, and how columns are padded."""
    return re.sub(r"-{3,}", "---", " ".join(text.split()))


def _value(number: str) -> float:
    return float(number.replace(",", ""))
