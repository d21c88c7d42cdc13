"""The arguments of publishing."""

from __future__ import annotations

import argparse
import re

from timm_decor.errors import UserError
from timm_decor.publishing.licenses import license_id
from timm_decor.training.parser import Parser

LICENSE = "apache-2.0"  # of weights that began at random


def publish_parser(prog: str = "hub.publish") -> Parser:
    """The command line of publishing."""
    words = Parser(prog=prog, description="Publish what train.py trained to the Hugging Face Hub.")
    words.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="output folder of train.py, a .safetensors "
                       "file in one, or a folder of such folders")  # fmt: skip
    words.add_argument("--space", action="store_true", help="publish the demo of the project's own weights, as a Space")
    words.add_argument(
        "--repo-id", required=True, metavar="OWNER/NAME", help="repository; for several models OWNER alone"
    )
    words.add_argument(
        "--tag", type=_tag, help="pretrained tag, as in resnet18.TAG; default: by rule, data and image size"
    )
    words.add_argument("--dry-run", metavar="FOLDER", help="write what would be uploaded into this folder, and stop")
    words.add_argument("--private", action="store_true", help="make a new repository private")
    words.add_argument("--revision", metavar="BRANCH", help="branch to commit to; it is made if need be")
    words.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    words.add_argument(
        "--license",
        type=license_id,
        metavar="ID",
        help=f"of the weights, as the Hub names licenses; default: {LICENSE}",
    )
    words.add_argument(
        "--base-model", metavar="ID", help="the Hub's name of the weights that training began with; none"
    )
    words.add_argument("--half", action="store_true", help="store the weights in half precision")
    words.add_argument("--no-r", action="store_true", help="leave R (decor.safetensors) out")
    words.add_argument("--data-dir", metavar="DIR", help="the data to evaluate on; default: where training found them")
    words.add_argument(
        "--no-eval", action="store_true", help="publish training's own last evaluation; run no validate.py"
    )
    words.add_argument(
        "--twin", metavar="RUN", help="output folder of the twin, where it was trained by itself and not by --compare"
    )
    words.add_argument(
        "--samples", action="store_true", help="show some evaluation images on the card; that publishes them"
    )
    words.add_argument(
        "--requirement",
        type=_requirement,
        metavar="LINE",
        help="what the Space installs, as 'timm-decor @ git+https://...'; default: this version, from PyPI",
    )
    return words


def refuse_others(args: argparse.Namespace) -> None:
    """Refuse arguments that mean nothing for what is published.

    Args:
        args: parsed.

    Raises:
        UserError: naming one.
    """
    if args.space and args.checkpoint:
        raise UserError(f"--space publishes the demo, not {args.checkpoint}: publish that without --space")
    if not args.space and not args.checkpoint:
        raise UserError("CHECKPOINT is needed: what train.py left; or --space, for the demo")
    if args.revision and args.create_pr:
        raise UserError("--create-pr opens a pull request on main: leave out --revision, or --create-pr")
    name = next((name for name in (_OF_WEIGHTS if args.space else _OF_SPACE) if getattr(args, name)), None)
    if name:
        whose = "the weights', and --space publishes the demo" if args.space else "the Space's: add --space"
        raise UserError(f"--{name.replace('_', '-')} is {whose}")


_OF_WEIGHTS = ("tag", "license", "base_model", "half", "no_r", "data_dir", "no_eval", "samples", "twin")
_OF_SPACE = ("requirement",)


def _requirement(text: str) -> str:
    if not re.fullmatch(r"timm[-_]decor\b[^\r\n]*", text):
        raise argparse.ArgumentTypeError(f"one line of pip's that begins with timm-decor, not '{text}'")
    return text


def _tag(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"letters, digits, '_', '-' and '.' make a tag, not '{text}'")
    return text
