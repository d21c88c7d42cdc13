"""Inputs of every kind of badness: the weights stay finite, a refresh either happens or is counted as skipped."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import timm_decor
from timm_decor import DecorConfig, DecorHandle
from timm_decor.config import RULE_STRUCTURES
from timm_decor.moments import OUTPUT_MOMENT

PAIRS = [(rule, structure) for rule, structures in RULE_STRUCTURES.items() for structure in structures]
LAYERS = {
    "3x3": lambda: nn.Conv2d(4, 3, 3, padding=1),
    "3x3 strided, 2 groups": lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, bias=False),
    "1x1": lambda: nn.Conv2d(4, 5, 1),
    "linear": lambda: nn.Linear(4, 3),
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01),
}
NORMAL = {"kind": "normal", "images": 4, "side": 4, "exponent": 0}
# What happens to a batch of normal numbers, (N, H, W, 4).
TROUBLES = {
    "normal": lambda x: x,
    "after a ReLU": lambda x: x.relu(),
    "a dead channel": lambda x: x * torch.tensor([1.0, 0, 1, 1]),
    "one live channel": lambda x: x * torch.tensor([0.0, 0, 1, 0]),
    "constant": lambda x: torch.ones_like(x),
    "equal images": lambda x: x[:1].expand_as(x).clone(),
    "zero": torch.zeros_like,
    "one inf": lambda x: x.index_fill(3, torch.tensor([1]), math.inf),
    "one NaN": lambda x: x.flatten().index_fill(0, torch.tensor([0]), math.nan).view_as(x),
    "all -inf": lambda x: torch.full_like(x, -math.inf),
}


def batch(trouble: dict[str, Any], linear: bool, dtype: torch.dtype) -> Tensor:
    size = trouble["images"], trouble["side"], trouble["side"], 4
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 10.0 ** trouble["exponent"]
    x = TROUBLES[trouble["kind"]](x).to(dtype)
    return x if linear else x.permute(0, 3, 1, 2)


class Subject:
    """One decorrelated layer in training."""

    def __init__(self, layer: str, config: DecorConfig, optimizer: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.linear, self.dtype = layer == "linear", dtype
        self.model = timm_decor.decorrelate(nn.Sequential(LAYERS[layer]()).to(dtype), config)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.handle: DecorHandle = timm_decor.attach(self.model, self.optimizer, config)

    def step(self, trouble: dict[str, Any]) -> None:
        """A step with finite gradients, whatever the layer saw: those would reach the weights without R, too."""
        self.model(batch(trouble, self.linear, self.dtype))
        generator = torch.Generator().manual_seed(trouble["images"])
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        self.optimizer.step()

    @property
    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    @property
    def r(self) -> dict[str, Tensor]:
        layer = self.optimizer.state_dict()["timm_decor"]["layers"]["0"]
        known = {name: tensor.clone() for part in ("r", "moments") for name, tensor in layer[part].items()}
        known.pop(OUTPUT_MOMENT, None)  # of the gradients, which are always fine here
        return known


def without_refresh(subject: Subject, config: DecorConfig, *names: Any) -> Subject:
    """A copy of it whose next step refreshes nothing."""
    twin = Subject(names[0], DecorConfig(**{**config.to_dict(), "every": 10**6}), *names[1:])
    twin.model.load_state_dict(subject.model.state_dict())
    twin.optimizer.load_state_dict(copy.deepcopy(subject.optimizer.state_dict()))  # torch would share the tensors
    assert twin.handle.step == subject.handle.step > 1
    return twin


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


troubles = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(list(TROUBLES)),
        "images": st.integers(1, 4),
        "side": st.integers(1, 4),  # 1: a 1x1 map; with one image, a single row
        "exponent": st.one_of(st.just(0), st.integers(-40, 38)),
    }
)


@pytest.mark.parametrize(("rule", "structure"), PAIRS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    layer=st.sampled_from(list(LAYERS)),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    damping=st.sampled_from([0.0, 1e-6, 1.0]),
    kappa=st.sampled_from([0.0, 0.5, 1.0]),
    preserve=st.booleans(),
    rank=st.sampled_from([1, 3, 32]),
    stat_decay=st.sampled_from([0.0, 0.5]),
    sample=st.sampled_from([0.25, 1.0]),
    inputs=st.lists(troubles, min_size=1, max_size=4),
)
def test_it_never_reaches_the_weights(
    rule, structure, layer, optimizer, dtype, damping, kappa, preserve, rank, stat_decay, sample, inputs
):
    if structure == "space" and layer in ("1x1", "linear"):
        layer = "3x3"  # they have one position
    own = {"whiten": {"damping": damping, "stat_decay": stat_decay}, "dbp": {"kappa": kappa}, "crgd": {}}[rule]
    config = DecorConfig(
        rule=rule, structure=structure, every=1, sample=sample, rank=rank, preserve_function=preserve, **own
    )
    subject = Subject(layer, config, optimizer, dtype)
    for _ in range(2):
        subject.step(NORMAL)
    for trouble in inputs:
        if rule != "whiten":  # test_an_iteration_that_diverges has those
            trouble = {**trouble, "exponent": min(0, trouble["exponent"])}
        twin = without_refresh(subject, config, layer, optimizer, dtype)
        (before,), r = subject.handle.report().rows, subject.r
        subject.step(trouble)
        twin.step(trouble)
        (after,) = subject.handle.report().rows
        assert all(bool(weight.isfinite().all()) for weight in subject.weights)
        assert all(bool(tensor.isfinite().all()) for tensor in subject.r.values())
        assert (after.refreshes - before.refreshes) + (after.skips - before.skips) == 1
        if after.skips > before.skips:
            own = {name: tensor for name, tensor in r.items() if name != "step_scale"}  # which is the network's
            assert all(torch.equal(subject.r[name], tensor) for name, tensor in own.items()), "R stays"
            assert all(map(torch.equal, subject.weights, twin.weights)), "and the step is that without a refresh"
        elif trouble["kind"] in ("one NaN", "all -inf") and trouble["images"] == 1:
            pytest.fail("there was nothing to refresh from")


@pytest.mark.parametrize(
    ("rule", "structure", "exponents"),
    [("dbp", "full", [11, 0]), ("dbp", "space", [5, 4, 0]), ("crgd", "full", [11, 0])],
)
def test_an_iteration_that_diverges(rule: str, structure: str, exponents: list[int]):
    """Finite statistics, but so large that the iteration diverges: decor_lr <z z^T> is above 2."""
    config = DecorConfig(rule=rule, structure=structure, every=1, sample=1, preserve_function=False)
    subject = Subject("3x3", config, "sgd", torch.float32)
    for exponent in (0, *exponents):
        subject.step({**NORMAL, "images": 1, "side": 2, "exponent": exponent})
    assert all(bool(weight.isfinite().all()) for weight in subject.weights)


class TestLossScaling:
    """A step that the gradient scaler skips is as if it had not been."""

    @staticmethod
    def trained(optimizer: str, batches: list[str], every: int) -> tuple[Subject, list[Any]]:
        """The layer after steps with a scaler on "good" and bad batches, and each step's end."""
        config = DecorConfig(every=every, sample=1.0)
        subject, ends = Subject("3x3", config, optimizer, torch.float32), []
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for number, kind in enumerate(batches):
            x = torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(batches[:number].count("good")))
            loss = subject.model(x * math.inf if kind == "inf inputs" else x).square().mean()
            subject.optimizer.zero_grad()
            scaler.scale(loss * (math.inf if kind == "inf gradient" else 1)).backward()
            scaler.step(subject.optimizer)
            scaler.update()
            ends.append((subject.weights, subject.r, subject.handle.step))
        return subject, ends

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize(
        ("bad", "every"),
        # the third step refreshes R, and forgets the bad inputs; or does not
        [("inf inputs", 2), ("inf inputs", 20), ("inf gradient", 20)],
    )
    def test_it_leaves_weight_and_r_in_step(self, optimizer: str, bad: str, every: int):
        good, _ = self.trained(optimizer, ["good"] * 5, every)
        both, ends = self.trained(optimizer, ["good", "good", bad, bad, "good", "good", "good"], every)
        for weights, r, step in ends[2:4]:
            assert all(map(torch.equal, weights, ends[1][0])) and step == 2
            assert all(torch.equal(r[name], tensor) for name, tensor in ends[1][1].items())
        assert all(map(torch.equal, both.weights, good.weights)) and both.handle.step == 5
        assert both.r.keys() == good.r.keys() and all(map(torch.equal, both.r.values(), good.r.values()))
        (row,) = both.handle.report().rows
        assert row.skips == 0 and row.refreshes == (3 if every == 2 else 1)

    @pytest.mark.skipif(torch.__version__ < (2, 4), reason="this torch fuses on GPUs alone")
    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
    def test_one_layer_that_overflows_is_enough(self, kind: type[torch.optim.Optimizer]):
        """A fused optimizer finds out on the device: until then the other layers' gradients look like a step's."""

        def trained(steps: list[bool]) -> tuple[list[Tensor], dict[str, Any]]:
            torch.manual_seed(0)
            model = timm_decor.decorrelate(nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5)), DecorConfig(every=3))
            more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
            optimizer = kind(model.parameters(), 0.05, fused=True, **more)
            handle, scaler = timm_decor.attach(model, optimizer), torch.amp.GradScaler("cpu", init_scale=4.0)
            for number, is_good in enumerate(steps):
                x = torch.randn(9, 6, generator=torch.Generator().manual_seed(sum(steps[:number])))
                optimizer.zero_grad()
                scaler.scale(model(x).square().mean()).backward()
                if not is_good:
                    model[1].weight.grad.fill_(math.inf)
                scaler.step(optimizer)
                scaler.update(4.0)
                assert handle.step == sum(steps[: number + 1])  # else the engine asks at the next refresh alone
            return [p.detach().clone() for p in model.parameters()], handle.state()

        # Step 1 measures the scale, and each one looks at the outputs' errors.
        weights, state = trained([True, True, False, True, True, False])
        good, wanted = trained([True] * 4)
        assert all(map(torch.equal, weights, good)) and state["step"] == wanted["step"] == 4
        for name, layer in wanted["layers"].items():
            for part in ("r", "moments"):
                for key, tensor in layer[part].items():
                    assert torch.equal(state["layers"][name][part][key], tensor), (name, key)
