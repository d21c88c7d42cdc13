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

from timm_decor.errors import UserError
from timm_decor.knobs import did_nothing, removed
from timm_decor.redact import without_secrets
from timm_decor.text import near, printable
from timm_decor.training.foreign import read_mapping


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
        raise UserError(without_secrets(message))

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a command line.

        Raises:
            UserError: an unknown argument (with its near misses), or a value that is refused: one with control
                characters, too, since names of files are made of them that are printed.
        """
        args, unknown = self.parse_known_args(list(argv))
        if unknown:
            if reason := removed(unknown):
                raise UserError(reason)
            flag = without_secrets(unknown[0].split("=", 1)[0])
            raise UserError(f"unknown argument '{flag}'{near(flag, self._option_string_actions)}")
        for key, value in vars(args).items():
            text = _unprintable(value)
            if text is not None:
                shown = without_secrets(printable(text))
                raise UserError(f"--{key.replace('_', '-')} has a character that cannot be printed: '{shown}'")
        return args

    def recipe_words(self, *paths: str) -> list[str]:
        """Read YAML recipes as command-line words.

        Args:
            paths: each a mapping of argument names, written with - or _, to values; null, and an empty list, mean the
                default. Of an argument that several have the last one's value counts, and nothing of the others'.

        Raises:
            UserError: a file cannot be read, is no mapping, or has a key that is no argument.
        """
        words: dict[str, list[str]] = {}  # by argument
        for path in paths:
            words |= self._recipe_words(path)
        return [word for each in words.values() for word in each]

    def _recipe_words(self, path: str) -> dict[str, list[str]]:
        recipe = read_mapping(path, "recipe")
        by_dest = {action.dest: action for action in self._actions if action.option_strings}
        words: dict[str, list[str]] = {}
        given: dict[str, Any] = {}  # the recipe's own spelling by argument
        for key, value in recipe.items():
            action = by_dest.get(str(key).replace("-", "_"))
            if action is None and did_nothing(str(key).replace("-", "_"), value):
                continue
            if action is None and (reason := removed([str(key)])):
                raise UserError(f"recipe {path}: {reason}")
            if action is None or action.dest in ("config", "help"):
                raise UserError(f"recipe {path}: unknown key '{key}'{near(str(key).replace('-', '_'), by_dest)}")
            if action.dest in given:
                raise UserError(f"recipe {path} has {key} twice: written as {given[action.dest]}, too")
            given[action.dest] = key
            words[action.dest] = _words(action, value, f"recipe {path}: {key}")
        return words


def _unprintable(value: Any) -> str | None:
    """The first text in an argument's value that is not what `printable` makes of it."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return next((text for item in value if (text := _unprintable(item)) is not None), None)
    return value if isinstance(value, str) and printable(value) != value else None


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
            except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: brackets by the thousand
                result[key] = value
        setattr(namespace, self.dest, result)


class Names(argparse.Action):
    """Adds to the names given before, so that the argument can be repeated; `none` takes those back."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        names = list(getattr(namespace, self.dest))
        for name in values:
            names = [] if name == "none" else [*names, name] if name not in names else names
        setattr(namespace, self.dest, names)


class Rising(argparse.Action):
    """Two numbers, the second not below the first."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if values[0] > values[1]:
            parser.error(f"argument {self.option_strings[0]}: the smaller one first, not {values[0]:g} {values[1]:g}")
        setattr(namespace, self.dest, values)


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


def below_one(text: str) -> float:
    """A number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), not {text}")
    return value


def finite(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, not {text}")
    return value


CROP_PCT = (0.1, 10.0)  # smallest and largest, here and in a checkpoint's metadata


def crop(text: str) -> float:
    """A share of an image's side that an evaluation takes: what a checkpoint may say of itself."""
    value = float(text)
    if not CROP_PCT[0] <= value <= CROP_PCT[1]:
        raise argparse.ArgumentTypeError(f"must be in [{CROP_PCT[0]:g}, {CROP_PCT[1]:g}], not {text}")
    return value


def sizes_and_shares(text: str) -> list[tuple[int, float]]:
    """`48:0.4,64:0.6` as [(48, 0.4), (64, 0.6)].

    Raises:
        ValueError: it is written otherwise, or the shares do not add up to 1.
    """
    found = []
    for part in text.split(","):
        size, _, share = part.partition(":")
        try:
            found.append((int(size), float(share)))
        except ValueError:
            raise ValueError(f"write SIZE:SHARE,SIZE:SHARE, as in 48:0.4,64:0.6, not {text!r}") from None
        if found[-1][0] < 1 or not 0 < found[-1][1] <= 1:
            raise ValueError(f"{part!r}: a size is 1 or more, a share of the epochs above 0 and at most 1")
    total = sum(share for _, share in found)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"the shares of {text!r} add up to {total:g}, not 1")
    return found


def sizes(text: str) -> str:
    """Image sizes by shares of the epochs: the text itself, if `sizes_and_shares` reads it."""
    try:
        sizes_and_shares(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _at_least(value: int, least: int) -> int:
    if value < least:
        raise argparse.ArgumentTypeError(f"must be {least} or more, not {value}")
    return value
