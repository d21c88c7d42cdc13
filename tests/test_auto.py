"""`structure="auto"`: what it chooses for a layer, that it keeps to its memory, that a checkpoint keeps the choice."""

import io
import sys

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attach import net, step

import timm_decor
from timm_decor import DecorConfig
from timm_decor.auto import COST_SHARE, MEMORY_SHARE, SeenLayer, plan
from timm_decor.shape import LayerShape
from timm_decor.sharing import rows_a_process
from timm_decor.structure import memory

AUTO = DecorConfig(structure="auto")


def one(channels, positions, outputs, rows, products=1, **others):
    """What is chosen for a layer that has the memory of a whole model to itself."""
    rich = SeenLayer(LayerShape(1, 1, 1, 10**9), rows, products)
    return plan([SeenLayer(LayerShape(1, channels, positions, outputs), rows, products, **others), rich], AUTO)[0]


def test_many_rows_for_a_small_patch_make_it_full():
    assert one(64, 9, 64, rows=65536).structure == "full"
    assert one(64, 9, 64, rows=1000).structure == "kronecker"
    assert one(16384, 1, 64, rows=10**8).structure == "kronecker", "max_dim holds for full as well"


def test_the_rank_follows_the_rows_and_few_rows_leave_space_alone():
    wide = (512, 9, 512)
    ranks = [one(*wide, rows).rank for rows in (10**4, 300, 250)]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] == AUTO.rank > ranks[1] > ranks[2]
    assert one(*wide, 300, products=2).rank < ranks[1], "Adam's step takes two products"
    assert one(*wide, 64).structure == "space"
    assert one(512, 1, 10, 64).structure == "kronecker", "a 1x1 kernel has no space to decorrelate"


@st.composite
def models(draw):
    number = st.integers(1, 400)
    layers = draw(
        st.lists(st.tuples(number, st.sampled_from([1, 4, 9, 49]), number, st.integers(1, 10**6)), min_size=1)
    )
    return [SeenLayer(LayerShape(1, c, s, o), rows, draw(st.integers(1, 2))) for c, s, o, rows in layers]


@settings(max_examples=100, deadline=None)
@given(layers=models())
def test_memory_is_kept_to_where_that_is_possible(layers):
    """Above the share only where every layer is as small as `block` and `space` make it, or `kronecker` is smaller."""
    chosen = plan(layers, AUTO)
    used = sum(sum(memory(config, layer.shape)) for layer, config in zip(layers, chosen, strict=True))
    if used > MEMORY_SHARE * sum(layer.weight_size for layer in layers):
        assert "full" not in {config.structure for config in chosen}
        for layer, config in zip(layers, chosen, strict=True):
            block = DecorConfig(structure="block")
            assert sum(memory(config, layer.shape)) <= sum(memory(block, layer.shape))
    for layer, config in zip(layers, chosen, strict=True):
        if config.structure == "full":
            assert layer.products * layer.shape.dim / (3 * layer.rows) <= COST_SHARE


def tensors(tree):
    """Entries of every tensor in an optimizer's decorrelation state, W aside."""
    if isinstance(tree, torch.Tensor):
        return tree.numel()
    return sum(tensors(value) for key, value in tree.items() if key != "coordinates") if isinstance(tree, dict) else 0


@pytest.mark.parametrize("name,size", [("resnet18", 64), ("resnet50", 64)])
@pytest.mark.parametrize("batch", [2, 64])
def test_memory_on_resnets(name, size, batch, monkeypatch):
    """What the state really holds after the choice, at most 1.5 times the weights; batches are faked by their rows."""
    monkeypatch.setattr(  # the module, which the function of that name hides
        sys.modules["timm_decor.attach"],
        "rows_a_process",
        lambda groups: [batch / 2 * n for n in rows_a_process(groups)],
    )
    model = timm_decor.decorrelate(timm.create_model(name, num_classes=10), AUTO)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    handle = timm_decor.attach(model, optimizer)
    F.cross_entropy(model(torch.randn(2, 3, size, size)), torch.tensor([0, 1])).backward()
    optimizer.step()
    structures = {row.structure for row in handle.report().rows}
    assert len(structures) > 1, structures
    kept = sum(
        tensors(entry) + (entry["r"]["matrix"].numel() if entry["structure"] != "kronecker" else 0)  # R^T R
        for entry in optimizer.state_dict()["timm_decor"]["layers"].values()
    )
    assert 0 < kept <= MEMORY_SHARE * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_checkpoint_keeps_what_was_chosen(steps, opt):
    def attached():
        model = timm_decor.decorrelate(net(), DecorConfig(structure="auto", every=3, sample=1.0))
        kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        optimizer = kinds[opt](model.parameters(), 0.01)
        return model, optimizer, timm_decor.attach(model, optimizer)

    model, optimizer, handle = attached()
    for seed in range(steps):
        step(model, optimizer, seed)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = [step(model, optimizer, seed) for seed in range(steps, 12)]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, resumed_optimizer, other = attached()
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    assert [step(resumed, resumed_optimizer, seed) for seed in range(steps, 12)] == expected
    assert [row.structure for row in other.report().rows] == [row.structure for row in handle.report().rows]
    assert all(row.refreshes == 4 and not row.skips for row in handle.report().rows)  # at steps 1, 4, 7, 10


def test_auto_learns():
    model = timm_decor.decorrelate(net(), AUTO)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    timm_decor.attach(model, optimizer)
    losses = [step(model, optimizer, 0) for _ in range(30)]
    assert losses[-1] < losses[0] / 2
