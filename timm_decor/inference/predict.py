"""timm-decor predict: the likeliest classes of images, as a table, a file or a picture."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from timm_decor.errors import UserError
from timm_decor.inference.files import BROKEN, Files, find_images
from timm_decor.inference.weights import Opened, open_model
from timm_decor.text import csv_text, printable, text_table
from timm_decor.training import build
from timm_decor.training.args import predict_parser
from timm_decor.training.data.loaders import eval_loader
from timm_decor.training.keeping.folder import RunFolder
from timm_decor.training.options import DeviceOptions, LoaderOptions, PredictOptions
from timm_decor.training.runtime import follow_launcher, make_accelerator, slow_precision
from timm_decor.training.seeing.drawing import label
from timm_decor.training.seeing.mistakes import MOST_PICTURES, write_sheet
from timm_decor.training.without_effect import idle

_FORMATS = (".csv", ".jsonl", ".parquet")
_MOST_NAMED = 20  # broken images that are named one by one


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        index: of the image in its source.
        path: of the image.
        labels: of the likeliest classes, the likeliest first.
        names: theirs.
        probabilities: theirs.
    """

    index: int
    path: str
    labels: list[int]
    names: list[str]
    probabilities: list[float]


def main(argv: Sequence[str], prog: str) -> None:
    """Predict, and print a table or write what was asked for.

    Args:
        argv: the command line.
        prog: the program, for messages.

    Raises:
        UserError: anything that the person who called can put right, in one line; no image could be decoded. Images
            that could not, among others that could, are named on stderr.
    """
    parser = predict_parser(prog)
    args = parser.parse(argv)
    told = follow_launcher(args) + idle(args, parser)
    options = PredictOptions.of(args)
    if options.output and Path(options.output).suffix not in _FORMATS:
        raise UserError(f"--output {options.output}: its ending says the format: {', '.join(_FORMATS)}")
    if options.picture and Path(options.picture).suffix.lower() != ".png":
        raise UserError(f"--picture {options.picture}: it is a png, and its name must end so")
    paths = find_images(options.paths)
    accelerator = make_accelerator(options.device.device, options.device.amp, options.device.amp_dtype)
    main_process = accelerator.is_main_process
    if main_process:
        for line in told + slow_precision(accelerator):
            print(f"{prog}: {line}", file=sys.stderr)
    for file in (options.output, options.picture):
        if file:
            RunFolder(Path(file).parent, main_process)
    opened = open_model(options.weights, options.model, options.use_ema, options.image, options.create)
    if main_process:
        for line in opened.notes:
            print(f"{prog}: {line}", file=sys.stderr)
    predictor = Predictor(opened, options.device, accelerator, options.weights)
    source = Files(paths, opened.mode)
    predictions, broken = predictor.predict(source, options.loader, options.top)
    if main_process:
        for index in broken[:_MOST_NAMED]:
            print(f"{prog}: {printable(source.why_broken(index))}", file=sys.stderr)
        if broken:
            print(f"{prog}: {len(broken)} of {len(paths)} images left out", file=sys.stderr)
        if predictions:
            _show(options, predictions, source)
    accelerator.end_training()
    if not predictions:
        raise UserError(f"none of {len(paths)} images could be decoded")


class Predictor:
    """A trained model that is ready to say what is in images.

    Args:
        opened: the model.
        device: on what, and in which form, it runs.
        accelerator: made for that.
        weights: the model's name, for messages.

    Raises:
        UserError: it does not take images of the size that its weights want.
    """

    def __init__(self, opened: Opened, device: DeviceOptions, accelerator: Accelerator, weights: str) -> None:
        model, size = opened.model, opened.data_config["input_size"]
        self.opened = opened
        self._device, self._accelerator = device, accelerator
        build.place(model, accelerator.device, device.channels_last)
        build.check_images(model, size, accelerator.device, accelerator.autocast, weights)
        self._runnable: Any = build.compiled(model.eval(), device)

    @torch.no_grad()
    def predict(self, source: Files, loader: LoaderOptions, top: int) -> tuple[list[Prediction], list[int]]:
        """What the model says, and the numbers of the images that could not be decoded.

        Args:
            source: the images.
            loader: how they are batched.
            top: classes to name for each.
        """
        names = self.opened.names
        predictions: list[Prediction] = []
        broken: list[int] = []
        for images, states in eval_loader(loader, source, self.opened.data_config, 2, 0, self._accelerator):
            if self._device.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with self._accelerator.autocast():
                output = self._runnable(images)
            best = output.float().softmax(1).topk(min(top, output.shape[1]), dim=1)
            # on several processes the last batch is padded; gather_for_metrics drops the padding
            parts = self._accelerator.gather_for_metrics((states, best.indices, best.values))
            for state, labels, shares in zip(*(part.tolist() for part in parts), strict=True):
                index = len(predictions) + len(broken)
                if state == BROKEN:
                    broken.append(index)
                else:
                    its = [names[number] for number in labels]
                    predictions.append(Prediction(index, source.where(index), labels, its, shares))
        return predictions, broken


def _show(options: PredictOptions, predictions: Sequence[Prediction], source: Files) -> None:
    if options.output:
        _write(predictions, Path(options.output))
        print(f"{options.output}: {len(predictions)} images")
    else:
        print(_table(predictions))
    if options.picture:
        shown = [
            (one.index, f"{label(one.names[0], 18)}\n{100 * one.probabilities[0]:.0f} %", "black")
            for one in predictions[:MOST_PICTURES]
        ]
        heading = "what was predicted"
        if len(predictions) > len(shown):
            heading += f": the first {len(shown)} of {len(predictions)} images"
        write_sheet(source, shown, heading, Path(options.picture))


def _table(predictions: Sequence[Prediction]) -> str:
    rows = []
    for one in predictions:
        rest = [f"{name} {100 * share:.1f}" for name, share in zip(one.names[1:], one.probabilities[1:], strict=True)]
        rows.append((one.path, one.names[0], f"{100 * one.probabilities[0]:.1f}", ", ".join(rest)))
    return text_table(("image", "prediction", "%", "then"), rows)


def _write(predictions: Sequence[Prediction], path: Path) -> None:
    """The predictions as a file: CSV has a column for each name and probability, the other formats have lists."""
    if path.suffix == ".csv":
        count = len(predictions[0].names)
        header = ["path", *(f"{what}_{place + 1}" for place in range(count) for what in ("name", "probability"))]
        rows = [
            [one.path, *(cell for pair in zip(one.names, one.probabilities, strict=True) for cell in pair)]
            for one in predictions
        ]
        RunFolder(path.parent).write_text(path.name, csv_text([header, *rows]))
        return
    columns = {
        "path": [printable(one.path) for one in predictions],
        "names": [one.names for one in predictions],
        "labels": [one.labels for one in predictions],
        "probabilities": [one.probabilities for one in predictions],
    }
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
        RunFolder(path.parent).write_text(path.name, "\n".join(lines) + "\n")
        return
    import pyarrow
    from pyarrow import parquet

    data = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), data)
    RunFolder(path.parent).write_bytes(path.name, data.getvalue())
