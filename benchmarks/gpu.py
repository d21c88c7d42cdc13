"""All GPU tables with one command, `make bench-gpu`, in parts of 25 minutes.

    python benchmarks/gpu.py --cifar10 FOLDER --imagenette FOLDER [--minutes 25]
    python benchmarks/gpu.py --smoke --out output/gpu      # the same on a CPU in a minute, on generated images

In this order: time to accuracy with ResNet-18 on CIFAR-10 (32 px, the stem for small images) and on Imagenette (128 px,
timm's stem), SGD and AdamW, plain and decorrelated, and plain Muon; then what a step costs at 64, 128 and 224 px in
bfloat16, SGD also compiled. Runs that are not timed share the GPU, each in a process of its own; those whose seconds
are reported have it alone, the arms of a seed in turns within one process. How long all of it takes is not known: no
GPU has run it yet.

What is finished is in the result files at once: a run, and where runs take turns those of a seed, seven of them, for
which the minutes must suffice. Where they end, or something else ends it, the same command goes on, also on another
host with the same GPU; it ends with exit code 0 when all is there, and with 3 when something is left.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from timm_decor.errors import UserError, exit_code

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LEFT = 3  # exit code
IMAGENETTE = ("--stem", "timm", "--epochs", "20", "--batch-size", "64", "--shift", "12", "--held-out", "1000")


@dataclass(frozen=True)
class Task:
    """A command that goes on where it was.

    Attributes:
        name: for people.
        words: a script of this folder, and its arguments.
    """

    name: str
    words: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(ROOT / "benchmarks" / self.words[0]), *self.words[1:]]


def time_to_accuracy(data: str, folder: Path, out: Path, *words: str) -> list[Task]:
    """Tune, then report."""
    files = [str(out / "time_to_accuracy" / f"gpu_{data}{kind}.json") for kind in ("_tune", "")]
    shared = ("--preset", "gpu", "--data-dir", str(folder), *words)
    tune, report = (("time_to_accuracy.py", stage, *shared) for stage in ("tune", "report"))
    return [
        Task(f"{data}: learning rates", (*tune, "--grid", "3", "--json", files[0])),
        Task(f"{data}: time to accuracy", (*report, "--json", files[1], "--tune-json", files[0])),
    ]


def step_cost(out: Path) -> list[Task]:
    """Three optimizers, then SGD compiled, in one file."""
    shared: tuple[str, ...] = (
        "step_cost.py",
        "--device",
        "cuda",
        "--img-size",
        "64",
        "128",
        "224",
        "--batch-size",
        "128",
    )
    shared += ("--precision", "bfloat16", "--channels-last", "--json", str(out / "step_cost" / "gpu.json"))
    return [
        Task("step cost", (*shared, "--opt", "sgd", "adamw", "muon")),
        Task("step cost, compiled", (*shared, "--opt", "sgd", "--compile", "yes")),
    ]


def smoke(out: Path) -> list[Task]:
    """The same commands on what every machine has."""
    files = [str(out / "time_to_accuracy" / f"smoke{kind}.json") for kind in ("_tune", "")]
    shared = ("--preset", "smoke", "--opt", "sgd", "--train-images", "96")
    cost = ("step_cost.py", "--smoke", "--model", "test_resnet", "--json", str(out / "step_cost" / "smoke.json"))
    return [
        Task("smoke: learning rates", ("time_to_accuracy.py", "tune", *shared, "--grid", "3", "--json", files[0])),
        Task(
            "smoke: time to accuracy",
            ("time_to_accuracy.py", "report", *shared, "--json", files[1], "--tune-json", files[0], "--seeds", "1"),
        ),
        Task("smoke: step cost", cost),
    ]


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP be exceptions: a task that is left behind would train beside the next one."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(tasks: list[Task], minutes: float) -> list[Task]:
    """Run one after the other until the time is over; returns those that are left.

    Raises:
        UserError: one failed; the others are left as they are.
    """
    end = time.monotonic() + 60 * minutes
    for number, task in enumerate(tasks):
        left = end - time.monotonic()
        if left <= 0:
            return tasks[number:]
        begin = time.monotonic()
        with ended_by_signals():
            process = subprocess.Popen(task.command, start_new_session=True)  # a group of its own: workers end with it
            try:
                code = process.wait(timeout=left)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)  # what is finished is in the file
                process.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    return tasks[number:]
                raise
        if code:
            raise UserError(f"{task.name} failed, see above; what was finished is kept, and the same command goes on")
        print(f"{task.name}: done in {time.monotonic() - begin:.0f} s", flush=True)
    return []


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, metavar="FOLDER", help="train*.parquet and test*.parquet")
    parser.add_argument("--imagenette", type=Path, metavar="FOLDER", help="the same, 128 px")
    parser.add_argument("--minutes", type=float, default=25, help="(default: 25)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results (default: the committed ones)")
    parser.add_argument("--smoke", action="store_true", help="a check that it runs, on generated images")
    args = parser.parse_args(argv)
    if args.smoke:
        tasks = smoke(args.out)
    else:
        missing = [f"--{name}" for name in ("cifar10", "imagenette") if getattr(args, name) is None]
        if missing:
            raise UserError(f"{' and '.join(missing)}: where are these images?")
        tasks = time_to_accuracy("cifar10", args.cifar10, args.out)
        tasks += time_to_accuracy("imagenette128", args.imagenette, args.out, *IMAGENETTE)
        tasks += step_cost(args.out)
    left = run(tasks, args.minutes)
    if left:
        print(f"the time is over; left: {', '.join(task.name for task in left)}. The same command goes on.")
        sys.exit(LEFT)


if __name__ == "__main__":
    sys.exit(exit_code("gpu.py", main))
