"""decor.safetensors: R without the optimizer it grew in."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from training_runs import DECOR, history, train

import timm_decor
from timm_decor import DecorConfig
from timm_decor.engine.checkpoint import read_r
from timm_decor.engine.handle import DecorHandle
from timm_decor.errors import UserError
from timm_decor.structures import SCALE

CONFIG = DecorConfig(every=2, sample=1.0)


def attached(config: DecorConfig = CONFIG, opt: str = "sgd", classes: int = 5, in_chans: int = 3) -> tuple:
    torch.manual_seed(0)
    model = timm_decor.decorrelate(timm.create_model("test_resnet", num_classes=classes, in_chans=in_chans), config)
    optimizer = timm.optim.create_optimizer_v2(model, opt=opt, lr=0.01)
    return model, optimizer, timm_decor.attach(model, optimizer)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) + 0.5
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.arange(6) % 5).backward()
    optimizer.step()


def r_of(handle: DecorHandle) -> dict[str, torch.Tensor]:
    """R and L. The scale is no part of a file: it is measured anew."""
    return {
        f"{name}|{key}": value
        for name, entry in handle.state()["layers"].items()
        for key, value in entry["r"].items()
        if key != SCALE
    }


@pytest.mark.parametrize("structure", ["kronecker", "full", "space"])
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_training_goes_on_with_the_r_of_a_file(structure: str, opt: str, tmp_path: Path) -> None:
    config = DecorConfig(every=2, sample=1.0, structure=structure)
    model, optimizer, handle = attached(config, opt)
    for seed in range(5):
        step(model, optimizer, seed)
    handle.save_r(tmp_path / "decor.safetensors")
    state, before = model.state_dict(), r_of(handle)

    torch.manual_seed(1)
    other, its_optimizer, its_handle = attached(config, opt)
    other.load_state_dict(state)
    assert not all(torch.equal(before[key], value) for key, value in r_of(its_handle).items() if key in before)
    its_handle.load_r(tmp_path / "decor.safetensors")
    assert all(torch.equal(before[key], value) for key, value in r_of(its_handle).items())
    assert its_handle.scale == 1 != handle.scale
    assert its_handle.report().mean_correlation() == handle.report().mean_correlation()

    plain, plain_optimizer, _ = attached(config, opt)
    plain.load_state_dict(state)
    step(other, its_optimizer, 7)
    step(plain, plain_optimizer, 7)
    moved = other.layer2[0].conv1.weight - plain.layer2[0].conv1.weight
    assert moved.abs().max() > 1e-6  # it matters from the first step on


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("classes", [9, 5, 2])
def test_a_head_of_other_classes_takes_it_too(classes: int, opt: str, tmp_path: Path) -> None:
    """The head's inputs are the same; what its outputs' errors are is not."""
    model, optimizer, handle = attached(opt=opt, classes=5)
    for seed in range(3):
        step(model, optimizer, seed)
    handle.save_r(tmp_path / "decor.safetensors")
    new, its, other = attached(opt=opt, classes=classes)
    start = r_of(other)
    other.load_r(tmp_path / "decor.safetensors")
    for key, value in r_of(handle).items():
        is_new = classes != 5 and key.startswith("fc|output_")
        assert torch.equal(r_of(other)[key], start[key] if is_new else value), key
    for seed in range(3):
        x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        its.zero_grad()
        F.cross_entropy(new(x), torch.arange(6) % classes).backward()
        its.step()
    assert all(row.refreshes == 4 and not row.skips for row in other.report().rows)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, optimizer, handle = attached()
    step(model, optimizer, 0)
    file = tmp_path / "decor.safetensors"
    handle.save_r(file)
    with pytest.raises(ValueError, match="before the first step only, not after 1"):
        handle.load_r(file)
    with pytest.raises(ValueError, match="structure 'kronecker', this run uses 'space'"):
        attached(DecorConfig(structure="space"))[2].load_r(file)
    with pytest.raises(ValueError, match=r"shape \[16, 3, 3, 3\] for layer conv1.0, which has shape \[16, 1, 3, 3\]"):
        attached(in_chans=1)[2].load_r(file)
    with pytest.raises(ValueError, match="cannot read"):
        read_r(tmp_path / "nothing.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for change in ({"layers": "[]"}, {"layers": '{"a": 3}'}, {"layers": "[" * 10**5}, {"config": "3"}, {"config": "{"}):
        save_file(load_file(file), tmp_path / "other.safetensors", {**metadata, **change})
        with pytest.raises(ValueError):
            read_r(tmp_path / "other.safetensors")
    (tmp_path / "half.safetensors").write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot read"):
        read_r(tmp_path / "half.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds no R"):
        read_r(tmp_path / "weights.safetensors")


def test_train_py_starts_with_it(tmp_path: Path) -> None:
    model = timm_decor.decorrelate(timm.create_model("test_resnet", num_classes=10), CONFIG)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.01)
    handle = timm_decor.attach(model, optimizer)
    step(model, optimizer, 0)
    handle.save_r(tmp_path / "decor.safetensors")
    with_r = train(tmp_path / "with", "--epochs", 1, *DECOR, "--initial-r", tmp_path / "decor.safetensors")
    without = train(tmp_path / "without", "--epochs", 1, *DECOR)
    first, second = (history(folder)[0]["train_loss"] for folder in (with_r, without))
    assert first != second
    with pytest.raises(UserError, match="--initial-r does nothing for plain test_resnet"):
        train(tmp_path / "plain", "--initial-r", tmp_path / "decor.safetensors")
    with pytest.raises(UserError, match="cannot read .*nothing.safetensors"):
        train(tmp_path / "missing", *DECOR, "--initial-r", tmp_path / "nothing.safetensors")
