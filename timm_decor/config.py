"""DecorConfig: every knob of decorrelation, its default and where it comes from."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from timm_decor.text import closest

# Which rule can refresh which structure. `dbp` and `crgd` iterate on R itself, so R must be stored as a matrix; the
# Kronecker structure is defined by the eigenbasis of two factors, which only `whiten` computes.
RULE_STRUCTURES: dict[str, tuple[str, ...]] = {
    "whiten": ("full", "kronecker", "space"),
    "dbp": ("full", "space"),
    "crgd": ("full",),
}
SIDES = ("auto", "input", "both")
REMOVED_KNOBS = {  # what to do instead
    "warmup": "decorrelation that comes in over some steps showed no gain",
    "follow_lr": "damping that follows the learning rate showed no gain",
    "block_dim": "it went with structure 'block'; 'kronecker' keeps more in less memory",
}
# With these values they did nothing: a recipe or a config of before that names them is read all the same.
REMOVED_DEFAULTS: dict[str, Any] = {"warmup": 0, "follow_lr": False, "block_dim": 288}
_REMOVED_STRUCTURES = {
    "auto": "'kronecker', the default, is what it mostly chose",
    "block": "'kronecker' keeps more in less memory",
}


_NOTHING = object()


def structures() -> tuple[str, ...]:
    """Every structure that some rule takes, in the order of the rules."""
    return tuple(dict.fromkeys(name for names in RULE_STRUCTURES.values() for name in names))


def _knob(default: Any, text: str, rules: tuple[str, ...] = ()) -> Any:
    """A field: its default, its help, and the rules that have it (all, if none is named)."""
    return field(default=default, metadata={"help": text, "rules": rules})


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    near = closest(str(value), choices, count=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {name} {value!r}{hint} ({name}s: {', '.join(choices)})")


@dataclass(frozen=True)
class DecorConfig:
    """How layer inputs are decorrelated. Immutable and validated; travels as JSON.

    `DecorConfig.paper()` is the paper's algorithm; the defaults were chosen on held-out images of a small ResNet's
    training on CIFAR-10.

    Raises:
        ValueError: a value out of range, an unknown rule or structure, two that do not go together, or a knob that the
            rule does not have.
        TypeError: a value of the wrong type.
    """

    rule: str = _knob(
        "whiten", "rule that moves R: whiten (damped whitening), dbp (arXiv 2405.02385) or crgd (2407.10780)"
    )
    kappa: float = _knob(
        0.5, "weight of the unit-variance term V against the decorrelation term C, in [0, 1]", ("dbp",)
    )
    decor_lr: float = _knob(5e-3, "learning rate of R", ("dbp", "crgd"))
    damping: float = _knob(2.0, "added to the second moment's eigenvalues, in units of their mean", ("whiten",))
    every: int = _knob(20, "optimizer steps between two refreshes of R")
    sample: float = _knob(0.25, "share of the batch's images that the statistics are taken from; 1.0: every row")
    max_rows: int = _knob(16384, "rows of one forward pass in the statistics of a layer, where sample is below 1.0")
    structure: str = _knob("kronecker", "form of R: full, kronecker (channels x space) or space")
    preserve_function: bool = _knob(True, "a refresh leaves the function alone: A stays and W becomes A R^-1")
    center: bool = _knob(
        True, "leave the mean input out where a BatchNorm follows: gradients are blind to it", ("whiten",)
    )
    sides: str = _knob(
        "auto", "what is decorrelated: input, both (output errors as well) or auto: both with whiten and SGD"
    )
    output_damping: float = _knob(1.0, "both sides: damping of the output errors, in units of their mean eigenvalue")
    output_every: int = _knob(4, "both sides: optimizer steps between two looks at the output errors, in the gradient")
    output_decay: float = _knob(0.8, "both sides: weight of the old moment of the output errors, per look")
    rank: int = _knob(
        32, "kronecker, and the output side: eigenvectors kept (all where there are fewer); the rest share a scale"
    )
    stat_decay: float = _knob(0.5, "weight of the old second moment in its running average, per refresh", ("whiten",))
    graft: bool = _knob(
        True, "a scale beside R makes a step as long as the plain optimizer's: the learning rate stays what it was"
    )
    max_dim: int = _knob(8192, "layers whose R would need a factor larger than this stay plain")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, _typed(spec.name, getattr(self, spec.name), type(spec.default)))
        _check_choice("rule", self.rule, tuple(RULE_STRUCTURES))
        if self.structure in _REMOVED_STRUCTURES:
            raise ValueError(f"structure {self.structure!r} was removed: {_REMOVED_STRUCTURES[self.structure]}")
        _check_choice("structure", self.structure, structures())
        _check_choice("side", self.sides, SIDES)
        if self.structure not in RULE_STRUCTURES[self.rule]:
            raise ValueError(
                f"rule {self.rule!r} does not go with structure {self.structure!r}; "
                f"{self.rule!r} takes: {', '.join(RULE_STRUCTURES[self.rule])}"
            )
        for spec in dataclasses.fields(self):
            rules, value = spec.metadata["rules"], getattr(self, spec.name)
            if rules and self.rule not in rules and value != spec.default:
                raise ValueError(f"{spec.name}={value!r}: rule {self.rule!r} has no {spec.name} ({', '.join(rules)})")
        self._require("kappa", 0 <= self.kappa <= 1, "in [0, 1]")
        self._require("decor_lr", 0 <= self.decor_lr < math.inf, "zero or more")
        self._require("damping", 0 <= self.damping < math.inf, "zero or more")
        self._require("every", self.every >= 1, "1 or more")
        self._require("sample", 0 < self.sample <= 1, "in (0, 1]")
        self._require("max_rows", self.max_rows >= 1, "1 or more")
        self._require("rank", self.rank >= 1, "1 or more")
        self._require("stat_decay", 0 <= self.stat_decay < 1, "in [0, 1)")
        self._require("output_damping", 0 < self.output_damping < math.inf, "above zero")
        self._require("output_every", self.output_every >= 1, "1 or more")
        self._require("output_decay", 0 <= self.output_decay < 1, "in [0, 1)")
        self._require("max_dim", self.max_dim >= 1, "1 or more")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:  # a NaN fails every comparison, so it is caught here as well
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {wanted}")

    @classmethod
    def paper(cls) -> DecorConfig:
        """Decorrelated backpropagation as its paper has it (arXiv 2405.02385): every step, a tenth of the images."""
        return cls(
            rule="dbp", structure="full", every=1, sample=0.1, preserve_function=False, sides="input", graft=False
        )

    def to_dict(self) -> dict[str, Any]:
        """The knobs as a plain dictionary."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The knobs as one JSON object; `from_json` reads it back to an equal config."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecorConfig:
        """Build a config from a dictionary.

        Raises:
            ValueError: a key that is no knob (with the near miss), or a value that is refused.
        """
        names = tuple(spec.name for spec in dataclasses.fields(cls))
        values = {key: value for key, value in values.items() if REMOVED_DEFAULTS.get(key, _NOTHING) != value}
        for key in values:
            if key in REMOVED_KNOBS:
                raise ValueError(f"DecorConfig has no {key} any more: {REMOVED_KNOBS[key]}")
            _check_choice("DecorConfig field", key, names)
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> DecorConfig:
        """Read what `to_json` wrote; see `from_dict` for what is raised."""
        return cls.from_dict(json.loads(text))


def _typed(name: str, value: Any, kind: type) -> Any:
    """Return value as `kind`: an int is a fine float, nothing else is converted."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise TypeError(f"{name}={value!r}: must be {kind.__name__}, not {type(value).__name__}")
