"""DecorConfig: frozen, validated, and the same after a trip through JSON."""

import dataclasses

import pytest

from timm_decor import DecorConfig
from timm_decor.config import REMOVED_DEFAULTS, REMOVED_KNOBS

DBP = {"rule": "dbp", "structure": "full"}


def test_json_round_trip():
    config = DecorConfig(rule="dbp", structure="space", kappa=0.25, every=7, preserve_function=False)
    assert DecorConfig.from_json(config.to_json()) == config
    assert DecorConfig.from_json(DecorConfig().to_json()) == DecorConfig()


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DecorConfig().every = 3


def test_an_int_is_a_fine_float():
    config = DecorConfig(damping=2, sample=1)
    assert config.damping == 2.0 and isinstance(config.damping, float)


@pytest.mark.parametrize(
    "values,words",
    [
        ({"rule": "whitn"}, ["'whitn'", "did you mean 'whiten'"]),
        ({"structure": "kron"}, ["'kron'", "did you mean 'kronecker'"]),
        ({"structure": "xyz"}, ["full, kronecker, space"]),
        ({"rule": "dbp", "structure": "kronecker"}, ["does not go with", "full, space"]),
        ({**DBP, "kappa": 1.5}, ["kappa=1.5", "[0, 1]"]),
        ({**DBP, "kappa": -0.1}, ["kappa=-0.1"]),
        ({**DBP, "kappa": float("nan")}, ["kappa=nan"]),
        ({"kappa": 0.9}, ["kappa=0.9: rule 'whiten' has no kappa (dbp)"]),
        ({**DBP, "damping": 0.3}, ["rule 'dbp' has no damping (whiten)"]),
        ({"structure": "auto"}, ["structure 'auto' was removed", "kronecker"]),
        ({"damping": -1.0}, ["damping=-1.0", "zero or more"]),
        ({**DBP, "decor_lr": float("inf")}, ["decor_lr=inf"]),
        ({"every": 0}, ["every=0", "1 or more"]),
        ({"sample": 0.0}, ["sample=0.0"]),
        ({"sample": 1.1}, ["sample=1.1"]),
        ({"rank": 0}, ["rank=0"]),
        ({"max_rows": 0}, ["max_rows=0"]),
        ({"stat_decay": 1.0}, ["stat_decay=1.0"]),
        ({"max_dim": 0}, ["max_dim=0"]),
    ],
)
def test_bad_values_are_named(values, words):
    with pytest.raises(ValueError) as caught:
        DecorConfig(**values)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("values", [{"every": 2.5}, {"every": True}, {"rule": 3}, {"damping": "1"}, {"kappa": None}])
def test_bad_types_are_named(values):
    with pytest.raises(TypeError, match=next(iter(values))):
        DecorConfig(**values)


def test_no_knob_is_removed_and_there():
    assert REMOVED_KNOBS.keys().isdisjoint(DecorConfig().to_dict())


@pytest.mark.parametrize("name", REMOVED_KNOBS)
def test_a_knob_that_was_removed_says_why(name):
    with pytest.raises(ValueError, match=f"has no {name} any more: "):
        DecorConfig.from_dict({name: 1})


def test_a_config_of_before_is_read():
    """With the removed knobs at the values with which they did nothing."""
    assert DecorConfig.from_dict({"every": 5, **REMOVED_DEFAULTS}) == DecorConfig(every=5)


def test_the_paper():
    paper = DecorConfig.paper()
    assert (paper.rule, paper.structure, paper.every, paper.sample) == ("dbp", "full", 1, 0.1)
    assert not paper.preserve_function and paper.sides == "input"


def test_unknown_key_has_its_near_miss():
    with pytest.raises(ValueError, match="'dampning'; did you mean 'damping'"):
        DecorConfig.from_dict({"dampning": 1.0})
