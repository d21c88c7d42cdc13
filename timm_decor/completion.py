"""timm-decor completion: a script by which bash or zsh completes commands, arguments, files and names of models.

It is written once and holds the names, so that a shell needs no Python, and no torch, at a press of the key.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import timm

from timm_decor.cli import whole_parser
from timm_decor.errors import UserError
from timm_decor.scripts.args import completion_parser

_MODELS = "_timm_decor_models"  # the function of the script that knows them
_NAMING = ("model", "kd_model_name", "filter")  # arguments that take one
_FILES, _FOLDERS = ("FILE", "PATH", "CHECKPOINT", "WEIGHTS", "IMAGE"), ("DIR", "FOLDER")


def main(argv: Sequence[str], prog: str) -> None:
    """Print the script.

    Args:
        argv: the command line.
        prog: the program, for messages.

    Raises:
        UserError: shtab is not installed.
    """
    args = completion_parser(prog).parse(argv)
    if find_spec("shtab") is None:
        raise UserError("completion needs shtab: pip install 'timm-decor[completion]'")
    import shtab

    parser = whole_parser(with_arguments=True)
    for action in _actions(parser):
        if action.dest in _NAMING:
            action.complete = {"bash": _MODELS, "zsh": _MODELS}  # type: ignore[attr-defined]  # shtab's own
        elif action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    names = " ".join(timm.list_models())
    preamble = {
        "bash": f'{_MODELS}() {{ compgen -W "{names}" -- "$1"; }}',
        "zsh": f"{_MODELS}() {{ compadd -- {names} }}",
    }
    print(shtab.complete(parser, shell=args.shell, preamble=preamble[args.shell]))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of those below it."""
    for action in parser._actions:
        yield action
        parsers: Any = action.choices if isinstance(action, argparse._SubParsersAction) else {}
        for below in parsers.values():
            yield from _actions(below)
