"""What is written down of a command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm_decor.training.args import as_recipe
from timm_decor.training.keeping.privacy import published, published_command


@dataclass(frozen=True)
class Record:
    """The whole set of arguments, as files have it.

    Attributes:
        recipe: what args.yaml says, which `-c` reads back.
        config: those that say how, and not where: they may be published.
        command: the command line, to show to others.
    """

    recipe: dict[str, Any]
    config: dict[str, Any]
    command: str

    @classmethod
    def of(cls, prog: str, argv: Sequence[str], args: argparse.Namespace) -> Record:
        """The record of a command line that was parsed."""
        return cls(as_recipe(args), published(args), published_command(prog, argv))
