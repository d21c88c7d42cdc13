"""The machine under a run: device, Accelerator, seeds, versions."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import numpy as np
import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch import nn

from timm_decor.errors import UserError, first_line
from timm_decor.version import __version__

T = TypeVar("T")


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_accelerator(
    device: str | None, amp: bool | None, amp_dtype: str, grad_accum_steps: int = 1, timeout: float | None = None
) -> Accelerator:
    """An Accelerator on the device that was asked for.

    Args:
        device: cpu, cuda, cuda:N or mps; None takes the best there is, or what `accelerate launch` was told.
        amp: mixed precision in `amp_dtype`, float16 or bfloat16.
        grad_accum_steps: batches an optimizer step.
        timeout: seconds that a process waits for another one; None for torch's own.

    Raises:
        UserError: the device is not there, or cannot do that precision, or cannot train with the other processes that
            were started, or Accelerate is set up to cut a model up in another way than FSDP2's.
    """
    _refuse_pieces()
    _check_device(device)
    precision = {"float16": "fp16", "bfloat16": "bf16"}[amp_dtype] if amp else "no"
    on_cpu = device == "cpu" or (device is None and not _has_accelerator())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if amp and amp_dtype == "float16" and on_cpu:
        raise UserError("--amp in float16 needs a GPU; on the CPU use --amp-dtype bfloat16")
    try:
        accelerator = Accelerator(
            # On a machine without GPUs Accelerate joins what torchrun started only where it is told that it is a CPU's.
            cpu=device == "cpu" or (on_cpu and started > 1),
            mixed_precision=precision,
            # as a plugin, because a plain number gives way to a variable of the environment
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=grad_accum_steps),
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, non_blocking=torch.cuda.is_available()
            ),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))] if timeout else None,
        )
    except ValueError as error:
        raise UserError(f"--device {device or 'default'}: {first_line(error)}") from error
    if accelerator.num_processes < started:  # MPI's processes are more: it does not set the variable
        raise UserError(
            f"{started} processes were started (WORLD_SIZE), but on {accelerator.device} Accelerate trains with "
            f"{accelerator.num_processes}: use --device cpu, or start one process"
        )
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as timm's train.py has it
    if is_sharded(accelerator):
        # Every process has made the same model already; and Accelerate's way of sending it knows no buffers.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    return accelerator


def slow_precision(accelerator: Accelerator) -> list[str]:
    """A line where the device has no instructions for bfloat16: it is emulated, and costs time instead of saving it."""
    device = accelerator.device
    if accelerator.mixed_precision != "bf16":
        return []
    if device.type == "cpu":
        known = torch.backends.mkldnn.is_available()
        emulated = known and not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # there is no public name for it
        name = "CPU"
    else:
        emulated = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0)
        name = "GPU"
    line = f"--amp-dtype bfloat16 is emulated on this {name}: many times slower than float32 (--no-amp)"
    return [line] if emulated else []


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the model that it prepares is cut over the processes, by FSDP2."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Cut a model up as the accelerator does with the one that is trained."""
    from accelerate.utils import fsdp2_prepare_model  # only an accelerate that knows FSDP2 has it

    fsdp2_prepare_model(accelerator, model)


def follow_launcher(args: argparse.Namespace) -> list[str]:
    """Fill in mixed precision and accumulation from `accelerate launch` or `accelerate config`, where we were not told.

    Args:
        args: of train.py or validate.py; `amp` and `grad_accum_steps` are None where they were not given.

    Returns:
        What the launcher was told and is not followed, a line each.

    Raises:
        UserError: a precision that there is no --amp-dtype for.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    kinds = {"no": None, "fp16": "float16", "bf16": "bfloat16"}
    if precision not in kinds:
        raise UserError(f"accelerate is set up for mixed precision in {precision}; here there are {', '.join(kinds)}")
    kind, lines = kinds[precision], []
    if args.amp is None:
        args.amp = kind is not None
        args.amp_dtype = kind or args.amp_dtype
    elif kind and (not args.amp or args.amp_dtype != kind):
        ours = args.amp_dtype if args.amp else "--no-amp"
        lines.append(f"accelerate's mixed precision {precision} is not followed: this run says {ours}")
    steps = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))
    given = getattr(args, "grad_accum_steps", steps)
    if given is None:
        args.grad_accum_steps = steps
    elif steps not in (1, given):
        lines.append(f"accelerate's {steps} accumulation steps are not followed: this run says {given}")
    return lines


def decided_by_one(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What the main process found, or its `UserError`, on all processes. Collective."""
    box: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            box = [decide()]
        except UserError as error:
            box = [error]
    answer = broadcast_object_list(box)[0]
    if isinstance(answer, UserError):
        raise answer
    return answer  # type: ignore[no-any-return]


@contextlib.contextmanager
def others_needed() -> Iterator[None]:
    """Say in one line that another process of this run is gone, or does not answer.

    On GPUs that is NCCL's watchdog's to say, which ends the process after the same time.

    Raises:
        UserError: see above.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        # torch has no class for what gloo meets on the way
        if not isinstance(error, dist.DistError) and not any(
            word in text for word in ("/gloo/", "pair closure", "NCCL")
        ):
            raise
        late = "imed out" in text and "refused" not in text
        raise UserError(
            f"process {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}: another process "
            f"{'gave nothing in time (--dist-timeout)' if late else 'is gone: its own last lines say why'}; "
            f"--resume auto goes on ({first_line(error).split('] ')[-1].split('. ')[0]})"
        ) from error


def restarts() -> list[str]:
    """A line where torchrun has started this run anew."""
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not count:
        return []
    lines = [f"torchrun has started it anew, {count} of at most {os.environ['TORCHELASTIC_MAX_RESTARTS']} times"]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # It remembers where the processes before were: github.com/pytorch/pytorch/issues/135712
        lines.append("it shares a store with them, in which they may miss each other: start torchrun with "
                     "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")  # fmt: skip
    return lines


def launched_for_fsdp() -> bool:
    """Whether the launcher was told to shard."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def _refuse_pieces() -> None:
    """Refuse what cuts weights otherwise than by rows."""
    for name in ("FSDP", "DeepSpeed", "Megatron_LM"):
        if not parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}"):
            continue
        if name != "FSDP" or os.environ.get("FSDP_VERSION", "1") != "2":
            kind = "FSDP1" if name == "FSDP" else name
            raise UserError(
                f"accelerate is set up for {kind}, which cuts weights into pieces that are no rows; decorrelation "
                f"knows FSDP2: fsdp_version: 2 in accelerate's config, or --use_fsdp --fsdp_version 2 (or --multi_gpu)"
            )
        if torch.__version__ < (2, 6) or not hasattr(Accelerator, "is_fsdp2"):  # type: ignore[operator]
            raise UserError(
                f"FSDP2 needs torch 2.6 and accelerate 1.6 or newer; here are torch {torch.__version__} and "
                f"accelerate {accelerate.__version__}"
            )


def _has_accelerator() -> bool:
    others = hasattr(torch, "accelerator") and torch.accelerator.is_available()  # since torch 2.6
    return torch.cuda.is_available() or torch.backends.mps.is_available() or others


def _check_device(name: str | None) -> None:
    if name is None or name == "cpu":
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; use cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UserError(f"--device {name}: this machine has no usable CUDA GPU; use --device cpu")
        if device.index is not None:
            if device.index >= count:
                raise UserError(f"--device {name}: this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}")
            torch.cuda.set_device(device)
    elif device.type != "mps" or not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: not available here; use --device cpu")


def mixed_seed(*parts: int) -> int:
    """One 32-bit seed out of several numbers; different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random number generator, in tensors and plain Python types."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["device"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on with the random numbers that followed when `random_state` was called."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if "device" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
    elif "device" in state and device.type == "mps":
        torch.mps.set_rng_state(state["device"])


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "timm_decor": __version__,
    }


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """The hardware of a run: names and counts, nothing that identifies whose it is."""
    on_gpu = accelerator.device.type == "cuda"
    return {
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "gpu": torch.cuda.get_device_name(accelerator.device) if on_gpu else None,
        "gpus": torch.cuda.device_count() if on_gpu else 0,
        "cpu": cpu_name(),
        "cpus": available_cpus(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_name() -> str:
    """The processor's model name; `platform.processor()` is empty on most Linux machines."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
