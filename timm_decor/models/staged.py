"""The project's own weights: where they lie here, and what they are called on the Hub.

A checkout keeps them in hub/staged, a wheel in timm_decor/staged: a folder a model, as it is on the Hub. Its
config.json is the one place that says what they are (tag, classes, mean, std, size). Without the weights' file, timm
fetches it from the Hub.
"""

from __future__ import annotations

import dataclasses
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from timm_decor.digest import RESULTS_FILE, check_digest
from timm_decor.errors import UserError
from timm_decor.knobs import HUB_OWNER_VARIABLE

# The Hub's account that the weights are under; a fork names its own by the variable.
HUB_OWNER = os.environ.get(HUB_OWNER_VARIABLE, "timm-decor")
WEIGHTS = "model.safetensors"

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = [_PACKAGE.parent / "hub" / "staged"] if (_PACKAGE.parent / "pyproject.toml").is_file() else []
_PLACES = (_PACKAGE / "staged", *_CHECKOUT)
_FIELDS = {field.name for field in dataclasses.fields(PretrainedCfg)}


def own_cfgs(architecture: str) -> dict[str, PretrainedCfg]:
    """timm's pretrained configs of the project's own weights of a model, by tag; those with the most classes first."""
    return {
        config["pretrained_cfg"]["tag"]: _cfg(config, folder)
        for folder, config in _staged()
        if config["architecture"] == architecture
    }


@dataclasses.dataclass(frozen=True)
class Own:
    """Weights of the project.

    Attributes:
        architecture: timm's name of the plain model.
        tag: of the weights.
        hub_id: of their repository.
        data: that they were trained on, as results.json has it.
        classes: how many.
        top1: accuracy on the usual evaluation images, in %.
    """

    architecture: str
    tag: str
    hub_id: str
    data: str
    classes: int
    top1: float


def own_weights() -> list[Own]:
    """The project's own weights of all models, those with the most classes first."""
    found = []
    for folder, config in _staged():
        results = _results(folder)
        tag, classes = config["pretrained_cfg"]["tag"], config["num_classes"]
        top1 = results["evaluated"]["top1"]
        found.append(Own(config["architecture"], tag, _hub_id(config), results["data"], classes, top1))
    return found


def knowledge(cfg: str | dict[str, Any] | PretrainedCfg | None) -> str:
    """What the project's own weights know, in a line: many who ask timm for weights expect ImageNet-1k's classes.

    Args:
        cfg: of a model.

    Returns:
        "" where the weights are somebody else's, or a file that timm was told to take.
    """
    folder, config = _own(cfg)
    if folder is None:
        return ""
    results = _results(folder)
    data = f" of {results['data']}" if "data" in results else ""
    right = f", {results['evaluated']['top1']:.1f} % top-1" if results.get("evaluated") else ""
    size = config["pretrained_cfg"]["input_size"][-1]
    return f"{folder.name}: weights for the {config['num_classes']} classes{data}, images of {size} px{right}"


def check(cfg: str | dict[str, Any] | PretrainedCfg | None) -> None:
    """Refuse a file of the project's own weights that is not the one that was published.

    Raises:
        RuntimeError: as timm raises it for weights that do not fit.
    """
    folder, _ = _own(cfg)
    if folder is not None and (folder / WEIGHTS).is_file():
        try:
            check_digest(folder / WEIGHTS)
        except UserError as error:
            raise RuntimeError(str(error)) from error


def unavailable(cfg: str | dict[str, Any] | PretrainedCfg | None, error: Exception) -> str:
    """What to say where the project's own weights could not be had; "" where `cfg` is not theirs, or they are here."""
    own, config = _own(cfg)
    if own is None or getattr(cfg, "file", None):
        return ""
    name = _hub_id(config)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"the weights {own.name} are neither here ({own / WEIGHTS} does not exist) "
        f"nor to be had from the Hub ({name}): {reason}"
    )


def _own(cfg: str | dict[str, Any] | PretrainedCfg | None) -> tuple[Path | None, dict[str, Any]]:
    """The folder of the project's own weights that a configuration asks for, and its config.json."""
    name = getattr(cfg, "hf_hub_id", "")
    found = next(((folder, config) for folder, config in _staged() if name == _hub_id(config)), None)
    told = getattr(cfg, "file", None)
    if found is None or (told and Path(told) != found[0] / WEIGHTS):
        return None, {}
    return found


def _results(folder: Path) -> dict[str, Any]:
    file = folder / RESULTS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}  # type: ignore[no-any-return]


@cache
def _staged() -> tuple[tuple[Path, dict[str, Any]], ...]:
    folder = next((place for place in _PLACES if place.is_dir()), None)
    files = sorted(folder.glob("*/config.json")) if folder else []
    found = [(file.parent, json.loads(file.read_text(encoding="utf-8"))) for file in files]
    # Of two of a model, the one that had more to learn is the better start.
    return tuple(sorted(found, key=lambda pair: -pair[1]["num_classes"]))


def _hub_id(config: dict[str, Any]) -> str:
    return f"{HUB_OWNER}/{config['architecture']}.{config['pretrained_cfg']['tag']}"


def _cfg(config: dict[str, Any], folder: Path) -> PretrainedCfg:
    given = {key: value for key, value in config["pretrained_cfg"].items() if key in _FIELDS}
    for key in ("input_size", "mean", "std"):
        given[key] = tuple(given[key])
    weights = folder / WEIGHTS
    return PretrainedCfg(
        **{
            **given,
            "label_names": tuple(config.get("label_names", ())) or None,
            "file": str(weights) if weights.is_file() else None,
            "hf_hub_id": _hub_id(config),
        }
    )
