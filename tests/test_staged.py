"""The project's own weights as pretrained tags: found here, on the Hub, or missed in one line that names both."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from local_hub import LocalHub
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg, register_model

import timm_decor
from timm_decor.digest import sha256
from timm_decor.models import staged

CONFIG = {
    "num_classes": 4,
    "label_names": ["a", "b", "c", "d"],
    "pretrained_cfg": {
        **{"tag": "dbp_four_r48", "input_size": [3, 48, 48], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]},
        **{"crop_pct": 1.0, "interpolation": "bilinear", "num_classes": 4, "first_conv": "conv1.0", "classifier": "fc"},
    },
}
_COUNT = iter(range(1000))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path, dict[str, torch.Tensor]]]:
    """A model of its own with staged weights: its name, their folder, and the weights."""
    name = f"staged_resnet_{next(_COUNT)}"

    def entrypoint(pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
        return timm.models.model_entrypoint("test_resnet")(pretrained=pretrained, **kwargs)

    entrypoint.__name__ = name
    entrypoint.__module__ = __name__
    register_model(entrypoint)
    folder = tmp_path / "staged" / f"{name}.dbp_four_r48"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architecture": name, **CONFIG}))
    weights = timm.create_model("test_resnet", num_classes=4).state_dict()
    save_file(weights, folder / "model.safetensors")
    monkeypatch.setattr(staged, "_PLACES", (tmp_path / "absent", tmp_path / "staged"))
    staged._staged.cache_clear()
    yield name, folder, weights
    staged._staged.cache_clear()


def test_pretrained_takes_the_staged_weights(own: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    name, _, weights = own
    timm_decor.register_decorrelated(name)
    model = timm.create_model(f"decor_{name}", pretrained=True)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert model.pretrained_cfg["tag"] == "dbp_four_r48" and model.pretrained_cfg["label_names"][2] == "c"
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 48, 48)
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.1, 0.2, 0.3)
    assert f"decor_{name}.dbp_four_r48" in timm.list_pretrained(f"decor_{name}*")
    half = timm.create_model(f"decor_{name}", pretrained=True, num_classes=7)  # a new head, the body's weights
    assert half.num_classes == 7 and torch.equal(half.state_dict()["conv1.0.weight"], weights["conv1.0.weight"])


def test_who_names_no_tag_is_told_what_they_know(
    own: tuple[str, Path, dict[str, torch.Tensor]], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    name, folder, weights = own
    timm_decor.register_decorrelated(name)

    def said(**kwargs: Any) -> list[str]:
        caplog.clear()
        kwargs = {"pretrained": True, **kwargs}
        with caplog.at_level(logging.WARNING, "timm_decor"):
            timm.create_model(kwargs.pop("name", f"decor_{name}"), **kwargs)
        return [record.message for record in caplog.records]

    line = f"{name}.dbp_four_r48: weights for the 4 classes, images of 48 px"
    assert said() == [line]
    results = {"data": "four-things", "evaluated": {"top1": 87.654}}
    (folder / "results.json").write_text(json.dumps(results))
    assert said() == [line.replace("classes", "classes of four-things") + ", 87.7 % top-1"]
    assert said(name=f"decor_{name}.dbp_four_r48") == [], "who names it knows it"
    assert said(pretrained=False) == []
    save_file(weights, tmp_path / "mine.safetensors")
    mine = {"file": str(tmp_path / "mine.safetensors"), "num_classes": 4}
    assert said(pretrained_cfg_overlay=mine) == []


def test_a_file_that_is_not_the_published_one_is_refused(own: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    name, folder, weights = own
    timm_decor.register_decorrelated(name)
    file = folder / "model.safetensors"
    (folder / "results.json").write_text(json.dumps({"sha256": {file.name: sha256(file)}}))
    timm.create_model(f"decor_{name}", pretrained=True)
    save_file({key: value * 1.01 for key, value in weights.items()}, file)
    with pytest.raises(RuntimeError, match="model.safetensors is damaged, or was replaced: its SHA-256 is not"):
        timm.create_model(f"decor_{name}", pretrained=True)
    timm.create_model(f"decor_{name}")


def test_a_mistake_of_the_callers_is_not_blamed_on_the_weights(own: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    name, folder, weights = own
    (folder / "model.safetensors").unlink()
    timm_decor.register_decorrelated(name)
    with pytest.raises(TypeError, match="bogus"):
        timm.create_model(f"decor_{name}", pretrained=True, bogus=1)


def test_weights_of_ones_own_are_taken_as_the_plain_model_takes_them(
    own: tuple[str, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Not with the classes, size, mean and std of the project's weights."""
    name, _, _ = own
    timm_decor.register_decorrelated(name)
    mine = timm.create_model("test_resnet").state_dict()
    save_file(mine, tmp_path / "mine.safetensors")
    for overlay in ({"file": str(tmp_path / "mine.safetensors")}, {"state_dict": mine}):
        model = timm.create_model(f"decor_{name}", pretrained=True, pretrained_cfg_overlay=overlay)
        assert model.num_classes == 1000 and model.pretrained_cfg["architecture"] == f"decor_{name}"
        assert model.pretrained_cfg["input_size"] == (3, 224, 224)
        assert all(torch.equal(value, mine[key]) for key, value in model.state_dict().items())


def test_the_id_on_the_hub_is_a_forks_to_choose() -> None:
    code = "from timm_decor.models import staged; print(staged.HUB_OWNER)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"TIMM_DECOR_HUB_OWNER": "somebody", "PATH": ""})  # fmt: skip
    assert done.stdout.strip() == "somebody"


def test_without_them_the_hub_is_asked_and_the_error_names_both_places(
    own: tuple[str, Path, dict[str, torch.Tensor]],
    local_hub: LocalHub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    name, folder, weights = own
    kept = folder / "model.safetensors"
    kept.rename(tmp_path / "model.safetensors")
    timm_decor.register_decorrelated(name)
    local_hub.use_in_process(monkeypatch, tmp_path / "cache")
    repo = f"{staged.HUB_OWNER}/{name}.dbp_four_r48"
    with pytest.raises(RuntimeError) as error:
        timm.create_model(f"decor_{name}", pretrained=True)
    assert str(kept) in str(error.value) and repo in str(error.value) and len(str(error.value).splitlines()) == 1
    with pytest.raises(FileNotFoundError):  # an error of something else stays what it is
        timm.create_model(f"decor_{name}", pretrained=True, pretrained_cfg_overlay={"file": "somewhere.safetensors"})

    monkeypatch.setattr(staged, "HUB_OWNER", "me")
    name2 = name + "_b"
    _rename(name, name2, folder)
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(f"me/{name2}.dbp_four_r48")
    api.upload_file(path_or_fileobj=str(tmp_path / "model.safetensors"), path_in_repo="model.safetensors",
                    repo_id=f"me/{name2}.dbp_four_r48")  # fmt: skip
    timm_decor.register_decorrelated(name2)
    model = timm.create_model(f"decor_{name2}", pretrained=True)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def _rename(old: str, new: str, folder: Path) -> None:
    """The same model under another name: a name's configs are filed when its twin is registered."""

    def entrypoint(pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
        return timm.models.model_entrypoint("test_resnet")(pretrained=pretrained, **kwargs)

    entrypoint.__name__, entrypoint.__module__ = new, __name__
    register_model(entrypoint)
    (folder / "config.json").write_text(json.dumps({"architecture": new, **CONFIG}))
    staged._staged.cache_clear()


def test_without_weights_a_twin_is_as_the_plain_model_is() -> None:
    """Whatever the project has trained: classes, image size, mean and std of `decor_resnet18` are resnet18's."""
    twin, plain = timm.create_model("decor_resnet18"), timm.create_model("resnet18")
    assert twin.num_classes == plain.num_classes == 1000
    assert twin.pretrained_cfg == {**plain.pretrained_cfg, "architecture": "decor_resnet18"}
    assert get_pretrained_cfg("decor_resnet18.a1_in1k").hf_hub_id == "timm/resnet18.a1_in1k"
