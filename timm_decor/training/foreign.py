"""Files that somebody else may have written: YAML and JSON, read so that whatever is in them ends in one line."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from timm_decor.errors import UserError, first_line

_MOST_YAML = 2**20  # bytes: a recipe has a few thousand
_MOST = 2**26  # the record of a long run with many layers has a few million
_DEEPEST = 16  # levels of YAML in one another

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


class _Loader(yaml.SafeLoader):
    """Plain values, lists and mappings: nothing that grows as it is read, and no key twice."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(event, "an alias (*name): write the value out")
        if getattr(event, "tag", None) is not None:
            raise _refusal(event, f"the tag {event.tag!r}: plain values, lists and mappings are read")
        if self._depth == _DEEPEST:
            raise _refusal(event, f"more than {_DEEPEST} levels in one another")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _refusal(key, f"the key {_short.repr(key.value)} twice")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _refusal(at: Any, what: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {at.start_mark.line + 1} has {what}")


def read_mapping(path: str | Path, what: str) -> dict[Any, Any]:
    """A YAML file with a mapping in it.

    Args:
        path: the file.
        what: for messages, as in `recipe`.

    Raises:
        UserError: it cannot be read, is larger than 1 MB, is no YAML or no mapping, or has tags, aliases, a key twice
            or too many levels.
    """
    text = _read(path, what, _MOST_YAML)
    try:
        values = yaml.load(text, _Loader)  # a SafeLoader, and less
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:  # ValueError: such as 2024-13-45
        raise UserError(f"{what} {path} is not YAML: {_reason(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{what} {path} must be a mapping of argument names to values")
    return values


def read_json(path: str | Path) -> Fields:
    """A JSON file with an object in it.

    Raises:
        UserError: it cannot be read, is larger than 64 MB, is no JSON or no object.
    """
    return parse_json(_read(path, "file", _MOST), str(path))


def parse_json(text: str, where: str) -> Fields:
    """A JSON object.

    Args:
        text: the JSON.
        where: for messages: file, or file and key.

    Raises:
        UserError: it is no JSON or no object.
    """
    return Fields(where, json_value(text, where))


def json_value(text: str, where: str) -> Any:
    """Any JSON value; arguments and errors as for `parse_json`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {first_line(error)}") from error


def text_list(value: Any, where: str) -> list[str]:
    """A list of texts, such as the names of classes.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where} must be a list of texts, not {_short.repr(value)}")
    return value


def read_text(path: str | Path) -> str:
    """A text file in UTF-8.

    Raises:
        UserError: it cannot be read, is larger than 64 MB or no UTF-8.
    """
    return _read(path, "file", _MOST)


def _read(path: str | Path, what: str, most: int) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(
            f"cannot read {what} {path}: {getattr(error, 'strerror', None) or first_line(error)}"
        ) from error
    if len(data) > most:
        raise UserError(f"cannot read {what} {path}: it is larger than {most // 2**20} MB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {what} {path}: it is not UTF-8 text ({first_line(error)})") from error


def _reason(error: Exception) -> str:
    """What is wrong and, where YAML knows it, in which line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    return f"line {mark.line + 1}: {problem}" if mark and problem else first_line(error)


class Fields:
    """An object out of a file: each look at a field checks its type.

    Args:
        where: for messages: file, or file and key.
        values: what should be the object.

    Raises:
        UserError: it is none; so do all methods where a field is missing or is not what they are to return.
    """

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{where} must be an object with fields, not {_short.repr(values)}")
        self.where = where
        self.values: dict[str, Any] = dict(values)

    def __contains__(self, key: str) -> bool:
        """Whether the field is there, with a value."""
        return self.values.get(key) is not None

    def wrong(self, key: str, wanted: str) -> UserError:
        """What to raise where a field is not what was wanted."""
        if key not in self.values:
            return UserError(f"{self.where} does not say its {key}")
        return UserError(f"{self.where}: {key} must be {wanted}, not {_short.repr(self.values[key])}")

    def whole(self, key: str, least: int = 1) -> int:
        """A whole number."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**53:
            raise self.wrong(key, f"a whole number, {least} or more")
        return value

    def number(self, key: str, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number in a range."""
        value: Any = self.values.get(key)
        if not _is_number(value) or not least <= value <= most:
            span = "" if most == math.inf else f" from {least:g} to {most:g}"
            raise self.wrong(key, f"a number{span or (f', {least:g} or more' if least > -math.inf else '')}")
        return float(value)

    def numbers(self, key: str, length: int, positive: bool = False) -> list[float]:
        """So many finite numbers."""
        value = self.values.get(key)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(_is_number(item) and (item > 0 or not positive) for item in value)
        ):
            raise self.wrong(key, f"a list of {length} numbers{' above 0' if positive else ''}")
        return [float(item) for item in value]

    def wholes(self, key: str, length: int, most: int) -> list[int]:
        """So many whole numbers from 1 to `most`."""
        value = self.values.get(key)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(isinstance(item, int) and not isinstance(item, bool) and 1 <= item <= most for item in value)
        ):
            raise self.wrong(key, f"a list of {length} whole numbers from 1 to {most}")
        return value

    def text(self, key: str, choices: Collection[str] = ()) -> str:
        """A string, out of the choices where there are any."""
        value = self.values.get(key)
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.wrong(key, f"one of {', '.join(choices)}" if choices else "a text")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def fields(self, key: str) -> Fields:
        """An object."""
        if not isinstance(self.values.get(key), Mapping):
            raise self.wrong(key, "an object with fields")
        return Fields(f"{self.where}, {key}", self.values[key])

    def objects(self, key: str) -> list[Fields]:
        """A list of objects."""
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list of objects")
        return [Fields(f"{self.where}, {key}[{place}]", item) for place, item in enumerate(value)]


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # neither infinite nor NaN, nor a whole number that no float can hold
