"""What train.py left behind, read for publishing: nothing here writes or knows the Hub."""

from __future__ import annotations

import argparse
import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm_decor.digest import check_digest
from timm_decor.errors import UserError, first_line, message
from timm_decor.models import PREFIX
from timm_decor.publishing.datasets import Data, is_place, known
from timm_decor.training.args import as_recipe, decor_config
from timm_decor.training.foreign import Fields, read_json, read_mapping, read_text
from timm_decor.training.keeping.folder import ARGS_FILE, EMA_SUFFIX, RESULTS_FILE, SUMMARY_FILE
from timm_decor.training.keeping.metadata import CheckpointMetadata
from timm_decor.training.keeping.resume import NO_MATTER
from timm_decor.training.keeping.starts import longest
from timm_decor.training.run import parse
from timm_decor.training.seeing.compare import SIDES, Side

WEIGHTS = "last.safetensors"
# Of args.yaml, which is sorted: what the card tells, and its last line.
_WRITTEN = ("batch_size", "dataset", "epochs", "model", "opt", "sched", "val_split", "weight_decay", "workers")
_OWN_LOAD = 1.25  # times its threads and workers: a load above that is others' as well
_OF_A_TWIN = ("model", "decor", "lr", "lr_base", "lr_base_size", "lr_base_scale")  # may be its own
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
        twin: that of the other model of a --compare run, or of a run that was named as the twin's; None otherwise.
        twin_apart: whether the twin had a run of its own.
    """

    checkpoint: Path
    metadata: CheckpointMetadata
    results: dict[str, Any]
    args: dict[str, Any]
    side: Side
    twin: Side | None
    twin_apart: bool = False

    @property
    def architecture(self) -> str:
        """timm's name of the plain model, without a tag."""
        return self.metadata.architecture

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
        assert self.metadata.epoch is not None  # `read` saw to it
        return self.metadata.epoch

    @property
    def averaged(self) -> bool:
        """Whether the weights are the averaged ones (EMA)."""
        return self.checkpoint.stem.endswith(EMA_SUFFIX)

    @property
    def is_picked(self) -> bool:
        """Whether the weights were picked by their accuracy on the images that they are reported on."""
        return self.checkpoint.stem.removesuffix(EMA_SUFFIX) == "best"

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
        return self.metadata.data_config

    @property
    def machine(self) -> dict[str, Any]:
        """The one that most of the updates were trained on, as `runtime.machine` tells."""
        return dict(longest(self.results["starts"], self.results["final"]["steps"])["machine"])

    @property
    def beside_others(self) -> bool:
        """Whether the machine had much more to do than this run while it trained."""
        machine = self.machine
        workers = machine.get("workers", self.args["workers"])
        if self.results["load"] is None or machine.get("gpu") or workers is None:
            return False
        own = machine["processes"] * (machine["torch_threads"] + workers)
        return float(self.results["load"]) > _OWN_LOAD * own

    @property
    def label_names(self) -> list[str]:
        """By class index; empty where the data set has none."""
        return self.metadata.label_names

    @property
    def data_name(self) -> str:
        """The data set's name: that of --dataset, or the last part of where it is on the machine that trained."""
        return _data_name(self.args)

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
        """As timm's tags: how it was trained (`DecorConfig.rule`, or bp for plain), on what, at which size."""
        how = decor_config(argparse.Namespace(**self.args)).rule if self.decorrelated else "bp"
        return f"{how}_{self.data.short}_r{self.data_config['input_size'][-1]}"


def _data_name(args: dict[str, Any]) -> str:
    dataset = str(args.get("dataset") or ("folder" if args.get("data_dir") else "digits"))
    kind, _, rest = dataset.partition("/")
    if kind in ("hfds", "hfids") and is_place(rest):
        return _last_part(rest)
    if kind in ("parquet", "folder", "wds") and args.get("data_dir"):
        return _last_part(args["data_dir"])
    return dataset


def _last_part(place: str) -> str:
    """What a folder, or an address, is called."""
    if "://" in place or place.startswith("pipe:"):
        return place.split()[-1].rstrip("/").rsplit("/", 1)[-1]
    return Path(place).expanduser().resolve().name


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
    check_digest(checkpoint)
    metadata = CheckpointMetadata.read(checkpoint)
    if metadata is None:
        raise UserError(f"{checkpoint} does not say its architecture: it is no checkpoint of train.py")
    if metadata.architecture.startswith(PREFIX):
        raise UserError(f"{checkpoint} is a {metadata.architecture}, which timm does not know: it could not be loaded")
    folder = checkpoint.parent
    top = folder.parent if folder.name in SIDES and (folder.parent / "compare.json").is_file() else folder
    try:
        results, args = _results(folder / RESULTS_FILE), _args(top / ARGS_FILE)
        sides = _compared(top) if top != folder else [_alone(folder, results, args)]
        side = sides[SIDES.index(folder.name) if top != folder else 0]
        if not results.get("failure"):
            _check_epochs(checkpoint, metadata, results, side)
    except UserError as error:
        raise UserError(
            f"{checkpoint} needs the other files of its run (results.json, {ARGS_FILE}, {SUMMARY_FILE}), as train.py "
            f"writes them when it ends: {message(error)}"
        ) from error
    if results.get("failure"):
        raise UserError(f"{checkpoint}: training failed ({results['failure']})")
    return Trained(checkpoint, metadata, results, args, side, next((each for each in sides if each is not side), None))


def with_twin(trained: Trained, folder: Path) -> Trained:
    """A run, with its twin of another run: who has trained the plain model before need not do so again.

    Args:
        trained: the run.
        folder: of the twin's run; args.yaml, results.json and summary.csv are all that is read.

    Raises:
        UserError: the run has a twin, the folder holds no run that ended well, or it was not trained as its twin.
    """
    if trained.twin is not None:
        raise UserError(f"--twin {folder}: {trained.checkpoint} is of a --compare run, which has its twin")
    results, args = _results(folder / RESULTS_FILE), _args(folder / ARGS_FILE)
    if results.get("failure"):
        raise UserError(f"--twin {folder}: training failed ({results['failure']})")
    if args["compare"]:
        raise UserError(f"--twin {folder} is of a --compare run: it is the twin of the other model there")
    side = _alone(folder, results, args)
    _check_ends(results, side)
    if bool(results["decorrelated"]) == trained.decorrelated:
        kind = "decorrelated" if trained.decorrelated else "plain"
        raise UserError(f"--twin {folder}: both are {kind}, and a twin is the model that is not")
    own = {name for name in {*args, *trained.args} if name.startswith("decor_")} | {*_OF_A_TWIN, *NO_MATTER}
    pairs = {name: (trained.args.get(name), args.get(name)) for name in sorted({*args, *trained.args} - own)}
    names = (trained.args["model"].removeprefix(PREFIX), args["model"].removeprefix(PREFIX))
    files = {  # their places may differ, and R is decorrelation's
        name: (Path(trained.args.get(name) or "").name, Path(args.get(name) or "").name)
        for name in _FILES
        if name != "initial_r"
    }
    pairs = {"model": names, "data": (trained.data_name, _data_name(args)), **files, **pairs}
    other = next((name for name, pair in pairs.items() if pair[0] != pair[1]), None)
    if other:
        raise UserError(
            f"--twin {folder} was not trained as its twin: {other} is {pairs[other][1]}, "
            f"and {pairs[other][0]} in {trained.checkpoint.parent}"
        )
    for run, found in ((trained.checkpoint.parent, trained.results), (folder, results)):
        if found["changed"]:
            raise UserError(f"--twin {folder}: {run} was gone on with by other arguments, so that its recipe does not "
                            f"say how it was trained")  # fmt: skip
    return replace(trained, twin=side, twin_apart=True)


def _check_epochs(checkpoint: Path, metadata: CheckpointMetadata, results: dict[str, Any], side: Side) -> None:
    """Refuse files of different runs, and a history that was cut."""
    _check_ends(results, side)
    known = len(side.history)
    if metadata.epoch is None or metadata.epoch > known:
        said = f"is of epoch {metadata.epoch}" if metadata.epoch else "does not say its epoch"
        raise UserError(f"{checkpoint.name} {said}, the history has {known}")


def _check_ends(results: dict[str, Any], side: Side) -> None:
    """Refuse results and a history that end at different places."""
    final, known = results["final"], len(side.history)
    last = side.history[-1] if side.history else {}
    if final["epoch"] != known or final["steps"] != last["steps"]:
        raise UserError(
            f"results.json ends with epoch {final['epoch']} ({final['steps']} updates), the history with epoch {known} "
            f"({last.get('steps', 0)} updates): they are not of one run, or one was cut"
        )


def _results(path: Path) -> dict[str, Any]:
    """results.json, with all that is published of it or looked at."""
    found = read_json(path)
    if "failure" in found:
        found.text("failure")
        return found.values
    found.text("model")
    found.flag("decorrelated")
    found.number("lr", 0)
    found.whole("epochs")
    final = found.fields("final")
    final.whole("epoch")
    final.whole("steps")
    final.number("seconds", 0)
    _check_start(found)
    starts = found.objects("starts") if "starts" in found else []
    for start in starts:
        start.whole("steps", 0)
        _check_start(start)
    steps = [start.values["steps"] for start in starts]
    if steps != sorted(set(steps)) or ("starts" in found and not steps):
        raise found.wrong("starts", "a list of one entry or more by rising steps")
    if "base_model" in found:
        found.text("base_model")
    if "ms_per_update" in found:
        found.fields("ms_per_update")
    if "images" in found:
        found.fields("images").whole("training")
    if "load" in found:
        found.number("load", 0)
    for change in found.objects("changed") if "changed" in found else ():
        change.whole("steps")
        pairs = change.fields("changed")
        for name, pair in pairs.values.items():
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise pairs.wrong(name, "two texts")
    extra: dict[str, Any] = {"base_model": None, "ms_per_update": None, "images": None, "load": None, "changed": []}
    begun = {"steps": 0, **{key: found.values[key] for key in ("machine", "versions")}}  # all that old runs tell
    return {"starts": [begun], **extra, **found.values}


def _check_start(found: Fields) -> None:
    """A machine and its versions, of a start or of the whole run."""
    machine, versions = found.fields("machine"), found.fields("versions")
    for key in ("processes", "torch_threads"):
        machine.whole(key)
    if "gpu" in machine:
        machine.text("gpu")
    for fields, key in ((machine, "cpu"), *((versions, name) for name in ("timm_decor", "timm", "torch"))):
        fields.text(key)
    if "workers" in machine:
        machine.whole("workers", 0)


def _args(path: Path) -> dict[str, Any]:
    """args.yaml with the types that train.py's arguments have."""
    given = read_mapping(path, "recipe")
    missing = next((name for name in _WRITTEN if name not in given), None)
    if missing:
        raise UserError(f"{path} does not say its {missing}: it was cut, or is not what train.py writes")
    return as_recipe(parse(["-c", str(path)], is_begun=True))


def _compared(top: Path) -> list[Side]:
    found = read_json(top / "compare.json")
    sides = []
    for side in found.objects("sides"):
        failure = side.text("failure") if "failure" in side else None
        text = [side.text(key) for key in ("name", "model", "optimizer")]
        history = _history(side.objects("history"))
        sides.append(Side(text[0], text[1], text[2], side.number("lr", 0), side.whole("epochs"), history, failure))
    if len(sides) != len(SIDES):
        raise found.wrong("sides", f"a list of {len(SIDES)}")
    return sides


def _alone(folder: Path, results: dict[str, Any], args: dict[str, Any]) -> Side:
    if results.get("failure"):
        return Side("", "", "", 0.0, 0, [])
    history = read_summary(folder / SUMMARY_FILE)
    return Side(results["model"], results["model"], args["opt"], results["lr"], results["epochs"], history)


def read_summary(path: Path) -> list[dict[str, Any]]:
    """summary.csv: a row an epoch, numbers all of them.

    Raises:
        UserError: it cannot be read, it was cut, or it is something else.
    """
    text = read_text(path)
    if not text.endswith("\n"):
        raise UserError(f"{path} ends within a line: it was cut")
    rows = []
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), start=2):
            if None in row or None in row.values():
                raise UserError(f"{path}: line {number} has another number of cells than the first")
            cells = {key: float(value) for key, value in row.items() if value}
            whole = {
                key: int(value) for key, value in cells.items() if key in ("epoch", "steps") and value == value // 1
            }
            rows.append(Fields(f"{path}, line {number}", {**cells, **whole}))
    except (ValueError, OverflowError, csv.Error) as error:
        raise UserError(f"{path} is not what train.py writes: {first_line(error)}") from error
    return _history(rows)


def _history(rows: list[Fields]) -> list[dict[str, Any]]:
    for place, row in enumerate(rows, start=1):
        if row.whole("epoch") != place:
            raise row.wrong("epoch", f"{place}, one more than before")
        row.whole("steps")
        for key in ("seconds", "epoch_seconds"):
            row.number(key, 0)
        row.number("train_loss")
        for key, value in row.values.items():
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise row.wrong(key, "a number")
    return [row.values for row in rows]
