"""The model of a run: names, twins, weights."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import get_arch_pretrained_cfgs, is_model, list_models, load_state_dict, split_model_name_tag
from torch import nn

import timm_decor
from timm_decor.config import DecorConfig
from timm_decor.digest import check_digest
from timm_decor.errors import UserError, first_line, load_failure
from timm_decor.models import PREFIX, plain_name
from timm_decor.text import closest, near
from timm_decor.training.adjust import init_head, set_batch_norm
from timm_decor.training.keeping.folder import EMA_SUFFIX, RESUME_FILES
from timm_decor.training.keeping.privacy import without_path
from timm_decor.training.options import CreateOptions, DeviceOptions, ImageOptions, LayerOptions, StartOptions

# What timm raises on arguments that it cannot follow.
CREATION_ERRORS = (
    *(RuntimeError, ValueError, TypeError, LookupError, OSError, AttributeError, AssertionError),
    *(ArithmeticError, MemoryError, ImportError, pickle.UnpicklingError),
)
CHECKPOINT_ENDINGS = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin")
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load reads it at every call


def is_decorrelated(name: str, decor: bool, changed: Sequence[str]) -> bool:
    """Whether a decorrelated model is asked for.

    Args:
        name: of the model.
        decor: --decor.
        changed: the `--decor-*` arguments that are not at their defaults.

    Raises:
        UserError: knobs were turned for a plain model.
    """
    if name.startswith(PREFIX) or decor:
        return True
    if changed:
        raise UserError(f"{changed[0]} does nothing for plain {name}: add --decor, or use a {PREFIX} model")
    return False


def check_model_name(name: str) -> None:
    """Refuse an unknown architecture or tag, with its near misses; names such as hf-hub:... are left to timm.

    Raises:
        UserError: see above.
    """
    if ":" in name or "/" in name:
        return
    arch, tag = split_model_name_tag(name)
    if not is_model(arch):
        raise UserError(f"unknown model '{arch}'{near(arch, list_models())}")
    tags = [split_model_name_tag(key)[1] for key in get_arch_pretrained_cfgs(arch)]
    if tag and tag not in tags:
        raise UserError(f"{arch} has no tag '{tag}'; tags: {', '.join(t for t in tags if t) or 'none'}")


def create(
    name: str, options: CreateOptions, num_classes: int | None, in_chans: int, pretrained: bool = False
) -> nn.Module:
    """A model as it is evaluated.

    Args:
        name: timm's, or a decor_ one.
        options: how it is made.
        num_classes: None for the model's own.
        in_chans: image channels.
        pretrained: with timm's weights, which are random otherwise.

    Raises:
        UserError: unknown name or tag, arguments the model does not take, weights that do not load.
    """
    check_model_name(name)
    with _creating(name):
        return _timm_model(name, options, num_classes, in_chans, pretrained)


def create_to_train(
    name: str,
    options: CreateOptions,
    start: StartOptions,
    layer: LayerOptions,
    decor: DecorConfig,
    num_classes: int | None,
    in_chans: int,
) -> nn.Module:
    """A model with the weights that training begins with.

    Args:
        name: timm's, or a decor_ one.
        options: how it is made.
        start: its weights, and what of it is frozen.
        layer: how its layers behave, and whether a plain one is decorrelated.
        decor: for that.
        num_classes: None for the model's own.
        in_chans: image channels.

    Raises:
        UserError: as `create`; weights of which more than the head does not fit; an unknown submodule to freeze.
    """
    check_model_name(name)
    path = start.pretrained_path
    weights = _read_weights(path) if path else {}
    kwargs: dict[str, Any] = {
        "drop_rate": layer.drop,
        "drop_path_rate": layer.drop_path,
        "drop_block_rate": layer.drop_block,
    }
    if path:
        _check_tensors(weights, path)
        # num_classes: as in timm's train.py, it asks for a new head even where the number of classes is the same
        kwargs["pretrained_cfg_overlay"] = {"state_dict": weights, "num_classes": -1}
    with _creating(name):
        model = _timm_model(name, options, num_classes, in_chans, start.pretrained or bool(path), **kwargs)
        if layer.decor:
            model = timm_decor.decorrelate(model, decor)
    if path:
        cast(Any, model).pretrained_cfg.pop("state_dict", None)
        _check_adapted(model, weights, path)
    if layer.grad_checkpointing:
        with _creating(f"{name} with --grad-checkpointing"):
            cast(Any, model).set_grad_checkpointing(True)
    if start.initial_checkpoint:
        load_weights(model, start.initial_checkpoint, use_ema=None)
    has_weights = start.pretrained or bool(path or start.initial_checkpoint)
    set_batch_norm(model, layer.bn_momentum, layer.bn_eps, has_weights)
    init_head(model, start.head_init_scale, start.head_init_bias)
    freeze(model, start.freeze)
    return model


def _timm_model(
    name: str, options: CreateOptions, num_classes: int | None, in_chans: int, pretrained: bool, **kwargs: Any
) -> nn.Module:
    with weights_only():
        return timm.create_model(
            name,
            pretrained=pretrained,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=options.gp,
            **kwargs,
            **options.model_kwargs,
        )


@contextlib.contextmanager
def _creating(name: str) -> Iterator[None]:
    """What timm says of a model that it cannot make, in one line."""
    try:
        yield
    except CREATION_ERRORS as error:
        raise UserError(f"cannot create {name}: {reason(error)}") from error


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """No pickle that calls anything loads in here, whatever timm asks for: not all of its versions are careful."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def freeze(model: nn.Module, names: list[str]) -> None:
    """Keep submodules as they are: no gradients, and no new running statistics in their normalisation layers.

    `timm.utils.freeze` would replace BatchNorm by FrozenBatchNorm2d, whose checkpoints lack `num_batches_tracked`.
    Here a frozen BatchNorm keeps its class and keys, and stays in evaluation mode.

    Args:
        model: changed in place; its copies are frozen as well.
        names: of submodules, as in `model.named_modules()`.

    Raises:
        UserError: the model has no such submodule, or nothing is left to train.
    """
    known = dict(model.named_modules())
    for name in names:
        if not name or name not in known:
            top = ", ".join(child for child, _ in model.named_children())
            raise UserError(f"--freeze: {_kind(model)} has no '{name}'{near(name, known) or f'; it has: {top}'}")
    for module in {module for name in names for module in known[name].modules()}:  # once each: names may overlap
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        if any(key.startswith("running_") for key, _ in module.named_buffers(recurse=False)):
            module.__class__ = _in_evaluation_mode(type(module))  # type: ignore[arg-type]  # hashable it is
            module.eval()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("--freeze leaves nothing to train")


def synchronized(model: nn.Module, frozen: list[str], device: torch.device, processes: int) -> nn.Module:
    """The model with BatchNorm over the images of all processes, under the same keys; on one process as it is.

    Args:
        model: its BatchNorm layers are replaced.
        frozen: the names that `freeze` was given; what is frozen there stays so.
        device: that it will train on.
        processes: how many train together.

    Raises:
        UserError: torch cannot do it on that device.
    """
    if processes == 1:
        return model
    if device.type == "cpu":
        raise UserError("--sync-bn needs GPUs: torch has no synchronised BatchNorm for the CPU")
    model = convert_sync_batchnorm(model)
    freeze(model, frozen)
    return model


@functools.cache
def _in_evaluation_mode(kind: type[nn.Module]) -> type[nn.Module]:
    """A class like `kind` that `model.train()` does not put into training mode."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return kind.train(self, False)

    return type(f"Frozen{kind.__name__}", (kind,), {"train": train})


def class_count(model: nn.Module) -> int:
    """The number of classes of a timm model.

    Raises:
        UserError: it has none, as with --model-kwargs features_only=True.
    """
    count = getattr(model, "num_classes", None)
    if not count:
        raise UserError(f"{type(model).__name__} is no classifier: it says no number of classes")
    return cast(int, count)


def refuse_new_head(model: nn.Module, name: str, num_classes: int | None) -> None:
    """Refuse a model that is to be looked at with pretrained weights, and has another head than they have.

    Args:
        model: made with `num_classes`.
        name: of the weights.
        num_classes: that were asked for, or None.

    Raises:
        UserError: timm gave it a new head, of random weights.
    """
    known = cast(Any, model).pretrained_cfg.get("num_classes")
    if known and num_classes not in (None, known):
        raise UserError(f"the weights of {name} know {known} classes, not --num-classes {num_classes}")


def pretrained_names(model: nn.Module) -> list[str]:
    """The classes that a model's pretrained weights know, by label: ImageNet's synsets; empty where nobody knows."""
    config = cast(Any, model).pretrained_cfg
    names = config.get("label_names")
    if names:
        return [str(name) for name in names]
    subset = infer_imagenet_subset(config)
    return ImageNetInfo(subset).label_names() if subset else []


def hub_name(model: nn.Module) -> str | None:
    """The Hub's name of the pretrained weights that a timm model was made with."""
    return cast(Any, model).pretrained_cfg.get("hf_hub_id")  # type: ignore[no-any-return]


def place(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Move a model, in place, to a device and a memory layout."""
    model.to(device=device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


@torch.no_grad()
def check_images(
    model: nn.Module,
    input_size: Sequence[int],
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    what: str,
) -> None:
    """Refuse a model that takes no such images, before there are any.

    Args:
        model: on its device; its mode, and all that it holds, stay as they are.
        input_size: (C, H, W).
        device: the model's.
        autocast: for the precision in use.
        what: the model, for the message.

    Raises:
        UserError: see above.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with autocast():
            model(torch.zeros(1, *input_size, device=device))
    except CREATION_ERRORS as error:
        fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = input_size[-1] if input_size[-1] == input_size[-2] else f"({input_size[-2]},{input_size[-1]})"
        hint = f"; --model-kwargs img_size={size} makes it for such images" if fixed else ""
        raise UserError(f"{what} does not take images of {tuple(input_size)}: {first_line(error)}{hint}") from error
    finally:
        for module, mode in modes:
            module.training = mode


def compiled(model: Any, options: DeviceOptions) -> Any:
    """The model under torch.compile, where that was asked for.

    Raises:
        UserError: torch does not know the backend or the mode.
    """
    backend, mode = options.torchcompile, options.torchcompile_mode
    if not backend:
        return model
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(f"--torchcompile {backend}: no backend of torch.compile{near(backend, known)}")
    try:
        return torch.compile(model, backend=backend, mode=mode)
    except RuntimeError as error:
        raise UserError(f"--torchcompile {backend}, mode {mode}: {first_line(error)}") from error


def plain_twin(model: nn.Module) -> nn.Module:
    """A plain model with the same weights, as the other side of a comparison."""
    return timm_decor.to_plain(copy.deepcopy(model))


def plain_copy(model: nn.Module) -> nn.Module:
    """A plain twin of a model in training, to be run by itself."""
    twin = plain_twin(model)
    twin.__dict__.pop("forward", None)  # Accelerate's, which would run the model that was copied
    return twin


def twin_name(name: str) -> str:
    """The plain architecture's name: `decor_resnet18` gives `resnet18`."""
    return plain_name(name)


def side_name(name: str, decorrelated: bool) -> str:
    """What a side of a run is called: by its model, which --decor leaves as it is."""
    twin = twin_name(name)
    if not decorrelated:
        return without_path(twin)
    return without_path(name if name != twin else f"decorrelated {name}")


def architecture(name: str) -> str:
    """The plain architecture's name without a tag: `decor_resnet18.a1_in1k` gives `resnet18`."""
    plain = twin_name(name)
    if ":" in plain or "/" in plain:  # hf-hub:...: dots do not begin a tag there
        return plain
    return str(split_model_name_tag(plain)[0])


def data_config(options: ImageOptions, model: nn.Module, in_chans: int, use_test_size: bool = False) -> dict[str, Any]:
    """timm's data configuration (input_size, mean, std, interpolation, crop) for the number of channels in use.

    Args:
        options: what the command line says.
        model: whose pretrained configuration says the rest.
        in_chans: image channels.
        use_test_size: take the weights' size for tests, and its crop, where they have one.

    Raises:
        UserError: --mean or --std of another length than the channels.
    """
    for name, given in (("mean", options.mean), ("std", options.std)):
        if given is not None and len(given) not in (1, in_chans):
            raise UserError(f"--{name} takes 1 or {in_chans} values, not {len(given)}")
    config = resolve_data_config(dataclasses.asdict(options), model=model, use_test_size=use_test_size)
    config["input_size"] = (in_chans, *config["input_size"][1:])
    for name in ("mean", "std"):
        config[name] = per_channel(config[name], in_chans)
    return config


def per_channel(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """Means or standard deviations of so many channels: timm's are for RGB, and of grey images their mean is taken."""
    return tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans


def input_channels(options: ImageOptions) -> int:
    """Channels of the images: 3 unless --in-chans or --input-size says 1.

    Raises:
        UserError: neither 1 nor 3.
    """
    channels = options.input_size[0] if options.input_size else options.in_chans or 3
    if channels not in (1, 3):
        raise UserError(f"images have 1 or 3 channels, not {channels}")
    return channels


def no_checkpoint(path: str) -> str:
    """What to say of a file of weights that does not exist: the checkpoints and folders that are where it should be."""
    folder = Path(path).parent
    if not folder.is_dir():
        return f"no checkpoint file {path}: there is no folder {folder}"
    there = sorted(
        f"{entry.name}/" if entry.is_dir() else entry.name
        for entry in folder.iterdir()
        if (entry.name.endswith(CHECKPOINT_ENDINGS) and entry.name not in RESUME_FILES)
        or (entry.is_dir() and not entry.name.startswith("."))
    )
    named = closest(Path(path).name, there, count=5, cutoff=0.0)
    more = f" and {len(there) - len(named)} more" if len(there) > len(named) else ""
    return f"no checkpoint file {path}; in its folder: {', '.join(named) or 'none'}{more}"


def load_weights(model: nn.Module, path: str, use_ema: bool | None = False) -> None:
    """Load a checkpoint's weights: safetensors, or a torch file that loads with weights_only.

    Args:
        model: decorrelated or plain; both have the same keys.
        path: the file.
        use_ema: take the averaged weights: `<name>-ema.safetensors` next to `<name>.safetensors`, or `state_dict_ema`
            inside a torch file. None: those of a torch file where it has them, as timm's `create_model` does.

    Raises:
        UserError: no such file, not a checkpoint, no averaged weights, or of another shape or architecture.
    """
    weights = _read_weights(path, use_ema)
    check_fit(model, weights, path)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:  # such as sparse tensors
        raise UserError(f"{path} does not fit {_kind(model)}: {reason(error)}") from error


def _read_weights(path: str, use_ema: bool | None = None) -> Any:
    """The state dict in a file; without a wish (None) the averaged one where a torch file has it, as timm's loader."""
    file = Path(path)
    if not file.is_file():
        raise UserError(no_checkpoint(path))
    if use_ema and file.suffix == ".safetensors" and not file.stem.endswith(EMA_SUFFIX):
        averaged = file.with_name(f"{file.stem}{EMA_SUFFIX}{file.suffix}")
        if not averaged.is_file():
            raise UserError(f"{path} has no averaged weights: {averaged.name} is not next to it")
        file = averaged
    check_digest(file)
    try:
        if use_ema and file.suffix != ".safetensors":
            saved = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(saved, dict) or not (saved.get("state_dict_ema") or saved.get("model_ema")):
                raise UserError(f"{path} has no averaged weights")
        return load_state_dict(str(file), use_ema=use_ema is not False, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # on arbitrary bytes the weights-only unpickler raises whatever it stumbles over
        raise UserError(f"{path} is not a checkpoint: {load_failure(error)}") from error


def _check_adapted(model: nn.Module, weights: Any, path: str) -> None:
    """Refuse pretrained weights of which timm left out more than the head.

    timm loads what fits by name and is silent about the rest. Families that rename a checkpoint's keys are left to it.

    Raises:
        UserError: names the first key that is missing or unknown.
    """
    if any("filter_fn" in name for name in vars(sys.modules[type(model).__module__])):
        return
    heads = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    own = model.state_dict()
    for key in (*own, *weights):
        # old checkpoints lack BatchNorm's counter
        if key.rpartition(".")[0] in heads or key.endswith(".num_batches_tracked") or (key in own and key in weights):
            continue
        what = f"it has no '{key}'" if key in own else f"the model has no '{key}'"
        raise UserError(f"{path} does not fit {_kind(model)}: {what}")


def _check_tensors(weights: Any, path: str) -> None:
    if not isinstance(weights, dict) or not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{path} is not a checkpoint: it holds no tensors")


def reason(error: BaseException) -> str:
    """The first line of an error; its second as well where torch announces it with a colon."""
    if "weights_only" in str(error):
        return load_failure(error)
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return f"{lines[0]} {lines[1]}" if len(lines) > 1 and lines[0].endswith(":") else first_line(error)


def check_fit(model: nn.Module, weights: Any, path: str) -> None:
    """Refuse a state dict that the model cannot load.

    Raises:
        UserError: names the first key that is missing, unknown, or of another shape.
    """
    own = model.state_dict()
    _check_tensors(weights, path)
    for key, value in own.items():
        if key in weights and not isinstance(weights[key], torch.Tensor):
            raise UserError(f"{path} does not fit {_kind(model)}: '{key}' is no tensor")
        if key not in weights:
            raise UserError(f"{path} does not fit {_kind(model)}: it has no '{key}'")
        if weights[key].shape != value.shape:
            raise UserError(
                f"{path} does not fit {_kind(model)}: '{key}' has shape {tuple(weights[key].shape)}, "
                f"the model's is {tuple(value.shape)}"
            )
    extra = next((key for key in weights if key not in own), None)
    if extra is not None:
        raise UserError(f"{path} does not fit {_kind(model)}: the model has no '{extra}'")


def _kind(model: nn.Module) -> str:
    return str((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__)
