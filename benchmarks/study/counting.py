"""What decorrelation sends, holds and computes, by model: counted from the engine itself, on tensors without values.

The model is on torch's meta device, in a process group that sends nothing, and the engine takes its steps: what it
hands to a collective, what it multiplies and what it holds is looked at from outside. Layers are stacked there as on a
GPU. Forward passes, which record nothing of meta tensors, are on a GPU that need not be there (FakeTensorMode). Every
kind of step between two refreshes (with a refresh, with a look at the output errors, with a measurement of the step's
length) is taken once, and counts as often as a period of `every` steps has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import timm
import timm.layers
import timm.optim
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import timm_decor
from study.wire import Wire, pretended_group, tensor_bytes
from study.work import Meter, Work
from timm_decor import DecorConfig, DecorHandle
from timm_decor.engine import attach as attach_module
from timm_decor.engine import handle as handle_module
from timm_decor.engine import sharing

PROCESSES = 8  # that the counted steps pretend to be of; more of them send the same, up to what FSDP2 makes rows up by
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # for which a refresh is shared out


@dataclasses.dataclass(frozen=True)
class Counted:
    """What is counted.

    Attributes:
        model: a timm model, by its plain name.
        opt: a timm optimizer.
        config: of the decorrelation.
        batch: images a process, for the arithmetic of forward, backward and statistics.
        model_kwargs: timm's.
    """

    model: str
    opt: str
    config: DecorConfig
    batch: int = 64
    model_kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> dict[str, Any]:
        """By which a result file knows it."""
        config = self.config
        return {"model": self.model, "opt": self.opt, "structure": config.structure, "batch": self.batch}


def count(case: Counted, processes: int = PROCESSES) -> dict[str, Any]:
    """Everything of one case, as a result file has it. Weights are float32.

    Args:
        case: what to count.
        processes: that the steps pretend to be of, one of RANKS.
    """
    with pretended_group(processes):
        plain, size = _plain_work(case)
        with _valueless():
            model = _model(case)
            weights, buffers = tensor_bytes([p for p in model.parameters() if p.requires_grad]), list(model.buffers())
            optimizer, handle = _attached(case, model)
            shared = _shared_out(handle)
            ddp = _steps(model, optimizer, handle, shared["first"])
            held = {
                "r_bytes": tensor_bytes([group.sides.tensors() for group in handle._groups]),
                "moment_bytes": tensor_bytes([group.moments for group in handle._groups]),
            }
            model = _model(case)
            fully_shard(model, mesh=_mesh())
            fsdp = _steps(model, *_attached(case, model), shared["first"])
        return {
            **case.key,
            "img_size": size,
            "every": case.config.every,
            "output_every": case.config.output_every,
            "layers": len(handle.names),
            "weight_bytes": weights,
            "buffer_bytes": tensor_bytes(buffers),
            **held,
            "plain_work": plain,
            "plain_fsdp": plain_fsdp(case, size),
            "statistics_work": statistics_work(case, size)._asdict(),
            "refresh": {key: value for key, value in shared.items() if key != "first"},
            "ddp": ddp,
            "fsdp": fsdp,
        }


class Kind(NamedTuple):
    """What an optimizer step does beside stepping."""

    refreshes: bool
    measures: bool
    looks: bool

    def __str__(self) -> str:
        done = [word for word, true in zip(("refresh", "measure", "look"), self, strict=True) if true]
        return " + ".join(done) or "ordinary"


def schedule(handle: DecorHandle) -> Iterator[tuple[int, Kind]]:
    """The steps from the second refresh to the third, and what each of them is to do."""
    every, before = handle.config.every, handle._counted
    looking = any("output" in group.moments for group in handle._groups)
    for step in range(every, 2 * every):
        handle._counted = step
        yield step, Kind(handle.refresh_due, handle._measure_due, looking and step % handle.config.output_every == 0)
    handle._counted = before


def _steps(model: nn.Module, optimizer: Any, handle: DecorHandle, own: Work) -> dict[str, Any]:
    """By kind of step: how often a period has it, what is sent, and what this process computes.

    Args:
        model: in training; its gradients are set here.
        optimizer: attached.
        handle: of the two.
        own: this process's share of a refresh, which is counted for every number of processes apart.
    """
    _step(model, optimizer)  # the first one makes the optimizer's state, and the first R
    kinds: dict[Kind, list[int]] = {}
    for step, kind in schedule(handle):
        kinds.setdefault(kind, []).append(step)
    found = {}
    for kind, steps in kinds.items():
        handle._counted = steps[0]
        with Wire() as wire, Meter() as meter:
            _step(model, optimizer)
        assert handle._counted == steps[0] + 1
        work = meter.work - own if kind.refreshes else meter.work
        found[str(kind)] = {"times": len(steps), "sent": wire.sent(), "work": work._asdict()}
    return found


def _step(model: nn.Module, optimizer: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()


def _shared_out(handle: DecorHandle) -> dict[str, Any]:
    """A refresh's work by layer, and what the busiest of n processes has of it, as the engine shares it out."""
    groups, of_layer = handle._groups, []
    for group in groups:
        with Meter() as meter:
            group.refreshed(group.moments, [0])
        of_layer.append(meter.work)
    heaviest = max(range(len(groups)), key=lambda i: of_layer[i])
    busiest, first = {}, Work(0, 0)
    for ranks in RANKS:
        loads = [
            sum((of_layer[i] * len(share) for i, share in enumerate(shares)), Work(0, 0))
            for shares in sharing._shares(groups, ranks)
        ]
        busiest[str(ranks)] = Work(max(load.flops for load in loads), max(load.matrices for load in loads))._asdict()
        if ranks == dist.get_world_size():
            first = loads[0]
    return {
        "largest_layer": {"name": groups[heaviest].names[0], **of_layer[heaviest]._asdict()},
        "busiest": busiest,
        "first": first,
    }


def _attached(case: Counted, model: nn.Module) -> tuple[Any, DecorHandle]:
    optimizer = timm.optim.create_optimizer_v2(model, opt=case.opt, lr=0.1, momentum=0.9)
    return optimizer, timm_decor.attach(model, optimizer)


def _model(case: Counted, decorrelated: bool = True) -> nn.Module:
    """In training mode, on the meta device."""
    with torch.device("meta"):
        model = timm.create_model(case.model, **dict(case.model_kwargs))
    return timm_decor.decorrelate(model, case.config) if decorrelated else model.train()


@contextmanager
def _valueless() -> Iterator[None]:
    """Let the engine work on meta tensors: what only values, or a device that is one, can answer is answered here."""
    autocast = torch.autocast
    with ExitStack() as stack:
        for place, name, answer in (
            (handle_module, "look_at", lambda flags: [[[True] * each.shape[1]] * 3 for each in flags]),
            (attach_module, "refuse", lambda *_: None),  # it steps, and looks whether the optimizer keeps weights
            (torch, "autocast", lambda _, **options: autocast("cpu", **options)),
        ):
            stack.enter_context(mock.patch.object(place, name, answer))
        yield


@contextmanager
def _fake(model: nn.Module, device: str) -> Iterator[None]:
    """A model of meta tensors on a device that need not be there, while forward and backward are looked at."""
    fused = timm.layers.use_fused_attn()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        timm.layers.set_fused_attn(False)  # which kernel it is, torch asks the device
        try:
            yield
        finally:
            timm.layers.set_fused_attn(bool(fused))


def plain_fsdp(case: Counted, size: int) -> dict[str, dict[str, int]]:
    """What FSDP2 sends in forward and backward of a plain model, each of its blocks cut by itself."""
    mesh, model = _mesh(), _model(case, decorrelated=False)
    with _fake(model, "cpu"):
        for unit in units(model):
            fully_shard(unit, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with Wire() as wire:
            model(torch.empty(2, 3, size, size)).sum().backward()
    return wire.sent()


def _mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def units(model: nn.Module) -> list[nn.Module]:
    """The blocks that fully_shard cuts by themselves: those of a transformer, ResNet or ConvNeXt."""
    kinds = ("Block", "Bottleneck", "BasicBlock", "ConvNeXtBlock")
    return [module for module in model.modules() if type(module).__name__ in kinds]


def _plain_work(case: Counted) -> tuple[dict[str, int], int]:
    """Forward and backward of a process's batch, and the images' size."""
    model: Any = _model(case, decorrelated=False)
    size = dict(case.model_kwargs).get("img_size") or model.default_cfg["input_size"][-1]
    with Meter() as meter:
        model(torch.empty(case.batch, 3, size, size, device="meta")).sum().backward()
    return meter.work._asdict(), size


def statistics_work(case: Counted, size: int) -> Work:
    """What a process's forward takes more in a step that is followed by a refresh."""
    model = _model(case)
    with _valueless():
        _, handle = _attached(case, model)  # here, so that it knows what each layer records
    with _fake(model, "cuda"):
        images, found = torch.empty(case.batch, 3, size, size, device="cuda"), []
        for _ in range(2):
            with Meter() as meter:
                model(images)
            found.append(meter.work)
            for group in handle._groups:
                group.stop_recording()
    return found[0] - found[1]
