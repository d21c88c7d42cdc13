"""validate.py over folders of checkpoints; what it says of mistakes; larger images at test time."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_dataset
from torch import nn
from training_runs import DECOR, history, reset_accelerate, train

from timm_decor.errors import UserError
from timm_decor.training import build, validation
from timm_decor.training.data.digits import Digits
from timm_decor.training.data.libraries import TimmDataset
from timm_decor.training.seeing.mistakes import confusion

DIGITS = ("--dataset", "digits", "--device", "cpu", "-j", "0", "--split", "test[:70]")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two epochs with averaged weights, and beside it files that are no checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "both", *DECOR, "--epochs", 2, "--compare", "--model-ema", "--model-ema-decay", "0.5")
    return folder


def validated(*words: object) -> None:
    reset_accelerate()
    validation.main([*DIGITS, *map(str, words)])


class TestFolders:
    def test_a_row_for_each_checkpoint_the_best_first(self, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        capsys.readouterr()
        validated("--checkpoint", runs, "--results-file", tmp_path / "rows.md")
        captured = capsys.readouterr()
        rows = json.loads(captured.out)
        # last and checkpoint-2 are one file, best is checkpoint-1 or checkpoint-2: two files a side
        assert len(rows) == 4 and [row["top1"] for row in rows] == sorted((row["top1"] for row in rows), reverse=True)
        assert {row["checkpoint"].split("/")[1] for row in rows} == {"decorrelated", "plain"}
        for side in ("decorrelated", "plain"):
            expected = sorted(row["eval_loss"] for row in history(runs / "both" / side))
            found = sorted(row["loss"] for row in rows if f"/{side}/" in row["checkpoint"])
            assert found == pytest.approx(expected, abs=1e-5)
        lines = (tmp_path / "rows.md").read_text().splitlines()
        assert (
            len(lines) == 6
            and lines[0].startswith("| checkpoint | model | top1 |")
            and f"{rows[0]['loss']}" in lines[2]
        )
        assert captured.err.count("validate.py: both/") == 4

    def test_names_that_would_be_alike_are_paths(self, runs: Path):
        one, other = runs / "both" / "decorrelated", runs / "both" / "plain"
        for paths in ([one, other], [one / "last.safetensors", other / "last.safetensors"]):
            found = validation.find_checkpoints([str(path) for path in paths])
            assert all(name == path for name, path in found) and len({name for name, _ in found}) == len(found) >= 2
        (name, _), *_ = validation.find_checkpoints([str(one)])
        assert "/" not in name

    def test_averaged_weights_of_each(self, runs: Path, tmp_path: Path):
        validated("--checkpoint", runs, "--use-ema", "--results-file", tmp_path / "rows.json")
        rows = json.loads((tmp_path / "rows.json").read_text())
        expected = [row["ema_loss"] for side in ("decorrelated", "plain") for row in history(runs / "both" / side)]
        assert sorted(row["loss"] for row in rows) == pytest.approx(sorted(expected), abs=1e-5)

    def test_one_that_does_not_load_does_not_stop_the_others(
        self, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ):
        good = runs / "both" / "plain" / "last.safetensors"
        (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:1000])
        with pytest.raises(UserError, match="^1 of 2 checkpoints could not be evaluated: cut.safetensors"):
            validated("--checkpoint", tmp_path / "cut.safetensors", good, "--results-file", tmp_path / "rows.csv")
        rows = list(csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_text())))
        assert [row["checkpoint"] for row in rows] == ["last.safetensors"]
        assert "validate.py: cut.safetensors is left out: " in capsys.readouterr().err

    def test_what_is_no_checkpoint_is_not_looked_at(self, runs: Path, tmp_path: Path):
        names = [name for name, _ in validation.find_checkpoints([str(runs)])]
        assert names and not any(
            "resume" in name or "-ema" in name or name.endswith((".png", ".html")) for name in names
        )
        with pytest.raises(UserError, match="holds no checkpoints: files that end in .safetensors, .pth"):
            validation.find_checkpoints([str(tmp_path)])

    def test_pictures_are_of_one(self, runs: Path, tmp_path: Path):
        with pytest.raises(UserError, match="--worst-images: for one checkpoint, not several"):
            validated("--checkpoint", runs, "--worst-images", tmp_path / "w.png")


class TestMistakes:
    def test_the_files(self, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        checkpoint = runs / "both" / "plain" / "last.safetensors"
        capsys.readouterr()
        validated(
            "--checkpoint", checkpoint, "-b", 32,
            *("--confusion-matrix", tmp_path / "new" / "c.csv", "--worst-images", tmp_path / "w.png"),
        )  # fmt: skip
        result = json.loads(capsys.readouterr().out)
        with open(tmp_path / "new" / "c.csv", newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["label", *(f"predicted {digit}" for digit in range(10))]
        counts = np.array([[int(cell) for cell in row[1:]] for row in rows])
        assert counts.sum() == 70 and 100 * np.trace(counts) / 70 == pytest.approx(result["top1"], abs=1e-3)
        assert counts.sum(1).tolist() == [7] * 10, "rows are labels"
        for picture in (tmp_path / "new" / "c.png", tmp_path / "w.png"):
            with Image.open(picture) as image:
                assert min(image.size) > 300

    def test_what_was_seen_is_in_the_sources_order(self, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        kept = []
        monkeypatch.setattr(validation, "write_worst", lambda source, seen, names, path: kept.append((source, seen)))
        validated("--checkpoint", runs / "both/plain/last.safetensors", "-b", 32, "--worst-images", tmp_path / "w.png")
        source, seen = kept[0]
        assert seen[:, 0].tolist() == [source.label(i) for i in range(70)]
        assert (seen[:, 2] >= 0).all() and (seen[:, 3] >= 0.1 - 1e-6).all() and (seen[:, 3] <= 1).all()

    def test_counts(self):
        seen = np.array([[0, 1, 2.0, 0.5], [0, 1, 2.0, 0.5], [2, 2, 0.1, 0.9]])
        assert confusion(seen, 3).tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]

    def test_class_names(self, tmp_path: Path):
        for name in ("ant", "bee"):
            (tmp_path / name).mkdir()
            Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
        source = TimmDataset(create_dataset("", root=str(tmp_path), class_map={"ant": 1, "bee": 0}), "", "RGB")
        assert source.class_names == ["bee", "ant"] and Digits("test", "L").class_names[3] == "3"


def test_timms_weights_at_the_size_of_their_tests(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """As timm's validate.py; a checkpoint of train.py is evaluated as it says itself."""
    created = build.create

    def pretrained(*given: Any, **options: Any) -> Any:
        model = created(*given, **{**options, "pretrained": False})
        sizes = {"test_input_size": (3, 48, 48), "test_crop_pct": 1.0, "num_classes": 10}
        model.pretrained_cfg = {**model.pretrained_cfg, **sizes}
        return model

    monkeypatch.setattr(build, "create", pretrained)
    found = {}
    for words in ([], ["--use-train-size"], ["--img-size", "40"]):
        reset_accelerate()
        validated("--model", "test_resnet", "--num-classes", 10, *words)
        row = json.loads(capsys.readouterr().out)
        found[" ".join(words)] = row["img_size"], row["crop_pct"]
    its = timm.create_model("test_resnet").pretrained_cfg
    assert found == {
        "": (48, 1.0), "--use-train-size": (its["input_size"][-1], its["crop_pct"]), "--img-size 40": (40, 1.0)
    }  # fmt: skip


class TestLargerImages:
    def test_a_constant_image_is_classified_the_same(self):
        """Windows over a map that is the same everywhere pool to the same."""
        model = timm.create_model("test_resnet", num_classes=10).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.padding_mode = "replicate"  # no border to tell from the middle
                module._reversed_padding_repeated_twice = [p for p in module.padding[::-1] for _ in (0, 1)]
        small, large = torch.full((1, 3, 64, 64), 0.3), torch.full((1, 3, 96, 96), 0.3)
        with torch.no_grad():
            expected = model(small)
            pooled = validation.pooled_over_windows(model, (3, 64, 64), (3, 96, 96))
            assert torch.allclose(pooled(large), expected, rtol=1e-3, atol=1e-4)

    def test_as_a_command(self, runs: Path, capsys: pytest.CaptureFixture):
        words = ("--checkpoint", runs / "both/plain/last.safetensors", "--img-size", 64)
        capsys.readouterr()
        validated(*words, "--test-pool")
        pooled = json.loads(capsys.readouterr().out)
        assert pooled["crop_pct"] == 1, "as timm's validate.py: of the whole image"
        validated(*words, "--test-pool", "--crop-pct", "0.5")
        assert json.loads(capsys.readouterr().out)["loss"] == pooled["loss"]
        validated(*words)
        assert pooled["loss"] != json.loads(capsys.readouterr().out)["loss"] and pooled["img_size"] == 64

    @pytest.mark.parametrize(
        ("model", "size", "expected"),
        [
            ("test_resnet", 32, "is for images larger than training's 32 px: give --img-size"),
            ("test_vit", 160, "VisionTransformer does more with its last feature map"),
            ("test_convnext", 96, "ConvNeXt does more with its last feature map"),
        ],
    )
    def test_it_refuses_in_one_line(self, model: str, size: int, expected: str):
        trained = 160 if model == "test_vit" else 32
        made = timm.create_model(model, num_classes=10, **({"img_size": 160} if trained == 160 else {}))
        with pytest.raises(UserError) as error:
            validation.pooled_over_windows(made, (3, trained, trained), (3, size + (trained == 160) * 32, size + 32))
        assert expected in str(error.value)


def test_another_torch_files_weights(tmp_path: Path):
    weights = timm.create_model("test_resnet", num_classes=10).state_dict()
    torch.save(weights, tmp_path / "a.pth")
    save_file(weights, tmp_path / "b.safetensors")
    words = (
        "--checkpoint",
        tmp_path,
        "--model",
        "test_resnet",
        "--img-size",
        32,
        "--results-file",
        tmp_path / "r.json",
    )
    validated(*words)
    rows = json.loads((tmp_path / "r.json").read_text())
    assert len(rows) == 2 and rows[0]["loss"] == rows[1]["loss"]
