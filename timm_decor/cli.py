"""timm-decor: the subcommands, what each is made of, and how one is chosen. `timm_decor_door.py` comes before it."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_decor.errors import UserError, exit_code
from timm_decor.redact import without_secrets
from timm_decor.text import near, printable
from timm_decor.training.parser import Parser
from timm_decor.version import __version__

PROG = "timm-decor"


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        help: what it does, in the list of all.
        parser: `module:function` that takes the program's name and makes the parser; its imports are light.
        module: whose `main` takes the command line and the program's name.
    """

    help: str
    parser: str
    module: str

    def make_parser(self, prog: str) -> Parser:
        """Its command line."""
        module, function = self.parser.split(":")
        parser: Parser = getattr(importlib.import_module(module), function)(prog)
        return parser


_ARGS = "timm_decor.training.args"
COMMANDS = {
    "train": Command("train an image classifier", f"{_ARGS}:train_parser", "timm_decor.training.run"),
    "validate": Command("evaluate checkpoints", f"{_ARGS}:validate_parser", "timm_decor.training.validation"),
    "predict": Command("say what is in images", f"{_ARGS}:predict_parser", "timm_decor.inference.predict"),
    "export": Command("write a model as ONNX and its like", f"{_ARGS}:export_parser", "timm_decor.inference.export"),
    "publish": Command(
        "bring a trained model to the Hugging Face Hub",
        "timm_decor.publishing.args:publish_parser",
        "timm_decor.publishing.publish",
    ),
    "list": Command("list the decorrelated models", "timm_decor.scripts.args:list_parser", "timm_decor.scripts.zoo"),
    "completion": Command(
        "print what lets a shell complete this command",
        "timm_decor.scripts.args:completion_parser",
        "timm_decor.completion",
    ),
}


def main(argv: Sequence[str], load: Callable[[], None]) -> int:
    """Run the subcommand that a command line names.

    Args:
        argv: the command line, without the program.
        load: loads torch, timm and the package.

    Returns:
        The exit code.
    """
    chosen = COMMANDS.get(argv[0]) if argv else None
    if chosen is not None:
        return run(chosen, f"{PROG} {argv[0]}", argv[1:], load)
    return exit_code(PROG, _without_command, list(argv))


def run(command: Command, prog: str, argv: Sequence[str], load: Callable[[], None]) -> int:
    """Parse a subcommand's line, say what is being loaded, load it, and go on there; arguments as for `main`."""

    def go_on(argv: list[str]) -> None:
        given = command.make_parser(prog).parse(argv)
        if os.environ.get("RANK", "0") == "0":  # the launcher's, of several processes
            print(f"{prog}: loading PyTorch, timm{_named(given)}", file=sys.stderr, flush=True)
        load()
        importlib.import_module(command.module).main(argv, prog)

    return exit_code(prog, go_on, list(argv))


def whole_parser(with_arguments: bool) -> Parser:
    """The command and its subcommands.

    Args:
        with_arguments: those of the subcommands as well, as completion wants them; otherwise their names alone.
    """
    parser = Parser(prog=PROG, description="Train timm's image classifiers with decorrelated backpropagation.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    more = f"{PROG} COMMAND --help tells more."
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", description=more)
    for name, command in COMMANDS.items():
        its: list[Any] = [command.make_parser(f"{PROG} {name}")] if with_arguments else []
        parsers.add_parser(name, help=command.help, parents=its, add_help=False)
    return parser


def _without_command(argv: list[str]) -> None:
    """A command line that begins with no subcommand: --help, --version, or an error."""
    names = ", ".join(COMMANDS)
    if not argv:
        raise UserError(f"a command is needed: {names}; {PROG} --help tells what they do")
    if argv[0] in ("-h", "--help", "--version"):
        whole_parser(with_arguments=False).parse(argv[:1])  # which ends the program
    word = without_secrets(printable(argv[0]))
    if word.startswith("-"):
        raise UserError(f"'{word}' stands where a command is needed: {names}")
    raise UserError(f"unknown command '{word}'{near(word, COMMANDS) or f'; commands: {names}'}")


def _named(given: argparse.Namespace) -> str:
    """What the command line says is to be loaded: `, a and b`. A recipe or a run to resume stands for all in it."""
    resumed = getattr(given, "resume", None)
    source = resumed if resumed != "auto" else None
    source = source or getattr(given, "config", None)
    if source:
        names = [Path(source).name]
    else:
        weights = getattr(given, "checkpoint", None) or getattr(given, "weights", [])
        weights = [weights] if isinstance(weights, str) else weights
        more = [f"{len(weights) - 1} more"] if len(weights) > 1 else []
        model = getattr(given, "model", None)
        names = [*(Path(path).name for path in weights[:1]), *more, *([model] if model else [])]
        if hasattr(given, "dataset"):
            names.append(given.dataset or (Path(given.data_dir).name if given.data_dir else "digits"))
    return "".join(f", {name}" for name in names[:-1]) + "".join(f" and {name}" for name in names[-1:])
