"""Runs that are killed, stopped, or left with a damaged file end with the bits of the run that nothing happened to."""

from __future__ import annotations

import random
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from processes import start
from safetensors.torch import load_file
from training_runs import DECOR, TINY, train

from timm_decor.errors import Stopped, UserError
from timm_decor.training import run as run_module
from timm_decor.training.arm import Arm
from timm_decor.training.keeping import checkpoints as checkpoints_module
from timm_decor.training.keeping.folder import read_resume

# Five batches an epoch, and three updates, the last one from a single batch.
WORDS = shlex.split(
    "--train-split train[:160] --epochs 4 --grad-accum-steps 2 --model-ema --model-ema-decay 0.9 --drop 0.2 --mixup 0.4"
)


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
    """All that training ended with: weights, their average, optimizer state with R and W, history."""
    state = read_resume(folder / "resume.pt")
    del state["observed"]  # when R was looked at and how long updates took, which the clock decides
    assert state["progress"] is None
    return untimed(state)


def command(folder: Path, *words: Any) -> list[str]:
    return [*TINY, *WORDS, "--output", str(folder.parent), "--experiment", folder.name, *map(str, words)]


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let a SIGTERM be seen at the `call`-th place where training can be left."""
    calls = 0

    def asked(self: object) -> int:
        nonlocal calls
        calls += 1
        return signal.SIGTERM if calls == call else 0

    monkeypatch.setattr(run_module.StopRequest, "asked", asked)


class TestStoppedWithinAnEpoch:
    @pytest.mark.parametrize(
        "words",
        [
            "--decor --decor-every 2 --reprob 0.5 --aa rand-m5 --drop-path 0.2 --cutmix 0.5 --clip-grad 1",
            "--decor --decor-every 2 --opt adamw --lr 0.002 --decor-structure full",
            "--decor --decor-every 1 --decor-rule dbp --decor-structure space --no-decor-preserve-function",
            "--decor --opt lookahead_sgd --sched plateau --patience-epochs 0 --lr 1e-5 --model-ema-warmup",
            "--decor --decor-every 2 --amp --amp-dtype bfloat16 --channels-last --sched step --no-sched-on-updates",
            "--decor --decor-every 2 --grad-accum-steps 1 -j 1 --opt muon",
        ],
    )
    @pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
    def test_it_goes_on_with_the_same_bits(self, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        words = shlex.split(words)
        whole = train(tmp_path / "whole", *WORDS, *words)
        for call in (3, 2, 5):  # in the second update; where it goes on; in the evaluation or the next epoch
            stop_at(monkeypatch, call)
            with pytest.raises(Stopped, match=r"^\S.* stopped by SIGTERM after update \d+; go on with the same"):
                train(tmp_path / "parts", *WORDS, *words, "--resume", "auto")
            monkeypatch.undo()
        train(tmp_path / "parts", *WORDS, *words, "--resume", "auto")
        assert same(final(tmp_path / "parts"), final(whole))

    @pytest.mark.parametrize("every", [1, 20])
    def test_with_a_gradient_scaler(self, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """It skips updates 2 to 4, whose gradients overflow; the stop is after the third."""
        make = run_module.make_accelerator

        def with_scaler(*args: Any) -> Any:
            accelerator = make(*args)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
            return accelerator

        words = ["--decor", "--decor-every", every, "--grad-accum-steps", 1]
        monkeypatch.setattr(run_module, "make_accelerator", with_scaler)
        monkeypatch.setattr(Arm, "_weight", lambda arm, batch: 2.0**40 if arm.epoch == 0 and 0 < batch < 4 else 1.0)
        whole = train(tmp_path / "whole", *WORDS, *words)
        state = read_resume(whole / "resume.pt")
        assert state["optimizer"]["timm_decor"]["step"] == state["history"][-1]["steps"] - 3
        with monkeypatch.context() as patch:
            stop_at(patch, 4)
            with pytest.raises(Stopped):
                train(tmp_path / "parts", *WORDS, *words)
        train(tmp_path / "parts", *WORDS, *words, "--resume", "auto")
        assert same(final(tmp_path / "parts"), final(whole))

    def test_recovery_checkpoints_change_nothing(self, tmp_path: Path):
        for name, interval in (("with", 2), ("without", 0)):
            train(tmp_path / name, *WORDS, *DECOR, "--recovery-interval", interval)
        assert same(final(tmp_path / "with"), final(tmp_path / "without"))

    def test_other_batches_within_an_epoch_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        stop_at(monkeypatch, 3)
        with pytest.raises(Stopped):
            train(tmp_path / "run", *WORDS)
        monkeypatch.undo()
        with pytest.raises(UserError, match=r"with batch-size 32 \(here 16\), batches 5 \(here 10\): .* epochs$"):
            train(tmp_path / "run", *WORDS, "--resume", "auto", "-b", 16)

    def test_a_state_that_is_not_finite_is_not_saved(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        pause = checkpoints_module.Keeper.pause

        def poisoned(self: checkpoints_module.Keeper) -> None:
            if self.arm.steps == 2:
                self.arm.model.get_parameter("conv1.0.weight").data[0] = float("nan")
            pause(self)

        monkeypatch.setattr(checkpoints_module.Keeper, "pause", poisoned)
        with pytest.raises(UserError, match="the weight conv1.0.weight is not finite in epoch 1, step 2"):
            train(tmp_path / "run", *WORDS, "--recovery-interval", 1)
        state = read_resume(tmp_path / "run" / "resume.pt")
        assert state["progress"]["steps"] == 1 and state["state_dict"]["conv1.0.weight"].isfinite().all()


class TestAuto:
    def test_it_starts_goes_on_and_says_so(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        run = train(tmp_path / "run", *WORDS, "--epochs", 1, "--resume", "auto")
        assert "goes on" not in capsys.readouterr().out
        train(tmp_path / "run", *WORDS, "--epochs", 2, "--lr", 0.04, "--resume", "auto")
        out = capsys.readouterr().out
        assert "test_resnet goes on after update 3\n" in out
        assert "other arguments than before: epochs 1 -> 2, lr 0.05 -> 0.04\n" in out
        train(run, *WORDS, "--epochs", 2, "--lr", 0.04, "--resume", "auto")
        assert len(read_resume(run / "resume.pt")["history"]) == 2, "a finished run has nothing left to do"

    def test_it_needs_the_name_of_a_folder_and_a_run_of_the_same_kind(self, tmp_path: Path):
        with pytest.raises(UserError, match="--resume auto goes on with the run of --experiment NAME"):
            run_module.main([*TINY, "--resume", "auto", "--output", str(tmp_path)])
        run = train(tmp_path / "run", "--epochs", 1)
        with pytest.raises(UserError, match="holds a run of a single model"):
            train(run, *DECOR, "--epochs", 1, "--compare", "--resume", "auto")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    for name, words in KILLED.items():
        process = start(command(folder / name, *words), folder / "log")
        process.join()
        assert process.exitcode == 0, (folder / "log").read_text()
    return {name: folder / name for name in KILLED}


KILLED = {
    "sgd": [*DECOR, "--epochs", 8, "--reprob", 0.5, "--drop-path", 0.2],
    "adamw": [*DECOR, "--epochs", 8, "--opt", "adamw", "--lr", 0.002],
    "compare": [*DECOR, "--epochs", 5, "--compare"],
}


class Killer:
    """Starts one command again and again and kills it at random moments, each of three kinds in turn.

    Args:
        words: the command, which must go on from where it was.
        run: its folder.
        seed: of the moments.
    """

    def __init__(self, words: list[str], run: Path, seed: int) -> None:
        self.words, self.run, self.log = words, run, run.with_suffix(".log")
        self.moments = random.Random(seed)
        self.kills = 0

    def kill_once(self) -> bool:
        """Start it and kill it; false where it got to its end before."""
        kind = self.kills % 3
        if kind == 0:  # in the middle of writing
            process = start(self.words, self.log, processes.die_at_event, self.moments.randrange(5, 60))
        else:
            before, process = self.checkpoints(), start(self.words, self.log)
            while kind == 1 and process.exitcode is None and self.checkpoints() == before:  # after an update
                time.sleep(0.01)
            process.join(self.moments.uniform(0, 0.2 if kind == 1 else 0.6))  # kind 2: while it starts
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.log.read_text()[-3000:]
        self.kills += process.exitcode != 0
        return process.exitcode != 0

    def checkpoints(self) -> list[int]:
        return [file.stat().st_mtime_ns for file in sorted(self.run.rglob("resume.pt"))]

    def finish(self) -> None:
        process = start(self.words, self.log)
        process.join()
        assert process.exitcode == 0, self.log.read_text()[-3000:]


class TestKilled:
    """SIGKILL until it is enough, then the same command to its end."""

    @pytest.mark.parametrize("name", KILLED)
    def test_it_ends_with_the_same_bits(self, name: str, whole: dict[str, Path], tmp_path: Path):
        seed, run = random.SystemRandom().randrange(10**6), tmp_path / name
        words = command(run, *KILLED[name], "--resume", "auto", "--recovery-interval", 1)
        killer = Killer(words, run, seed)
        told = f"seed {seed}, log {killer.log}"
        print(told)
        while killer.kills < 9 and killer.kill_once():
            pass
        assert killer.kills >= 7, "it was to be killed more often"
        killer.finish()
        for side in ("plain", "decorrelated") if name == "compare" else (".",):
            assert same(final(run / side), final(whole[name] / side)), told
            for file in ("last.safetensors", "last-ema.safetensors", "best.safetensors"):
                assert same(load_file(run / side / file), load_file(whole[name] / side / file)), told
            assert not list((run / side).glob(".*")), f"nothing half-written stays behind: {told}"
        print(f"{name}: killed {killer.kills} times, {killer.log.read_text().count('goes on after')} times gone on")
