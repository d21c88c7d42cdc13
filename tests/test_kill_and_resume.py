"""Runs that are killed, stopped, or left with a damaged file end with the bits of the run that nothing happened to."""

from __future__ import annotations

import random
import shlex
import signal
from pathlib import Path
from typing import Any

import chaos
import pytest
import timm
import torch
from chaos import WORDS, final, same
from safetensors.torch import load_file, save_file
from training_runs import DECOR, TINY, train

from timm_decor.errors import Stopped, UserError
from timm_decor.training import run as run_module
from timm_decor.training.arm import Arm
from timm_decor.training.keeping import checkpoints as checkpoints_module
from timm_decor.training.keeping.folder import read_resume


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

        def poisoned(self: checkpoints_module.Keeper, *within: Any) -> None:
            if self.arm.steps == 2:
                self.arm.model.get_parameter("conv1.0.weight").data[0] = float("nan")
            pause(self, *within)

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

    @pytest.mark.parametrize(
        "argument", ["--initial-checkpoint", "--pretrained-path", "--pretrained --pretrained-path"]
    )
    def test_it_needs_no_weights_to_begin_with_any_more(
        self, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        file = tmp_path / "w.safetensors"
        save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), file)
        words = [*DECOR, *WORDS, *argument.split(), file, "--epochs", 2, "--resume", "auto"]
        whole = train(tmp_path / "whole", *words)
        stop_at(monkeypatch, 4)
        with pytest.raises(Stopped):
            train(tmp_path / "run", *words)
        monkeypatch.undo()
        file.unlink()
        run = train(tmp_path / "run", *words)
        ours, theirs = (load_file(folder / "last.safetensors") for folder in (run, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        with pytest.raises(UserError, match=r"no checkpoint file .*w\.safetensors"):
            train(tmp_path / "new", *words)

    def test_it_needs_the_name_of_a_folder_and_a_run_of_the_same_kind(self, tmp_path: Path):
        with pytest.raises(UserError, match="--resume auto goes on with the run of --experiment NAME"):
            run_module.main([*TINY, "--resume", "auto", "--output", str(tmp_path)])
        run = train(tmp_path / "run", "--epochs", 1)
        with pytest.raises(UserError, match="holds a run of a single model"):
            train(run, *DECOR, "--epochs", 1, "--compare", "--resume", "auto")


class TestKilled:
    """SIGKILL until it is enough, then the same command to its end; `make chaos` does more of it."""

    @pytest.mark.parametrize(("name", "kills"), [("sgd", 3), ("adamw", 3), ("muon", 3), ("compare", 3), ("workers", 3),
                                                 ("two processes", 2)])  # fmt: skip
    def test_it_ends_with_the_same_bits(self, name: str, kills: int, tmp_path: Path):
        seed = random.SystemRandom().randrange(10**6)
        killer = chaos.Killer(name, tmp_path / "run", seed)
        told = f"seed {seed}, log {killer.log}"
        print(told)
        while killer.kills < kills and killer.kill_once():
            pass
        assert killer.kills >= kills - 1, "it was to be killed more often"
        killer.finish()
        assert chaos.compare(name, killer.run, chaos.whole(name, tmp_path)) == [], told


def test_two_at_once(tmp_path: Path):
    reference = chaos.whole("sgd", tmp_path)
    for number, apart in enumerate((0, 0.3)):
        assert chaos.pair(tmp_path / f"pair{number}", reference, apart) == []
