"""timm-decor export: what is written says what the model says, and what it wants; otherwise nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from training_runs import reset_accelerate

from timm_decor.errors import UserError
from timm_decor.inference import export
from timm_decor.training.data.digits import Digits
from timm_decor.training.keeping.metadata import stored_metadata

NAMES = [f"digit {number}" for number in range(10)]
CONFIG = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0,
          "crop_mode": "center"}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "best.safetensors"
    model = timm.create_model("test_resnet", num_classes=10)
    save_file(model.state_dict(), file, {"format": "pt", **stored_metadata("test_resnet", 10, CONFIG, {}, NAMES)})
    return file


def call(*words: object) -> None:
    reset_accelerate()
    export.main([*map(str, words)], "timm-decor export")


def load(file: Path) -> tuple[Any, dict[str, str]]:
    """What runs the file, and what it says of itself."""
    extra: dict[str, Any] = {"timm_decor.json": ""}
    if file.suffix == ".onnx":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        told = session.get_modelmeta().custom_metadata_map
        return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]), told
    if file.suffix == ".pt2":
        run = torch.export.load(file, extra_files=extra).module()
    else:
        run = torch.jit.load(file, _extra_files=extra)
    return run, json.loads(extra["timm_decor.json"])


@pytest.mark.filterwarnings("ignore")  # of torch, about its own formats
@pytest.mark.parametrize("ending", [".onnx", ".pt2", ".ts"])
def test_says_what_the_model_says(ending: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    if ending == ".onnx":
        pytest.importorskip("onnxscript")
    file = tmp_path / f"model{ending}"
    call(checkpoint.parent, file)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{file}: {file.stat().st_size / 1e6:.1f} MB, 10 classes, images (N, 3, 32, 32)"
    assert second.startswith("checked on 16 images: logits up to ")
    assert second.endswith("16 of 16 predictions are the same")
    model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(checkpoint)).eval()
    run, told = load(file)
    for count in (1, 3):
        x = torch.randn(count, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-3, atol=1e-4)
    assert json.loads(told["label_names"]) == NAMES and told["architecture"] == "test_resnet"
    assert json.loads(told["data_config"])["mean"] == [0.5] * 3
    assert sorted(tmp_path.iterdir()) == [file]


@pytest.mark.filterwarnings("ignore")
def test_is_checked_on_the_images_that_are_given(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="^--images: none of the first 1 images could be decoded$"):
        call(checkpoint, tmp_path / "m.ts", "--images", tmp_path)
    for index in range(2):
        Digits("test[:2]", "RGB").image(index).save(tmp_path / f"{index}.png")
    call(checkpoint, tmp_path / "m.ts", "--images", tmp_path)
    assert "checked on 2 images: " in capsys.readouterr().out


def test_a_model_that_does_not_script_is_traced():
    class Twice(nn.Module):
        def forward(self, x: Tensor, *more: Tensor) -> Tensor:  # which TorchScript does not compile
            return x * 2

    x = torch.randn(3, 2)
    _, run = export._torchscript(Twice(), x, {})
    assert torch.equal(run(x), 2 * x)


def test_small_logits_are_compared_by_their_own_size(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Those of a young network are far below one."""
    model = timm.create_model("test_resnet", num_classes=10)
    with torch.no_grad():
        model.get_classifier().weight.mul_(1e-3)
        model.get_classifier().bias.zero_()
    file = checkpoint.with_name("young.safetensors")
    save_file(model.state_dict(), file, {"format": "pt", **stored_metadata("test_resnet", 10, CONFIG, {}, NAMES)})
    model.eval()
    monkeypatch.setitem(export._FORMATS, ".ts", lambda *_: (b"", lambda x: 0.9 * model(x)))
    with pytest.raises(UserError, match="differs from the model"):
        call(file, tmp_path / "m.ts")
    (tmp_path / "d.ts").mkdir()
    monkeypatch.setitem(export._FORMATS, ".ts", lambda *_: (b"", model))
    with pytest.raises(UserError, match="cannot write .*d.ts: Is a directory"):
        call(file, tmp_path / "d.ts")
    assert [path.name for path in tmp_path.iterdir()] == ["d.ts"]


@pytest.mark.parametrize("wrong", [lambda x: x.new_zeros(len(x), 10), lambda x: x.new_full((len(x), 10), torch.nan)])
def test_nothing_is_written_that_differs(wrong: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(export._FORMATS, ".ts", lambda *_: (b"", wrong))
    with pytest.raises(UserError, match=r"^m.ts differs from the model by .*, logits reach .*: not written$"):
        call(checkpoint, tmp_path / "m.ts")
    assert list(tmp_path.iterdir()) == []


def test_refusals(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"m.tflite: its ending says the format: .onnx, .pt2, .ts$"):
        call(checkpoint, tmp_path / "m.tflite")

    def fails(*_: Any) -> Any:
        raise RuntimeError("no such operator\nat length")

    monkeypatch.setitem(export._FORMATS, ".ts", fails)
    with pytest.raises(UserError, match="^test_resnet does not export to .ts: no such operator$"):
        call(checkpoint, tmp_path / "m.ts")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(UserError, match=r"m.onnx needs onnxruntime: pip install 'timm-decor\[onnx\]'$"):
        call(checkpoint, tmp_path / "m.onnx")
