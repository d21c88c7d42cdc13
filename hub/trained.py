"""What train.py left behind, read for publishing: nothing here writes or knows the Hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hub.datasets import Data, known
from timm_decor.training.build import safetensors_metadata
from timm_decor.training.compare import SIDES
from timm_decor.training.errors import UserError, first_line
from timm_decor.training.folder import ARGS_FILE, find_resume

WEIGHTS = "last.safetensors"
_NEEDED = ("architecture", "num_classes", "data_config", "model_kwargs", "epoch")


@dataclass(frozen=True)
class Trained:
    """One model of a run.

    Attributes:
        checkpoint: its weights.
        metadata: what the weights' file says of itself.
        results: results.json.
        args: args.yaml, with the places on this machine.
        comparison: compare.json of a --compare run; None otherwise.
        pictures: pictures of the training, by the names that they are published under.
        resume: the state to go on from, if it is there.
    """

    checkpoint: Path
    metadata: dict[str, str]
    results: dict[str, Any]
    args: dict[str, Any]
    comparison: dict[str, Any] | None
    pictures: dict[str, Path]
    resume: Path | None

    @property
    def architecture(self) -> str:
        """timm's name of the plain model, without a tag."""
        return self.metadata["architecture"]

    @property
    def decorrelated(self) -> bool:
        return bool(self.results["decorrelated"])

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
        return known(self.data_name)

    @property
    def base_model(self) -> str | None:
        """The Hub's name of the weights that training began with; None for a random start.

        Raises:
            UserError: it began with weights whose name is not known.
        """
        if self.args.get("initial_checkpoint") or self.args.get("pretrained_path"):
            raise UserError(
                f"{self.checkpoint} began with a file of weights: say by --base-model what they are, or none"
            )
        return self.results.get("base_model")

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
        UserError: it is not of train.py, or files of the run are missing or damaged.
    """
    if checkpoint.suffix != ".safetensors":
        raise UserError(f"{checkpoint} is no safetensors file: nothing else is published (a pickle can run code)")
    metadata = safetensors_metadata(str(checkpoint))
    missing = [key for key in _NEEDED if key not in metadata]
    if missing:
        raise UserError(f"{checkpoint} is damaged, or no checkpoint of train.py: it does not say its {missing[0]}")
    folder = checkpoint.parent
    results = _json(folder / "results.json")
    if results.get("failure"):
        raise UserError(f"{checkpoint}: training failed ({results['failure']})")
    top = folder.parent if folder.name in SIDES and (folder.parent / "compare.json").is_file() else folder
    try:
        args = yaml.safe_load((top / ARGS_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{checkpoint} needs the {ARGS_FILE} of its run: {first_line(error)}") from error
    return Trained(
        checkpoint,
        metadata,
        results,
        args,
        _json(top / "compare.json") if top != folder else None,
        {"training.png": top / "compare.png"} if top != folder and (top / "compare.png").is_file() else {},
        find_resume(folder)[0],
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}, which train.py writes when it ends: {first_line(error)}") from error
