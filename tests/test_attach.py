"""attach: the life of a handle, its state in checkpoints, and what it does with trouble."""

import copy
import io
import logging

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import timm_decor
from timm_decor import DecorConfig
from timm_decor import moments as moments_module
from timm_decor.engine import group as group_module
from timm_decor.shape import LayerShape
from timm_decor.structures import STRUCTURES

CONFIG = DecorConfig(every=2, sample=1.0)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, 2), nn.Flatten(), nn.Linear(36, 3)
    )
    return model.to(dtype)


def batch(seed, images=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, 8, 8, generator=generator, dtype=dtype) + 0.5, torch.arange(images) % 3


def step(model, optimizer, seed, **kwargs):
    x, y = batch(seed, **kwargs)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def attached(config=CONFIG, lr=0.1, opt="sgd", **kwargs):
    """Model, optimizer and handle. SGD steps in linear coordinates, AdamW in latent ones: see coordinates.py."""
    model = timm_decor.decorrelate(net(**kwargs), config)
    if opt.startswith("sgd"):
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.0 if opt == "sgd without momentum" else 0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 0.1 * lr)
    return model, optimizer, timm_decor.attach(model, optimizer)


def test_decorrelation_lowers_the_correlation_of_layer_inputs():
    model, optimizer, handle = attached(DecorConfig(every=1, damping=0.01))
    assert handle.report().mean_correlation() is None
    for seed in range(10):
        step(model, optimizer, seed)
    before, after = handle.report().mean_correlation()
    assert after < 0.5 * before
    text = str(handle.report())
    assert "after 10 steps" in text and all(row.name in text for row in handle.report().rows)


class NoOperation(TorchDispatchMode):
    """Nothing is asked of a device in here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


def test_a_handle_tells_of_itself_without_asking_the_device():
    model, optimizer, handle = attached(DecorConfig(every=3))

    def told():
        with NoOperation():
            return str(handle).splitlines()

    head, how, done, more = told()
    assert head == "DecorHandle of SGD" and "report()" in more
    assert how == "  3 layers, inputs and outputs decorrelated: rule whiten, structure rank 32 kronecker"
    assert done == "  0 steps; no refresh of R yet (every 3); 0 of 0 refreshes skipped"
    for seed, last in enumerate((1, 1, 1, 4, 4)):
        step(model, optimizer, seed)
        assert f"R last refreshed in step {last} (every 3)" in told()[2]
    assert told()[2].startswith("  5 steps; ") and told()[2].endswith("; 0 of 6 refreshes skipped")
    x, y = batch(0)
    for _ in range(3):  # inputs that are all zero: the third of these steps is one with a refresh
        optimizer.zero_grad()
        F.cross_entropy(model(0 * x), y).backward()
        optimizer.step()
    skips = sum(row.skips for row in handle.report().rows)
    assert skips and told()[2].endswith(f"; {skips} of 9 refreshes skipped")
    handle.detach()
    assert told()[0] == "DecorHandle of SGD (detached)"
    _, _, other = attached(DecorConfig(rule="dbp", structure="full", every=1), opt="adamw")
    assert str(other).splitlines()[:2] == [
        "DecorHandle of AdamW", "  3 layers, inputs decorrelated: rule dbp, structure full",
    ]  # fmt: skip
    assert "(each step)" in str(other)


def dense_moment(moments):
    """<x x^T> of the whole patch, (g, D, D)."""
    if "channel" not in moments:
        return next(iter(moments.values()))
    return torch.stack([torch.kron(c, s) for c, s in zip(moments["channel"], moments["space"], strict=True)])


def test_large_layers_are_reported_from_some_of_their_entries(monkeypatch):
    """Their D x D moment is never formed (VGG's first head has D = 25 088); the entries looked at are the same."""
    monkeypatch.setattr(moments_module, "REPORTED_ENTRIES", 12)
    for structure in ("full", "kronecker"):
        model, optimizer, handle = attached(DecorConfig(structure=structure, every=1))
        step(model, optimizer, seed=0)
        for group in handle._groups:
            sigma, r = dense_moment(group.moments), group.sides.inputs.dense()
            index = moments_module.reported_entries(sigma.shape[-1], sigma.device)
            assert len(index.unique()) == min(12, sigma.shape[-1])
            for ours, whole in (
                (group.sides.inputs.input_moment(group.moments), sigma),
                (group.sides.inputs.output_moment(group.moments), r @ sigma @ r.mT),
            ):
                torch.testing.assert_close(ours, whole[:, index][..., index])


def test_reported_correlation_is_that_of_the_explicit_inputs():
    """For every structure: from R's dense form and the moments' dense form, entry by entry."""
    from timm_decor.moments import mean_correlation

    for structure, rule in (("full", "whiten"), ("kronecker", "whiten"), ("space", "whiten"), ("full", "crgd")):
        model, optimizer, handle = attached(DecorConfig(structure=structure, rule=rule, every=1))
        for seed in range(3):
            step(model, optimizer, seed)
        for group, row in zip(handle._groups, handle.report().rows, strict=True):
            sigma = dense_moment(group.moments)
            if (mean := group.moments.get("patch_mean")) is not None:
                assert rule == "crgd"
                sigma = sigma - mean.mT @ mean
            own = group.sides.inputs
            r = own.matrix if structure == "space" else own.dense()
            assert row.correlation_before == pytest.approx(mean_correlation(sigma), rel=1e-4)
            assert row.correlation_after == pytest.approx(mean_correlation(r @ sigma @ r.mT), rel=1e-3)
            assert row.condition == pytest.approx(float(torch.linalg.cond(r).max()), rel=1e-3)


def test_detach_makes_steps_plain_again():
    model, optimizer, handle = attached()
    for seed in range(3):
        step(model, optimizer, seed)
    handle.detach()
    handle.detach()
    assert "timm_decor" not in optimizer.state_dict()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    twin_optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    for seed in range(3):
        assert step(model, optimizer, seed) == step(twin, twin_optimizer, seed)
    timm_decor.attach(model, optimizer)  # and it can be attached again


@pytest.mark.parametrize("structure", ["full", "kronecker", "space"])
@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_resume_is_exact_to_the_bit(structure, weights_first, opt):
    config = DecorConfig(structure=structure, every=3, sample=1.0)
    model, optimizer, _ = attached(config, opt=opt)
    for seed in range(5):
        step(model, optimizer, seed)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = [step(model, optimizer, seed) for seed in range(5, 12)]

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, resumed_optimizer, handle = attached(config, opt=opt)
    if weights_first:
        resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    if not weights_first:
        resumed.load_state_dict(saved["model"])
    assert handle.step == 5
    assert [step(resumed, resumed_optimizer, seed) for seed in range(5, 12)] == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_saving_does_not_change_training(opt):
    model, optimizer, _ = attached(opt=opt)
    twin, twin_optimizer, _ = attached(opt=opt)
    for seed in range(4):
        optimizer.state_dict()
        assert step(model, optimizer, seed) == step(twin, twin_optimizer, seed)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_weights_written_from_outside_are_kept(opt):
    """A checkpoint loaded in mid-training is what trains on: W follows the weight, not the other way round."""
    model, optimizer, _ = attached(lr=0.0, opt=opt)
    for seed in range(3):
        step(model, optimizer, seed)
    loaded = {key: value + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(loaded)
    step(model, optimizer, 3)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, loaded[key], rtol=1e-4, atol=1e-5)


def test_state_of_another_structure_or_model_is_refused():
    _, optimizer, _ = attached()
    saved = optimizer.state_dict()
    _, other, _ = attached(DecorConfig(structure="space"))
    with pytest.raises(ValueError, match="of structure 'kronecker', this run uses 'space'"):
        other.load_state_dict(saved)
    model, optimizer, _ = attached()
    saved["timm_decor"]["layers"]["0"]["shape"] = [2, 3, 3, 3]
    with pytest.raises(ValueError, match=r"shape \[2, 3, 3, 3\] for layer 0"):
        optimizer.load_state_dict(saved)


def test_plain_optimizer_state_makes_r_start_anew(caplog):
    model, optimizer, handle = attached()
    plain = torch.optim.SGD(net().parameters(), 0.1, momentum=0.9).state_dict()
    step(model, optimizer, 0)
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(plain)
    assert "no decorrelation state" in caplog.text
    assert handle.step == 0 and all(row.condition == 1 and not row.refreshes for row in handle.report().rows)


def test_attach_refuses_what_cannot_work():
    model, optimizer, handle = attached()
    with pytest.raises(ValueError, match="already attached"):
        timm_decor.attach(model, optimizer)
    with pytest.raises(ValueError, match="already attached"):
        timm_decor.attach(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="call timm_decor.decorrelate"):
        timm_decor.attach(net(), torch.optim.SGD(net().parameters(), 0.1))
    other = timm_decor.decorrelate(net())
    with pytest.raises(ValueError, match="does not hold the weight of 0 and 2 more layers"):
        timm_decor.attach(other, torch.optim.SGD(net().parameters(), 0.1))
    other.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        timm_decor.attach(other, torch.optim.SGD(net().parameters(), 0.1))
    with pytest.raises(ValueError, match="not a torch.optim.Optimizer"):
        timm_decor.attach(other, object())


def test_frozen_layers_and_layers_without_gradient_do_not_move():
    model = timm_decor.decorrelate(net(), CONFIG)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    handle = timm_decor.attach(model, optimizer)
    assert [row.name for row in handle.report().rows] == ["2", "4"]
    before = model[0].weight.detach().clone()
    step(model, optimizer, 0)
    model[2].requires_grad_(False)  # from now on it gets no gradient
    frozen = model[2].weight.detach().clone()
    for seed in range(1, 5):
        step(model, optimizer, seed)
    assert torch.equal(model[0].weight, before) and torch.equal(model[2].weight, frozen)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("opt", ["sgd", "sgd without momentum", "adamw"])
def test_unusable_statistics_skip_the_refresh_and_are_named(value, opt, caplog):
    """The refresh is skipped, counted and reported; R and the function of the other layers are as they were."""
    model, optimizer, handle = attached(DecorConfig(every=1), lr=1e-4, opt=opt)
    step(model, optimizer, 0)
    before = copy.deepcopy(optimizer.state_dict()["timm_decor"]["layers"]["0"]["r"])
    x, y = batch(1)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model[0].start_recording(handle._groups[0]._recorded, 1.0)  # forget those of the good batch
    model[0](torch.full_like(x, value))
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    row = handle.report().rows[0]
    assert (row.refreshes, row.skips) == (1, 1)
    assert "step 1, layer 0: refresh of R skipped" in caplog.text
    after = optimizer.state_dict()["timm_decor"]["layers"]["0"]["r"]
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed <= {"step_scale"}  # which is the network's, measured with the other layers
    assert all(torch.isfinite(p).all() for p in model.parameters())
    step(model, optimizer, 2)
    assert handle.report().rows[0].refreshes == 2


@pytest.mark.parametrize("opt", ["sgd without momentum", "adamw"])
@pytest.mark.parametrize("structure", ["full", "kronecker", "space"])
def test_one_layer_of_a_batch_that_skips_does_not_hold_up_the_others(structure, opt, monkeypatch):
    """Three grouped convolutions of equal shape are one batch; the second sees only zeros."""
    monkeypatch.setattr(group_module, "_STACKED_ELEMENTS", {})

    def train(names):
        torch.manual_seed(0)
        layers = {name: nn.Conv2d(4, 4, 3, padding=1, groups=2) for name in ("first", "dead", "last")}
        model = nn.ModuleDict({name: layers[name] for name in names}).double()
        timm_decor.decorrelate(model, DecorConfig(structure=structure, every=1, sample=1.0))
        make = torch.optim.AdamW if opt == "adamw" else torch.optim.SGD
        optimizer = make(model.parameters(), 0.01)
        handle = timm_decor.attach(model, optimizer)
        assert len(handle._groups) == 1
        for seed in range(3):
            x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).double() + 0.5
            optimizer.zero_grad()
            sum(model[name](x * (name != "dead")).square().mean() for name in names).backward()
            optimizer.step()
        return model, {row.name: (row.refreshes, row.skips) for row in handle.report().rows}

    model, counts = train(("first", "dead", "last"))
    assert counts == {"first": (3, 0), "dead": (0, 3), "last": (3, 0)}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    alone, _ = train(("first", "last"))
    for name in ("first", "last"):
        torch.testing.assert_close(model[name].weight, alone[name].weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", ["full", "kronecker"])
def test_one_group_that_is_dead_does_not_hold_up_the_others(structure):
    """Channels that are always zero, in a grouped convolution: its other groups have an R of what they see."""

    def train(groups, dead):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2 * groups, 4 * groups, 3, groups=groups, bias=False)).double()
        with torch.no_grad():
            model[0].weight[:4].copy_(torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1)))
        timm_decor.decorrelate(model, DecorConfig(structure=structure, every=1, sample=1.0, sides="input", graft=False))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        handle = timm_decor.attach(model, optimizer)
        for seed in range(4):
            x = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(seed)).double() + 0.5
            if dead:
                x = torch.cat([x, torch.zeros_like(x) if seed in dead else x.flip(1)], 1)
            optimizer.zero_grad()
            model(x)[:, :4].square().mean().backward()
            optimizer.step()
        return model[0].weight.detach(), handle

    weight, handle = train(2, dead=(0, 1))  # alive later
    assert [(row.refreshes, row.skips) for row in handle.report().rows] == [(4, 0)]
    alone, _ = train(1, dead=())
    torch.testing.assert_close(weight[:4], alone, rtol=1e-9, atol=1e-12)
    _, handle = train(2, dead=(0, 1, 2, 3))
    identity = handle._groups[0].sides.inputs.dense()[1]
    torch.testing.assert_close(identity / identity[0, 0], torch.eye(18, dtype=torch.float64), rtol=0, atol=1e-3)


def test_gradient_accumulation_sees_every_micro_batch():
    model, optimizer, _ = attached(dtype=torch.float64)
    twin, twin_optimizer, _ = attached(dtype=torch.float64)
    for seed in range(4):
        x, y = batch(seed, dtype=torch.float64)
        optimizer.zero_grad()
        for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
            (F.cross_entropy(model(x[part]), y[part]) / 3).backward()
        optimizer.step()
        step(twin, twin_optimizer, seed, dtype=torch.float64)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    """A recomputed forward is recorded as one, or twice with twice the rows: the averages stay."""

    class Checkpointed(nn.Sequential):
        def forward(self, x):
            body, head = nn.Sequential(*list(self)[:3]), nn.Sequential(*list(self)[3:])
            return head(checkpoint(body, x.requires_grad_(), use_reentrant=use_reentrant))

    model, optimizer, _ = attached(dtype=torch.float64)
    twin, twin_optimizer, handle = attached(dtype=torch.float64)
    twin.__class__ = Checkpointed
    for seed in range(5):
        expected = step(model, optimizer, seed, dtype=torch.float64)
        assert step(twin, twin_optimizer, seed, dtype=torch.float64) == pytest.approx(expected, rel=1e-10)
    assert all(row.refreshes == 3 for row in handle.report().rows)


def test_ema_averages_the_plain_kernels():
    model, optimizer, handle = attached()
    ema = ModelEmaV3(model, decay=0.5)
    mean = copy.deepcopy(model[0].weight.detach())
    for seed in range(3):
        step(model, optimizer, seed)
        ema.update(model)
        mean.lerp_(model[0].weight.detach(), 0.5)
    torch.testing.assert_close(ema.module[0].weight, mean)
    assert handle.report().step == 3


def test_lookahead_and_accelerate_wrappers():
    model = timm_decor.decorrelate(net(), CONFIG)
    optimizer = timm.optim.create_optimizer_v2(model, "lookahead_sgd", lr=0.1)
    timm_decor.attach(model, optimizer)
    losses = [step(model, optimizer, 0) for _ in range(20)]
    assert losses[-1] < losses[0] / 2

    accelerate = pytest.importorskip("accelerate")
    model = timm_decor.decorrelate(net(), CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    prepared, wrapped = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    handle = timm_decor.attach(prepared, wrapped)
    step(prepared, wrapped, 0)
    assert handle.step == 1 and "timm_decor" in wrapped.state_dict()


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_channels_last_changes_nothing(opt):
    model, optimizer, _ = attached(dtype=torch.float64, opt=opt)
    twin, twin_optimizer, _ = attached(dtype=torch.float64, opt=opt)
    twin.to(memory_format=torch.channels_last)
    assert twin[0].weight.is_contiguous(memory_format=torch.channels_last)
    for seed in range(5):
        expected = step(model, optimizer, seed, dtype=torch.float64)
        assert step(twin, twin_optimizer, seed, dtype=torch.float64) == pytest.approx(expected, rel=1e-10)


def test_bfloat16_weights_and_autocast():
    model, optimizer, handle = attached(dtype=torch.bfloat16, lr=0.02)
    losses = [step(model, optimizer, 0, dtype=torch.bfloat16) for _ in range(20)]
    assert losses[-1] < losses[0]
    model, optimizer, handle = attached()
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # the step inside it, too: R's products stay in float32
            losses.append(step(model, optimizer, 0))
    assert losses[-1] < losses[0] / 2
    assert all(t.dtype == torch.float32 for t in handle._groups[0].sides.tensors().values())


def test_a_compiled_model_trains_the_same():
    model, optimizer, _ = attached()
    twin = timm_decor.decorrelate(net(), CONFIG)
    twin_optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    compiled = torch.compile(twin, backend="aot_eager")
    handle = timm_decor.attach(compiled, twin_optimizer)
    for seed in range(5):
        assert step(compiled, twin_optimizer, seed) == pytest.approx(step(model, optimizer, seed), rel=1e-4)
    assert [row.name for row in handle.report().rows] == ["0", "2", "4"]


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="recording breaks the graph there, see layers.py")
def test_a_compiled_forward_has_no_graph_break_and_does_not_recompile():
    """Recording comes and goes, statistics change: two graphs, made in the first steps, serve them all."""
    import torch._dynamo.config as dynamo

    model = timm_decor.decorrelate(net(), DecorConfig(every=3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    handle = timm_decor.attach(compiled, optimizer)
    with dynamo.patch(error_on_recompile=False):
        for seed in range(5):
            step(compiled, optimizer, seed)
    with dynamo.patch(error_on_recompile=True):
        for seed in range(5, 14):
            step(compiled, optimizer, seed)
    assert all(row.refreshes == 5 for row in handle.report().rows)


def test_moments_of_one_row_do_not_defeat_the_eigendecomposition():
    """float32's eigh fails on some 512 x 512 matrices of rank 1, which is what a batch of one 1x1 map gives."""
    for seed in range(8):
        x = torch.randn(512, 1, generator=torch.Generator().manual_seed(seed)).relu()
        r = STRUCTURES["kronecker"].identity(LayerShape(1, 512, 1, 8), 4, torch.empty(0), False)
        r = r.whitened({"channel": (x @ x.T)[None], "space": torch.ones(1, 1, 1)}, damping=1.0)
        leading = r.tensors()["channel_basis"][0, :, -1] @ (x[:, 0] / x.norm())
        assert abs(leading) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_gradients_are_autograds_own_after_the_step(opt):
    model, optimizer, _ = attached(DecorConfig(every=1), opt=opt)
    for seed in range(3):
        x, y = batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
        optimizer.step()
        for p, (tensor, values) in zip(model.parameters(), gradients, strict=True):
            assert p.grad is tensor and torch.equal(tensor, values)


@pytest.mark.skipif(torch.__version__ < (2, 4), reason="this torch fuses on GPUs alone")
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam])
def test_gradients_are_what_a_fused_optimizer_makes_of_them(make, found):
    """It divides them by the gradient scaler's scale in place: who logs their norm after the step sees one unit."""
    left = []
    for plain in (True, False):
        model = net()
        optimizer = make(model.parameters(), 0.01, fused=True)
        if not plain:
            timm_decor.attach(timm_decor.decorrelate(model, DecorConfig(every=1)), optimizer)
        x, y = batch(0)
        (512 * F.cross_entropy(model(x), y)).backward()
        optimizer.grad_scale = torch.full((), 512.0)
        if found is not None:
            optimizer.found_inf = torch.full((), found)
        optimizer.step()
        left.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*left, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam])
def test_gradients_that_the_optimizer_drops_are_gone(kind):
    class Dropping(kind):
        @torch.no_grad()
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    model = timm_decor.decorrelate(net(), DecorConfig(every=1))
    optimizer = Dropping(model.parameters(), 0.01)
    timm_decor.attach(model, optimizer)
    step(model, optimizer, 0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_step_that_fails_leaves_weights_and_gradients(opt, caplog):
    """The optimizer raises half-way: what follows is as if that step had not been tried."""
    model, optimizer, handle = attached(DecorConfig(every=1), opt=opt)
    twin, twin_optimizer, _ = attached(DecorConfig(every=1), opt=opt)
    for seed in range(3):
        step(model, optimizer, seed)
        step(twin, twin_optimizer, seed)
    name = "momentum" if opt == "sgd" else "betas"
    value = optimizer.param_groups[0].pop(name)
    with pytest.raises(KeyError):
        step(model, optimizer, 3)
    optimizer.param_groups[0][name] = value
    handle.report()
    assert "step 3 did not end" in caplog.text
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_singular_r_is_a_skip_and_not_a_crash(caplog):
    """dbp with a huge step can make R singular: W = A R^-1 does not exist then."""
    model, optimizer, handle = attached(DecorConfig(rule="dbp", structure="full", every=1), opt="adamw", lr=1e-9)
    step(model, optimizer, 0)
    before = model[0].weight.detach().clone()
    group = handle._groups[0]
    group.refreshed = lambda moments, index=None: {n: torch.zeros_like(t) for n, t in group.sides.tensors().items()}
    step(model, optimizer, 1)
    assert handle.report().rows[0].skips == 1 and "layer 0: refresh of R skipped: R is" in caplog.text
    torch.testing.assert_close(model[0].weight.detach(), before)


def test_a_batch_that_overflows_does_not_spoil_the_others():
    """What a gradient scaler skips: the step is not taken, and its inputs do not count."""
    model, optimizer, _ = attached(DecorConfig(every=2))
    twin, twin_optimizer, _ = attached(DecorConfig(every=2))
    x, y = batch(9)
    model(torch.full_like(x, float("inf")))
    assert float(model[0].rows) == 0
    for seed in range(3):
        assert step(model, optimizer, seed) == step(twin, twin_optimizer, seed)


def test_empty_and_unbatched_inputs():
    model, _, _ = attached()
    model[0](torch.randn(0, 3, 8, 8))
    model[4](torch.randn(0, 36))
    assert float(model[0].rows) == 0
    model[0](torch.randn(3, 8, 8))
    model[4](torch.randn(36))
    assert (float(model[0].rows), float(model[4].rows)) == (64, 1)


def test_copies_do_not_record():
    model, _, _ = attached()
    assert model[0].recording
    twin = copy.deepcopy(model)
    twin(batch(0)[0])
    assert not twin[0].recording and "moments" not in vars(twin[0])


def test_a_dropped_optimizer_lets_go_of_the_model():
    """The cell of a notebook, run twice."""
    model, optimizer, _ = attached()
    del optimizer, _
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    timm_decor.attach(model, optimizer)
    step(model, optimizer, 0)


def test_optimizers_that_cannot_be_are_refused():
    model = timm_decor.decorrelate(net(), CONFIG)
    for name, words in (("madgrad", "keeps a copy of the weights"), ("adahessian", "differentiates the gradient")):
        with pytest.raises(ValueError, match=words):
            timm_decor.attach(model, timm.optim.create_optimizer_v2(model, name, lr=0.1))
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        timm_decor.attach(nn.DataParallel(model), torch.optim.SGD(model.parameters(), 0.1))


def test_muon_is_attached_with_a_warning_and_others_without(caplog):
    """It gains nothing (README): who decorrelates it should know."""
    model = timm_decor.decorrelate(net())
    timm_decor.attach(model, timm.optim.create_optimizer_v2(model, "adamw", lr=0.01)).detach()
    assert not caplog.records
    timm_decor.attach(model, timm.optim.create_optimizer_v2(model, "muon", lr=0.01))
    assert "compare it with plain training" in caplog.text


def test_state_of_another_optimizer_or_rule_is_refused():
    _, sgd, _ = attached()
    _, adamw, handle = attached(opt="adamw")
    with pytest.raises(ValueError, match="not that of a AdamW"):
        adamw.load_state_dict(sgd.state_dict())
    _, dbp, _ = attached(DecorConfig(rule="dbp", structure="full"))
    _, whiten, _ = attached(DecorConfig(structure="full"))
    with pytest.raises(ValueError, match="of rule 'dbp', this run uses 'whiten'"):
        whiten.load_state_dict(dbp.state_dict())


def test_layers_in_eval_mode_are_named_as_such(caplog):
    model, optimizer, handle = attached(DecorConfig(every=1))
    model.eval()
    step(model, optimizer, 0)
    assert all(row.skips == 1 for row in handle.report().rows)
    assert "it saw no input in training mode" in caplog.text


class HostLooks(TorchDispatchMode):
    """Counts operations that wait for a GPU to tell the host a value."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.count += name in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_step_between_refreshes_never_waits_for_the_device(opt):
    """Seen from the operations, so that a machine without a GPU can tell; a refresh may look, its own algebra does."""
    model, optimizer, _ = attached(DecorConfig(every=4), opt=opt)
    plain = net()
    plain_optimizer = type(optimizer)(plain.parameters(), 0.1)
    looks = []
    for seed in range(8):
        for trained, its in ((model, optimizer), (plain, plain_optimizer)):
            x, y = batch(seed)
            loss = F.cross_entropy(trained(x), y)
            its.zero_grad()
            loss.backward()
            with HostLooks() as watch:
                its.step()
            looks.append(watch.count)
    decorrelated, plain_looks = looks[::2], looks[1::2]
    assert decorrelated[0] > plain_looks[0] and decorrelated[4] > plain_looks[4], (
        "the count would miss a refresh's look"
    )
    assert decorrelated[1:4] + decorrelated[5:] == plain_looks[1:4] + plain_looks[5:]


@pytest.mark.parametrize("value", [0.1, 0.5, 3.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_are_all_the_same_have_nothing_to_whiten(value, dtype, caplog):
    """Behind a BatchNorm their centred moment is zero, of which rounding leaves some noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5))
    timm_decor.decorrelate(model.to(dtype), DecorConfig(every=1, sample=1.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    handle = timm_decor.attach(model, optimizer)
    for _ in range(2):
        model(torch.full((8, 3, 6, 6), value, dtype=dtype)).square().mean().backward()
        optimizer.step()
    first = handle.report().rows[0]
    assert (first.refreshes, first.skips) == (0, 2) and "all zero, or all the same" in caplog.text
