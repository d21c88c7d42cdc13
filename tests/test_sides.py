"""The output side, and centred statistics: where they are, where they are not, and what they do with trouble."""

import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils.model import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch import nn

import timm_decor
from timm_decor import DecorConfig
from timm_decor.convert import norms_behind
from timm_decor.engine import group as group_module
from timm_decor.moments import OUTPUT_MOMENT, gradient_moment, looked_at, mean_moment
from timm_decor.plan import plan
from timm_decor.shape import LayerShape
from timm_decor.structures import OutputL

CONFIG = DecorConfig(every=2, sample=1.0, output_every=1)


def attached(opt="sgd", config=CONFIG, name="test_resnet"):
    torch.manual_seed(0)
    model = timm_decor.decorrelate(timm.create_model(name, num_classes=5), config)
    optimizer = timm.optim.create_optimizer_v2(model, opt=opt, lr=0.05)
    return model, optimizer, timm_decor.attach(model, optimizer)


def step(model, optimizer, seed=0, images=6):
    x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) + 0.5
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), torch.arange(images) % 5)
    loss.backward()
    optimizer.step()
    return loss.item()


def has_outputs(config, shape):
    return plan(config, shape, torch.float32).outputs


def two_sided(group):
    return isinstance(group.sides.outputs, OutputL)


def sides_of(handle):
    return {two_sided(group) for group in handle._groups if has_outputs(CONFIG, group.plan.shape)}


@pytest.mark.parametrize(
    "opt,config,both",
    [
        ("sgd", CONFIG, True),
        ("adamw", CONFIG, False),
        ("muon", CONFIG, False),
        ("adamw", DecorConfig(sides="both"), True),
        ("sgd", DecorConfig(sides="input"), False),
        ("sgd", DecorConfig(rule="dbp", structure="full"), False),
        ("sgd", DecorConfig(rule="dbp", structure="full", sides="both"), True),
    ],
)
def test_which_sides_auto_takes(opt, config, both):
    _, optimizer, handle = attached(opt, config)
    assert sides_of(handle) == {both}
    assert any(row.structure.endswith("+ outputs") for row in handle.report().rows) == both
    assert handle.config.sides == ("both" if both else "input")
    assert any("output_basis" in entry["r"] for entry in handle.state()["layers"].values()) == both


def test_a_layer_with_many_more_outputs_than_inputs_has_none():
    assert has_outputs(CONFIG, LayerShape(1, 8, 1, 16))
    assert not has_outputs(CONFIG, LayerShape(1, 8, 1, 17))
    assert not has_outputs(CONFIG, LayerShape(1, 64, 9, 1)), "one output has nothing to be correlated with"
    assert not has_outputs(DecorConfig(max_dim=512), LayerShape(1, 512, 1, 513))


def test_outputs_end_less_correlated():
    """L (moment) L^T of the errors is nearer to the identity than their moment."""
    model, optimizer, handle = attached(config=DecorConfig(every=1, output_every=1, output_damping=0.01, rank=64))
    for seed in range(6):
        step(model, optimizer, seed)
    for group in handle._groups:
        if two_sided(group):
            moment = group.moments[OUTPUT_MOMENT]
            left = group.sides.outputs.apply(torch.eye(group.plan.shape.outputs)[None, :, :, None])[..., 0]
            after = left @ moment @ left.mT

            def spread(m):
                values = torch.linalg.eigvalsh(m)
                return float(values[..., -1].max() / values.mean())

            assert spread(after) < 0.5 * spread(moment) or spread(moment) < 2, group.names


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 8), st.integers(0, 9))
def test_powers_of_l(groups, outputs, channels, positions, rank, seed):
    """`apply` is multiplication by U gain U^T + tail (1 - U U^T), and its powers are that matrix's."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    rank = min(rank, outputs)
    basis = torch.linalg.qr(random(groups, outputs, outputs)).Q[..., :rank]
    left = OutputL({"basis": basis, "gain": 0.5 + random(groups, rank), "tail": 0.5 + random(groups, 1)})
    span = basis @ basis.mT
    tail = left.tail[..., None] * (torch.eye(outputs, dtype=torch.float64) - span)
    matrix = basis @ torch.diag_embed(left.gain) @ basis.mT + tail
    w = random(groups, outputs, channels, positions)
    for power in (1, 2, -1):
        expected = torch.linalg.matrix_power(matrix, power) @ w.flatten(2)
        torch.testing.assert_close(left.apply(w, power), expected.view(w.shape))


def test_a_gradient_of_zero_or_overflow_is_no_opinion():
    rows = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [float("inf"), 0.0]], [[3e-20, 0.0], [0.0, 4e-20]]])
    moment = gradient_moment(rows[..., None])
    assert not torch.isfinite(moment[:2]).flatten(1).all(1).any()
    model, optimizer, handle = attached(config=DecorConfig(every=1, output_every=1))
    for parameter in model.layer1.parameters():
        parameter.register_hook(torch.zeros_like)
    step(model, optimizer)
    looked_at = {}
    for group in handle._groups:
        if two_sided(group):
            eye = torch.eye(group.plan.shape.outputs)
            looked_at[group.names[0]] = not torch.equal(group.moments[OUTPUT_MOMENT][0], eye)
            assert group.refreshes == [1], "R is refreshed all the same"
    assert not any(moved for name, moved in looked_at.items() if name.startswith("layer1"))
    assert looked_at["fc"], "the others are behind a norm whose weight timm starts at zero"


def test_the_scale_of_the_loss_does_not_matter():
    rows = torch.randn(2, 4, 9, 1, dtype=torch.float64)
    torch.testing.assert_close(gradient_moment(rows), gradient_moment(1e-12 * rows))
    torch.testing.assert_close(gradient_moment(rows).diagonal(dim1=1, dim2=2).mean(1), torch.ones(2).double())


def test_of_a_wide_gradient_some_channels_are_looked_at():
    shape, rows = LayerShape(2, 500, 9, 4), torch.randn(2, 4, 500, 9, dtype=torch.float64)
    some = rows[:, :, looked_at(shape)]
    assert some.shape[2:] == (63, 9), "at every position"
    full = gradient_moment(rows)
    assert 0.001 < (gradient_moment(some) - full).abs().max() < 0.3, "an estimate of all of them"
    assert looked_at(LayerShape(1, 64, 9, 4)) == slice(None, None, 1), "fewer are all looked at"


def test_a_layer_without_a_gradient_keeps_its_moment(monkeypatch):
    """Also in a batch of layers of equal shape, of which the others are looked at."""
    monkeypatch.setattr(group_module, "_STACKED_ELEMENTS", {})
    model = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))
    timm_decor.decorrelate(model, DecorConfig(every=1, output_every=1, sample=1.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (group,) = timm_decor.attach(model, optimizer)._groups
    (model[0](torch.randn(5, 6)) + model[2](torch.randn(5, 6))).square().sum().backward()
    optimizer.step()
    kept = [torch.equal(moment, torch.eye(4)) for moment in group.moments[OUTPUT_MOMENT]]
    assert kept == [False, True, False]


def test_a_state_of_other_sides_is_refused_in_a_resume():
    _, both, _ = attached()
    _, one, _ = attached(config=DecorConfig(sides="input"))
    with pytest.raises(ValueError, match="of sides 'both', this run uses 'input'"):
        one.load_state_dict(both.state_dict())


@pytest.mark.parametrize("opts", [("sgd", "adamw"), ("adamw", "sgd")])
def test_r_of_a_file_with_other_sides_is_taken(opts, tmp_path):
    """SGD's file has an L that AdamW leaves, AdamW's none: SGD starts from L = I."""
    model, optimizer, handle = attached(opts[0])
    for seed in range(3):
        step(model, optimizer, seed)
    handle.save_r(tmp_path / "decor.safetensors")
    other, its_optimizer, its_handle = attached(opts[1])
    its_handle.load_r(tmp_path / "decor.safetensors")
    for name, entry in handle.state()["layers"].items():
        taken = its_handle.state()["layers"][name]
        for key, value in taken["r"].items():
            if key.startswith("output_"):
                assert key not in entry["r"]
            elif key == "step_scale":
                assert torch.equal(value, torch.ones_like(value))  # measured anew
            else:
                assert torch.equal(value, entry["r"][key])
    assert step(other, its_optimizer) > 0


@pytest.mark.parametrize("structure", ["kronecker", "full", "space"])
def test_r_of_another_number_of_groups_is_refused(structure, tmp_path):
    """Their weights can have one shape: (8, 2, 3, 3) is of four channels in two groups, or of eight in four."""

    def bound(groups):
        model = timm_decor.decorrelate(
            nn.Sequential(nn.Conv2d(2 * groups, 8, 3, groups=groups)), DecorConfig(every=1, structure=structure)
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return model, optimizer, timm_decor.attach(model, optimizer)

    model, optimizer, handle = bound(2)
    model(torch.randn(4, 4, 6, 6)).square().mean().backward()
    optimizer.step()
    handle.save_r(tmp_path / "decor.safetensors")
    other, _, its_handle = bound(4)
    if structure == "space":  # one for all groups
        its_handle.load_r(tmp_path / "decor.safetensors")
        return
    with pytest.raises(ValueError, match="the saved R has 2 groups for layer 0, which has 4"):
        its_handle.load_r(tmp_path / "decor.safetensors")


def test_norms_behind_the_layers_of_timms_models():
    def names(name):
        model = timm_decor.decorrelate(timm.create_model(name))
        found, modules = norms_behind(model), {module: name for name, module in model.named_modules()}
        return {modules[layer]: modules[norm] for layer, norm in found.items()}

    resnet = names("resnet18")
    assert len(resnet) == 20, "every convolution, not the head"
    assert resnet["layer2.0.downsample.0"] == "layer2.0.downsample.1"
    assert resnet["layer1.1.conv2"] == "layer1.1.bn2"
    assert names("test_efficientnet")["blocks.1.0.conv_exp"] == "blocks.1.0.bn1"
    assert names("test_resnet")["conv1.6"] == "bn1", "behind a Sequential's end"
    assert not names("test_vit") and not names("test_convnext"), "LayerNorm takes no mean over the batch away"
    order = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    assert not norms_behind(timm_decor.decorrelate(order))


@pytest.mark.parametrize(
    "name", ["resnet18", "regnety_002", "densenet121", "mobilenetv3_small_050", "efficientnet_b0", "vgg11_bn"]
)
def test_errors_in_front_of_a_norm_add_up_to_zero(name):
    """What centring rests on, in every family that has a BatchNorm; a head's do not."""
    torch.manual_seed(0)
    model = timm_decor.decorrelate(timm.create_model(name, num_classes=5, drop_rate=0)).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # timm starts some of them at zero: no error would come through
    errors = {}

    def listen(layer, _, out):
        out.register_hook(lambda error: errors.__setitem__(layer, error))

    found = norms_behind(model)
    for layer in found:
        layer.register_forward_hook(listen)
    model.get_classifier().register_forward_hook(listen)
    F.cross_entropy(model(torch.randn(4, 3, 64, 64).double()), torch.arange(4)).backward()

    def share(layer):
        error = errors[layer].transpose(0, 1).flatten(1)
        return float((error.sum(1).abs() / error.abs().sum(1).clamp_min(1e-300)).max())

    assert bool(found) == (name != "vgg11_bn"), "its convolutions have biases"
    assert all(share(layer) < 1e-6 for layer in found)
    assert share(model.get_classifier()) > 1e-2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
def test_a_centred_moment_is_that_of_centred_rows(groups, channels, positions, seed):
    shape = LayerShape(groups, channels, positions, 2)
    rows = torch.randn(groups, 20, channels, positions, generator=torch.manual_seed(seed), dtype=torch.float64) + 1

    def moments(rows):
        whole = torch.einsum("gncs,gndt->gcsdt", rows, rows) / rows.shape[1]
        space = torch.einsum("gcsct->gst", whole) / channels
        return {
            "channel": torch.einsum("gcsds->gcd", whole) / positions,
            "space": space,
            "shared_space": space.mean(0, keepdim=True),
            "patch": whole.reshape(groups, channels * positions, -1),
        }

    mean = rows.mean(1, keepdim=True)
    plain, centred = moments(rows), moments(rows - mean)
    for name, moment in plain.items():
        if positions > 1 or "space" not in name:
            torch.testing.assert_close(moment - mean_moment(name, mean.flatten(2), shape), centred[name])


def test_a_frozen_norm_is_not_centred_for():
    """Its statistics are not the batch's, so that the gradient does see the mean."""

    def moments(frozen, center):
        config = DecorConfig(every=1, sample=1.0, structure="full", center=center)
        model, optimizer, handle = attached(config=config)
        model.train()
        if frozen:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        step(model, optimizer)
        return handle._groups[1].moments["patch"]

    assert torch.equal(moments(frozen=True, center=True), moments(frozen=True, center=False))
    assert not torch.allclose(moments(frozen=False, center=True), moments(frozen=False, center=False))


def test_norms_are_those_of_the_model_as_it_is_now():
    """timm's own way to freeze one puts another module in its place, and back."""

    def moments(before, after, center):
        config = DecorConfig(every=1, sample=1.0, structure="full", center=center)
        torch.manual_seed(0)
        model = timm_decor.decorrelate(timm.create_model("test_resnet", num_classes=5), config)
        before(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        handle = timm_decor.attach(model, optimizer)
        after(model)
        for seed in range(2):  # for the first, the means of a norm that came later were not recorded
            step(model, optimizer, seed)
        return handle._groups[1].moments["patch"]

    frozen = [moments(lambda model: None, freeze_batch_norm_2d, center) for center in (True, False)]
    assert torch.equal(*frozen)
    thawed = [moments(freeze_batch_norm_2d, unfreeze_batch_norm_2d, center) for center in (True, False)]
    assert not torch.allclose(*thawed)


def test_inputs_that_never_vary_keep_their_r(caplog):
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    timm_decor.decorrelate(model, DecorConfig(every=1, sample=1.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = timm_decor.attach(model, optimizer)
    with caplog.at_level(logging.WARNING):
        F.cross_entropy(model(torch.ones(4, 2, 2, 2)), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
    assert handle.report().rows[0].skips == 1
    assert "layer 0: refresh of R skipped: the layer's inputs are all zero, or all the same" in caplog.text


@pytest.mark.parametrize("values,words", [
    ({"sides": "bth"}, "unknown side 'bth'; did you mean 'both'"),
    ({"output_damping": 0.0}, "output_damping=0.0: must be above zero"),
    ({"output_every": 0}, "output_every=0"),
    ({"output_decay": 1.0}, "output_decay=1.0"),
])  # fmt: skip
def test_bad_values_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        DecorConfig(**values)
