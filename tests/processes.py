"""train.py in real processes that share one import of torch: they start in a tenth of the time, and can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def context() -> Any:
    """A multiprocessing context whose processes are forks of one that has imported train.py."""
    forkserver = multiprocessing.get_context("forkserver")
    # Python before 3.12 does not hand sys.path on to what is preloaded
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    preload = ["processes", "timm_decor.training.run", "sklearn.datasets", "jinja2", "matplotlib.pyplot"]
    forkserver.set_forkserver_preload([*preload, "matplotlib.backends.backend_svg", "matplotlib.backends.backend_agg"])
    return forkserver


def start(words: list[str], log: Path, prepare: Callable[..., None] | None = None, *args: Any) -> Any:
    """Start train.py.

    Args:
        words: its arguments.
        log: a file for what it prints, appended to.
        prepare: called in the new process first, with args; a function of a module, so that it can be sent.

    Returns:
        The multiprocessing process; its exit code is that of the command line.
    """
    process = context().Process(target=_run, args=(words, str(log), prepare, args))
    process.start()
    return process


def call(folder: Path, log: Path, function: Callable[..., Any], *args: Any) -> int:
    """Call a function of a module as a program of its own would run.

    Args:
        folder: the program's working directory.
        log: a file for what it prints, appended to.
        function: called with args; what it returns is the exit code.

    Returns:
        The exit code.
    """
    process = context().Process(target=_call, args=(str(folder), str(log), function, args))
    process.start()
    process.join()
    return int(process.exitcode)


def _call(folder: str, log: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _print_into(log)
    os.chdir(folder)
    sys.exit(function(*args))


def _run(words: list[str], log: str, prepare: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
    _print_into(log)
    # A foreground program's, whatever the one that runs the tests has: one started in the background ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # of its DataLoader workers, as ever on Linux
    import torch

    from timm_decor.errors import exit_code
    from timm_decor.training.run import main

    torch.set_num_threads(1)
    if prepare is not None:
        prepare(*args)
    sys.exit(exit_code("train.py", main, words))


def _print_into(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.__stderr__ = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)


def die_at_event(number: int) -> None:
    """Let this process be killed at its `number`-th step of writing a file: half-written, unsynced, not yet renamed."""
    import io
    import random

    import torch

    events = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal events
            events += 1
            if events == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    save = torch.save

    def half_saved(state: Any, file: Any) -> None:
        nonlocal events
        events += 1
        if events == number:
            buffer = io.BytesIO()
            save(state, buffer)
            file.write(buffer.getvalue()[: random.randrange(len(buffer.getvalue()))])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    torch.save = half_saved
    for name in ("replace", "fsync", "link", "unlink", "open"):
        setattr(os, name, counted(getattr(os, name)))


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def join_group(rank: int, world_size: int, port: int) -> None:
    """Be one of several processes, as `accelerate launch` and torchrun would start them."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def member(rank: int, world_size: int, port: int, die_at: int) -> None:
    """Be one of several processes, the first of which dies at its `die_at`-th step of writing a file, if at all."""
    join_group(rank, world_size, port)
    if die_at and rank == 0:
        die_at_event(die_at)


def slow_update(marker: str, seconds: float) -> None:
    """Let the second update take its time, and leave a file when it begins.

    The process leads a group, so that a signal to that reaches its workers and nobody else.
    """
    import time

    os.setsid()

    from timm_decor.training.arm import Arm

    count_update = Arm._count_update

    def slow(self: Arm, progress: Any) -> None:
        if self.steps == 1:
            Path(marker).touch()
            time.sleep(seconds)
        count_update(self, progress)

    Arm._count_update = slow  # type: ignore[method-assign]


def limit_file_size(size: int) -> None:
    """Let no file grow beyond so many bytes, as on a disk that is full."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def on_small_disk(words: list[str], folder: str, size: int, rescued: str, log: str) -> None:
    """Run train.py where `folder` is a disk of `size` bytes, and copy what is in the end there to `rescued`.

    Exits with 77 where this user may not mount.
    """
    import ctypes
    import shutil

    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private = 0x00020000, 0x40000
    os.makedirs(folder)
    if (
        libc.unshare(new_mounts)
        or libc.mount(b"none", b"/", None, 0x4000 | private, None)
        or libc.mount(b"none", folder.encode(), b"tmpfs", 0, f"size={size}".encode())
    ):
        sys.exit(77)
    try:
        _run(words, log, None, ())
    finally:
        shutil.copytree(folder, rescued)


def in_float64() -> None:
    """Let models be made, and batches come, in float64."""
    import torch

    from timm_decor.training.data.batches import Batches

    torch.set_default_dtype(torch.float64)
    getitems = Batches.__getitems__

    def doubled(self: Batches, indices: list[int]) -> Any:
        images, labels = getitems(self, indices)
        return images.double(), labels

    Batches.__getitems__ = doubled  # type: ignore[method-assign]


def keep_own_end(file: str) -> None:
    """Write this process's weights and optimizer state, R included, at the end of each epoch."""
    import torch

    from timm_decor.training.keeping.checkpoints import Keeper

    save = Keeper.save

    def saved(self: Keeper) -> None:
        torch.save([self.arm.model.state_dict(), self.arm.optimizer.state_dict()], file)
        save(self)

    Keeper.save = saved  # type: ignore[method-assign]


def as_launched(*words: str) -> None:
    """Have the environment that `accelerate launch` makes of its arguments; and Accelerate shards on CPUs as well."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args([*words, "train.py"])
    made = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    os.environ |= {key: value for key, value in made.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    init = AcceleratorState.__init__

    def sharding(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.num_processes > 1:  # what it does on GPUs
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = sharding  # type: ignore[method-assign]


def one_of(rank: int, world_size: int, port: int, file: str, float64: bool, launched: str) -> None:
    """The above in one; with `launched`, a config file for `accelerate launch`, nothing is kept."""
    if world_size > 1:
        join_group(rank, world_size, port)
    if float64:
        in_float64()
    if launched:
        as_launched("--config_file", launched, "--mixed_precision", "no")
    else:
        keep_own_end(file)


def launched_one_of(rank: int, world_size: int, port: int, words: list[str]) -> None:
    """Be one of the processes that `accelerate launch` with these words starts."""
    join_group(rank, world_size, port)
    as_launched(*words)


def start_group(
    words: list[str], log: Path, ends: Path, world_size: int, float64: bool = False, launched: str = ""
) -> list[Any]:
    """Start train.py in `world_size` processes that train together; they leave `<rank>.pt` in `ends`."""
    port = free_port()
    ends.mkdir(exist_ok=True)
    return [
        start(words, log, one_of, rank, world_size, port, str(ends / f"{rank}.pt"), float64, launched)
        for rank in range(world_size)
    ]


def die_at_call(owner: str, method: str, number: int, rank: int) -> None:
    """Let the process of this rank be killed when it calls a method of train.py's for the `number`-th time."""
    import pydoc

    if int(os.environ.get("RANK", "0")) != rank:
        return
    cls: Any = pydoc.locate(owner)
    original, calls = getattr(cls, method), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(cls, method, counted)


def dying_member(rank: int, world_size: int, port: int, owner: str, method: str, number: int, dies: int) -> None:
    """Be one of several processes, of which that of rank `dies` is killed at a call; see `die_at_call`."""
    join_group(rank, world_size, port)
    die_at_call(owner, method, number, dies)


def agent(words: list[str], log: str, pids: str, nodes: tuple[int, int], processes: int, port: int) -> None:
    """Be torchrun on one node, whose processes leave their number in `<pids>/<restart>-<rank>`."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as docs/training.md has it
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _print_into(log)
    config = LaunchConfig(
        *nodes, processes, run_id="test", rdzv_backend="c10d", rdzv_endpoint=f"127.0.0.1:{port}", max_restarts=5,
        monitor_interval=0.1, start_method="fork",
        rdzv_configs={"last_call_timeout": 1, "keep_alive_interval": 1, "keep_alive_max_attempt": 2, "timeout": 60},
    )  # fmt: skip
    elastic_launch(config, _launched)(words, log, pids)


def _launched(words: list[str], log: str, pids: str) -> None:
    (Path(pids) / f"{os.environ['TORCHELASTIC_RESTART_COUNT']}-{os.environ['RANK']}").write_text(str(os.getpid()))
    _run(words, log, None, ())
