"""recipe_study: which runs it asks of train.py, and that one of them is gone on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import recipe_study
from training_runs import TINY, train

from study.script import accuracies, run_train
from timm_decor.errors import UserError
from timm_decor.training.run import parse

SCORES = {0.05: 60.0, 0.1: 61.0, 0.2: 62.0, 0.4: 61.5, 0.8: 50.0}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Parsed arguments of the runs that were asked for; plain SGD is best at 0.2."""
    found: list[Any] = []

    def fake(words: Sequence[str], folder: Path) -> dict[str, Any]:
        args = parse(words)
        found.append(args)
        folder.mkdir(parents=True)
        (folder / "summary.csv").write_text(f"epoch,eval_top1\n1,\n2,{SCORES.get(args.lr, 55.0)}\n")
        final = {"eval_top1": SCORES.get(args.lr, 55.0), "train_loss": 1.0, "steps": 20, "seconds": 3.0}
        return {"final": final}

    monkeypatch.setattr(recipe_study, "run_train", fake)
    return found


def test_it_tunes_plain_and_trains_both_at_its_rate(tmp_path: Path, asked: list[Any]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: decor_test_resnet\ndataset: parquet\nimg-size: 32\n")
    out = tmp_path / "out.json"
    words = ["-c", str(recipe), "--data-dir", "DATA", "--json", str(out), "--work", str(tmp_path / "work")]
    words += ["--opt", "sgd", "muon", "--epochs", "2", "4", "--tune-epochs", "2", "--", "--batch-size", "32"]
    recipe_study.main(words)
    tuning = [a for a in asked if a.train_split != "train"]
    assert {(a.train_split, a.val_split, a.model, a.epochs) for a in tuning} == {
        ("train[:90%]", "train[90%:]", "test_resnet", 2)
    }
    assert [a.lr for a in tuning if a.opt == "nesterov"] == [0.05, 0.1, 0.2, 0.4], (
        "grown where the best was at its edge"
    )
    rest = [(a.model, a.opt, a.lr, a.epochs) for a in asked if a.train_split == "train"]
    assert rest[:4] == [
        ("test_resnet", "nesterov", 0.2, 2),
        ("decor_test_resnet", "nesterov", 0.2, 2),
        ("test_resnet", "nesterov", 0.2, 4),
        ("decor_test_resnet", "nesterov", 0.2, 4),
    ]
    assert {model for model, opt, _, _ in rest if opt == "muon"} == {"test_resnet"}
    assert {a.batch_size for a in asked} == {32} and {a.seed for a in asked} == {0}
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert len(runs) == len(asked) and {run["measured_on"] for run in runs} == {"held-out", "test"}
    assert runs[0]["by_epoch"] == [60.0]
    before = len(asked)
    recipe_study.main(words)
    assert len(asked) == before, "what is there is not made again"


def test_a_recipe_without_a_model_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 2\n")
    with pytest.raises(UserError, match="names no model"):
        recipe_study.main(["-c", str(recipe), "--data-dir", "x", "--json", "y", "--work", "z"])


def test_a_run_is_gone_on_with(tmp_path: Path) -> None:
    first = json.loads((train(tmp_path / "run", "--epochs", 1) / "results.json").read_text())
    assert accuracies(tmp_path / "run", "eval_top1") == [first["final"]["eval_top1"]]
    assert run_train([*TINY, "--epochs", "2"], tmp_path / "run")["final"]["epoch"] == 2
    assert len(accuracies(tmp_path / "run", "eval_top1")) == 2
    with pytest.raises(UserError, match="train.py: .*unknown argument"):
        run_train([*TINY, "--epoch", "2"], tmp_path / "other")
