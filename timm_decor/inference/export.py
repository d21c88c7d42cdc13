"""timm-decor export: a trained model as ONNX, torch.export or TorchScript, written where it says what torch says."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_decor.convert import to_plain
from timm_decor.errors import UserError, first_line
from timm_decor.inference.files import FINE, Files, find_images
from timm_decor.inference.weights import Opened, open_model
from timm_decor.training import build
from timm_decor.training.args import export_parser
from timm_decor.training.data.digits import Digits
from timm_decor.training.data.loaders import eval_loader
from timm_decor.training.data.sources import Source
from timm_decor.training.keeping.folder import RunFolder
from timm_decor.training.keeping.metadata import stored_metadata
from timm_decor.training.options import ExportOptions, LoaderOptions
from timm_decor.training.runtime import make_accelerator

Run = Callable[[Tensor], Tensor]
_CHECKED = 16  # images
_ROUNDING = 1e-6  # of logits near zero
_TOLERANCE = 1e-3  # of the largest logit; kernels add up in another order, and deep networks let that grow
_INPUT, _OUTPUT = "images", "logits"


def main(argv: Sequence[str], prog: str) -> None:
    """Export, check, write, and say what was written.

    Args:
        argv: the command line.
        prog: the program, for messages.

    Raises:
        UserError: anything that the person who called can put right, in one line; a model that the format does not
            take, or a file that does not say what the model says: nothing is written then.
    """
    options = ExportOptions.of(export_parser(prog).parse(argv))
    path = Path(options.file)
    if path.suffix not in _FORMATS:
        raise UserError(f"{path}: its ending says the format: {', '.join(_FORMATS)}")
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise UserError(f"{path} needs {' and '.join(missing)}: pip install 'timm-decor[onnx]'")
    paths = find_images(options.images)[:_CHECKED]
    RunFolder(path.parent)  # made, and tested for writing
    opened = open_model(options.weights, options.model, options.use_ema, options.image, options.create)
    for line in opened.notes:
        print(f"{prog}: {line}", file=sys.stderr)
    model, size = to_plain(opened.model).eval().requires_grad_(False), opened.data_config["input_size"]
    build.check_images(model, size, torch.device("cpu"), contextlib.nullcontext, options.weights)
    images = _images(paths, opened)
    classes = build.class_count(model)
    told = stored_metadata(opened.name, classes, opened.data_config, opened.model_kwargs, opened.names)
    with _quiet():
        try:
            data, run = _FORMATS[path.suffix](model, images, told)
        except Exception as error:  # exporters raise whatever they stumble over
            raise UserError(f"{opened.name} does not export to {path.suffix}: {first_line(error)}") from error
        checked = _check(model, run, images, path)
    _write(path, data)
    print(f"{path}: {len(data) / 10**6:.1f} MB, {classes} classes, images (N, {', '.join(map(str, size))})")
    print(checked)


def _images(paths: Sequence[str], opened: Opened) -> Tensor:
    """Real images as the model wants them, (N, C, H, W)."""
    source: Source = Files(paths, opened.mode) if paths else Digits(f"test[:{_CHECKED}]", opened.mode)
    accelerator = make_accelerator("cpu", False, "float16")
    loader = eval_loader(LoaderOptions(_CHECKED, 0, False), source, opened.data_config, 10, 0, accelerator)
    images, labels = next(iter(loader))
    fine: Tensor = images[labels == FINE] if paths else images
    if not len(fine):
        raise UserError(f"--images: none of the first {len(paths)} images could be decoded")
    return fine


def _check(model: nn.Module, run: Run, images: Tensor, path: Path) -> str:
    """Compare what is exported with the model, on all images and on the first alone.

    Returns:
        What was found, for people.

    Raises:
        UserError: they differ, or the export takes no batch of one.
    """
    expected = model(images)
    try:
        found = torch.cat([run(images), run(images[:1])])
    except Exception as error:  # as above
        raise UserError(f"{path.name} does not run: {first_line(error)}; nothing was written") from error
    expected = torch.cat([expected, model(images[:1])])
    largest, reach = (found - expected).abs().max().item(), expected.abs().max().item()
    if not largest <= _TOLERANCE * reach + _ROUNDING:
        raise UserError(f"{path.name} differs from the model by {largest:.2g}, logits reach {reach:.2g}: not written")
    same = int((found.argmax(1) == expected.argmax(1))[:-1].sum())
    return (
        f"checked on {len(images)} images: logits up to {reach:.3g} differ by {largest:.1e} at most, "
        f"{same} of {len(images)} predictions are the same"
    )


def _onnx(model: nn.Module, images: Tensor, told: Mapping[str, str]) -> tuple[bytes, Run]:
    import onnx
    import onnxruntime

    file = io.BytesIO()
    names: dict[str, Any] = {"input_names": [_INPUT], "output_names": [_OUTPUT]}
    if "dynamic_shapes" in inspect.signature(torch.onnx.export).parameters:  # since torch 2.6
        shapes = ({0: torch.export.Dim("batch")},)
        program: Any = torch.onnx.export(
            model, (_two(images),), dynamo=True, verbose=False, dynamic_shapes=shapes, **names
        )
        program.save(file)
    else:
        axes = {name: {0: "batch"} for name in (_INPUT, _OUTPUT)}
        older: Any = torch.onnx.export  # they write into open files
        older(model, (_two(images),), file, dynamic_axes=axes, **names)
    proto = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(proto, dict(told))
    data: bytes = proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda x: torch.from_numpy(session.run([_OUTPUT], {_INPUT: x.numpy()})[0])


def _torch_export(model: nn.Module, images: Tensor, told: Mapping[str, str]) -> tuple[bytes, Run]:
    program = torch.export.export(model, (_two(images),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"timm_decor.json": json.dumps(dict(told))})
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def _torchscript(model: nn.Module, images: Tensor, told: Mapping[str, str]) -> tuple[bytes, Run]:
    try:
        script: Any = torch.jit.script(model)
    except Exception:  # not all of timm's models can be compiled from their source; a trace has no branches
        script = torch.jit.trace(model, _two(images))
    file = io.BytesIO()
    torch.jit.save(script, file, _extra_files={"timm_decor.json": json.dumps(dict(told)).encode()})
    file.seek(0)
    return file.getvalue(), torch.jit.load(file)


_FORMATS: dict[str, Callable[[nn.Module, Tensor, Mapping[str, str]], tuple[bytes, Run]]] = {
    ".onnx": _onnx,
    ".pt2": _torch_export,
    ".ts": _torchscript,
}


def _two(images: Tensor) -> Tensor:
    """A batch of two: exporters take a size of one for a constant."""
    return torch.cat([images, images])[:2]


def _write(path: Path, data: bytes) -> None:
    """The file, whole or not at all."""
    RunFolder(path.parent).write_bytes(path.name, data)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of themselves: advice to the people who make them, and to traced models."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
