"""DecorConfig's fields as arguments of a command line and as environment variables: a new knob appears by itself.

`decor_lr` is `--decor-lr` and `TIMM_DECOR_DECOR_LR`, `every` is `--decor-every` and `TIMM_DECOR_EVERY`. Knobs that were
removed are refused with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from timm_decor.config import REMOVED_DEFAULTS, REMOVED_KNOBS, RULE_STRUCTURES, DecorConfig
from timm_decor.text import closest

VARIABLE_PREFIX = "TIMM_DECOR_"
HUB_OWNER_VARIABLE = "TIMM_DECOR_HUB_OWNER"  # begins like those of knobs, and is none: see models/staged.py
_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def dest(name: str) -> str:
    """A knob's attribute in parsed arguments."""
    return "decor_" + name.removeprefix("decor_")


def flag(name: str) -> str:
    """A knob's argument."""
    return "--" + dest(name).replace("_", "-")


def add_arguments(group: argparse._ActionsContainer) -> None:
    """One `--decor-*` argument a knob, with its default and its help."""
    for spec in dataclasses.fields(DecorConfig):
        text = spec.metadata["help"].replace("%", "%%")
        if rules := spec.metadata["rules"]:
            text = f"{', '.join(rules)}: {text}"
        if isinstance(spec.default, bool):
            action = group.add_argument(flag(spec.name), action=argparse.BooleanOptionalAction, default=spec.default)
        else:
            action = group.add_argument(flag(spec.name), type=type(spec.default), default=spec.default, metavar="X")
        # Set here, because some versions of BooleanOptionalAction and of the help's formatters add the default as well.
        action.help = f"{text} (default: %(default)s)"


def from_arguments(args: argparse.Namespace) -> DecorConfig:
    """The DecorConfig that parsed arguments describe; what it refuses, it raises."""
    return DecorConfig(**{spec.name: getattr(args, dest(spec.name)) for spec in dataclasses.fields(DecorConfig)})


def changed_flags(args: argparse.Namespace) -> list[str]:
    """The `--decor-*` arguments that differ from their defaults."""
    specs = dataclasses.fields(DecorConfig)
    return [flag(spec.name) for spec in specs if getattr(args, dest(spec.name)) != spec.default]


def removed(words: Iterable[str]) -> str:
    """What to say of an argument, or a recipe's key, that stood for a knob which is gone; "" where there is none."""
    gone = {dest(name): name for name in REMOVED_KNOBS}
    for word in words:
        key = word.split("=", 1)[0].lstrip("-").removeprefix("no-").replace("-", "_")
        if key in gone:
            return f"{flag(gone[key])} was removed: {REMOVED_KNOBS[gone[key]]}"
    return ""


def did_nothing(key: str, value: Any) -> bool:
    """Whether a recipe's key stands for a removed knob at the value with which it did nothing: its default."""
    return any(dest(name) == key and default == value for name, default in REMOVED_DEFAULTS.items())


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Fields of DecorConfig from `TIMM_DECOR_<FIELD>` variables.

    Raises:
        ValueError: a variable that names no field (with the near miss), or a value that its field does not take.
    """
    fields = {VARIABLE_PREFIX + spec.name.upper(): spec for spec in dataclasses.fields(DecorConfig)}
    values: dict[str, Any] = {}
    for variable in sorted(name for name in environ if name.startswith(VARIABLE_PREFIX)):
        if variable == HUB_OWNER_VARIABLE:
            continue
        name = variable.removeprefix(VARIABLE_PREFIX).lower()
        if name in REMOVED_KNOBS:
            raise ValueError(f"environment variable {variable} was removed: {REMOVED_KNOBS[name]}")
        if variable not in fields:
            near = closest(name.upper(), [known.removeprefix(VARIABLE_PREFIX) for known in fields], count=1)
            hint = f"did you mean {VARIABLE_PREFIX}{near[0]}?" if near else f"there are {', '.join(fields)}"
            raise ValueError(f"unknown environment variable {variable}; {hint}")
        try:
            values[name] = _parsed(environ[variable].strip(), type(fields[variable].default))
            _check_alone(name, values[name], fields[variable].metadata["rules"])
        except ValueError as error:
            raise ValueError(f"environment variable {variable}={environ[variable]!r}: {error}") from None
    return values


def _parsed(text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in _TRUTH:
            raise ValueError("must be true or false")
        return _TRUTH[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"must be a {'whole number' if kind is int else 'number'}") from None


def _check_alone(name: str, value: Any, rules: tuple[str, ...]) -> None:
    # Whether a knob, a rule and a structure go together is seen once the model's own config is known.
    others = {"rule": rules[0]} if rules else {}
    rule = value if name == "rule" else others.get("rule", DecorConfig.rule)
    if name != "structure":
        others["structure"] = RULE_STRUCTURES.get(rule, ("full",))[0]
    DecorConfig(**{**others, name: value})
