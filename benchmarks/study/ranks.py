"""A step and a refresh on several processes of one machine, in turns with the plain model's.

Every number of processes has its own group (gloo, a thread each), with a plain and a decorrelated model in each
process. All groups live at once and wait on a pipe while another one is timed, so that a slow minute meets all of them.
More processes than cores share those: seconds then say nothing of a machine that has enough, and ratios little more.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from study.arm import PERIOD_MORE, Arm, Case, Options, decorrelated_block
from timm_decor import DecorConfig
from timm_decor.training.runtime import available_cpus

CLASSES, RATE = 1000, 1e-3  # small, the labels are random


def measure(case: Case, sizes: Sequence[int], blocks: int, steps: int) -> dict[str, Any]:
    """Time a combination on each number of processes.

    A block is, for each of them, one step of the plain arm that is not timed and `steps` timed together, and the
    decorrelated arm's `decorrelated_block`.

    Returns:
        The result: seconds of every block, and medians made of them.
    """
    config = DecorConfig()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        groups = {size: stack.enter_context(Ranks(size, case, steps + PERIOD_MORE, folder)) for size in sizes}
        rounds = [_block(groups, index % 2 == 1, steps, config.every) for index in range(blocks)]
        for group in groups.values():
            group.ask("check", 2 + blocks)
    found = {}
    for size in sizes:
        mine = [each[size] for each in rounds]
        kinds = ("ordinary", "refresh", "measuring", "amortised")
        ratio = {kind: statistics.median(block[kind] / block["plain"] for block in mine) for kind in kinds}
        ratio["refresh alone"] = statistics.median((b["refresh"] - b["ordinary"]) / b["plain"] for b in mine)
        seconds = {kind: statistics.median(block[kind] for block in mine) for kind in ("plain", *kinds)}
        found[str(size)] = {"ratio": ratio, "seconds": seconds, "blocks": mine}
    return {
        "case": dataclasses.asdict(case),
        "config": config.to_dict(),
        "cores": available_cpus(),
        "steps_per_block": steps,
        "processes": found,
    }


def _block(groups: dict[int, Ranks], backwards: bool, steps: int, every: int) -> dict[int, dict[str, float]]:
    order = sorted(groups, reverse=backwards)
    found = {}
    for size in order:
        block: dict[str, float] = {}
        for arm in ("decorrelated", "plain") if backwards else ("plain", "decorrelated"):
            group = groups[size]
            if arm == "decorrelated":
                block |= decorrelated_block(partial(group.ask, arm), steps, every)
                continue
            group.ask(arm, 1)
            block["plain"] = group.ask(arm, steps) / steps
        found[size] = block
    return found


class Ranks:
    """Processes that train together, each with both arms.

    Args:
        size: how many.
        case: the combination.
        every: steps between two refreshes.
        folder: for what they meet by.
    """

    def __init__(self, size: int, case: Case, every: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, size, case, every, folder), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def __enter__(self) -> Ranks:
        self.ask("decorrelated", 1)  # they are there, behind a step with a refresh; a block begins behind the next one
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if any(error):  # it may wait for one that has ended
                process.terminate()
            process.join()

    def ask(self, what: str, number: int) -> float:
        """Let all of them take so many steps of an arm; returns the slowest one's seconds.

        Raises:
            RuntimeError: one of them has ended.
        """
        for pipe in self._pipes:
            pipe.send((what, number))
        try:
            return max(pipe.recv() for pipe in self._pipes)
        except EOFError:
            raise RuntimeError("one of the processes ended; what it said is above") from None


def _serve(pipe: Connection, rank: int, size: int, case: Case, every: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / str(size)}", rank=rank, world_size=size)
    wrap = DistributedDataParallel if size > 1 else None
    options = Options("cpu", CLASSES, RATE, threads=1)
    decor = {**DecorConfig().to_dict(), "every": every}
    arms = {name: Arm(case, options, knobs, wrap=wrap) for name, knobs in (("plain", None), ("decorrelated", decor))}
    while True:
        try:
            what, number = pipe.recv()
        except EOFError:
            break
        if what == "check":
            arms["decorrelated"].check_refreshes(number)
            pipe.send(0.0)
        else:
            dist.barrier()
            pipe.send(arms[what].steps(number))
    dist.destroy_process_group()
