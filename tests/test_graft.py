"""The scale beside R: a step is as long as the plain optimizer's. That it is exact: tests/test_equivalence.py."""

from __future__ import annotations

import math

import pytest
import timm.optim
import torch
from test_attach import net, step
from torch import nn

import timm_decor
from timm_decor import DecorConfig
from timm_decor.engine.coordinates import General
from timm_decor.engine.optimizers import UNKNOWN, innermost
from timm_decor.engine.probe import power_of

CONFIG = DecorConfig(every=2, sample=1.0)


def attached(make, config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = timm_decor.decorrelate(net(), config)
    optimizer = make(model)
    return model, optimizer, timm_decor.attach(model, optimizer)


def sgd(model, **kwargs):
    return torch.optim.SGD(model.parameters(), 0.1, **kwargs)


def scale_of(handle):
    values = {float(c) for group in handle._groups for c in group.sides.scale}
    assert len(values) == 1, "one number for the network"
    return values.pop()


LINEAR = {"sgd", "nesterov", "momentum", "sgdw", "nesterovw", "sgdp", "sgdc", "csgdw", "csgdp", "csgdc"}
RATIO = {"lars", "larc", "nlars", "nlarc"} | {
    n for n in timm.optim.list_optimizers() if n.startswith(("lamb", "clamb"))
}
REFUSED = {"adahessian", "madgrad", "madgradw"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in timm.optim.list_optimizers() if not n.startswith(("bnb", "fused"))])
def test_how_a_step_depends_on_the_scale(name):
    """SGD's grows with its square, that of optimizers with a trust ratio not at all, all others' with itself."""
    if name in REFUSED or name.startswith("kron"):  # attach refuses them; Kron compiles for seconds
        pytest.skip("not attached, or slow")
    model = net()
    optimizer = innermost(timm.optim.create_optimizer_v2(model, name, lr=0.01, weight_decay=0.05))
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert power_of(optimizer, weights).exponent == (2 if name in LINEAR else 0 if name in RATIO else 1)


def test_an_optimizer_that_cannot_be_tried_has_no_scale(caplog):
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("needs its own weight")

    model = net()
    assert power_of(Own(model.parameters(), 0.1), [model[0].weight]) == UNKNOWN
    assert "may need tuning" in caplog.text


def test_attach_leaves_random_states_alone(monkeypatch):
    model = timm_decor.decorrelate(net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    seeded, before = [], torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    timm_decor.attach(model, optimizer)
    assert torch.equal(torch.get_rng_state(), before) and not seeded


def test_torchs_default_device_changes_nothing():
    """Small tensors that the engine makes for itself are on the CPU, or where the weights are."""

    def trained(device):
        torch.manual_seed(0)
        model = timm_decor.decorrelate(nn.Sequential(nn.Linear(400, 6)), DecorConfig(every=1, sample=1.0))
        optimizer = sgd(model, momentum=0.9)
        batches = [(torch.randn(64, 400), torch.arange(64) % 6) for _ in range(4)]
        with torch.device(device):
            handle = timm_decor.attach(model, optimizer)
            for x, y in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            return model[0].weight, handle.scale, handle.report()

    (weight, scale, report), (other, its, its_report) = trained("cpu"), trained("meta")  # nothing comes back from it
    assert torch.equal(weight, other) and scale == its != 1 and report == its_report


def test_the_step_is_as_long_as_plain_sgds():
    """With the gradients that it was measured with its length is plain's; without the scale it is a part of that."""
    lengths = {}
    for graft in (True, False):
        model, optimizer, handle = attached(sgd, DecorConfig(every=100, sample=1.0, graft=graft))
        step(model, optimizer, 0)
        layers = [model.get_submodule(name) for name in handle.names]
        plain = math.sqrt(sum(float(layer.weight.grad.square().sum()) for layer in layers))
        before = [layer.weight.detach().clone() for layer in layers]
        optimizer.step()  # the same gradients, and another R and L
        moved = sum(float((layer.weight - a).detach().square().sum()) for layer, a in zip(layers, before, strict=True))
        lengths[graft] = math.sqrt(moved) / (0.1 * plain)
    assert lengths[True] == pytest.approx(1, abs=1e-4) and lengths[False] < 0.8


def test_when_it_is_measured():
    """At the first refresh and more often until the second; then at the step after each; never at a rate of zero."""
    model, optimizer, handle = attached(sgd, DecorConfig(every=10, sample=1.0))
    changed, before = [], 1.0
    for i in range(42):
        step(model, optimizer, i)
        now = scale_of(handle)
        changed += [i] if now != before else []
        before = now
    assert changed == [0, 1, 2, 4, 8, 11, 21, 31, 41]
    optimizer.param_groups[0]["lr"] = 0.0
    for i in range(50, 62):
        step(model, optimizer, i)
    assert scale_of(handle) == before and handle.step == 42


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_trust_ratio_has_no_scale(name):
    def make(model):
        return timm.optim.create_optimizer_v2(model, name, lr=0.1, weight_decay=0.01)

    _, _, handle = attached(make)
    assert all(group.sides.scale is None for group in handle._groups)


def test_the_paper_has_no_scale():
    _, _, handle = attached(sgd, DecorConfig.paper())
    assert all(group.sides.scale is None for group in handle._groups)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "muon"])
def test_decay_is_left_out(name):
    """The same gradients, with and without decay: the scale is the same number."""
    found = []
    for decay in (0.0, 50.0):
        model, optimizer, handle = attached(
            lambda m, wd=decay: timm.optim.create_optimizer_v2(m, name, lr=0.01, weight_decay=wd)
        )
        step(model, optimizer, 0)
        found.append(scale_of(handle))
    # Lion's weight is W itself, out of which decay is projected; its own movement along W goes with it
    assert found[0] != 1 and found[1] == pytest.approx(found[0], rel=0.03 if name == "lion" else 1e-4)


def test_a_weight_of_zero_has_a_length():
    """Nothing of it decays; what it moves by counts as that of the others."""
    model, optimizer, handle = attached(lambda m: torch.optim.Adam(m.parameters(), 0.01, weight_decay=0.1))
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    nn.init.zeros_(layer.weight)
    lengths = []
    measured = General.lengths

    def seen(self, sides=None):
        lengths.append(measured(self, sides))
        return lengths[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(General, "lengths", seen)
        step(model, optimizer, 0)
    assert lengths and all(torch.isfinite(torch.stack(each)).all() for each in lengths)
    assert scale_of(handle) != 1


def test_layers_weigh_by_their_rate():
    """One at rate zero has no say; one at ten times the rate has nearly all of it."""

    def make(factors):
        def optimizer(model):
            weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
            assert len(weights) >= 2
            rates = [0.1 * factors[0], *[0.1 * factors[1]] * (len(weights) - 1)]
            return torch.optim.SGD([{"params": [w], "lr": lr} for w, lr in zip(weights, rates, strict=True)], 0.1)

        return optimizer

    found = {}
    for factors in ((1, 0), (0, 1), (10, 1), (1, 1)):
        model, optimizer, handle = attached(make(factors))
        step(model, optimizer, 0)
        found[factors] = scale_of(handle)
    low, high = sorted((found[1, 0], found[0, 1]))
    assert low < found[1, 1] < high
    assert abs(found[10, 1] - found[1, 0]) < abs(found[1, 1] - found[1, 0])


def test_what_is_not_finite_is_left_out():
    model, optimizer, handle = attached(sgd)
    step(model, optimizer, 0)
    before = scale_of(handle)
    step(model, optimizer, 1)
    first = model.get_submodule(handle.names[0])
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(torch.randn(16, *INPUT)), torch.zeros(16, dtype=torch.int64)).backward()
    first.weight.grad.fill_(float("nan"))
    optimizer.step()
    assert (
        math.isfinite(scale_of_others(handle, handle.names[0])) and scale_of_others(handle, handle.names[0]) != before
    )


INPUT = (3, 8, 8)


def scale_of_others(handle, name):
    values = {float(c) for group in handle._groups for c in group.sides.scale if name not in group.names}
    assert len(values) == 1
    return values.pop()


def test_adamws_second_moment_does_not_see_the_scale():
    """Two runs with the same gradients, one with the scale: Adam's averages are equal to the bit."""
    states = []
    for graft in (True, False):
        model, optimizer, handle = attached(
            lambda m: torch.optim.AdamW(m.parameters(), 1e-3), DecorConfig(every=2, sample=1.0, graft=graft)
        )
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            model(torch.randn(16, *INPUT, generator=generator))
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        assert not graft or abs(scale_of(handle) - 1) > 1e-3
        states.append(optimizer.state[model[0].weight]["exp_avg_sq"].clone())  # whose inputs, and so R, are the same
    assert torch.equal(*states)


def test_sgds_momentum_joins_a_change_of_the_scale():
    """Momentum is c' / c times what it is without a scale: W's momentum stays what it is."""
    momenta, c = [], 1.0
    for graft in (True, False):
        model, optimizer, handle = attached(
            lambda m: sgd(m, momentum=0.9), DecorConfig(every=100, sample=1.0, graft=graft)
        )
        step(model, optimizer, 0)
        momenta.append([optimizer.state[model.get_submodule(n).weight]["momentum_buffer"] for n in handle.names])
        c = scale_of(handle) if graft else c  # of the first
    assert abs(c - 1) > 0.05
    for scaled, bare in zip(*momenta, strict=True):
        torch.testing.assert_close(scaled, c * bare)


def test_it_goes_on_with_a_checkpoint_and_begins_anew_with_a_loaded_r(tmp_path):
    model, optimizer, handle = attached(sgd)
    for i in range(5):
        step(model, optimizer, i)
    saved, weights = optimizer.state_dict(), model.state_dict()
    assert "step_scale" in saved["timm_decor"]["layers"][handle.names[0]]["r"]
    again, other, second = attached(sgd, seed=1)
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    assert scale_of(second) == scale_of(handle) != 1
    for i in range(5, 8):
        assert step(model, optimizer, i) == step(again, other, i)

    handle.save_r(tmp_path / "r.safetensors")
    fresh, third, loaded = attached(sgd, seed=2)
    loaded.load_r(tmp_path / "r.safetensors")
    assert scale_of(loaded) == 1
    step(fresh, third, 0)
    assert scale_of(loaded) != 1


def test_a_state_without_the_scale_is_refused():
    """Its learning rate was another one's."""
    _, optimizer, _ = attached(sgd, DecorConfig(every=2, sample=1.0, graft=False))
    _, other, _ = attached(sgd)
    with pytest.raises(ValueError, match="graft False, this run uses True"):
        other.load_state_dict(optimizer.state_dict())
