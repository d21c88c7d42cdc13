"""timm-decor predict: images by files, folders and wildcards; tables, files and pictures; what cannot be read."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
from PIL import Image
from pyarrow import parquet
from training_runs import reset_accelerate, train

from timm_decor.errors import UserError
from timm_decor.inference import predict, weights
from timm_decor.inference.files import BROKEN, FINE, Files, find_images
from timm_decor.training.data.digits import Digits
from timm_decor.training.keeping.metadata import CheckpointMetadata
from timm_decor.training.validation import main as validate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "run", "--epochs", 1, "--decor", "--decor-every", 3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five digits, two of them below another folder, and a file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    digits = Digits("test[:5]", "RGB")
    for index in range(5):
        digits.image(index).save(folder / ("sub" if index > 2 else "") / f"{index}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def register_model_as(name: str) -> None:
    """test_resnet by another name."""

    def entry(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
        return timm.create_model("test_resnet", pretrained=pretrained, **kwargs)

    entry.__name__, entry.__module__ = name, __name__
    timm.models.register_model(entry)


def call(*words: object) -> None:
    reset_accelerate()
    predict.main([*map(str, words), "--device", "cpu", "-j", "0"], "timm-decor predict")


class TestImages:
    def test_folders_wildcards_and_files_each_once(self, photos: Path):
        names = [str(photos / name) for name in ("0.png", "1.png", "2.png", "sub/3.png", "sub/4.png")]
        assert find_images([str(photos)]) == names
        mixed = find_images([f"{photos}/sub/*", str(photos / "1.png"), f"{photos}/**"])
        assert mixed == [*names[3:], names[1], names[0], names[2]]
        assert find_images([str(photos / "notes.txt")]) == [str(photos / "notes.txt")], "it was named"

    @pytest.mark.parametrize("path", ["no.png", "no/*.png", "empty"])
    def test_nothing_there(self, path: str, tmp_path: Path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="no file or folder|: no images"):
            find_images([str(tmp_path / path)])

    def test_a_broken_one_is_labelled(self, photos: Path):
        files = Files([str(photos / "0.png"), str(photos / "notes.txt")], "L")
        for index, state in enumerate((FINE, BROKEN)):
            assert files.image(index).mode == "L" and files.label(index) == state
        assert "cannot decode image" in files.why_broken(1) and "notes.txt" in files.why_broken(1)


def test_the_same_as_the_model_says(run: Path, photos: Path, tmp_path: Path):
    call(run, photos, "--output", tmp_path / "out.jsonl", "--top", 3, "-b", 2)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    metadata = CheckpointMetadata.read(run / "best.safetensors")
    assert metadata is not None and [Path(row["path"]).name for row in rows] == [f"{i}.png" for i in range(5)]
    model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(run / "best.safetensors")).eval()
    transform = timm.data.create_transform(**metadata.data_config)
    for row in rows:
        x = transform(Image.open(row["path"]).convert("RGB"))
        with torch.no_grad():
            top = model(x[None]).softmax(1)[0].topk(3)
        assert row["labels"] == top.indices.tolist()
        assert row["probabilities"] == pytest.approx(top.values.tolist(), abs=1e-3)
        assert row["names"] == [(metadata.label_names or [str(i) for i in range(10)])[i] for i in row["labels"]]


def test_emulated_bfloat16_is_said(
    run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    call(run, photos, "--amp", "--amp-dtype", "bfloat16")
    captured = capsys.readouterr()
    assert "emulated" in captured.err and "emulated" not in captured.out


def test_the_launchers_precision_is_followed(
    run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    call(run, photos)
    assert "emulated" in capsys.readouterr().err
    reset_accelerate()
    words = ["--checkpoint", str(run / "last.safetensors"), "--dataset", "digits", "--split", "test[:70]"]
    validate([*words, "--device", "cpu", "-j", "0"])
    assert "emulated" in capsys.readouterr().err
    call(run, photos, "--no-amp")
    said = capsys.readouterr().err
    assert (
        "emulated" not in said and "accelerate's mixed precision bf16 is not followed: this run says --no-amp" in said
    )


def test_a_folders_best_is_what_was_picked(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """By the averaged weights' accuracy, where there are any."""
    run = train(tmp_path / "run", "--epochs", 1, "--model-ema", "--model-ema-decay", "0.9")
    capsys.readouterr()
    said = []
    for words in ([run], [run, "--use-ema"], [run, "--no-use-ema"], [run / "best.safetensors"]):
        call(*words, photos)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2] == said[3]


def test_weights_that_are_taken_for_another_model_are_told_of(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    register_model_as("alias_of_test_resnet")
    words = [run / "last.safetensors", photos, "--model", "alias_of_test_resnet", "--num-classes", 10]
    line = "is of test_resnet, not alias_of_test_resnet: its data configuration and number of classes are not used"
    call(*words, "--img-size", 32)
    assert line in capsys.readouterr().err
    call(run / "last.safetensors", photos)
    assert "not used" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--picture", "sheet.jpg"], "--picture sheet.jpg: it is a png, and its name must end so"),
        (["--torchcompile", "inducter"], "--torchcompile inducter: no backend of torch.compile; near: inductor"),
        (["--output", "{there}.parquet"], "cannot write .*there.parquet: Is a directory"),
        (["--picture", "{there}.png"], "cannot write .*there.png: Is a directory"),
    ],
)
def test_what_cannot_be_written_or_compiled_is_one_line(
    words: list[str], line: str, run: Path, photos: Path, tmp_path: Path
):
    for ending in ("parquet", "png"):
        (tmp_path / f"there.{ending}").mkdir()
    with pytest.raises(UserError, match=line):
        call(run, photos, *(word.format(there=tmp_path / "there") for word in words))


def test_every_format_says_the_same(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        call(run / "last.safetensors", photos, "--output", tmp_path / name, "--top", 2)
        assert capsys.readouterr().out == f"{tmp_path / name}: 5 images\n"
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == lines
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "name_1", "probability_1", "name_2", "probability_2"]
    assert [(row["path"], row["name_1"], float(row["probability_2"])) for row in rows] == [
        (line["path"], line["names"][0], line["probabilities"][1]) for line in lines
    ]


def test_broken_images_are_named_and_left_out(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = shutil.copytree(photos, tmp_path / "copy")
    (folder / "1.png").write_bytes((photos / "1.png").read_bytes()[:60])
    call(run, folder, "--picture", tmp_path / "sheet.png")
    said = capsys.readouterr()
    first, second = said.err.splitlines()[-2:]
    assert first.startswith(f"timm-decor predict: cannot decode image {folder / '1.png'}: ")
    assert second == "timm-decor predict: 1 of 5 images left out"
    lines = said.out.splitlines()
    assert lines[0].split() == ["image", "prediction", "%", "then"] and len(lines) == 2 + 4
    assert Image.open(tmp_path / "sheet.png").width > 300
    with pytest.raises(UserError, match="^none of 1 images could be decoded$"):
        call(run, folder / "1.png")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{run}", "{photos}", "--output", "out.xlsx"], r"^--output out.xlsx: its ending says the format: .csv, "),
        (["{photos}", "{photos}"], "holds no best.safetensors, last.safetensors, model.safetensors: name a"),
        (["{run}/bets.safetensors", "{photos}"], "no checkpoint file .*bets.safetensors"),
        (["resnet81", "{photos}"], "^unknown model 'resnet81'; near: "),
        (["test_resnet", "{photos}", "--use-ema"], "^--model and --use-ema are for a checkpoint"),
        (["{run}", "{photos}/7.png"], "^no file or folder .*7.png"),
    ],
)
def test_refusals(words: list[str], said: str, run: Path, photos: Path):
    with pytest.raises(UserError, match=said):
        call(*(word.format(run=run, photos=photos) for word in words))


def test_pretrained_weights_speak_in_words():
    assert weights._in_words("n01440764") == "tench" and weights._in_words("daisy") == "daisy"
