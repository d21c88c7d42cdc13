"""The project's own weights: what is staged is what the README's table and the cards say, and it loads by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import check_dist
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from training_runs import ROOT, reset_accelerate

from timm_decor.models.staged import own_weights
from timm_decor.training import validation

STAGED = sorted((ROOT / "hub" / "staged").glob("*/config.json"))
FOLDERS = [pytest.param(file.parent, id=file.parent.name) for file in STAGED]
SAMPLE = 1000


def test_there_are_some_and_the_first_is_what_pretrained_takes() -> None:
    assert STAGED
    model = timm.create_model("decor_resnet18", pretrained=True)
    config = json.loads((ROOT / "hub" / "staged" / "resnet18.whiten_tin_r64" / "config.json").read_text())
    assert model.pretrained_cfg["tag"] == "whiten_tin_r64" and model.num_classes == 200 == len(config["label_names"])
    weights = load_file(ROOT / "hub" / "staged" / "resnet18.whiten_tin_r64" / "model.safetensors")
    own = model.state_dict()
    assert all(torch.equal(own[key], value.to(own[key].dtype)) for key, value in weights.items())


def test_few_classes_are_no_default() -> None:
    """A name alone gives timm's weights where the project's own know ten classes."""
    usual, own = (timm.get_pretrained_cfg(f"decor_regnety_002{tag}") for tag in ("", ".whiten_cifar10_r64"))
    assert usual is not None and own is not None
    assert (usual.num_classes, own.num_classes) == (1000, 10)
    assert usual.hf_hub_id == timm.get_pretrained_cfg("regnety_002").hf_hub_id  # type: ignore[union-attr]
    assert timm.create_model("decor_regnety_002.whiten_cifar10_r64", pretrained=True).num_classes == 10


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_repository_is_consistent(folder: Path) -> None:
    config, results = (json.loads((folder / name).read_text()) for name in ("config.json", "results.json"))
    card = ModelCard.load(folder / "README.md")
    top1 = next(result.metric_value for result in card.data.eval_results if result.metric_name == "accuracy")
    assert top1 == round(results["evaluated"]["top1"], 2)
    assert (
        folder.name
        == f"{config['architecture']}.{config['pretrained_cfg']['tag']}"
        == f"{results['architecture']}.{results['tag']}"
    )
    assert len(config["label_names"]) == config["num_classes"] == config["pretrained_cfg"]["num_classes"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["epochs"] == results["training"]["epochs"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"hub/staged/{folder.name}/README.md" in readme
    for file in folder.iterdir():
        assert b"/home/" not in file.read_bytes() and b"/tmp/" not in file.read_bytes(), file


def test_distributions_have_what_a_name_alone_gives() -> None:
    usual = {timm.get_pretrained_cfg(f"decor_{own.architecture}").hf_hub_id for own in own_weights()}  # type: ignore[union-attr]
    by_name = {f"{own.architecture}.{own.tag}" for own in own_weights() if own.hub_id in usual}
    rest = {file.parent.name for file in STAGED} - by_name
    files = {path for name in rest for path in (ROOT / "hub" / "staged" / name).glob("*.safetensors")}
    kept_out = check_dist.left_out()
    assert kept_out == {file.relative_to(ROOT).as_posix() for file in files}
    size = sum(
        file.stat().st_size for config in STAGED for file in config.parent.iterdir()
        if file.relative_to(ROOT).as_posix() not in kept_out
    )  # fmt: skip
    assert size < check_dist.WHEEL_LIMIT, "weights are not compressed"


@pytest.mark.parametrize("folder", FOLDERS)
def test_published_accuracy_holds_on_a_sample(folder: Path, tmp_path: Path) -> None:
    """validate.py by the pretrained tag, on the first images of the split that the card names."""
    results = json.loads((folder / "results.json").read_text())
    data = ROOT.parent / "shared" / "data" / results["data"]
    if not data.is_dir() or not (folder / "model.safetensors").is_file():
        pytest.skip(f"no data in {data}, or a source distribution: other weights are fetched")
    reset_accelerate()
    file = tmp_path / "row.json"
    words = f"--model decor_{folder.name} --pretrained --dataset parquet --split test[:{SAMPLE}] --device cpu -j 0"
    validation.main([*words.split(), "--data-dir", str(data), "--results-file", str(file)])
    row = json.loads(file.read_text())
    share = results["evaluated"]["top1"] / 100
    spread = 100 * math.sqrt(share * (1 - share) / SAMPLE)
    assert row["images"] == SAMPLE and abs(row["top1"] - results["evaluated"]["top1"]) < 4 * spread
