"""What may leave the machine: settings, commands and messages without its paths and without secrets."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from timm_decor.errors import UserError
from timm_decor.redact import HIDDEN, holds_secret, is_secret, without_secrets

# Arguments that name places on somebody's machine: kept out of files that are made to be published.
PRIVATE = (
    "data_dir",
    "output",
    "experiment",
    "initial_checkpoint",
    "initial_r",
    "pretrained_path",
    "kd_pretrained_path",
    "class_map",
    "config",
    "resume",
)

# How a value begins that is one path, spaces and all.
_WHOLE_PATH = re.compile(r"((?:hfds/|hfids/|local-dir:)?)(?:file:///|/(?!/)|~/|[A-Za-z]:\\)")
_PATH = re.compile(
    r"""file:///[^\s'"]+              # a file URL
      | (?<![\w./~])/(?!/)[^\s'"]+    # an absolute path, but no part of https://host/path
      | (?<=hfds/)/[^\s'"]+ | (?<=hfids/)/[^\s'"]+  # a folder's instead of a name on the Hub
      | (?<!\w)~/[^\s'"]+             # below a home folder
      | (?<!\w)[A-Za-z]:\\[^\s'"]+    # a drive
    """,
    re.VERBOSE,
)


def without_paths(text: str) -> str:
    """Text in which each path of this machine is cut to its last part: `/home/me/data` becomes `.../data`."""
    return _PATH.sub(lambda match: f".../{_last_part(match[0])}", text)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def without_path(value: str) -> str:
    """The same for one argument's value, which may be a path with spaces in it."""
    whole = _WHOLE_PATH.match(value)
    return f"{whole[1]}.../{_last_part(value)}" if whole else without_paths(value)


def published(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that say how a run was trained, without those that say where."""
    return {key: cleaned(value) for key, value in vars(args).items() if key not in PRIVATE}


def published_command(prog: str, argv: Sequence[str]) -> str:
    """A command line to show to others: paths of this machine are `PATH`, a recipe keeps its name."""
    words, take = prog.split(), ""
    for word in argv:
        flag, equals, value = word.partition("=")
        if word.startswith("-c") and len(word) > 2:  # -cFILE, as argparse takes it
            flag, equals, value = "-c", "=", word[2:].removeprefix("=")
        name = flag.lstrip("-").replace("-", "_") if flag.startswith("-") else ""
        if take and not name:
            words.append(_place(take, word))
            take = ""
        elif name in PRIVATE or flag == "-c":
            take = "" if equals else name
            words.append(f"{flag}={_place(name, value)}" if equals else flag)
        elif equals and is_secret(flag.lstrip("-"), value):
            take = ""
            words.append(f"{flag}={HIDDEN}")
        else:
            take = ""
            words.append(f"{flag}={cleaned(value)}" if name and equals else cleaned(word))
    return " ".join(shlex.quote(word) for word in words)


def refuse_secrets(args: argparse.Namespace) -> None:
    """Refuse an argument that holds what looks like a token, before it is written anywhere.

    Raises:
        UserError: names the argument, not the secret.
    """
    for key, value in vars(args).items():
        if holds_secret(value):
            raise UserError(
                f"--{key.replace('_', '-')} holds what looks like a password or token: others can read command lines "
                f"and args.yaml; give it by the environment (HF_TOKEN, WANDB_API_KEY)"
            )


def cleaned(value: Any) -> Any:
    """An argument's value without paths of this machine and without secrets."""
    if isinstance(value, str):
        return without_path(without_secrets(value))
    if isinstance(value, Mapping):
        return {cleaned(key): HIDDEN if is_secret(str(key), item) else cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item) for item in value]
    return value


def _place(name: str, value: str) -> str:
    is_recipe = name in ("c", "config")
    return without_paths(without_secrets(value)) if is_recipe and not value.startswith("..") else "PATH"
