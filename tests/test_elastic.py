"""Processes that die, stand still, or are others than before: a run goes on by itself, and nobody waits for ever."""

import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import processes
import pytest
from chaos import ended, final, same
from processes import agent, context, free_port, start, start_group
from training_runs import DECOR, TINY, history

WORDS = [*TINY, *DECOR, "--epochs", "2", "--train-split", "train[:128]", "--sched", "none", "--model-ema"]
ARM = "timm_decor.training.arm.Arm"


def said(log: Path) -> str:
    """What was printed, as one line."""
    return " ".join(log.read_text().split())


def words_of(run: Path, *more: Any) -> list[str]:
    """A run that goes on by itself; with a state after every update."""
    given = ["--recovery-interval", 1, "--resume", "auto", "--output", run.parent, "--experiment", run.name]
    return [*WORDS, *map(str, [*more, *given])]


def together(run: Path, size: int, *more: Any) -> None:
    """Train to the end with so many processes."""
    log, batch = run.with_suffix(".log"), ["-b", 32 // size]
    codes = ended(start_group(words_of(run, *batch, *more), log, run.with_suffix(".ends"), size))
    assert not any(codes), log.read_text()


def killed(run: Path, owner: str, method: str, number: int, *more: Any) -> str:
    """Start two processes of which the first dies at a call; what they printed."""
    port, log = free_port(), run.with_suffix(".log")
    words = words_of(run, "-b", 16, *more)
    group = [start(words, log, processes.dying_member, rank, 2, port, owner, method, number, 0) for rank in range(2)]
    codes = ended(group)
    assert codes[0] == -signal.SIGKILL
    return log.read_text()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave that stop behind their first epoch."""
    run = tmp_path_factory.mktemp("two") / "run"
    together(run, 2, "--epochs", 1)
    return run


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave of which one dies at the third of four updates of the second epoch."""
    run = tmp_path_factory.mktemp("left") / "run"
    killed(run, ARM, "learn", 7)
    return run


class TestOtherNumbersOfProcesses:
    @pytest.mark.parametrize("size", [1, 3])
    def test_go_back_to_the_end_of_the_epoch(self, size: int, left: Path, of_two: Path, tmp_path: Path):
        """As if the others had never begun the next one."""
        run, reference = (shutil.copytree(path, tmp_path / name) for path, name in ((left, "run"), (of_two, "other")))
        together(run, size)
        together(reference, size)
        assert same(final(run), final(reference))
        text = said(run.with_suffix(".log"))
        assert f"2 processes were in the middle of epoch 2, which {size} cannot go on with: back to the" in text
        assert f"{size} process{'es' if size > 1 else ''} now, 2 before" in text
        assert not (run / "resume-epoch.pt").exists(), "a finished run keeps one state"

    def test_a_finished_run_that_trains_on_keeps_its_end(self, of_two: Path, tmp_path: Path):
        """Epochs that are done are never begun anew."""
        run = shutil.copytree(of_two, tmp_path / "run")
        assert not (run / "resume-epoch.pt").exists()
        killed(run, ARM, "learn", 3)
        shutil.copytree(run, tmp_path / "without")
        together(run, 1)
        assert "back to the end of epoch 1" in said(run.with_suffix(".log")) and len(history(run)) == 2
        (tmp_path / "without" / "resume-epoch.pt").unlink()
        log = tmp_path / "without.log"
        assert ended([start(words_of(tmp_path / "without", "-b", 32), log)]) == [2]
        assert "resume-epoch.pt, from which others could go on, is missing: go on with 2" in said(log)

    def test_begin_anew_where_no_epoch_was_done(self, tmp_path: Path):
        run, reference = tmp_path / "run", tmp_path / "reference"
        killed(run, ARM, "learn", 3)
        together(run, 1)
        together(reference, 1)
        assert "epoch 1, which 1 cannot go on with: back to the start" in said(run.with_suffix(".log"))
        assert same(final(run), final(reference))

    def test_evaluate_an_epoch_that_is_trained(self, of_two: Path, tmp_path: Path):
        """It is not trained again, and its loss is that of the images of all."""
        run, reference = tmp_path / "run", shutil.copytree(of_two, tmp_path / "reference")
        killed(run, ARM, "finish_epoch", 1)
        together(run, 1)
        together(reference, 1)
        for part in ("state_dict", "state_dict_ema", "optimizer"):  # its evaluation adds up in another order
            assert same(final(run)[part], final(reference)[part])
        assert "in the middle" not in said(run.with_suffix(".log"))
        assert history(run)[0]["train_loss"] == history(reference)[0]["train_loss"]


class TestNobodyWaitsForEver:
    def test_for_one_that_is_gone(self, tmp_path: Path):
        port, log = free_port(), tmp_path / "log"
        words = words_of(tmp_path / "run", "-b", 16)
        group = [start(words, log, processes.dying_member, rank, 2, port, ARM, "learn", 3, 1) for rank in range(2)]
        for process in group:
            process.join(60)
        assert [process.exitcode for process in group] == [2, -signal.SIGKILL], log.read_text()
        text = said(log)
        assert "train.py: error: process 0 of 2: another process is gone: its own last lines say why; --resume" in text
        assert "Traceback" not in text

    def test_for_one_that_stands_still(self, tmp_path: Path):
        run, log = tmp_path / "run", tmp_path / "run.log"
        group = start_group(words_of(run, "-b", 16, "--dist-timeout", 3), log, tmp_path / "ends", 2)
        while not (run / "resume.pt").exists() and group[1].exitcode is None:
            time.sleep(0.01)
        os.kill(group[1].pid, signal.SIGSTOP)
        try:
            group[0].join(60)
            assert group[0].exitcode == 2, log.read_text()
        finally:
            group[1].kill()
        text = said(log)
        assert "process 0 of 2: another process gave nothing in time (--dist-timeout); --resume auto goes on" in text
        assert "Traceback" not in text

    def test_for_one_that_never_comes(self, tmp_path: Path):
        port, log = free_port(), tmp_path / "log"
        alone = start(words_of(tmp_path / "run", "--dist-timeout", 2), log, processes.join_group, 0, 2, port)
        alone.join(60)
        assert alone.exitcode == 2 and "process 0 of 2: another process gave nothing in time" in said(log)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Torchrun:
    """torchrun on some nodes of this machine, each with one process of the run."""

    def __init__(self, run: Path, nodes: tuple[int, int], each: int) -> None:
        self.run, self.log, self.pids = run, run.with_suffix(".log"), run.with_suffix(".pids")
        self.pids.mkdir()
        port, forks = free_port(), context()
        words = words_of(run, "-b", 16)
        self.agents = [
            forks.Process(target=agent, args=(words, str(self.log), str(self.pids), nodes, each, port))
            for _ in range(nodes[1])
        ]
        for process in self.agents:
            process.start()
            while not _listens(port):  # the first one keeps the rendezvous: a job does not outlive that node
                assert process.exitcode is None, self.log.read_text()[-3000:]
                time.sleep(0.05)

    def wait_for_state(self) -> None:
        """Wait until a new one is written."""
        file = self.run / "resume.pt"
        before = file.stat().st_mtime_ns if file.exists() else 0
        while not file.exists() or file.stat().st_mtime_ns == before:
            assert any(process.exitcode is None for process in self.agents), self.log.read_text()[-3000:]
            time.sleep(0.01)

    def pid(self, restart: int, rank: int) -> int:
        """The number of a process that torchrun has started, or is about to start."""
        file = self.pids / f"{restart}-{rank}"
        while not (file.exists() and file.read_text()):
            assert any(process.exitcode is None for process in self.agents), self.log.read_text()[-3000:]
            time.sleep(0.01)
        return int(file.read_text())


class TestTorchrun:
    def test_starts_anew_when_a_rank_is_killed(self, tmp_path: Path):
        job = Torchrun(tmp_path / "run", (1, 1), 2)
        for restart in range(2):
            pid = job.pid(restart, random.randrange(2))
            job.wait_for_state()
            time.sleep(random.uniform(0, 0.3))
            os.kill(pid, signal.SIGKILL)
        job.agents[0].join()
        assert job.agents[0].exitcode == 0, job.log.read_text()[-3000:]
        together(tmp_path / "reference", 2)
        assert same(final(job.run), final(tmp_path / "reference"))
        assert "torchrun has started it anew, 2 of at most 5 times" in said(job.log)

    def test_goes_on_without_a_node_that_is_gone(self, tmp_path: Path):
        job = Torchrun(tmp_path / "run", (1, 2), 1)
        while not (job.run / "resume-epoch.pt").exists():
            job.wait_for_state()
        job.wait_for_state()
        workers = {rank: job.pid(0, rank) for rank in range(2)}
        lost = job.agents[1]
        lost.kill()
        for pid in workers.values():
            if os.path.exists(f"/proc/{pid}") and Path(f"/proc/{pid}/stat").read_text().split()[3] == str(lost.pid):
                os.kill(pid, signal.SIGKILL)
        job.agents[0].join(120)
        assert job.agents[0].exitcode == 0, job.log.read_text()[-3000:]
        assert len(history(job.run)) == 2 and "1 process now, 2 before" in said(job.log)
