"""The files of a published model, written into a folder: the folder is the repository.

`config.json` and `model.safetensors` are the plain model's, in timm's own layout, so that
`timm.create_model("hf-hub:...")` needs nothing of this project. Nothing in the folder depends on the day or the place:
the same run gives the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from timm_decor.digest import sha256
from timm_decor.engine.checkpoint import STATE_KEY, write_r
from timm_decor.errors import UserError, first_line
from timm_decor.publishing.trained import Trained
from timm_decor.publishing.upload import Contents
from timm_decor.training import build, validation
from timm_decor.training.keeping.folder import RESUME_FILE, RunFolder, read_resume
from timm_decor.training.keeping.metadata import stored_metadata
from timm_decor.training.keeping.privacy import PRIVATE, cleaned
from timm_decor.training.seeing.plot import save_picture

WEIGHTS, CONFIG, R_FILE, RECIPE, RESULTS, PICTURE, SAMPLES, CARD = FILES = (
    "model.safetensors",
    "config.json",
    "decor.safetensors",
    "recipe.yaml",
    "results.json",
    "training.png",
    "predictions.png",
    "README.md",
)
_NOISY = ("images_per_s",)  # what differs from one evaluation of the same weights to the next
_HALF_TOLERANCE = 0.02  # of the outputs' standard deviation: what rounding the weights to half precision may change
_POINTS = 1.0  # between training's own evaluation, which may be in bfloat16, and that of the published file


@dataclass(frozen=True)
class Options:
    """What the person who publishes decides.

    Attributes:
        tag: the pretrained tag.
        license: of the weights, as the Hub names licenses.
        half: store the weights in half precision.
        base_model: the Hub's name of the weights that training began with; None for none, or none that can be named.
        with_r: publish R, if the run has it and it belongs to the weights.
        data_dir: where the evaluated data are, if not where training found them.
        evaluate: run validate.py on the files as they will be published.
        samples: publish some of the evaluation images, with what the model says of them.
    """

    tag: str
    license: str
    half: bool
    base_model: str | None
    with_r: bool
    data_dir: str | None
    evaluate: bool
    samples: bool = False


def write(trained: Trained, path: Path, options: Options) -> dict[str, Any]:
    """Write all files but the card.

    Args:
        trained: the run.
        path: an empty folder.
        options: see there.

    Returns:
        What results.json holds.

    Raises:
        UserError: the weights are not what they say, the data to evaluate on are not there, nothing says how good the
            weights are, or the folder cannot be written.
    """
    if not options.evaluate and trained.evaluated is None:
        raise UserError(f"{trained.checkpoint} was not evaluated in training: publish it without --no-eval")
    folder = RunFolder(path)
    weights = load_file(trained.checkpoint)
    stored = {
        key: value.half() if options.half and value.is_floating_point() else value for key, value in weights.items()
    }
    known = trained.metadata
    said = stored_metadata(
        known.architecture, known.num_classes, known.data_config, known.model_kwargs, known.label_names
    )
    folder.write_weights("model", stored, {**said, "epoch": str(trained.epoch)})
    config = timm_config(trained, options)
    folder.write_json(CONFIG, config)
    _check(config, weights, load_file(path / WEIGHTS), trained.checkpoint)
    if options.with_r and trained.is_last and not trained.averaged:
        _write_r(trained, path / R_FILE)
    for file in path.glob("*.safetensors"):
        _settle(file)
    folder.write_text(RECIPE, recipe(trained))
    save_picture(trained.sides, path / PICTURE, f"{trained.architecture} on {trained.data.name}")
    evaluated = _evaluated(trained, path, options) if options.evaluate else None
    results = _results(trained, options, evaluated)
    results["sha256"] = {name: sha256(path / name) for name in (WEIGHTS, R_FILE) if (path / name).is_file()}
    folder.write_json(RESULTS, results)
    return results


def _write_r(trained: Trained, path: Path) -> None:
    """R at the end of the run. Not resume-previous.pt's, which belongs to other weights."""
    file = trained.checkpoint.parent / RESUME_FILE
    if not file.is_file():
        return
    try:
        state = read_resume(file)["optimizer"].get(STATE_KEY)
        if state is not None:
            write_r(state, path)
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"no R can be had from {file} (--no-r publishes without): {first_line(error)}") from error


def _settle(file: Path) -> None:
    """Sort the header of a safetensors file, whose library writes its metadata in another order each time."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def timm_config(trained: Trained, options: Options) -> dict[str, Any]:
    """config.json as timm reads it. Of timm's own configuration only what belongs to the architecture is taken."""
    twin = get_pretrained_cfg(trained.architecture)
    data = trained.data_config
    size = data["input_size"]
    config: dict[str, Any] = {
        "architecture": trained.architecture,
        "num_classes": trained.metadata.num_classes,
        "pretrained_cfg": {
            "tag": options.tag,
            "custom_load": False,
            "input_size": size,
            "fixed_input_size": bool(twin and twin.fixed_input_size),
            "interpolation": data["interpolation"],
            "crop_pct": data["crop_pct"],
            "crop_mode": data["crop_mode"],
            "mean": list(data["mean"]),
            "std": list(data["std"]),
            "num_classes": trained.metadata.num_classes,
            "pool_size": None,
            "first_conv": twin.first_conv if twin else None,
            "classifier": twin.classifier if twin else None,
            "license": options.license,
        },
    }
    model_args = dict(trained.metadata.model_kwargs)
    if size[0] != 3:
        model_args["in_chans"] = size[0]
    if model_args:
        config["model_args"] = model_args
    if trained.label_names:
        config["label_names"] = trained.label_names
    return config


def plain_model(config: dict[str, Any]) -> nn.Module:
    """The model that a config.json describes, with random weights: what timm makes of it without this plugin."""
    cfg = {**config["pretrained_cfg"], "architecture": config["architecture"]}
    kwargs = {"num_classes": config["num_classes"], **config.get("model_args", {})}
    if cfg["fixed_input_size"]:
        kwargs.setdefault("img_size", tuple(cfg["input_size"][1:]))
    return timm.create_model(config["architecture"], pretrained=False, pretrained_cfg=cfg, **kwargs)


@torch.no_grad()
def _check(config: dict[str, Any], weights: dict[str, Tensor], stored: dict[str, Tensor], checkpoint: Path) -> None:
    """Refuse files of which timm would not make the trained model."""
    try:
        model = plain_model(config).eval()
        x = torch.rand(2, *config["pretrained_cfg"]["input_size"], generator=torch.Generator().manual_seed(0))
        model.load_state_dict(weights)
        expected = model(x)
        model.load_state_dict(stored)
        found = model(x)
    except build.CREATION_ERRORS as error:
        raise UserError(f"{checkpoint} does not fit timm's {config['architecture']}: {first_line(error)}") from error
    if not torch.isfinite(expected).all():
        raise UserError(f"{checkpoint} gives outputs that are not finite: there is nothing in it to publish")
    scale = float(expected.std()) or 1.0
    if not torch.isfinite(found).all() or float((found - expected).abs().max()) > _HALF_TOLERANCE * scale:
        raise UserError(f"{checkpoint} changes its outputs in half precision: publish it without --half")


def contents(folder: Path) -> Contents:
    """A written folder, with the card, for the Hub."""
    mine = json.loads((folder / CONFIG).read_text(encoding="utf-8"))

    def other(names: Collection[str], read: Callable[[str], str]) -> str:
        if CONFIG not in names:
            others = [name for name in names if name.endswith((".safetensors", ".bin", ".pth"))]
            return f"{others[0]} without a config.json" if others else ""
        theirs = json.loads(read(CONFIG)).get("architecture", "model of no known architecture")
        return f"a {theirs}, not a {mine['architecture']}" if theirs != mine["architecture"] else ""

    return Contents(folder, FILES, f"Publish {mine['architecture']}.{mine['pretrained_cfg']['tag']}", other)


def recipe(trained: Trained) -> str:
    """recipe.yaml: train.py -c reads it; only the places of the data, and `left_out`, are missing."""
    kept = {key: cleaned(value) for key, value in trained.args.items() if key not in PRIVATE and value is not None}
    return yaml.safe_dump(kept, sort_keys=True)


def _evaluated(trained: Trained, path: Path, options: Options) -> dict[str, Any]:
    """validate.py's row for the file as it will be published; and its picture, where that is wanted."""
    args = trained.args
    given = {name: args.get(name) for name in ("dataset", "class_map", "input_key", "target_key")}
    given["data_dir"] = options.data_dir or args.get("data_dir")
    words = ["--checkpoint", str(path / WEIGHTS), "--split", args["val_split"], "--workers", "0", "--device", "cpu"]
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", str(value)] if value else []
    if options.samples:
        words += ["--sample-images", str(path / SAMPLES)]
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        file = Path(place) / "results.json"
        try:
            validation.main([*words, "--results-file", str(file)])
        except UserError as error:
            raise UserError(
                f"{error}; --data-dir says where the data are, --no-eval publishes training's numbers"
            ) from error
        row = json.loads(file.read_text(encoding="utf-8"))
    before = trained.evaluated
    off = _POINTS + 200 / row["images"]  # two images, in %
    if before is not None and abs(row["top1"] - float(before["top1"] or 0.0)) > off:
        raise UserError(
            f"{trained.checkpoint}: the published file has a top-1 accuracy of {row['top1']:.2f} %, training measured "
            f"{before['top1']:.2f} %: other data than training's, or a model that config.json does not describe"
        )
    return {key: value for key, value in row.items() if key not in _NOISY}


def _results(trained: Trained, options: Options, evaluated: dict[str, Any] | None) -> dict[str, Any]:
    results, twin = trained.results, trained.twin
    other = None
    if twin is not None:
        last = twin.history[-1] if twin.history else None
        other = {"model": twin.model, "lr": twin.lr, "epochs": twin.epochs, "failure": twin.failure, "final": last}
        other["apart"] = trained.twin_apart
    return {
        "architecture": trained.architecture,
        "tag": options.tag,
        "data": trained.data_name,
        "split": trained.args["val_split"],
        "epoch": trained.epoch,
        "dtype": "float16" if options.half else "float32",
        "evaluated": evaluated,
        "evaluated_in_training": trained.evaluated,
        "training": {key: results[key] for key in ("model", "decorrelated", "lr", "epochs", "final", "ms_per_update")}
        | {key: results.get(key) for key in ("images", "load")},
        "twin": other,
        "versions": results["versions"],
        "machine": results["machine"],
        "starts": results["starts"],
    }
