"""What a run says of itself is what it did: other arguments on the way, the launcher's, rates, comparisons."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_kill_and_resume import stop_at
from training_runs import DECOR, TINY, drawn_reports, history, reset_accelerate, train

from timm_decor.errors import Stopped, UserError
from timm_decor.training import arm as arm_module
from timm_decor.training import validation
from timm_decor.training.keeping.folder import RunFolder, read_resume
from timm_decor.training.run import main, parse
from timm_decor.training.runtime import follow_launcher
from timm_decor.training.seeing.compare import Side, verdict

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    return train(tmp_path_factory.mktemp("runs") / "two", *DECOR, "--epochs", 2)


def gone_on(two: Path, to: Path, *words: Any, auto: bool = False) -> Path:
    """A copy of it, gone on with by other arguments."""
    shutil.copytree(two, to)
    reset_accelerate()
    if auto:
        return train(to, *DECOR, *words, "--resume", "auto")
    main(["--resume", str(to), *map(str, words)])
    return to


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def groups(run: Path) -> list[dict[str, Any]]:
    return read_resume(run / "resume.pt")["optimizer"]["param_groups"]


@pytest.mark.parametrize("auto", [False, True])
class TestOtherArguments:
    def test_weight_decay_takes_effect(self, two: Path, tmp_path: Path, auto: bool, capsys: Capture) -> None:
        run = gone_on(two, tmp_path / "run", "--epochs", 3, "--weight-decay", 0.5, auto=auto)
        assert "weight_decay 2e-05 -> 0.5" in capsys.readouterr().out
        assert sorted(group["weight_decay"] for group in groups(run)) == [0, 0.5]
        assert sorted(group["weight_decay"] for group in results(run)["optimizer"]["groups"]) == [0, 0.5]
        assert yaml.safe_load((run / "args.yaml").read_text())["weight_decay"] == 0.5

    def test_the_learning_rate_takes_effect(self, two: Path, tmp_path: Path, auto: bool) -> None:
        run = gone_on(two, tmp_path / "run", "--epochs", 3, "--sched", "none", "--lr", 0.001, auto=auto)
        assert history(run)[-1]["lr"] == 0.001 and {group["lr"] for group in groups(run)} == {0.001}
        assert results(run)["lr"] == 0.05, "the highest that was reached"

    def test_the_schedule_goes_on_by_epochs(self, two: Path, tmp_path: Path, auto: bool) -> None:
        """128 images: 4 updates an epoch, then 2."""
        run = gone_on(two, tmp_path / "run", "--epochs", 4, "-b", 64, auto=auto)
        rows = history(run)
        assert [row["steps"] for row in rows] == [4, 8, 10, 12]
        cosine = [0.05 * (1 + math.cos(math.pi * place / 8)) / 2 for place in (5, 7)]  # of 4 epochs of 2 updates
        assert [row["lr"] for row in rows[2:]] == pytest.approx(cosine)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--decor-rank", 2], "the saved R is of rank 32, this run uses 2"),
            (["--opt", "adamw"], "was trained with --opt sgd, whose state is of no use to adamw"),
            (["--freeze", "conv1"], "trained other parameters"),
            (["--layer-decay", 0.5], "trained other parameters"),
            (["--head-init-scale", 0.5], "--head-init-scale is for the start of a run"),
            (["--model", "test_convnext"], "does not fit"),
        ],
    )
    def test_what_cannot_change_is_refused(
        self, two: Path, tmp_path: Path, auto: bool, words: list[Any], said: str
    ) -> None:
        before = {file.name: file.read_bytes() for file in two.iterdir()}
        with pytest.raises(UserError, match=said):
            gone_on(two, tmp_path / "run", "--epochs", 3, *words, auto=auto)
        assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before, "nothing is lost"

    def test_nothing_changes_what_training_counts(self, two: Path, tmp_path: Path, auto: bool) -> None:
        """The same as if it had never stopped, also after a first part with fewer epochs of a constant schedule."""
        words = ["--epochs", 3, "--sched", "none"]
        whole = train(tmp_path / "whole", *DECOR, *words)
        part = train(tmp_path / "part", *DECOR, "--epochs", 1, "--sched", "none")
        run = gone_on(part, tmp_path / "run", *words, auto=auto)
        ours, theirs = (load_file(folder / "last.safetensors") for folder in (run, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_decor_is_refused(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "run")
    with pytest.raises(UserError, match="was trained decorrelated: go on with --decor"):
        train(tmp_path / "run", "--epochs", 3, "--resume", "auto")


def test_results_of_a_finished_run_go_when_it_goes_on(two: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise UserError("the disk is gone")

    monkeypatch.setattr(arm_module, "evaluate", fails)
    with pytest.raises(UserError, match="the disk is gone"), drawn_reports():
        gone_on(two, tmp_path / "run", "--epochs", 3)
    assert not (tmp_path / "run" / "results.json").exists()
    assert "Not finished: decorrelated test_resnet 2 of 3 epochs." in (tmp_path / "run" / "report.html").read_text()
    state = read_resume(tmp_path / "run" / "resume.pt")
    assert state["progress"]["steps"] == 12, "the trained epoch is saved before evaluation meets anything"
    monkeypatch.undo()
    reset_accelerate()
    main(["--resume", str(tmp_path / "run")])
    assert [row["steps"] for row in history(tmp_path / "run")] == [4, 8, 12]


def test_what_only_the_records_are_left_of_is_no_other_training(two: Path, tmp_path: Path) -> None:
    """All epochs are done and nothing was written: arguments that no update used are told of as changes."""
    shutil.copytree(two, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    train(tmp_path / "run", *DECOR, "--epochs", 2, "--lr", 0.01, "--resume", "auto")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (change,) = results["changed"]
    assert change["changed"]["lr"] == ["0.05", "0.01"], change


def test_a_run_cannot_be_cut_in_an_epoch_that_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 6)
    with pytest.raises(Stopped):
        train(tmp_path / "run", *DECOR, "--epochs", 3, "--val-interval", 2)
    monkeypatch.undo()
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="epoch 2 has begun, and it would end after 1: more --epochs$"):
        train(tmp_path / "run", *DECOR, "--epochs", 1, "--val-interval", 2, "--resume", "auto")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before
    run = train(tmp_path / "run", *DECOR, "--epochs", 2, "--val-interval", 2, "--resume", "auto")
    assert "eval_top1" in history(run)[-1]


class TestLauncher:
    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            monkeypatch.delenv(name)

    def follow(self, monkeypatch: pytest.MonkeyPatch, precision: str, steps: str, *words: str) -> tuple[Any, list[str]]:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        args = parse([*TINY, *words])
        return args, follow_launcher(args)

    def test_it_is_followed_where_nothing_else_was_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        args, lines = self.follow(monkeypatch, "bf16", "4")
        assert (args.amp, args.amp_dtype, args.grad_accum_steps, lines) == (True, "bfloat16", 4, [])
        args, lines = self.follow(monkeypatch, "no", "1")
        assert (args.amp, args.grad_accum_steps, lines) == (False, 1, [])

    def test_our_own_argument_wins_and_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        args, lines = self.follow(monkeypatch, "bf16", "4", "--no-amp", "--grad-accum-steps", "2")
        assert (args.amp, args.grad_accum_steps) == (False, 2)
        assert lines == [
            "accelerate's mixed precision bf16 is not followed: this run says --no-amp",
            "accelerate's 4 accumulation steps are not followed: this run says 2",
        ]

    def test_a_precision_that_we_do_not_have_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UserError, match="mixed precision in fp8; here there are no, fp16, bf16"):
            self.follow(monkeypatch, "fp8", "1")

    def test_a_run_accumulates(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
        run = train(tmp_path / "run", "--epochs", 1)
        assert history(run)[-1]["steps"] == 2
        assert yaml.safe_load((run / "args.yaml").read_text())["grad_accum_steps"] == 2


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_without_its_instructions_is_said(
    supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    run = train(tmp_path / "run", "--epochs", 1, "--amp", "--amp-dtype", "bfloat16")
    line = "--amp-dtype bfloat16 is emulated on this CPU"
    assert (line in capsys.readouterr().out) is not supported
    words = ["--dataset", "digits", "--split", "test[:70]", "--device", "cpu", "-j", "0"]
    words += ["--checkpoint", str(run / "last.safetensors")]
    for precision, said in (["--amp-dtype", "bfloat16", "--amp"], not supported), (["--no-amp"], False):
        reset_accelerate()
        validation.main([*words, *precision])
        assert (line in capsys.readouterr().err) is said


class TestPeak:
    def test_a_warm_up_that_does_not_end_is_told(self, tmp_path: Path, capsys: Capture) -> None:
        run = train(tmp_path / "run", "--epochs", 2, "--warmup-epochs", 4)
        out = " ".join(capsys.readouterr().out.split())
        assert "a warm-up of 4 epochs does not end within 2: the learning rate never reaches 0.05" in out
        assert 0.01 < results(run)["lr"] < 0.03, "the highest that was reached"


class TestVerdict:
    def side(self, name: str, top1: float, chance: float | None = 10.0, images: int | None = 1000) -> Side:
        row = {"epoch": 1, "steps": 4, "eval_top1": top1, "eval_loss": 1.0, "train_loss": 1.0, "lr": 0.1}
        rows = [row | {"seconds": 1.0, "epoch_seconds": 1.0}]
        return Side(name, name, "sgd", 0.1, 1, rows, chance=chance, images=images)

    def test_at_chance_there_is_nothing_to_compare(self) -> None:
        words = verdict((self.side("decorrelated", 20.5), self.side("plain", 12.0)))
        assert words == "plain (12.00 %): no better than guessing (10.00 %), so that there is nothing to compare."

    def test_an_interval_says_how_much_images_can_tell(self) -> None:
        close = verdict((self.side("decorrelated", 72.0), self.side("plain", 70.0)))
        assert (
            "ends 2.00 points above plain" in close and "(1000 images: +-3.98, which they cannot tell apart)" in close
        )
        far = verdict((self.side("decorrelated", 80.0), self.side("plain", 70.0)))
        assert "(1000 images: +-3.77)" in far
        unknown = verdict((self.side("decorrelated", 80.0, None, None), self.side("plain", 70.0, None, None)))
        assert "images" not in unknown

    def test_a_run_knows_its_chance(self, tmp_path: Path) -> None:
        run = train(tmp_path / "run", *DECOR, "--epochs", 1, "--compare", "--lr", 1e-6)
        assert "no better than guessing" in json.loads((run / "compare.json").read_text())["verdict"]


class TestFolder:
    def test_the_second_run_is_refused(self, tmp_path: Path) -> None:
        first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
        with first.held():
            with pytest.raises(UserError, match="another run is at work in"), second.held():
                pass
            with RunFolder(tmp_path / "other").held():
                pass
        with second.held():
            pass
        assert list((tmp_path / "run").iterdir()) == []

    def test_a_resume_removes_what_is_its_own_alone(self, two: Path, tmp_path: Path) -> None:
        shutil.copytree(two, tmp_path / "run")
        dead = tmp_path / "run" / ".unfinished-0123456789ab"
        dead.mkdir()
        (dead / ".tmpXyz").write_bytes(b"half")
        kept = [tmp_path / "run" / name for name in ("checkpoint-999.safetensors", ".tmp-mine", "notes.txt")]
        for file in kept:
            file.write_text("somebody else's")
        reset_accelerate()
        main(["--resume", str(tmp_path / "run"), "--epochs", "3", "--checkpoint-hist", "1"])
        assert not dead.exists() and all(file.read_text() == "somebody else's" for file in kept)
        assert len(list((tmp_path / "run").glob("checkpoint-[123].safetensors"))) == 1

    def test_files_follow_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            run = train(tmp_path / "run", "--epochs", 1)
        finally:
            os.umask(before)
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in run.iterdir()}
        assert set(modes.values()) == {"0o640"} and "last.safetensors" in modes, modes

    def test_a_finished_run_keeps_one_state(self, two: Path) -> None:
        assert sorted(file.name for file in two.glob("resume*")) == ["resume.pt"]
        digests = results(two)["sha256"]
        assert set(digests) == {"best.safetensors", "last.safetensors"} and all(len(d) == 64 for d in digests.values())

    def test_a_name_that_no_disk_takes_is_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="cannot make output folder"):
            train(tmp_path / ("x" * 300), "--epochs", 1)


def test_a_batch_of_one_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--batch-size 1 at 32 px leaves BatchNorm one value a channel"):
        train(tmp_path / "run", "--epochs", 1, "-b", 1)


def test_images_that_are_too_small_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not take images of"):
        train(tmp_path / "run", "--model", "vgg11", "--img-size", 8, "--epochs", 1)


def test_a_seed_that_no_generator_takes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be below 2"):
        train(tmp_path / "run", "--seed", 2**80)


def test_records_say_what_the_optimizer_and_the_engine_hold(two: Path) -> None:
    found = results(two)
    assert found["optimizer"]["name"] == "sgd" and found["decor"]["every"] == 3
    assert {group["momentum"] for group in found["optimizer"]["groups"]} == {0.9}
    assert sum(group["parameters"] for group in found["optimizer"]["groups"]) > 10


def test_a_state_knows_its_classes_and_settings(two: Path) -> None:
    state = read_resume(two / "resume.pt")
    assert state["label_names"] == [str(i) for i in range(10)]
    assert state["peak_lr"] == 0.05 and isinstance(state["options"], list)
