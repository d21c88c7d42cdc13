"""Gradients that no backward pass made: unbiased for the kernel; and the study's script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import without_backpropagation as study
from torch import nn

import timm_decor
from timm_decor import DecorConfig


def layer(config: DecorConfig | None) -> tuple[nn.Module, timm_decor.DecorHandle | None]:
    """A layer after one refresh, on inputs that are far from white."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).double()
    if config is None:
        return model, None
    timm_decor.decorrelate(model, config)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    handle = timm_decor.attach(model, optimizer)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return model, handle


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return torch.randn(32, 6, generator=generator, dtype=torch.float64) @ mix, torch.arange(32) % 4


@pytest.mark.parametrize("sides", ["plain", "input", "both"])
@pytest.mark.parametrize("estimator", ["forward gradients", "weight perturbation"])
def test_the_estimates_mean_is_the_kernels_gradient(sides: str, estimator: str) -> None:
    config = None if sides == "plain" else DecorConfig(every=1, sample=1.0, sides=sides, damping=0.1, output_every=1)
    model, handle = layer(config)
    x, y = batch()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    wanted = model[0].weight.grad.clone()
    total, draws = torch.zeros_like(wanted), 3000
    for _ in range(draws):
        study.estimate(model, x, y, estimator, handle)
        total += model[0].weight.grad
    error = float((total / draws - wanted).norm() / wanted.norm())
    assert error < 0.2, error  # by chance about sqrt(28 / 3000) = 0.1


def test_weights_that_are_perturbed_are_no_sign_of_another_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    model, handle = layer(DecorConfig(every=1, sample=1.0))
    assert handle is not None
    with handle.recording(), torch.no_grad():
        for _ in range(4):
            model[0].weight.add_(1e-3)
            model(batch()[0])
    assert "training is plain" not in caplog.text


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits.json"
    study.main(["--smoke", "--steps", "40", "--json", str(out)])
    results = json.loads(out.read_text())["results"]
    assert [(r["estimator"], r["arm"]) for r in results] == [(e, a) for e in study.ESTIMATORS for a in study.ARMS]
    assert all(len(r["test_top1"]) == 3 for r in results) and "test top-1" in capsys.readouterr().out
