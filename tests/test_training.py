"""Training: fair twins, resuming, checkpoints, and the arguments that change how a model is trained."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from training_runs import DECOR, ROOT, TINY, created, drawn_reports, history, options, reset_accelerate, train, untimed

from timm_decor import DecorHandle
from timm_decor.digest import check_digest
from timm_decor.errors import UserError
from timm_decor.inference.weights import open_model
from timm_decor.reporting import AttachReport
from timm_decor.text import counted
from timm_decor.training import arm as arm_module
from timm_decor.training import run as run_module
from timm_decor.training import schedule
from timm_decor.training.adjust import weights_for_timm
from timm_decor.training.data.batches import Batches
from timm_decor.training.keeping import folder as folder_module
from timm_decor.training.keeping import resume
from timm_decor.training.options import CreateOptions, ImageOptions
from timm_decor.training.seeing.compare import Side, markdown, summary, verdict
from timm_decor.training.seeing.losswatch import NonFiniteLoss
from timm_decor.training.validation import main as validate


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def options_of_a_model() -> tuple[ImageOptions, CreateOptions]:
    """Those of a command line that says nothing."""
    return ImageOptions(*[None] * len(dataclasses.fields(ImageOptions))), CreateOptions(None, {}, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison: two decorrelated epochs, three plain ones at another learning rate."""
    folder = tmp_path_factory.mktemp("runs") / "both"
    return train(folder, *DECOR, "--epochs", 2, "--compare", "--compare-lr", 0.02, "--compare-epochs", 3)


class TestComparison:
    def test_taking_turns_changes_neither_side(self, run: Path, tmp_path: Path):
        alone = train(tmp_path / "plain", "--epochs", 3, "--lr", 0.02)
        assert untimed(history(run / "plain")) == untimed(history(alone))
        assert same(weights(run / "plain"), weights(alone))
        alone = train(tmp_path / "decorrelated", *DECOR, "--epochs", 2)
        assert untimed(history(run / "decorrelated")) == untimed(history(alone))
        assert same(weights(run / "decorrelated"), weights(alone))

    def test_the_sides_differ(self, run: Path):
        assert not same(weights(run / "plain"), weights(run / "decorrelated"))

    def test_both_start_from_the_same_weights(self, tmp_path: Path):
        run = train(tmp_path / "still", *DECOR, "--epochs", 1, "--lr", 0, "--compare")
        mine, twin = weights(run / "decorrelated"), weights(run / "plain")
        # the running statistics are those of the same images, too
        assert all(torch.allclose(mine[key], twin[key], atol=1e-6) for key in mine)

    def test_files(self, run: Path):
        assert (run / "compare.png").read_bytes().startswith(b"\x89PNG")
        table = (run / "compare.md").read_text()
        assert "| learning rate | 0.05 | 0.02 |" in table and "| epochs | 2 | 3 |" in table
        sides = json.loads((run / "compare.json").read_text())["sides"]
        assert [len(side["history"]) for side in sides] == [2, 3]
        assert [side["steps"] for side in sides] == [8, 12]

    def test_resuming_goes_on_with_both_sides(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        folder = tmp_path / "both"
        interrupt_after(monkeypatch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(folder, *DECOR, "--epochs", 2, "--compare", "--compare-lr", 0.02, "--compare-epochs", 3)
        monkeypatch.undo()
        train(folder, "--resume", folder, base=[])
        for side in ("plain", "decorrelated"):
            assert same(weights(run / side), weights(folder / side))

    def test_resuming_starts_the_side_that_had_not_begun(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        folder = tmp_path / "both"
        interrupt_after(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(folder, *DECOR, "--epochs", 2, "--compare", "--compare-lr", 0.02, "--compare-epochs", 3)
        monkeypatch.undo()
        assert not (folder / "plain" / "resume.pt").exists()
        train(folder, "--resume", folder, base=[])
        for side in ("plain", "decorrelated"):
            assert same(weights(run / side), weights(folder / side))

    @pytest.mark.parametrize("epochs", [1, 0], ids=["after an epoch", "at once"])
    def test_one_that_diverges_does_not_stop_the_other(
        self, epochs: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        poison_loss(monkeypatch, lambda arm: arm.handle is None and arm.epoch == epochs)
        folder = tmp_path / "both"
        with pytest.raises(UserError, match=f"^test_resnet: the loss is not finite in epoch {epochs + 1}"):
            train(folder, *DECOR, "--epochs", 2, "--compare", "--compare-lr", 0.02, "--compare-epochs", 3)
        assert same(weights(run / "decorrelated"), weights(folder / "decorrelated")), "the other is none the worse"
        results = json.loads((folder / "plain" / "results.json").read_text())
        assert "not finite" in results["failure"]
        assert (folder / "compare.png").exists() == bool(epochs), "no picture of nothing"
        if epochs:
            table = (folder / "compare.md").read_text()
            assert "| outcome | finished | diverged after epoch 1 of 3 |" in table
            assert "\ntest_resnet diverged after epoch 1 of 3: its figures are those up to there. " in table

    def test_figures(self):
        def side(name: str, accuracies: list[float], seconds: float) -> Side:
            rows = [
                {"epoch": i + 1, "steps": 10 * (i + 1), "epoch_seconds": seconds, "seconds": seconds * (i + 1)}
                | {"eval_top1": accuracy, "train_loss": 1.0, "eval_loss": 1.0}
                for i, accuracy in enumerate(accuracies)
            ]
            return Side(name, name, "sgd", 0.1, len(rows), rows)

        quick, slow = side("quick", [50, 71, 80], 3.0), side("slow", [40, 70, 65], 2.0)
        figures = summary(quick, slow)
        assert (figures["reach_epoch"], figures["reach_seconds"]) == (2, 6.0)
        assert (figures["best_top1"], figures["seconds_per_step"]) == (80, 0.3)
        assert summary(slow, quick)["reach_epoch"] is None and summary(slow, quick)["best_top1"] == 70
        assert "| time per step, ms (median epoch) | 300.0 | 200.0 |" in markdown((quick, slow))
        assert "| as accurate as the other's best after epoch | 2 | - |" in markdown((quick, slow))
        words = verdict((quick, slow))
        assert words.startswith("quick (learning rate 0.1) ends 10.00 points above slow (learning rate 0.1) in")
        assert "1.50 times as long" in words and "after epoch 2 of 3" in words


def interrupt_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """Let training be interrupted when `epochs` epochs of all arms together are done."""
    train_epoch, done = arm_module.Arm.train_epoch, []

    def interrupted(self: arm_module.Arm) -> None:
        if len(done) == epochs:
            raise KeyboardInterrupt
        done.append(self)
        return train_epoch(self)

    monkeypatch.setattr(arm_module.Arm, "train_epoch", interrupted)


def poison_loss(monkeypatch: pytest.MonkeyPatch, when: Callable[[arm_module.Arm], bool]) -> None:
    """Let the training loss of the arms and epochs that `when` chooses be NaN."""
    train_epoch = arm_module.Arm.train_epoch

    def poisoned(self: arm_module.Arm) -> None:
        if when(self):
            with monkeypatch.context() as patch:
                patch.setattr(self, "_loss", lambda output, labels: output.sum() * math.nan)
                return train_epoch(self)
        return train_epoch(self)

    monkeypatch.setattr(arm_module.Arm, "train_epoch", poisoned)


class TestResume:
    @pytest.mark.parametrize(
        "words",
        [
            [*DECOR, "--drop", "0.2", "--mixup", "0.4"],
            # a learning rate at which the accuracy does not move, so that plateau's schedule does
            shlex.split("--lr 1e-5 --model-ema --model-ema-decay 0.9 --sched plateau --patience-epochs 0"),
        ],
        ids=["decorrelated", "ema-plateau"],
    )
    @pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
    def test_it_ends_where_an_uninterrupted_run_ends(
        self, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        whole = train(tmp_path / "whole", *words, "--epochs", 4)
        interrupt_after(monkeypatch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", *words, "--epochs", 4)
        monkeypatch.undo()
        train(tmp_path / "parts", "--resume", tmp_path / "parts", base=[])
        assert untimed(history(tmp_path / "parts")) == untimed(history(whole))
        assert same(weights(tmp_path / "parts"), weights(whole))
        if "--model-ema" in words:
            assert history(whole)[-1]["lr"] < history(whole)[0]["lr"], "the schedule did something to restore"
            assert same(weights(tmp_path / "parts", "last-ema"), weights(whole, "last-ema"))

    def test_of_another_model_or_of_nothing(self, tmp_path: Path):
        run = train(tmp_path / "run", "--epochs", 1)
        with pytest.raises(UserError, match="does not fit resnet10t: "):
            train(tmp_path / "run", "--resume", run, "--model", "resnet10t")
        with pytest.raises(UserError, match="was trained plain: leave out --decor"):
            train(tmp_path / "run", "--resume", run, *DECOR)
        with pytest.raises(UserError, match="trained other parameters, or grouped them otherwise"):
            train(tmp_path / "run", "--resume", run, "--weight-decay", 0)
        with pytest.raises(UserError, match="nothing to resume"):
            train(tmp_path / "run", "--resume", tmp_path / "nope")
        (run / "resume.pt").write_bytes(b"PK nonsense")
        with pytest.raises(UserError, match="cannot resume from"):
            train(tmp_path / "run", "--resume", run)

    def test_a_refused_one_leaves_the_arguments_alone(self, tmp_path: Path):
        run = train(tmp_path / "run", "--epochs", 1)
        before = (run / "args.yaml").read_text()
        with pytest.raises(UserError, match="does not fit resnet10t: "):
            train(tmp_path / "run", "--resume", run, "--model", "resnet10t", "--epochs", 2)
        assert (run / "args.yaml").read_text() == before


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs; nothing may write into it."""
    return train(tmp_path_factory.mktemp("runs") / "begun", "--epochs", 3, "--sched", "constant")


class TestChangesOnTheWay:
    """A run that goes on with other arguments says of itself what is true."""

    @staticmethod
    def gone_on(begun: Path, tmp_path: Path, *words: object) -> Path:
        shutil.copytree(begun, tmp_path / "run")
        return train(tmp_path / "run", "--resume", tmp_path / "run", "--epochs", 5, *words, base=[])

    def with_another_best(self, begun: Path, to: Path) -> int:
        """A copy of the run in which another epoch than its best has the lowest loss; which one."""
        state = torch.load(begun / "resume.pt", weights_only=True)
        other = 1 + self.epoch(begun, "best") % 3
        for row in state["history"]:
            row["eval_loss"] = 0.001 if row["epoch"] == other else 0.5
        shutil.copytree(begun, to)
        torch.save(state, to / "resume.pt")
        results = json.loads((begun / "results.json").read_text()) | {"final": state["history"][-1]}
        (to / "results.json").write_text(json.dumps(results))
        return other

    @staticmethod
    def epoch(run: Path, name: str) -> int:
        with safe_open(run / f"{name}.safetensors", "pt") as file:
            return int(file.metadata()["epoch"])

    def test_an_average_from_now_on_leaves_the_earlier_checkpoints(self, begun: Path, tmp_path: Path):
        run = self.gone_on(begun, tmp_path, "--model-ema", "--model-ema-decay", "0.5")
        names = {file.stem for file in run.glob("checkpoint-*")}
        assert names == {*(f"checkpoint-{i}" for i in range(1, 6)), "checkpoint-4-ema", "checkpoint-5-ema"}
        best = json.loads((run / "results.json").read_text())["best"]
        assert best == max(json.loads(json.dumps(history(run)[3:])), key=lambda row: row["ema_top1"])
        assert self.epoch(run, "best-ema") == self.epoch(run, "best") == best["epoch"]

    def test_without_an_average_from_now_on_none_stays_behind(self, tmp_path: Path):
        first = train(tmp_path / "first", "--epochs", 2, "--sched", "constant", "--model-ema")
        assert (first / "last-ema.safetensors").is_file()
        run = self.gone_on(first, tmp_path, "--no-model-ema")
        names = {file.stem for file in run.glob("*-ema.safetensors")}
        assert names <= {"checkpoint-1-ema", "checkpoint-2-ema", "best-ema"}
        best = max(history(run), key=lambda row: row["eval_top1"])["epoch"]
        assert self.epoch(run, "best") == best == json.loads((run / "results.json").read_text())["best"]["epoch"]
        assert ("best-ema" in names) == (best <= 2)

    def test_best_is_what_the_metric_of_now_says(self, begun: Path, tmp_path: Path):
        other = self.with_another_best(begun, tmp_path / "made")
        run = self.gone_on(tmp_path / "made", tmp_path, "--eval-metric", "loss")
        assert self.epoch(run, "best") == json.loads((run / "results.json").read_text())["best"]["epoch"] == other
        (tmp_path / "made" / f"checkpoint-{other}.safetensors").unlink()
        back = train(tmp_path / "run", "--resume", tmp_path / "run", "--epochs", 6, "--eval-metric", "top1", base=[])
        assert self.epoch(back, "best") == json.loads((back / "results.json").read_text())["best"]["epoch"]
        shutil.rmtree(tmp_path / "run")
        said = f"by eval_loss epoch {other} was the best, and checkpoint-{other} was not kept: go on"
        with pytest.raises(UserError, match=said):
            self.gone_on(tmp_path / "made", tmp_path, "--eval-metric", "loss")

    def test_they_are_kept_in_results(self, begun: Path, tmp_path: Path):
        run = self.gone_on(begun, tmp_path, "--lr", "0.01", "-j", "0", "--log-interval", "3")
        changed = {"epochs": ["3", "5"], "lr": ["0.05", "0.01"]}
        assert json.loads((run / "results.json").read_text())["changed"] == [{"steps": 12, "changed": changed}]
        assert json.loads((begun / "results.json").read_text())["changed"] == []

    def test_each_machine_is_kept_in_results(self, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """And not the last one alone: the time would be told as that of another machine."""
        first = json.loads((begun / "results.json").read_text())
        here = {"machine": first["machine"], "versions": first["versions"]}
        assert first["starts"] == [{"steps": 0, **here}]
        there = {**first["machine"], "cpu": "another", "torch_threads": 7}
        monkeypatch.setattr("timm_decor.training.run.machine", lambda accelerator: {**there, "workers": None})
        with drawn_reports():
            run = self.gone_on(begun, tmp_path)
        results = json.loads((run / "results.json").read_text())
        assert results["machine"] == there
        assert results["starts"] == [
            {"steps": 0, **here},
            {"steps": 12, "machine": there, "versions": here["versions"]},
        ]
        words = f"{here['machine']['cpu']} ({counted(here['machine']['torch_threads'], 'thread')}, 60 % of the updates)"
        assert f"<td>{words}, then another (7 threads)</td>" in (run / "report.html").read_text()

    def test_what_was_never_trained_with_is_no_change(self, begun: Path, tmp_path: Path):
        shutil.copytree(begun, tmp_path / "run")
        train(tmp_path / "run", "--resume", tmp_path / "run", "--smoothing", "0.2", base=[])  # it is finished
        assert not (tmp_path / "run" / "changes.json").exists()
        folder = folder_module.RunFolder(tmp_path / "made")
        folder.note_changes(4, {"lr": ("0.1", "0.2"), "drop": ("0.0", "0.1")})
        folder.note_changes(4, {"lr": ("0.2", "0.1"), "drop": ("0.1", "0.3")})
        assert folder.changes() == [{"steps": 4, "changed": {"drop": ["0.0", "0.3"]}}]
        folder.note_changes(8, {"lr": ("0.1", "0.4")})
        folder.note_changes(6, {})  # from an earlier state
        assert folder.changes() == [{"steps": 4, "changed": {"drop": ["0.0", "0.3"]}}]

    def test_they_hold_no_place(self, begun: Path, tmp_path: Path):
        shutil.copytree(begun, tmp_path / "run")
        args = yaml.safe_load((begun / "args.yaml").read_text())
        for dataset in ("hfds//data/old set/cats", "hfds//mnt/new set/dogs"):
            (tmp_path / "run" / "args.yaml").write_text(yaml.safe_dump({**args, "dataset": dataset}))
            changed = resume._changed(
                {**args, "dataset": "/home/me/my files/x"}, folder_module.RunFolder(tmp_path / "run")
            )
            assert list(changed) == ["dataset"]
            assert [resume._text(value) for value in changed["dataset"]] == [
                f"hfds/.../{dataset.rpartition('/')[2]}", ".../x"
            ]  # fmt: skip

    def test_a_finished_run_is_left_alone(self, begun: Path, tmp_path: Path):
        """Its results.json has the digests of its files."""
        self.with_another_best(begun, tmp_path / "run")
        train(tmp_path / "run", "--resume", tmp_path / "run", "--eval-metric", "loss", base=[])
        assert self.epoch(tmp_path / "run", "best") == self.epoch(begun, "best")
        check_digest(tmp_path / "run" / "best.safetensors")


class TestRunFolders:
    def test_of_a_refused_run_nothing_stays(self, tmp_path: Path):
        both = ["--compare", *DECOR, "--eval-metric", "top5", "--num-classes", 3]
        for words in (["--opt-kwargs", "nonsense=1"], both, ["--compare", *DECOR, "--opt-kwargs", "nonsense=1"]):
            with pytest.raises(UserError):
                train(tmp_path / "run", "--epochs", 1, *words)
            assert not (tmp_path / "run").exists()
        (tmp_path / "run").mkdir()
        with pytest.raises(UserError):
            train(tmp_path / "run", "--epochs", 1, "--opt-kwargs", "nonsense=1")
        assert (tmp_path / "run").is_dir()  # somebody made it

    def test_of_a_refused_resume_no_new_folder_stays(self, tmp_path: Path):
        """Of a comparison's one side, with the recipe of both."""
        run = train(tmp_path / "run", "--epochs", 1, "--compare", *DECOR)
        shutil.copy(run / "args.yaml", run / "decorrelated")
        names = {path.name for path in (run / "decorrelated").iterdir()}
        with pytest.raises(UserError, match="nothing to resume"):
            train(run / "decorrelated", "--resume", run / "decorrelated", "--epochs", 2, base=[])
        assert {path.name for path in (run / "decorrelated").iterdir()} == names

    def test_sizes_go_on_where_they_were(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        words = [*DECOR, "--progressive-size", "16:0.67,32:0.33", "--epochs", 3]
        whole = train(tmp_path / "whole", *words)
        assert "training images: 16 px, 32 px from epoch 3 on" in capsys.readouterr().out
        parts = tmp_path / "parts"
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 2)
            with pytest.raises(KeyboardInterrupt):
                train(parts, *words)
        train(parts, "--resume", parts, base=[])
        assert untimed(history(parts)) == untimed(history(whole))
        assert same(weights(parts), weights(whole))

    @pytest.mark.parametrize("file", ["resume.pt", "summary.csv", "plain/resume.pt", "decorrelated/summary.csv"])
    def test_a_second_run_into_one_is_refused(self, file: str, tmp_path: Path):
        run = tmp_path / "run"
        (run / file).parent.mkdir(parents=True)
        (run / file).write_text("earlier")
        with pytest.raises(UserError) as error:
            train(run, "--epochs", 1)
        expected = f"{run} holds a run already: go on with it by --resume {run}, or take another --experiment"
        assert str(error.value) == expected
        assert [path for path in run.rglob("*") if path.is_file()] == [run / file]

    def test_runs_without_a_name_in_the_same_second(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(run_module.time, "strftime", lambda *_: "now")
        for _ in range(3):
            reset_accelerate()
            run_module.main([*TINY, "--epochs", "1", "--output", str(tmp_path / "new" / "demo")])
        names = {path.parent.name for path in tmp_path.glob("new/demo/*/summary.csv")}
        assert names == {"now-test_resnet-32", "now-test_resnet-32-2", "now-test_resnet-32-3"}


class TestCheckpoints:
    @pytest.mark.parametrize("eps", ["0.3", "1e-7"])
    def test_another_eps_begins_with_the_function_of_the_weights(self, eps: str, tmp_path: Path):
        run = train(tmp_path / "run", "--epochs", 1)
        file, x = run / "last.safetensors", torch.rand(4, 3, 32, 32)
        plain = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(file)).eval()
        again = created(options("--initial-checkpoint", file, "--bn-eps", eps)).eval()
        assert torch.allclose(again(x), plain(x), atol=1e-5)
        assert {m.eps for m in again.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {float(eps)}
        stored = weights_for_timm(again, again.state_dict())
        assert all(torch.allclose(stored[key], value, atol=1e-6) for key, value in load_file(file).items())
        fresh = created(options("--bn-eps", eps))
        assert all(bool((m.running_var == 1).all()) for m in fresh.modules() if isinstance(m, torch.nn.BatchNorm2d))

    @pytest.mark.parametrize(
        ("words", "average"),
        [("--gp max", ""), ("--bn-eps 0.3", ""), ("--bn-eps 0.3 --model-ema --model-ema-decay 0.5", "-ema")],
    )
    def test_what_changes_the_model_is_in_them(self, words: str, average: str, tmp_path: Path):
        """validate.py, predict and export need no arguments, and timm only what it can say itself."""
        run = train(tmp_path / "run", "--epochs", 2, *words.split())
        kind = "ema" if average else "eval"
        validate(
            ["--checkpoint", str(run / f"last{average}.safetensors"), "--dataset", "digits", "--split", "test[:70]"]
            + ["--device", "cpu", "-j", "0", "--results-file", str(tmp_path / "row.json")]
        )
        row, last = json.loads((tmp_path / "row.json").read_text()), history(run)[-1]
        assert row["top1"] == pytest.approx(last[f"{kind}_top1"], abs=1e-3)
        assert row["loss"] == pytest.approx(last[f"{kind}_loss"], abs=1e-4)
        opened = open_model(str(run / f"last{average}.safetensors"), None, False, *options_of_a_model())
        pool = {"global_pool": "max"} if "--gp" in words else {}
        assert opened.model_kwargs == pool
        timms = timm.create_model(
            "test_resnet", num_classes=10, checkpoint_path=str(run / f"last{average}.safetensors"), **pool
        )
        x = torch.rand(4, 3, 32, 32)
        assert torch.allclose(timms.eval()(x), opened.model.eval()(x), atol=1e-6)

    def test_the_plain_architecture_loads_them(self, tmp_path: Path):
        run = train(tmp_path / "run", *DECOR, "--epochs", 1, "--channels-last")
        model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(run / "best.safetensors"))
        assert same(model.state_dict(), weights(run))
        with safe_open(run / "last.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["architecture"] == "test_resnet" and metadata["epoch"] == "1"

    def test_the_best_ones_are_kept(self, tmp_path: Path):
        run = train(tmp_path / "run", "--epochs", 4, "--checkpoint-hist", 2, "--eval-metric", "loss")
        ranked = sorted(history(run), key=lambda row: row["eval_loss"])
        kept = {int(file.stem.split("-")[1]) for file in run.glob("checkpoint-*")}
        assert kept == {int(row["epoch"]) for row in ranked[:2]}
        with safe_open(run / "best.safetensors", "pt") as file:
            assert int(file.metadata()["epoch"]) == ranked[0]["epoch"]
        assert not list(run.glob(".*")), "no unfinished file stays behind"

    def test_a_non_finite_loss_stops_and_keeps_the_last_good_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        getitems = Batches.__getitems__

        def poisoned(self: Batches, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            images, labels = getitems(self, indices)
            return (images * math.nan if int(self._epoch) == 1 else images), labels

        monkeypatch.setattr(Batches, "__getitems__", poisoned)
        with pytest.raises(UserError, match="loss is not finite in epoch 2, step 5"):
            train(tmp_path / "run", *DECOR, "--epochs", 3)
        with safe_open(tmp_path / "run" / "last.safetensors", "pt") as file:
            assert file.metadata()["epoch"] == "1"
        assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())

    @pytest.mark.parametrize("what", ["weight conv1.0.weight", "eval loss"])
    def test_a_last_step_into_nan_keeps_the_last_good_one(
        self, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        evaluate = arm_module.Arm.evaluate

        def poisoned(self: arm_module.Arm, model: torch.nn.Module) -> arm_module.Metrics:
            metrics = evaluate(self, model)
            if self.epoch == 1 and what == "eval loss":
                return dataclasses.replace(metrics, loss=math.nan)
            if self.epoch == 1:
                model.get_parameter("conv1.0.weight").data[0] = math.inf
            return metrics

        monkeypatch.setattr(arm_module.Arm, "evaluate", poisoned)
        with pytest.raises(NonFiniteLoss, match=f"the {what} is not finite in epoch 2, step 8"):
            train(tmp_path / "run", "--epochs", 3)
        for name in ("last", "best"):
            with safe_open(tmp_path / "run" / f"{name}.safetensors", "pt") as file:
                assert file.metadata()["epoch"] == "1"
        assert len(history(tmp_path / "run")) == 1

    def test_nan_is_never_the_best(self):
        arm = object.__new__(arm_module.Arm)
        arm.ema, arm.options = None, options("--eval-metric", "loss")
        arm.history = [{"epoch": i + 1, "eval_loss": loss} for i, loss in enumerate([math.nan, 2.0, 1.0, math.nan])]
        assert arm.best == arm.history[2] and [row["epoch"] for row in arm.ranked] == [3, 2]

    def test_a_full_disk_is_one_line_and_keeps_the_earlier_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        folder = folder_module.RunFolder(tmp_path)
        folder.write_weights("last", {"a": torch.ones(1)}, {})

        def full(tensors: dict, file: Path, metadata: dict) -> None:
            file.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device")

        monkeypatch.setattr(folder_module, "save_file", full)
        with pytest.raises(UserError, match=r"cannot write .*last\.safetensors: I/O error: No space left on device"):
            folder.write_weights("last", {"a": torch.zeros(1)}, {})
        assert same(weights(tmp_path), {"a": torch.ones(1)})

    def test_they_name_the_architecture_without_a_tag(self):
        model = torch.nn.Module()
        model.num_classes, model.pretrained_cfg = 2, {"architecture": "resnet34"}
        assert run_module._metadata("decor_resnet18.a1_in1k", {}, model, {}, [])["architecture"] == "resnet18"
        # where it came from: the name that timm makes it by is another
        assert run_module._metadata("hf-hub:me/some_name", {}, model, {}, ["a", "b"]) | {"data_config": ""} == {
            **{"architecture": "resnet34", "num_classes": "2", "data_config": "", "model_kwargs": "{}"},
            "label_names": '["a", "b"]',
        }

    def test_what_stayed_plain_and_what_was_skipped_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ):
        report = DecorHandle.report

        def skipped(self: DecorHandle, **options: bool) -> AttachReport:
            done = report(self, **options)
            return dataclasses.replace(done, rows=(dataclasses.replace(done.rows[0], skips=1), *done.rows[1:]))

        monkeypatch.setattr(DecorHandle, "report", skipped)
        run = train(tmp_path / "run", *DECOR, "--epochs", 1, "--decor-max-dim", 100)
        out = capsys.readouterr().out.replace("\n    ", " ")  # lines of 80 columns
        assert " left plain; R takes " in out and re.search(r"^  \S+, .*: .*100", out, re.MULTILINE)
        results = json.loads((run / "results.json").read_text())
        assert results["skips"] == results["layers"][0]["skips"] == 1
        assert results["refreshes"] == sum(row["refreshes"] for row in results["layers"]) > 0
        assert f"; 1 of {results['refreshes'] + 1} refreshes of R skipped" in " ".join(out.split())

    def test_results_do_not_need_a_report(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def fails(self: DecorHandle, **options: bool) -> AttachReport:
            raise torch.linalg.LinAlgError("did not converge")

        monkeypatch.setattr(DecorHandle, "report", fails)
        run = train(tmp_path / "run", *DECOR, "--epochs", 1)
        results = json.loads((run / "results.json").read_text())
        assert results["final"]["epoch"] == 1 and results["mean_correlation"] is results["skips"] is None

    def test_results_name_no_place_on_this_machine(self, tmp_path: Path):
        run = train(tmp_path / "run", "--epochs", 1)
        results = json.loads((run / "results.json").read_text())
        assert str(tmp_path) not in json.dumps(results)
        assert results["final"]["steps"] == 4 and set(results["versions"]) >= {"torch", "timm", "timm_decor"}


class TestArguments:
    def test_schedule_on_updates(self, tmp_path: Path):
        run = train(tmp_path / "run", "--epochs", 4, "--sched", "poly", "--decay-rate", 1, "--warmup-epochs", 0.5)
        rates = [row["lr"] for row in history(run)]
        # 16 updates, the last of an epoch being number 4 k - 1: 2 of warm-up, then linear decay to 0
        assert rates == pytest.approx([0.05 * (1 - n / 16) for n in (3, 7, 11, 15)])

    def test_warm_up_stable_decay(self, tmp_path: Path):
        words = ("--epochs", 4, "--sched", "wsd", "--decay-epochs", 0.5, "--lr-decay-fn", "linear")
        rates = [row["lr"] for row in history(train(tmp_path / "run", *words, "--warmup-epochs", 1))]
        # 16 updates: 4 of warm-up, 6 at the rate, 6 of linear decay to 0; the last of an epoch is number 4 k - 1
        assert rates == pytest.approx([1e-5 + 3 / 4 * (0.05 - 1e-5), 0.05, 0.05 * 5 / 6, 0.05 * 1 / 6])

    def test_a_schedule_that_timm_does_not_know_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def of_before(optimizer: torch.optim.Optimizer, num_epochs: int, **_: Any) -> tuple[None, int]:
            return None, num_epochs  # as timm 1.0.30 does

        monkeypatch.setattr(schedule, "create_scheduler_v2", of_before)
        with pytest.raises(UserError, match=r"^timm [\d.]+ has no --sched constant"):
            train(tmp_path / "run", "--epochs", 1, "--sched", "constant")
        train(tmp_path / "none", "--epochs", 1, "--sched", "none")

    def test_learning_rate_from_the_batch_size(self, tmp_path: Path):
        words = ("--epochs", 1, "--sched", "none", "--lr-base", 0.1)
        base = [word for i, word in enumerate(TINY) if "--lr" not in (word, TINY[i - 1])]
        assert history(train(tmp_path / "a", *words, base=base))[0]["lr"] == pytest.approx(0.1 * 32 / 256)
        words += ("--opt", "adamw", "--grad-accum-steps", 2)
        assert history(train(tmp_path / "b", *words, base=base))[0]["lr"] == pytest.approx(0.1 * 0.5)

    @pytest.mark.parametrize(("batch_size", "steps"), [(64, 2), (128, 8)], ids=["all full", "fewer batches than steps"])
    def test_gradient_accumulation_equals_the_larger_batch(self, batch_size: int, steps: int, tmp_path: Path):
        words = ("--model", "test_vit", "--model-kwargs", "img_size=32", "--no-aug", "--epochs", 2)
        whole = train(tmp_path / "whole", *words, "-b", batch_size)
        parts = train(tmp_path / "parts", *words, "-b", 32, "--grad-accum-steps", steps)
        updates = 128 // batch_size
        expected = [updates, 2 * updates]
        assert [row["steps"] for row in history(parts)] == [row["steps"] for row in history(whole)] == expected
        a, b = weights(whole), weights(parts)
        assert all(torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-5) for key in a)

    def test_clipping_bounds_the_step(self, tmp_path: Path):
        still = train(tmp_path / "still", "--epochs", 1, "--lr", 0)
        words = ("--epochs", 1, "--sched", "none", "--lr", 1, "--opt", "momentum", "--momentum", 0)
        words += ("--weight-decay", 0, "--clip-grad", 1e-3)
        moved = train(tmp_path / "moved", *words)
        names = [name for name, _ in timm.create_model("test_resnet", num_classes=10).named_parameters()]
        a, b = weights(still), weights(moved)
        distance = math.sqrt(sum(float((a[name] - b[name]).square().sum()) for name in names))
        assert 1e-4 < distance <= 4 * 1e-3 * 1.01, "four updates of length 1e-3 at most"

    def test_ema(self, tmp_path: Path):
        words = ("--epochs", 1, "--model-ema", "--model-ema-decay")
        kept = train(tmp_path / "a", *words, 0)
        assert same(weights(kept, "last-ema"), weights(kept))
        run = train(tmp_path / "b", *words, 0.9)
        assert not same(weights(run, "last-ema"), weights(run))
        row = history(run)[0]
        assert row["ema_loss"] != row["eval_loss"]

    def test_losses(self, tmp_path: Path):
        others = ["--mixup", "0.5", "--bce-loss"], ["--bce-loss"], ["--smoothing", "0.1"]
        losses = [
            history(train(tmp_path / str(number), "--epochs", 1, *words))[0]["train_loss"]
            for number, words in enumerate(([], *others))
        ]
        assert all(map(math.isfinite, losses)) and min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-3

    def test_mixed_precision(self, tmp_path: Path):
        run = train(tmp_path / "amp", *DECOR, "--epochs", 1, "--amp", "--amp-dtype", "bfloat16")
        full = train(tmp_path / "full", *DECOR, "--epochs", 1)
        assert all(value.dtype == torch.float32 for value in weights(run).values() if value.is_floating_point())
        a, b = history(run)[0]["train_loss"], history(full)[0]["train_loss"]
        assert a != b and a == pytest.approx(b, rel=0.1)

    def test_val_interval(self, tmp_path: Path):
        run = train(tmp_path / "run", "--epochs", 3, "--val-interval", 2)
        assert ["eval_top1" in row for row in history(run)] == [False, True, True]

    def test_one_channel(self, tmp_path: Path):
        run = train(tmp_path / "run", "--epochs", 1, "--in-chans", 1)
        assert weights(run)["conv1.0.weight"].shape[1] == 1


def test_it_learns(tmp_path: Path):
    words = ["--train-split", "train[:512]", "--epochs", "4", "--lr", "0.1"]
    assert history(train(tmp_path / "run", *DECOR, *words))[-1]["eval_top1"] > 60


def test_two_processes(tmp_path: Path):
    """The batches are shared out, evaluation counts every image once, and one process writes what both agree on."""
    arguments = [
        *TINY,
        *DECOR,
        "--compare",
        "--epochs",
        "2",
        "--lr",
        "0.2",
        "--output",
        str(tmp_path),
        "--experiment",
        "run",
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" 2/2: loss") == 2, "once for each twin"
    for side in ("decorrelated", "plain"):
        rows = history(tmp_path / "run" / side)
        assert [row["steps"] for row in rows] == [2, 4], "128 images in batches of 2 x 32"
        checkpoint = tmp_path / "run" / side / "last.safetensors"
        reset_accelerate()
        words = f"--dataset digits --split test[:70] --device cpu -j 0 -b 32 --checkpoint {checkpoint}"
        validate([*words.split(), "--results-file", str(tmp_path / "r.json"), "--results-format", "json"])
        result = json.loads((tmp_path / "r.json").read_text())
        assert result["loss"] == pytest.approx(rows[-1]["eval_loss"], abs=2e-6)
        assert result["top1"] == pytest.approx(rows[-1]["eval_top1"], abs=1e-3)
