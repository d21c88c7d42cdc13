"""The arguments of the commands about the models and the command line itself."""

from __future__ import annotations

from pathlib import Path

from timm_decor.training.parser import Parser


def list_parser(prog: str = "timm_decor.list") -> Parser:
    """The command line of the zoo."""
    parser = Parser(prog=prog, description="List the decorrelated twins of timm's models.")
    parser.add_argument(
        "filter", nargs="*", metavar="NAME", help="models, or wildcards: one row a model, instead of one a family"
    )
    parser.add_argument("--layers", action="store_true", help="every layer of each model: D, memory, why it is plain")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write families with all members there, as markdown")
    parser.add_argument("--markdown", action="store_true", help="for a README")
    return parser


def completion_parser(prog: str) -> Parser:
    """The command line of completion."""
    parser = Parser(prog=prog, description="Print the script that lets a shell complete timm-decor.")
    parser.add_argument("shell", choices=("bash", "zsh"), help="which shell")
    return parser
