"""The typed options: each argument is in one group, with the type that its parser gives it."""

from __future__ import annotations

import argparse
from collections import Counter
from functools import partial
from typing import Any, get_type_hints

import pytest
from training_runs import ROOT

from timm_decor.config import DecorConfig
from timm_decor.errors import UserError
from timm_decor.knobs import dest
from timm_decor.training.args import export_parser, predict_parser, train_parser, validate_parser
from timm_decor.training.options import ExportOptions, Options, PredictOptions, TrainOptions, ValidateOptions
from timm_decor.training.parser import (
    KeyValues,
    amount,
    below_one,
    count,
    crop,
    finite,
    index,
    positive,
    seed,
    share,
    sizes,
)

OF_THE_DOOR = {"help", "config"}  # they are done with before there are options
FILLED_IN = {"grad_accum_steps", "decay_epochs"}  # None until `follow_launcher` and `parse` have answered
TYPES = {
    None: str,
    float: float,
    amount: float,
    positive: float,
    share: float,
    count: int,
    index: int,
    seed: int,
    sizes: str,
    below_one: float,
    crop: float,
    finite: float,
}
PARSERS = pytest.mark.parametrize(
    "parser,options",
    [
        (train_parser, TrainOptions),
        (validate_parser, ValidateOptions),
        (partial(predict_parser, "x"), PredictOptions),
        (partial(export_parser, "x"), ExportOptions),
    ],
    ids=["train", "validate", "predict", "export"],
)


def arguments(options: type[Options]) -> list[tuple[str, Any]]:
    """Names and types of all arguments in a group and in the groups that it holds; None for a knob's type."""
    found: list[tuple[str, Any]] = []
    for name, kind in get_type_hints(options).items():
        if kind is DecorConfig:
            found += [(dest(field), None) for field in get_type_hints(DecorConfig)]
        elif isinstance(kind, type) and issubclass(kind, Options):
            found += arguments(kind)
        else:
            found.append((name, kind))
    return found


def expected(action: argparse.Action) -> Any:
    """The type of an argument's value."""
    if isinstance(action, KeyValues):
        return dict[str, Any]
    kind: Any = bool if isinstance(action.default, bool) or action.nargs == 0 else TYPES[action.type]
    if action.nargs not in (None, 0, "?"):
        kind = list[kind]
    optional = action.default is None and not action.required and action.dest not in FILLED_IN
    return kind | None if optional else kind


@PARSERS
def test_each_argument_is_in_one_group(parser: Any, options: type[Options]):
    names = Counter(name for name, _ in arguments(options))
    assert [name for name, times in names.items() if times > 1] == []
    assert set(names) == {action.dest for action in parser()._actions} - OF_THE_DOOR


@PARSERS
def test_types_are_those_of_the_arguments(parser: Any, options: type[Options]):
    actions = {action.dest: action for action in parser()._actions}
    wrong = [(name, kind) for name, kind in arguments(options) if kind and kind != expected(actions[name])]
    assert wrong == []


def test_values_are_taken_by_name_and_knobs_as_their_config():
    args = train_parser().parse(["--opt", "adamw", "--lr", "0.5", "--decor-every", "7", "--freeze", "a", "b"])
    options = TrainOptions.of(args)
    assert (options.optimizer.opt, options.optimizer.lr, options.start.freeze) == ("adamw", 0.5, ["a", "b"])
    assert options.decor == DecorConfig(every=7)
    with pytest.raises(UserError, match=r"^--decor-\*: every=0: must be 1 or more"):
        TrainOptions.of(train_parser().parse(["--decor-every", "0"]))


def test_parsed_arguments_stay_at_the_door():
    """Whatever else reads an argument takes the group that has it."""
    training = ROOT / "timm_decor" / "training"
    door = {"args.py", "parser.py", "options.py", "run.py", "runtime.py", "without_effect.py"}
    door |= {"keeping/privacy.py", "keeping/record.py"}
    readers = [file for file in training.rglob("*.py") if "Namespace" in file.read_text()]
    assert {file.relative_to(training).as_posix() for file in readers} == door
