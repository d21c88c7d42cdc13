"""What train.py left behind, read for publishing: nothing here writes or knows the Hub."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from timm.models import is_model

from hub.datasets import Data, known
from timm_decor.errors import UserError, first_line
from timm_decor.training.build import safetensors_metadata
from timm_decor.training.keeping.folder import ARGS_FILE, EMA_SUFFIX, SUMMARY_FILE
from timm_decor.training.seeing.compare import SIDES, Side

WEIGHTS = "last.safetensors"
_NEEDED = ("architecture", "num_classes", "data_config", "model_kwargs", "epoch")
# Files on the machine of the training that a recipe cannot bring along.
_FILES = ("initial_checkpoint", "pretrained_path", "initial_r", "kd_pretrained_path", "class_map")


@dataclass(frozen=True)
class Trained:
    """One model of a run.

    Attributes:
        checkpoint: its weights.
        metadata: what the weights' file says of itself.
        results: results.json.
        args: args.yaml, with the places on this machine.
        side: its history.
        twin: that of the other model of a --compare run; None otherwise.
    """

    checkpoint: Path
    metadata: dict[str, str]
    results: dict[str, Any]
    args: dict[str, Any]
    side: Side
    twin: Side | None

    @property
    def architecture(self) -> str:
        """timm's name of the plain model, without a tag."""
        return self.metadata["architecture"]

    @property
    def decorrelated(self) -> bool:
        return bool(self.results["decorrelated"])

    @property
    def sides(self) -> list[Side]:
        """The run's history and, of a comparison, its twin's: decorrelated first."""
        both = [self.side] if self.twin is None else [self.side, self.twin]
        return both if self.decorrelated else both[::-1]

    @property
    def epoch(self) -> int:
        """After which the weights were written, from 1."""
        return int(self.metadata["epoch"])

    @property
    def averaged(self) -> bool:
        """Whether the weights are the averaged ones (EMA)."""
        return self.checkpoint.stem.endswith(EMA_SUFFIX)

    @property
    def is_last(self) -> bool:
        """Whether the weights are those at the end of the run."""
        return self.epoch == len(self.side.history)

    @property
    def evaluated(self) -> dict[str, float | None] | None:
        """Training's own evaluation of these weights: top1, top5 (%) and loss; None where that epoch has none."""
        row = next((row for row in self.side.history if row["epoch"] == self.epoch), {})
        prefix = "ema" if self.averaged else "eval"
        found = {key: row.get(f"{prefix}_{key}") for key in ("top1", "top5", "loss")}
        return found if found["top1"] is not None else None

    @property
    def data_config(self) -> dict[str, Any]:
        """timm's: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode."""
        return dict(json.loads(self.metadata["data_config"]))

    @property
    def label_names(self) -> list[str]:
        """By class index; empty where the data set has none."""
        return list(json.loads(self.metadata.get("label_names", "[]")))

    @property
    def data_name(self) -> str:
        """The data set's name: that of --dataset, or the last part of --data-dir."""
        dataset = self.args.get("dataset") or ("folder" if self.args.get("data_dir") else "digits")
        if dataset in ("parquet", "folder"):
            return Path(self.args["data_dir"]).resolve().name
        return str(dataset)

    @property
    def data(self) -> Data:
        return known(self.data_name, is_folder=bool(self.args.get("data_dir")))

    @property
    def began_with(self) -> list[str]:
        """The arguments by which training began with somebody's weights; none for a random start."""
        names = ("pretrained", "initial_checkpoint", "pretrained_path")
        return [f"--{name.replace('_', '-')}" for name in names if self.args.get(name)]

    @property
    def base_model(self) -> str | None:
        """The Hub's name of the weights that training began with; None where it is not known."""
        known_by_name = self.began_with == ["--pretrained"]
        return self.results.get("base_model") if known_by_name else None

    @property
    def left_out(self) -> list[str]:
        """The arguments that name files of the machine, which the published recipe lacks."""
        return [f"--{name.replace('_', '-')}" for name in _FILES if self.args.get(name)]

    @property
    def tag(self) -> str:
        """As timm's tags: how it was trained, on what, at which size."""
        how = "dbp" if self.decorrelated else "bp"
        return f"{how}_{self.data.short}_r{self.data_config['input_size'][-1]}"


def find(path: Path) -> list[Path]:
    """The checkpoints that a path stands for: itself, or those of the runs in a folder and below it.

    Of a run the last epoch's weights are taken: its best epoch was picked on the images that it is reported on.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no checkpoint {path}: give an output folder of train.py, or a .safetensors file in one")
    found = sorted(file for file in path.rglob(WEIGHTS) if file.is_file())
    if not found:
        raise UserError(f"{path} holds no {WEIGHTS}: give an output folder of train.py, or a .safetensors file in one")
    return found


def read(checkpoint: Path) -> Trained:
    """Read a run by one of its checkpoints.

    Raises:
        UserError: it is not of train.py, files of the run are missing or damaged, or it is a model that a config.json
            of timm cannot describe.
    """
    if checkpoint.suffix != ".safetensors":
        raise UserError(f"{checkpoint} is no safetensors file: nothing else is published (a pickle can run code)")
    metadata = safetensors_metadata(str(checkpoint))
    missing = [key for key in _NEEDED if key not in metadata]
    if missing:
        raise UserError(f"{checkpoint} is damaged, or no checkpoint of train.py: it does not say its {missing[0]}")
    if not is_model(metadata["architecture"]):
        raise UserError(
            f"{checkpoint} is a {metadata['architecture']}, which timm does not know: it could not be loaded"
        )
    folder = checkpoint.parent
    top = folder.parent if folder.name in SIDES and (folder.parent / "compare.json").is_file() else folder
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        args = yaml.safe_load((top / ARGS_FILE).read_text(encoding="utf-8"))
        if results["failure"]:
            raise UserError(f"{checkpoint}: training failed ({results['failure']})")
        if args.get("bn_eps") is not None:
            raise UserError(
                f"{checkpoint} was trained with --bn-eps, which timm's config.json cannot say: no use to others"
            )
        sides = _compared(top) if top != folder else [_alone(folder, results, args)]
        place = SIDES.index(folder.name) if top != folder else 0
        twin = sides[1 - place] if len(sides) > 1 else None
        return Trained(checkpoint, metadata, results, args, sides[place], twin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"{checkpoint} needs the other files of its run (results.json, {ARGS_FILE}, {SUMMARY_FILE}), as train.py "
            f"writes them when it ends: {type(error).__name__}: {first_line(error)}"
        ) from error


def _compared(top: Path) -> list[Side]:
    record = json.loads((top / "compare.json").read_text(encoding="utf-8"))
    names = ("name", "model", "optimizer", "lr", "epochs", "history", "failure")
    return [Side(*(side[name] for name in names)) for side in record["sides"]]


def _alone(folder: Path, results: dict[str, Any], args: dict[str, Any]) -> Side:
    with open(folder / SUMMARY_FILE, newline="", encoding="utf-8") as file:
        history: list[dict[str, Any]] = [
            {**{key: float(value) for key, value in row.items() if value}, "epoch": int(row["epoch"])}
            for row in csv.DictReader(file)
        ]
    return Side(results["model"], results["model"], args["opt"], results["lr"], results["epochs"], history)
