"""`decor_<name>` in timm's registry: everything that works with a timm model's name works with its twin's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import Tensor, nn

import timm_decor
from timm_decor.layers import DecorConv2d, DecorLinear
from timm_decor.models import FAMILIES, PREFIX, Family, plain_name
from timm_decor.models.staged import own_cfgs

TWINS = [PREFIX + family.example for family in FAMILIES]
IDS = [family.module for family in FAMILIES]


def create_on_meta(name: str, **kwargs: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            return timm.create_model(name, **kwargs)
    except NotImplementedError:  # RegNet finds its stages with torch.unique, which torch 2.3 does not have on meta
        return timm.create_model(name, **kwargs).to("meta")


def images(channels: int = 3, count: int = 2) -> Tensor:
    return torch.randn(count, channels, 64, 64)


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    """A resnet18 checkpoint, as `pretrained_cfg_overlay=dict(file=...)` takes it."""
    path = tmp_path / "resnet18.safetensors"
    model = timm.create_model("resnet18")
    nn.init.normal_(model.fc.weight)
    safetensors.torch.save_file(model.state_dict(), path)
    return path


def load_weights(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_family_is_registered(family: Family) -> None:
    theirs = timm.list_models(module=family.module)
    ours = timm.list_models(module=PREFIX + family.module)
    assert len(ours) >= 5 and PREFIX + family.example in ours
    assert ours == [PREFIX + name for name in theirs]
    module = timm.model_entrypoint(ours[0]).__module__
    assert module == f"timm_decor.models.{PREFIX}{family.module}"
    assert getattr(sys.modules[module], ours[0]) is timm.model_entrypoint(ours[0])


def test_plain_models_stay_plain() -> None:
    model = create_on_meta("resnet18")
    assert not any(isinstance(module, DecorConv2d | DecorLinear) for module in model.modules())
    assert model.pretrained_cfg["architecture"] == "resnet18"


@pytest.mark.parametrize("name", TWINS, ids=IDS)
def test_state_dict_has_the_twins_entries(name: str) -> None:
    twin, plain = create_on_meta(name), create_on_meta(plain_name(name))
    entries = [(key, value.shape, value.dtype) for key, value in twin.state_dict().items()]
    assert entries == [(key, value.shape, value.dtype) for key, value in plain.state_dict().items()]
    assert any(isinstance(module, DecorConv2d) for module in twin.modules())
    assert isinstance(twin.get_classifier(), DecorLinear)


@pytest.mark.parametrize("name", timm.list_models("decor_*"))
def test_tags_are_the_twins(name: str) -> None:
    theirs = get_arch_pretrained_cfgs(plain_name(name))
    own = [f"{name}.{tag}" for tag in own_cfgs(plain_name(name))]
    ours, timms = get_arch_pretrained_cfgs(name), [PREFIX + key for key in theirs]
    # the same order: the first one is the default, of the project's own weights those that had enough to learn
    assert list(ours) == ([*own, *timms] if name == "decor_resnet18" else [*timms, *own])
    for key, cfg in theirs.items():
        found = ours[PREFIX + key].to_dict()
        assert found.pop("architecture") == name
        expected = cfg.to_dict()
        del expected["architecture"]
        assert found == expected
        assert "decor" not in str(found.get("hf_hub_id"))
    assert timm.is_model_pretrained(name) == (timm.is_model_pretrained(plain_name(name)) or bool(own))


def test_listed_as_pretrained() -> None:
    assert "decor_resnet18.a1_in1k" in timm.list_pretrained("decor_*")
    assert "decor_resnet18.a1_in1k" in timm.list_models("decor_resnet18*", pretrained=True)
    cfg = get_pretrained_cfg("decor_resnet18.a1_in1k")
    assert (cfg.hf_hub_id, cfg.architecture, cfg.tag) == ("timm/resnet18.a1_in1k", "decor_resnet18", "a1_in1k")
    assert get_pretrained_cfg("decor_resnet34").tag == get_pretrained_cfg("resnet34").tag


def test_tag_reaches_the_model() -> None:
    model = create_on_meta("decor_resnet50.a3_in1k")
    plain = create_on_meta("resnet50.a3_in1k")
    assert model.pretrained_cfg == {**plain.pretrained_cfg, "architecture": "decor_resnet50"}
    by_argument = create_on_meta("decor_resnet50", pretrained_cfg="a3_in1k")
    assert by_argument.pretrained_cfg == model.pretrained_cfg


def test_unknown_tag_names_the_known_ones() -> None:
    with pytest.raises(RuntimeError, match=r"^decor_resnet18 has no tag 'a9_in1k'; tags: .*a1_in1k"):
        timm.create_model("decor_resnet18.a9_in1k")


def test_deprecated_names() -> None:
    with pytest.warns(UserWarning, match="decor_tv_resnet34 to current decor_resnet34.tv_in1k"):
        model = create_on_meta("decor_tv_resnet34")
    assert (model.pretrained_cfg["architecture"], model.pretrained_cfg["tag"]) == ("decor_resnet34", "tv_in1k")
    assert "decor_tv_resnet34" not in timm.list_models("decor_*")


def test_a_family_says_what_stays_plain() -> None:
    for name, depthwise in (("decor_efficientnet_b0", "blocks.0.0.conv_dw"), ("decor_mobilenetv4_conv_small", ".dw_")):
        rows = create_on_meta(name).decor_report.rows
        reasons = {row.name: row.plain_reason for row in rows if depthwise in row.name}
        assert reasons and all("depthwise" in reason for reason in reasons.values())
        assert not next(row.plain_reason for row in rows if row.name == "conv_stem")
    assert not create_on_meta("decor_convnext_atto").decor_report.plain


def test_a_model_of_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    def own_model(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, kwargs["num_classes"]))

    own_model.__module__ = __name__
    timm.models.register_model(own_model)
    timm_decor.register_decorrelated("own_model", plain={"0": "kept plain for this test", "hea*": "misspelt"})
    assert timm.list_models(module="decor_test_registry") == ["decor_own_model"]
    model = timm.create_model("decor_own_model", num_classes=5)
    assert "decor_own_model: no layer matches 'hea*'" in caplog.text
    assert isinstance(model[2], DecorLinear) and type(model[0]) is nn.Conv2d
    assert model.decor_report.plain[0].plain_reason == "kept plain for this test"
    model[0] = nn.Conv2d(3, 4, 3)
    timm_decor.attach(model, torch.optim.SGD(model.parameters(), 0.1))
    assert type(model[0]) is nn.Conv2d  # attach converts again, and keeps to what was left out and why
    assert model.decor_report.plain[0].plain_reason == "kept plain for this test"


def test_a_model_outside_the_families() -> None:
    timm_decor.register_decorrelated("test_byobnet")
    assert list(get_arch_pretrained_cfgs("decor_test_byobnet")) == [
        PREFIX + key for key in get_arch_pretrained_cfgs("test_byobnet")
    ]
    assert timm.create_model("decor_test_byobnet").decor_report.decorrelated


def test_unknown_models_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="timm has no model 'resnet81'.*near: .*resnet"):
        timm_decor.register_decorrelated("resnet81")
    with pytest.raises(ValueError, match="timm has no model 'resnet18.a1_in1k'"):
        timm_decor.register_decorrelated("resnet18.a1_in1k")
    with pytest.raises(ValueError, match="decor_resnet18 is a decorrelated twin itself"):
        timm_decor.register_decorrelated("decor_resnet18")


@pytest.mark.parametrize("name", TWINS, ids=IDS)
def test_arguments_of_timm(name: str) -> None:
    """in_chans, num_classes, global_pool: shapes as the plain model has them."""
    for kwargs in ({"in_chans": 1, "num_classes": 7}, {"in_chans": 4, "num_classes": 0}):
        twin, plain = create_on_meta(name, **kwargs), create_on_meta(plain_name(name), **kwargs)
        x = torch.empty(2, kwargs["in_chans"], *plain.pretrained_cfg["input_size"][1:], device="meta")
        assert twin.eval()(x).shape == plain.eval()(x).shape
        assert [p.shape for p in twin.parameters()] == [p.shape for p in plain.parameters()]


def test_image_size_and_pooling_of_vit() -> None:
    model = create_on_meta("decor_vit_tiny_patch16_224", img_size=96, global_pool="avg", class_token=False)
    assert model(torch.empty(1, 3, 96, 96, device="meta")).shape == (1, 1000)
    assert model.pos_embed.shape[1] == 36
    assert model.decor_report.rows[0].name == "patch_embed.proj"


def test_checkpoints_pass_both_ways() -> None:
    plain, twin, back = (timm.create_model(name).eval() for name in ("resnet18", "decor_resnet18", "resnet18"))
    twin.load_state_dict(plain.state_dict(), strict=True)
    back.load_state_dict(twin.state_dict(), strict=True)
    x = images()
    with torch.no_grad():
        assert torch.equal(twin(x), plain(x))
        assert torch.equal(back(x), plain(x))
        features = twin.forward_features(x)
        assert torch.equal(features, plain.forward_features(x))
        assert torch.equal(twin.forward_head(features), plain(x))
        assert torch.equal(twin.forward_head(features, pre_logits=True), plain.forward_head(features, pre_logits=True))


def test_pretrained_weights(weights_file: Path) -> None:
    overlay = {"file": str(weights_file)}
    model = timm.create_model("decor_resnet18", pretrained=True, pretrained_cfg_overlay=overlay)
    assert overlay == {"file": str(weights_file)}
    assert model.pretrained_cfg["file"] == str(weights_file)
    saved = load_weights(weights_file)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_pretrained_weights_with_other_classes_and_channels(weights_file: Path) -> None:
    kwargs: dict[str, Any] = {"num_classes": 7, "in_chans": 1, "pretrained": True}
    kwargs["pretrained_cfg_overlay"] = {"file": str(weights_file)}
    twin, plain = (timm.create_model(name, **kwargs).eval() for name in ("decor_resnet18", "resnet18"))
    assert twin.num_classes == 7
    assert twin(images(channels=1)).shape == (2, 7)
    assert torch.equal(twin.conv1.weight, load_weights(weights_file)["conv1.weight"].sum(1, keepdim=True))
    body = {key: value for key, value in plain.state_dict().items() if not key.startswith("fc.")}
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in body.items())


def test_checkpoint_path(weights_file: Path) -> None:
    model = timm.create_model("decor_resnet18", checkpoint_path=str(weights_file))
    assert torch.equal(model.fc.weight, load_weights(weights_file)["fc.weight"])


def test_features_only(weights_file: Path) -> None:
    kwargs: dict[str, Any] = {"features_only": True, "out_indices": (1, 3), "pretrained": True}
    kwargs["pretrained_cfg_overlay"] = {"file": str(weights_file)}
    twin = timm.create_model("decor_resnet18", **kwargs).eval()
    plain = timm.create_model("resnet18", **kwargs).eval()
    assert list(twin.state_dict()) == list(plain.state_dict())
    assert twin.feature_info.channels() == [64, 256]
    assert isinstance(twin.conv1, DecorConv2d)
    x = images()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(twin(x), plain(x), strict=True))


def test_headless_model() -> None:
    model = timm.create_model("decor_resnet18", num_classes=0, global_pool="")
    assert model(images()).shape == (2, 512, 2, 2)


def test_reset_classifier() -> None:
    model = timm.create_model("decor_resnet18")
    model.reset_classifier(5)
    assert (model.num_classes, tuple(model(images()).shape)) == (5, (2, 5))
    assert list(model.state_dict()) == list(create_on_meta("resnet18").state_dict())
    assert model.get_classifier() is model.fc
    handle = timm_decor.attach(model, torch.optim.SGD(model.parameters(), 0.1))
    assert isinstance(model.fc, DecorLinear)  # timm made a new nn.Linear; attach decorrelates it like the old one
    assert handle.report().rows[-1].name == "fc"


@pytest.mark.parametrize("as_dict", [False, True])
def test_decor_config_reaches_the_model(as_dict: bool) -> None:
    config = timm_decor.DecorConfig(structure="space", every=7)
    model = create_on_meta("decor_resnet18", decor_config=config.to_dict() if as_dict else config)
    assert model.decor_report.config == config


def test_arguments_reach_timms_model() -> None:
    model = create_on_meta("decor_resnet18", drop_rate=0.3, drop_path_rate=0.2, act_layer="silu")
    assert model.drop_rate == 0.3
    assert model.layer4[1].drop_path.drop_prob == pytest.approx(0.2)
    assert isinstance(model.act1, nn.SiLU)


def test_local_dir_source(tmp_path: Path) -> None:
    """A folder as timm's hub code writes it, under the twin's name, loads by `local-dir:`."""
    model = timm.create_model("decor_resnet18", num_classes=3)
    # Not safetensors: the oldest supported timm does not read them from a folder.
    timm.models.save_for_hf(model, tmp_path, safe_serialization=False)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert isinstance(again.fc, DecorLinear)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_plain_export_is_a_resnet18(tmp_path: Path) -> None:
    """What hub/README.md says: after `to_plain`, timm's own export gives a model that needs no plugin."""
    model = timm.create_model("decor_resnet18", num_classes=3, decor_config={"every": 7}).eval()
    timm.models.save_for_hf(timm_decor.to_plain(model), tmp_path, safe_serialization=False)
    assert "decor" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(again.conv1) is nn.Conv2d
    x = images()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_to_plain_names_the_plain_architecture() -> None:
    model = timm_decor.to_plain(create_on_meta("decor_resnet18.a1_in1k"))
    assert model.pretrained_cfg == create_on_meta("resnet18.a1_in1k").pretrained_cfg


@pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 29),
    reason="before 1.0.29 timm cannot read safetensors from a folder",
)
def test_local_directory(tmp_path: Path, weights_file: Path) -> None:
    """A folder as timm writes it for the Hub: with the twin's name it gives the twin, with the plain name the model."""
    saved = load_weights(weights_file)
    for architecture, kind in (("decor_resnet18", DecorConv2d), ("resnet18", nn.Conv2d)):
        folder = tmp_path / architecture
        folder.mkdir()
        safetensors.torch.save_file(saved, folder / "model.safetensors")
        config = {
            "architecture": architecture,
            "num_classes": 1000,
            "pretrained_cfg": {"tag": "mine", "mean": [0.5] * 3},
        }
        (folder / "config.json").write_text(json.dumps(config))
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert type(model.conv1) is kind
        assert torch.equal(model.fc.weight, saved["fc.weight"])
        assert model.pretrained_cfg["mean"] == [0.5] * 3


def test_weights_from_the_hubs_cache_without_network(tmp_path: Path, weights_file: Path) -> None:
    """HF_HUB_OFFLINE=1: `pretrained=True` and `hf-hub:` read what is in the cache, and say what is missing."""
    repository = tmp_path / "hub" / "models--timm--resnet18.a1_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "model.safetensors").write_bytes(weights_file.read_bytes())
    config = {"architecture": "resnet18", "num_classes": 1000, "pretrained_cfg": {"tag": "a1_in1k"}}
    (snapshot / "config.json").write_text(json.dumps(config))
    script = """
import sys, timm, timm_decor, safetensors.torch, torch
saved = safetensors.torch.load_file(sys.argv[1])
for name in ("decor_resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"):
    model = timm.create_model(name, pretrained=True)
    assert torch.equal(model.fc.weight, saved["fc.weight"]), name
    print(type(model.conv1).__name__)
try:
    timm.create_model("decor_resnet34", pretrained=True)
except Exception as error:
    print(type(error).__name__)
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(weights_file)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *kinds, missing = done.stdout.split()
    assert kinds == ["DecorConv2d", "Conv2d"]
    assert missing in ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "RuntimeError", "FileNotFoundError")
