"""Kill train.py again and again at random moments; it must end with the bits of a run that nothing happened to.

    python tests/chaos.py [--kills 100] [--pairs 20] [--seed N] [NAME ...]

The runs differ in what is easy to get wrong: SGD, AdamW and Muon, averaged weights, mixup, accumulation, data workers,
two models in turns, two processes. `make chaos` makes a hundred kills; tests/test_kill_and_resume.py makes some of
them on every change.
"""

from __future__ import annotations

import argparse
import random
import shlex
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import processes
import torch
from processes import start
from safetensors.torch import load_file
from training_runs import DECOR, TINY

from timm_decor.training.keeping.folder import read_resume

# Five batches an epoch, and three updates, the last one from a single batch.
WORDS = shlex.split(
    "--train-split train[:160] --epochs 4 --grad-accum-steps 2 --model-ema --model-ema-decay 0.9 --drop 0.2 --mixup 0.4"
)
RUNS = {
    "sgd": [*DECOR, "--epochs", 8, "--reprob", 0.5, "--drop-path", 0.2],
    "adamw": [*DECOR, "--epochs", 8, "--opt", "adamw", "--lr", 0.002],
    "compare": [*DECOR, "--epochs", 5, "--compare"],
    "muon": [*DECOR, "--epochs", 8, "--opt", "muon", "--lr", 0.02],
    "workers": [*DECOR, "--epochs", 8, "-j", 2],
    "two processes": [*DECOR, "--epochs", 6, "-b", 16],
}
_SIDES = {"compare": ("plain", "decorrelated")}
_PROCESSES = {"two processes": 2}


def command(folder: Path, *words: Any) -> list[str]:
    """train.py's arguments for a run in a folder."""
    return [*TINY, *WORDS, "--output", str(folder.parent), "--experiment", folder.name, *map(str, words)]


def untimed(value: Any) -> Any:
    """A state without what depends on the clock."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if "second" not in str(key) and key != "images_per_s"}
    return [untimed(item) for item in value] if isinstance(value, list | tuple) else value


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def final(folder: Path) -> Any:
    """All that training ended with: weights, their average, optimizer state with R, history."""
    state = read_resume(folder / "resume.pt")
    del state["observed"]  # when R was looked at and how long updates took, which the clock decides
    assert state["progress"] is None
    return untimed(state)


class Killer:
    """Starts one command again and again and kills it at random moments, each of three kinds in turn.

    Args:
        name: of RUNS.
        run: the run's folder.
        seed: of the moments.
    """

    def __init__(self, name: str, run: Path, seed: int) -> None:
        self.name, self.run, self.log = name, run, run.with_suffix(".log")
        self.words = command(run, *RUNS[name], "--resume", "auto", "--recovery-interval", 1)
        self.moments = random.Random(seed)
        self.kills = 0

    def kill_once(self) -> bool:
        """Start it and kill it; false where it got to its end before."""
        kind = self.kills % 3
        if kind == 0:  # in the middle of writing
            group = launch(self.name, self.words, self.log, self.moments.randrange(5, 60))
        else:
            before, group = self.checkpoints(), launch(self.name, self.words, self.log)
            while kind == 1 and group[0].exitcode is None and self.checkpoints() == before:  # after an update
                time.sleep(0.01)
            group[0].join(self.moments.uniform(0, 0.2 if kind == 1 else 0.6))  # kind 2: while it starts
            self.moments.choice(group).kill()
        codes = ended(group)
        # of several, one that is left alone may meet the other's absence in any way
        assert len(group) > 1 or codes[0] in (0, -signal.SIGKILL), self.log.read_text()[-3000:]
        self.kills += any(codes)
        return any(codes)

    def checkpoints(self) -> list[int]:
        # by name: a folder that the run is about to remove would end a search through all of them
        files = [self.run / side / "resume.pt" for side in ("", "decorrelated", "plain")]
        return [file.stat().st_mtime_ns for file in files if file.is_file()]

    def finish(self) -> None:
        """Let it come to its end."""
        codes = ended(launch(self.name, self.words, self.log))
        assert not any(codes), self.log.read_text()[-3000:]


def launch(name: str, words: list[str], log: Path, die_at: int = 0) -> list[Any]:
    """Start a run in as many processes as it has; the first one dies at its `die_at`-th step of writing a file."""
    count = _PROCESSES.get(name, 1)
    if count == 1:
        return [start(words, log, processes.die_at_event, die_at) if die_at else start(words, log)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(words, log, processes.member, rank, count, port, die_at) for rank in range(count)]


def ended(group: list[Any]) -> list[int]:
    """Exit codes. As a launcher does, end the others when one has failed."""
    while any(process.exitcode is None for process in group):
        if any(process.exitcode for process in group):
            for process in group:
                process.kill()
        group[0].join(0.05)
    return [process.exitcode for process in group]


def whole(name: str, folder: Path) -> Path:
    """A run that nothing happens to."""
    run = folder / f"{name} whole"
    codes = ended(launch(name, command(run, *RUNS[name]), run.with_suffix(".log")))
    assert not any(codes), run.with_suffix(".log").read_text()[-3000:]
    return run


def compare(name: str, run: Path, reference: Path) -> list[str]:
    """What differs between a run that was killed and one that was not; empty where nothing does."""
    wrong = []
    for side in _SIDES.get(name, (".",)):
        if not same(final(run / side), final(reference / side)):
            wrong.append(f"{side}: the state")
        for file in ("last.safetensors", "last-ema.safetensors", "best.safetensors"):
            if not same(load_file(run / side / file), load_file(reference / side / file)):
                wrong.append(f"{side}: {file}")
        wrong += [f"{file.name} stayed behind" for file in (run / side).glob(".*")]
    return wrong


def pair(run: Path, reference: Path, apart: float) -> list[str]:
    """Start the same run twice, `apart` seconds after one another; what is wrong with what comes of it.

    One of them must be refused in one line, and the other end as if it had been alone.
    """
    words = command(run, *RUNS["sgd"], "--resume", "auto")
    logs = [run.with_name(f"{run.name}.{number}.log") for number in (1, 2)]
    both = [start(words, logs[0])]
    time.sleep(apart)
    both.append(start(words, logs[1]))
    for process in both:
        process.join()
    codes = [process.exitcode for process in both]
    if sorted(codes) != [0, 2]:
        return [f"exit codes {codes}: {logs[0].read_text()[-500:]} {logs[1].read_text()[-500:]}"]
    said = logs[codes.index(2)].read_text().strip().splitlines()
    refused = said[-1].startswith("train.py: error: another run is at work in ")
    return ([] if refused else [f"it said {said[-1]}"]) + compare("sgd", run, reference)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=20, help="times that a run is started twice at once")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    args = parser.parse_args(argv)
    names = args.runs or list(RUNS)
    print(f"seed {args.seed}")
    total, failed = 0, []
    with tempfile.TemporaryDirectory() as folder:
        references = {name: whole(name, Path(folder)) for name in names}
        rounds = 0
        while total < args.kills:
            name = names[rounds % len(names)]
            killer = Killer(name, Path(folder) / f"{name} {rounds}", args.seed + rounds)
            while killer.kills < min(9, args.kills - total) and killer.kill_once():
                pass
            killer.finish()
            wrong = compare(name, killer.run, references[name])
            total, rounds = total + killer.kills, rounds + 1
            failed += [f"{name}: {text}" for text in wrong]
            print(f"{name}: {killer.kills} kills, {total} in all: {'; '.join(wrong) or 'the same bits'}", flush=True)
        moments = random.Random(args.seed)
        reference = references.get("sgd") or whole("sgd", Path(folder))
        for number in range(args.pairs):
            wrong = pair(Path(folder) / f"pair {number}", reference, moments.uniform(0, 0.5))
            failed += [f"pair: {text}" for text in wrong]
    if failed:
        sys.exit(f"{len(failed)} things differ: {failed[0]}")
    print(f"{total} kills, {rounds} runs, every one ended with the same bits")
    print(f"{args.pairs} times two at once: one was refused, the other ended as if alone")


if __name__ == "__main__":
    main(sys.argv[1:])
