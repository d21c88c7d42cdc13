"""argparse with one-line errors, YAML recipes, and the types that its arguments share.

A recipe is translated into command-line words and parsed in front of the real ones, so its values meet the same types,
ranges and choices, and the command line overrides them.
"""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml

from timm_decor.errors import UserError, first_line
from timm_decor.knobs import did_nothing, removed
from timm_decor.text import near


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds an argument's default where it has one and its help does not say it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, [], {}) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `UserError`s (one line, exit code 2) and name near misses."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a command line.

        Raises:
            UserError: an unknown argument (with its near misses), or a value that is refused.
        """
        args, unknown = self.parse_known_args(list(argv))
        if unknown:
            if reason := removed(unknown):
                raise UserError(reason)
            flag = unknown[0].split("=", 1)[0]
            raise UserError(f"unknown argument '{flag}'{near(flag, self._option_string_actions)}")
        return args

    def recipe_words(self, path: str) -> list[str]:
        """Read a YAML recipe as command-line words.

        Args:
            path: a mapping of argument names, written with - or _, to values; null means the default.

        Raises:
            UserError: the file cannot be read, is no mapping, or has a key that is no argument.
        """
        try:
            with open(path, encoding="utf-8") as file:
                recipe = yaml.safe_load(file)
        except OSError as error:
            raise UserError(f"cannot read recipe {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"recipe {path} is not YAML: {first_line(error)}") from error
        if not isinstance(recipe, dict):
            raise UserError(f"recipe {path} must be a mapping of argument names to values")
        by_dest = {action.dest: action for action in self._actions if action.option_strings}
        words: list[str] = []
        for key, value in recipe.items():
            action = by_dest.get(str(key).replace("-", "_"))
            if action is None and did_nothing(str(key).replace("-", "_"), value):
                continue
            if action is None and (reason := removed([str(key)])):
                raise UserError(f"recipe {path}: {reason}")
            if action is None or action.dest in ("config", "help"):
                raise UserError(f"recipe {path}: unknown key '{key}'{near(str(key).replace('-', '_'), by_dest)}")
            words += _words(action, value, f"recipe {path}: {key}")
        return words


def _words(action: argparse.Action, value: Any, where: str) -> list[str]:
    flag = max(action.option_strings, key=len) if not _is_switch(action) else action.option_strings[0]
    if value is None:
        return []
    if _is_switch(action):
        if not isinstance(value, bool):
            raise UserError(f"{where}: must be true or false, not {value!r}")
        negative = f"--no-{flag[2:]}"
        if value:
            return [flag]
        return [negative] if negative in action.option_strings else []
    if isinstance(value, bool):
        raise UserError(f"{where}: takes a value, not {value!r}")
    if isinstance(value, dict):
        return [flag, *(f"{key}={item}" for key, item in value.items())] if value else []
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)] if value else []
    return [f"{flag}={value}"]  # with '=', so that a value may begin with a dash


def _is_switch(action: argparse.Action) -> bool:
    return action.nargs == 0


class KeyValues(argparse.Action):
    """`key=value ...` into a dictionary; values are Python literals, or else strings."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        result = {}
        for word in values:
            key, separator, value = word.partition("=")
            if not separator:
                parser.error(f"argument {self.option_strings[0]}: takes key=value, not {word!r}")
            try:
                result[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                result[key] = value
        setattr(namespace, self.dest, result)


class Names(argparse.Action):
    """Adds to the names given before, so that the argument can be repeated; `none` takes those back."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        names = list(getattr(namespace, self.dest))
        for name in values:
            names = [] if name == "none" else [*names, name] if name not in names else names
        setattr(namespace, self.dest, names)


def count(text: str) -> int:
    """A whole number, 1 or more."""
    return _at_least(int(text), 1)


def index(text: str) -> int:
    """A whole number, 0 or more."""
    return _at_least(int(text), 0)


def seed(text: str) -> int:
    """A whole number that every random number generator takes: 0 to 2^32 - 1."""
    value = index(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"must be below 2^32, not {text}")
    return value


def amount(text: str) -> float:
    """A finite number, 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def share(text: str) -> float:
    """A number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], not {text}")
    return value


def _at_least(value: int, least: int) -> int:
    if value < least:
        raise argparse.ArgumentTypeError(f"must be {least} or more, not {value}")
    return value
