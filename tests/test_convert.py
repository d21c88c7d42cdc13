"""decorrelate and to_plain: same Parameters, same function, and a reason for every layer that stays plain."""

import copy
import itertools

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from timm.layers import Linear as TimmLinear
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrizations import weight_norm

import timm_decor
from timm_decor import DecorConfig, DecorConv2d, DecorLinear
from timm_decor.convert import decor_layers


class OddConv(nn.Conv2d):
    """A subclass, as weight-standardised convolutions are."""


def small_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 36, 4))


def test_the_same_parameters_modules_and_function():
    model = small_net().eval()
    x = torch.randn(2, 3, 8, 8)
    before, parameters, modules = model(x), list(model.parameters()), list(model.modules())
    assert timm_decor.decorrelate(model) is model
    assert [type(m) for m in (model[0], model[2], model[4])] == [DecorConv2d, DecorConv2d, DecorLinear]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(model(x), before)

    assert timm_decor.to_plain(model) is model
    assert [type(m) for m in (model[0], model[2], model[4])] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    assert torch.equal(model(x), before)
    assert "moments" not in vars(model[0]) and not hasattr(model, "decor_report")


def test_report_names_sizes_and_reasons():
    shared = nn.Linear(6, 6)
    tied = nn.Linear(6, 6)
    tied.weight = shared.weight
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(8, 4, 3, groups=2),
            "odd": OddConv(3, 4, 3),
            "normed": weight_norm(nn.Conv2d(3, 4, 3)),
            "transposed": nn.ConvTranspose2d(3, 4, 3),
            "one": nn.Linear(1, 5),
            "shared": shared,
            "tied": tied,
            "head": nn.Linear(6, 2),
            "big": nn.Linear(40, 2),
            "norm": nn.BatchNorm2d(4),
        }
    )
    config = DecorConfig(structure="full", max_dim=36, sides="input")
    report = timm_decor.decorrelate(model, config, filter_fn=lambda name, module: name != "head").decor_report
    rows = {row.name: row for row in report.rows}
    assert "norm" not in rows  # no weight matrix: nobody expects it here
    assert [row.name for row in report.decorrelated] == ["conv"]
    assert (rows["conv"].dim, rows["conv"].bytes) == (
        36,
        4 * 2 * (2 * 36 * 36 + 1),
    )  # R, its inverse and the scale; two groups
    assert rows["conv"].moment_bytes == 4 * 2 * 36 * 36
    assert "OddConv may not multiply its input by its weight as it is" in rows["odd"].plain_reason
    assert "ParametrizedConv2d" in rows["normed"].plain_reason
    assert "ConvTranspose2d" in rows["transposed"].plain_reason
    assert "D = 1" in rows["one"].plain_reason
    assert "shared" in rows["shared"].plain_reason and "shared" in rows["tied"].plain_reason
    assert rows["head"].plain_reason == "excluded by filter_fn"
    assert "40 x 40; max_dim is 36" in rows["big"].plain_reason
    assert type(model["big"]) is nn.Linear and type(model["head"]) is nn.Linear
    text = str(report)
    assert all(row.name in text and row.plain_reason in text for row in report.rows)


def test_reported_bytes_are_those_held():
    """With AdamW, too, which has no L."""
    for structure, kind in itertools.product(("full", "kronecker", "space"), (torch.optim.SGD, torch.optim.AdamW)):
        model = timm_decor.decorrelate(small_net(), DecorConfig(structure=structure))
        optimizer = kind(model.parameters(), 0.1)
        handle = timm_decor.attach(model, optimizer)
        for _ in range(2):  # R, and then a step with it
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8, 8)).sum().backward()
            optimizer.step()
        groups = {name: group for group in handle._groups for name in group.names}
        for row in model.decor_report.decorrelated:
            tensors = groups[row.name].sides.tensors().values()
            moments = groups[row.name].moments.values()
            assert sum(t.numel() * t.element_size() for t in tensors) == row.bytes, (structure, row.name)
            assert sum(t.numel() * t.element_size() for t in moments) == row.moment_bytes, (structure, row.name)


def test_depthwise_convolutions_share_one_r():
    """A channel's own S x S eigenproblem each would cost more than the layer: `kronecker` is `space` there."""
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(6, 2))
    timm_decor.decorrelate(model, filter_fn=lambda name, layer: True)
    assert (model.decor_report.rows[0].dim, model.decor_report.rows[0].bytes) == (
        9,
        4 * (2 * 81 + 6),
    )  # and the scale, a group


def reasons(name, **kwargs):
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    return {row.name: row.plain_reason for row in timm_decor.decorrelate(model).decor_report.rows}


def test_gates_and_small_depthwise_kernels_are_left_plain_unless_asked_for():
    with torch.device("meta"):
        model = timm.create_model("efficientnet_b0")
    names = {row.name: row.plain_reason for row in timm_decor.decorrelate(model).decor_report.rows}
    assert "channel gate" in names["blocks.1.0.se.conv_reduce"] and type(model.blocks[1][0].se.conv_reduce) is nn.Conv2d
    assert "below 7x7" in names["blocks.1.0.conv_dw"]
    assert not any(reason for name, reason in names.items() if ".se." not in name and "conv_dw" not in name)
    timm_decor.decorrelate(model, filter_fn=lambda name, layer: True)
    assert not model.decor_report.plain


@pytest.mark.parametrize("name,gates,small,taken", [
    ("ghostnet_050", ["blocks.3.0.se.conv_reduce"], ["blocks.0.0.ghost1.cheap_operation.0", "blocks.1.0.conv_dw"],
     ["blocks.0.0.ghost1.primary_conv.0"]),
    ("edgenext_xx_small", [], ["stages.0.blocks.0.conv_dw", "stages.1.blocks.0.conv_dw"],
     ["stages.2.blocks.0.conv_dw", "stages.0.blocks.0.mlp.fc1"]),  # 3x3, 5x5; 7x7
    ("convnext_atto", [], [], ["stages.0.blocks.0.conv_dw"]),
    ("convmixer_1024_20_ks9_p14", [], [], ["blocks.0.0.fn.0"]),  # 9x9
    ("resnest14d", ["layer1.0.conv2.fc1"], [], ["layer1.0.conv2.conv"]),
    ("skresnet18", ["layer1.0.conv1.attn.fc_reduce"], [], ["layer1.0.conv1.paths.0.conv"]),
    ("legacy_seresnet18", ["layer1.0.se_module.fc1"], [], ["layer1.0.conv1"]),
    ("gcresnet33ts", ["stages.0.0.attn.mlp_add.fc1"], [], ["stages.0.0.conv1_1x1.conv", "stages.0.0.attn.conv_attn"]),
    ("resnet18", [], [], ["conv1", "fc"]),
])  # fmt: skip
def test_they_are_known_by_what_they_are(name, gates, small, taken):
    """Whatever family they are in, and whatever they are called."""
    names = reasons(name)
    assert all("channel gate" in names[gate] for gate in gates)
    assert all("below 7x7" in names[layer] for layer in small)
    assert not any(names[layer] for layer in taken)


@pytest.mark.parametrize("name,gates", [("rdnet_tiny", "EffectiveSEModule"), ("hgnet_tiny", "EseModule")])
def test_a_block_around_a_gate_is_none(name, gates):
    """Of RDNet's BlockESE only the gate in it; HGNet has a gate of its own."""
    with torch.device("meta"):
        model = timm.create_model(name)
    inside = [n for n, module in model.named_modules() if type(module).__name__ == gates]
    rows = timm_decor.decorrelate(model).decor_report.rows
    found = {row.name for row in rows if "channel gate" in row.plain_reason}
    assert inside and found == {row.name for row in rows if any(row.name.startswith(f"{n}.") for n in inside)}


def test_looking_at_a_model_does_not_move_it():
    """spectral_norm makes an iteration of its own whenever its weight is read; a lazy layer has no weight to read."""
    model = nn.Sequential(nn.Linear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 4)), nn.LazyLinear(3))
    before = {name: value.clone() for name, value in model[:2].state_dict().items()}
    timm_decor.decorrelate(model)
    assert all(torch.equal(value, before[name]) for name, value in model[:2].state_dict().items())
    assert [row.plain_reason == "" for row in model.decor_report.rows][0]


@pytest.mark.parametrize("wrap", [weight_norm, nn.utils.weight_norm])
def test_a_weight_that_is_computed_later_stays_plain_at_attach(wrap):
    model = timm_decor.decorrelate(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    wrap(model[0])
    handle = timm_decor.attach(model, torch.optim.SGD(model.parameters(), 0.1))
    assert handle.names == ["1"]


def test_layers_that_cannot_be_are_listed_with_their_reason():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.taken = nn.Linear(4, 4)
            self.complex = nn.Linear(4, 4, dtype=torch.cfloat)
            self.lstm = nn.LSTM(4, 5)
            self.cell = nn.GRUCell(4, 5)
            self.attention = nn.MultiheadAttention(4, 2)
            self.bilinear = nn.Bilinear(4, 4, 2)
            self.normed = nn.utils.weight_norm(nn.Linear(4, 4))
            self.spectral = nn.utils.spectral_norm(nn.Linear(4, 4))
            self.pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
            self.parametrized = weight_norm(nn.Linear(4, 4))
            self.embedding, self.position = nn.Embedding(9, 4), nn.Parameter(torch.zeros(3, 4))

    rows = {row.name: row for row in timm_decor.decorrelate(Net()).decor_report.rows}
    assert [name for name, row in rows.items() if not row.plain_reason] == ["taken"]
    assert "complex64: only real numbers" in rows["complex"].plain_reason
    for name in ("lstm", "cell", "attention", "bilinear"):
        assert "what its weights multiply is never seen" in rows[name].plain_reason
    assert rows["lstm"].weight_bytes == 4 * (20 * 4 + 20 * 5) and rows["attention"].weight_bytes == 4 * 12 * 4
    for name in ("normed", "spectral", "pruned", "parametrized"):
        assert "its weight is computed from other parameters" in rows[name].plain_reason
    assert "attention.out_proj" in rows and "embedding" not in rows


@pytest.mark.parametrize("name,reason,plain", [
    ("beit_base_patch16_224", "reads its weight past its forward", {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}),
    ("swinv2_tiny_window8_256", "reads its weight past its forward", {"layers.0.blocks.0.attn.qkv"}),
    ("eva_giant_patch14_224", "reads its weight past its forward", {"blocks.0.attn.qkv"}),
    ("nfnet_l0", "ScaledStdConv2d may not multiply", {"stem.conv1", "stages.0.0.conv2"}),
    ("efficientnet_cc_b0_4e", "CondConv2d may not multiply", {"blocks.4.0.conv_pw"}),
])  # fmt: skip
def test_layers_of_timm_whose_weight_is_not_what_they_multiply_by(name, reason, plain):
    with torch.device("meta"):
        report = timm_decor.decorrelate(timm.create_model(name)).decor_report
    assert plain <= {row.name for row in report.plain if reason in row.plain_reason}
    assert not any(row.name.endswith("attn.qkv") for row in report.decorrelated)
    assert any(row.name.startswith("head") or row.name == "classifier" for row in report.decorrelated)


def test_timms_forms_of_the_layers_are_decorrelated_and_come_back():
    model = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=4).eval()
    kinds = [type(module) for module in model.modules()]
    assert Conv2dSame in kinds and TimmLinear in kinds
    x = torch.randn(2, 3, 33, 35)  # odd: the padding of "same" differs between the sides
    before = model(x)
    timm_decor.decorrelate(model, filter_fn=lambda name, layer: True)
    assert not model.decor_report.plain
    assert torch.equal(model(x), before)
    timm_decor.to_plain(model)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(x), before)


def test_space_leaves_pointwise_layers_plain():
    model = timm_decor.decorrelate(small_net(), DecorConfig(structure="space"))
    assert [row.name for row in model.decor_report.decorrelated] == ["0"]
    assert all("one position" in row.plain_reason for row in model.decor_report.plain)


def test_layers_have_their_own_names_whatever_wraps_the_model():
    """`module` is DDP's, but it may be anybody's attribute."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.module = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})

    model = timm_decor.decorrelate(Own())
    assert [name for name, _ in decor_layers(model)] == ["fc", "module.fc"]
    wrapped = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    assert [name for name, _ in decor_layers(wrapped)] == ["fc", "module.fc"]
    both = nn.Module()
    both.a = wrapped
    assert [name for name, _ in decor_layers(both)] == ["a.fc", "a.module.fc"]


def test_a_second_call_replaces_the_configuration():
    model = timm_decor.decorrelate(small_net())
    timm_decor.decorrelate(model, DecorConfig(structure="space"))
    assert type(model[0]) is DecorConv2d and type(model[2]) is nn.Conv2d
    assert model.decor_report.config.structure == "space"


def test_attach_follows_the_report():
    """A new head is decorrelated, what filter_fn left out stays plain, and another config fits the layers anew."""
    model = timm_decor.decorrelate(small_net(), DecorConfig(structure="space"), lambda name, layer: name != "2")
    model[4] = nn.Linear(8 * 36, 7)
    handle = timm_decor.attach(model, torch.optim.SGD(model.parameters(), 0.1), DecorConfig(structure="kronecker"))
    assert [type(m) for m in (model[0], model[2], model[4])] == [DecorConv2d, nn.Conv2d, DecorLinear]
    assert [row.name for row in handle.report().rows] == ["0", "4"]
    assert model.decor_report.config == DecorConfig(structure="kronecker")
    assert handle.config == DecorConfig(structure="kronecker", sides="both"), "decided by the optimizer"


def test_to_plain_names_the_plain_architecture():
    model = timm_decor.to_plain(timm.create_model("decor_resnet18", num_classes=3, decor_config=DecorConfig()))
    assert "decor_config" not in getattr(model, "_model_args", {})  # timm 1.0.21 has none
    assert model.pretrained_cfg["architecture"] == "resnet18"
    assert {type(m) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)} == {nn.Conv2d, nn.Linear}


def test_wrapped_models_are_refused_with_what_to_do():
    class DistributedDataParallel(nn.Module):  # the real one needs a process group
        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(ValueError, match="wrapped in DistributedDataParallel: .* before wrapping"):
        timm_decor.decorrelate(DistributedDataParallel(small_net()))
    with pytest.raises(ValueError, match="compiled: .* before torch.compile"):
        timm_decor.decorrelate(torch.compile(small_net()))
    compiled_in_place = small_net()
    compiled_in_place.compile()
    with pytest.raises(ValueError, match="compiled: .* before torch.compile"):
        timm_decor.decorrelate(compiled_in_place)
    with pytest.raises(ValueError, match="wrapped in DataParallel"):
        timm_decor.decorrelate(nn.Sequential(nn.DataParallel(small_net())))
    with pytest.raises(ValueError, match="wrapped in DataParallel"):
        timm_decor.to_plain(nn.DataParallel(small_net()))


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="has no layer that can be decorrelated"):
        timm_decor.decorrelate(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(ValueError, match="most often: excluded by filter_fn"):
        timm_decor.decorrelate(small_net(), filter_fn=lambda name, module: False)


def test_an_attached_model_is_refused_and_its_copy_is_not():
    model = timm_decor.decorrelate(small_net())
    handle = timm_decor.attach(model, torch.optim.SGD(model.parameters(), 0.1))
    for function in (timm_decor.to_plain, timm_decor.decorrelate):
        with pytest.raises(ValueError, match="detach"):
            function(model)
    assert type(timm_decor.to_plain(copy.deepcopy(model))[0]) is nn.Conv2d
    handle.detach()
    assert type(timm_decor.to_plain(model)[0]) is nn.Conv2d
