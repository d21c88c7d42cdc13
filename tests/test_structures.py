"""What every structure and every rule must do; and the recipes of docs/contributing.md, tried with a toy of each."""

from __future__ import annotations

import pytest
import torch
from test_attach import net, step

import timm_decor
from timm_decor import DecorConfig
from timm_decor.config import RULE_STRUCTURES
from timm_decor.moments import moment_shape, normalized
from timm_decor.plan import plan
from timm_decor.rules import RULES, Rule
from timm_decor.shape import LayerShape
from timm_decor.structures import STRUCTURES, NoOutputs, OutputL, Sides, Structure
from timm_decor.structures.base import LowRank, selected

SHAPES = [LayerShape(1, 6, 9, 5), LayerShape(2, 3, 4, 4), LayerShape(3, 1, 9, 2), LayerShape(1, 7, 1, 3)]


class Diagonal(Structure):
    """A toy: R scales each entry of the patch by itself. Only what has no default."""

    name = "diagonal"

    @classmethod
    def moments(cls, shape):
        return ("patch",)

    @classmethod
    def identity(cls, shape, rank, like, inverse):
        return cls(shape, {"scale": like.new_ones(shape.groups, shape.dim)})

    def dense(self):
        return torch.diag_embed(self._tensors["scale"])

    def whitened(self, moments, damping):
        scale = (normalized(moments["patch"]).diagonal(dim1=1, dim2=2) + damping).rsqrt()
        return self.with_tensors({"scale": scale})


class Halving(Rule):
    """A toy: every refresh halves the way to damped whitening."""

    name = "halving"

    def refreshed(self, r, moments):
        new = r.whitened(moments, self.config.damping)
        return r.with_tensors({n: (t + new.tensors()[n]) / 2 for n, t in r.tensors().items() if n in new.tensors()})


ALL = {**STRUCTURES, "diagonal": Diagonal}


def random_moments(kind, shape, count):
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in kind.moments(shape):
        groups, side, _ = moment_shape(name, shape)
        rows = torch.randn(count * groups, 4 * side, side, generator=generator, dtype=torch.float64) + 0.3
        found[name] = rows.mT @ rows / rows.shape[1]
    return found


def refreshed(kind, shape, count=2, rank=2):
    one = kind.identity(shape, rank, torch.empty(0, dtype=torch.float64), True)
    stacked = {n: t.repeat(count, *[1] * (t.dim() - 1)) for n, t in one.tensors().items()}
    return one.with_tensors(stacked).whitened(random_moments(kind, shape, count), 0.3)


def fitting():
    for name, kind in ALL.items():
        for shape in SHAPES:
            if not kind.unfit(shape) and not (name == "kronecker" and shape.channels == 1):
                yield pytest.param(kind, shape, id=f"{name}-{shape.channels}x{shape.positions}")


@pytest.mark.parametrize("kind,shape", list(fitting()))
class TestStructure:
    def weight(self, shape, count=2, seed=1):
        generator = torch.Generator().manual_seed(seed)
        size = count * shape.groups, shape.outputs, shape.channels, shape.positions
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def test_products_are_those_of_its_dense_form(self, kind, shape):
        r, w = refreshed(kind, shape), self.weight(shape)
        dense, rows = r.dense(), w.flatten(2)
        assert dense.shape == (2 * shape.groups, shape.dim, shape.dim)
        assert (dense - torch.eye(shape.dim)).abs().max() > 1e-2, "R is not the identity"
        expected = {
            "apply": rows @ dense,
            "apply_transposed": rows @ dense.mT,
            "apply_gram": rows @ dense.mT @ dense,
            "apply_inverse": rows @ torch.linalg.inv(dense),
            "apply_inverse_transposed": rows @ torch.linalg.inv(dense).mT,
        }
        for verb, value in expected.items():
            for source in (w, w.transpose(2, 3).contiguous().transpose(2, 3)):  # both memory formats
                torch.testing.assert_close(getattr(r, verb)(source), value.view(w.shape), msg=verb)
        torch.testing.assert_close(r.errors(w, slice(None, None, 2)), r.apply_transposed(w)[:, :, ::2])

    def test_products_with_more(self, kind, shape):
        r, w = refreshed(kind, shape), self.weight(shape)
        scale = torch.rand(len(w), 1, 1, dtype=torch.float64) + 0.5
        plus = LowRank(self.weight(shape, seed=2)[:, :, :1, 0], self.weight(shape, seed=3)[:, :1])
        for verb in (r.apply, r.apply_transposed, r.apply_gram):
            torch.testing.assert_close(verb(w, scale), scale[..., None] * verb(w))
        expected = scale[..., None] * r.apply_gram(w) + plus.product()
        torch.testing.assert_close(r.apply_gram(w, scale, plus), expected)
        for beta in (0.9, 1, torch.tensor(0.9, dtype=torch.float64)):
            for target in (w.clone(), w.transpose(2, 3).clone(memory_format=torch.contiguous_format).transpose(2, 3)):
                expected = beta * target + r.apply(w)
                r.add_product(target, w, beta)
                torch.testing.assert_close(target, expected)

    def test_products_of_no_rows(self, kind, shape):
        """A process may have none of a sharded layer's."""
        r, none = refreshed(kind, shape), self.weight(shape)[:, :0]
        plus = LowRank(self.weight(shape, seed=2)[:, :0, :1, 0], self.weight(shape, seed=3)[:, :1])
        assert r.apply(none).shape == r.apply_gram(none, None, plus).shape == none.shape

    def test_layers_of_a_batch_do_not_see_each_other(self, kind, shape):
        r, w = refreshed(kind, shape), self.weight(shape)
        for i in (0, 1):
            own = r.with_tensors(selected(r.tensors(), 2, [i]))
            torch.testing.assert_close(own.apply(w.chunk(2)[i]), r.apply(w).chunk(2)[i])

    def test_tensors_are_all_there_is(self, kind, shape):
        r, w = refreshed(kind, shape), self.weight(shape)
        again = r.with_tensors({name: value.clone() for name, value in r.tensors().items()})
        assert torch.equal(again.apply_gram(w), r.apply_gram(w)) and again.condition() == r.condition() > 1

    def test_unusable_moments_are_nan_and_the_others_are_not_touched(self, kind, shape):
        moments = random_moments(kind, shape, 2)
        good = refreshed(kind, shape)
        for bad in (0.0, float("nan"), float("inf")):
            spoiled = {name: value.clone() for name, value in moments.items()}
            for value in spoiled.values():
                value[: len(value) // 2] = bad
            tensors = good.whitened(spoiled, 0.3).tensors()
            finite = [torch.stack([t.chunk(2)[i].isfinite().all() for t in tensors.values()]).all() for i in (0, 1)]
            assert finite == [False, True]

    def test_reported_moments_are_those_of_its_dense_form(self, kind, shape):
        r, moments = refreshed(kind, shape), random_moments(kind, shape, 2)
        before, after = r.input_moment(moments), r.output_moment(moments)
        if before.shape == r.dense().shape:  # of `space` the moment is the positions'
            torch.testing.assert_close(after, r.dense() @ before @ r.dense().mT)

    def test_with_an_output_side(self, kind, shape):
        r, w = refreshed(kind, shape), self.weight(shape)
        one = OutputL.identity(shape, 2, torch.empty(0, dtype=torch.float64)).tensors()
        left = OutputL({name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in one.items()})
        rows = torch.randn(len(w), shape.outputs, 20, dtype=torch.float64)
        left = left.whitened({"output": rows @ rows.mT}, 0.2)
        sides, eye = Sides(r, left), torch.eye(shape.outputs, dtype=torch.float64)
        dense = left.apply(eye.expand(len(w), -1, -1)[..., None])[..., 0]
        c = torch.rand(len(w), 1, 1, dtype=torch.float64) + 0.5
        scaled = Sides(r, left, c)
        for verb, power in (("apply", 1), ("apply_gram", 2), ("apply_inverse", -1), ("apply_transposed", 1)):
            expected = (torch.linalg.matrix_power(dense, power) @ getattr(r, verb)(w).flatten(2)).view(w.shape)
            torch.testing.assert_close(getattr(sides, verb)(w), expected)
            torch.testing.assert_close(getattr(scaled, verb)(w), c[..., None] ** power * expected)
            torch.testing.assert_close(
                getattr(Sides(r, NoOutputs(), c), verb)(w), c[..., None] ** power * getattr(r, verb)(w)
            )
        for each in (sides, scaled, Sides(r, NoOutputs(), c)):
            target = w.clone()
            each.add_product(target, w, 0.5)
            torch.testing.assert_close(target, 0.5 * w + each.apply(w))
            assert each.with_tensors(each.tensors()).tensors().keys() == each.tensors().keys()


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_has_its_row_and_refreshes_each_of_its_structures(rule):
    """The mathematics is held against explicit layers by tests/test_equivalence.py."""
    assert RULES.keys() == RULE_STRUCTURES.keys() and set(RULE_STRUCTURES[rule]) <= set(STRUCTURES)
    for structure in RULE_STRUCTURES[rule]:
        made = plan(DecorConfig(rule=rule, structure=structure), LayerShape(1, 4, 9, 5), torch.float32)
        held = {name: tuple(value.shape) for name, value in made.first_moments("cpu").items()}
        assert made.moment_bytes == 4 * sum(torch.Size(shape).numel() for shape in held.values())
        assert made.bytes == 4 * sum(value.numel() for value in made.identity("cpu").tensors().values())


@pytest.mark.parametrize("rule,structure", [("whiten", "diagonal"), ("halving", "full"), ("halving", "diagonal")])
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_toy_rule_and_a_toy_structure_train(rule, structure, opt, monkeypatch):
    """A class and a row each, as docs/contributing.md says."""
    monkeypatch.setitem(STRUCTURES, "diagonal", Diagonal)
    monkeypatch.setitem(RULES, "halving", Halving)
    monkeypatch.setitem(RULE_STRUCTURES, "halving", ("full", "diagonal"))
    monkeypatch.setitem(RULE_STRUCTURES, "whiten", (*RULE_STRUCTURES["whiten"], "diagonal"))
    model = timm_decor.decorrelate(net(), DecorConfig(rule=rule, structure=structure, every=2, sample=1.0))
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[opt]
    optimizer = make(model.parameters(), 0.1 if opt == "sgd" else 0.01)
    handle = timm_decor.attach(model, optimizer)
    losses = [step(model, optimizer, 0) for _ in range(40)]
    assert losses[-1] < losses[0] / 2
    rows = handle.report().rows
    assert all(row.refreshes == 20 and row.condition > 1 for row in rows)
    assert {row.structure.split(" ")[0] for row in rows} == {structure}
