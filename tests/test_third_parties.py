"""What people and their tools do around an optimizer: third parties only ever see kernels, a step is whole or none."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import logging
import math
import sys
import weakref

import pytest
import timm
import timm.optim
import torch
import torch.distributed as dist
from test_attach import attached, batch, net, step
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import timm_decor
from timm_decor import DecorConfig
from timm_decor.engine import coordinates
from timm_decor.engine import handle as handle_module
from timm_decor.engine.flight import StepInFlight
from timm_decor.engine.optimizers import DECAYING
from timm_decor.engine.probe import refuse
from timm_decor.structures import SCALE

CONFIG = DecorConfig(every=2, sample=1.0)
KINDS = {  # by the way of their step, see engine/coordinates.py
    "linear": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "decaying": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "general": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
}

fuses_on_a_cpu = pytest.mark.skipif(torch.__version__ < (2, 4), reason="this torch fuses on GPUs alone")


def bound(kind, config=CONFIG, model=None):
    model = timm_decor.decorrelate(model or net(), config)
    optimizer = KINDS[kind](model.parameters())
    return model, optimizer, timm_decor.attach(model, optimizer)


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestOutsideWrites:
    @pytest.mark.parametrize("kind", KINDS)
    def test_through_data_are_followed(self, kind):
        """Weight clipping, vector_to_parameters: torch counts no version there."""
        model, optimizer, _ = bound(kind)
        for seed in range(4):
            step(model, optimizer, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = 0.01 * parameter.data
        small = weights(model)
        step(model, optimizer, 4)
        assert all((a - b).abs().max() < 0.2 for a, b in zip(weights(model), small, strict=True))

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_rate_of_zero_moves_nothing_and_counts_nothing(self, kind):
        model, optimizer, handle = bound(kind)
        for seed in range(3):
            step(model, optimizer, seed)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before, rows = weights(model), handle.report().rows
        step(model, optimizer, 3)
        assert same(weights(model), before) and handle.step == 3
        assert handle.report().rows == rows

    def test_nothing_keeps_w(self):
        """AdamW's held memory is the plain one's and R's."""
        model, optimizer, _ = bound("decaying")
        for seed in range(3):
            step(model, optimizer, seed)
        entries = optimizer.state_dict()["timm_decor"]["layers"].values()
        facts = {"shape", "structure", "rank", "outputs", "refreshes", "skips", "late"}
        assert all(set(entry) == {*facts, "r", "moments", "recorded"} for entry in entries)


class TestHooks:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_see_kernels(self, kind, when):
        """Registered before or after `attach`, before or after the step, on the optimizer or on all of them."""
        model = timm_decor.decorrelate(net(), CONFIG)
        optimizer = KINDS[kind](model.parameters())
        seen = []

        def look(*_):
            seen.append((model[0].weight.detach().clone(), model[0].weight.grad.clone()))

        def register():
            handles = [optimizer.register_step_pre_hook(look), optimizer.register_step_post_hook(look)]
            handles += [register_optimizer_step_pre_hook(look), register_optimizer_step_post_hook(look)]
            return handles

        handles = register() if when == "before" else []
        timm_decor.attach(model, optimizer)
        handles += register() if when == "after" else []
        try:
            for seed in range(5):
                x, y = batch(seed)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                gradient, before = model[0].weight.grad.clone(), model[0].weight.detach().clone()
                seen.clear()
                optimizer.step()
                after = model[0].weight.detach()
                assert len(seen) == 4 and not torch.equal(before, after)
                assert all(torch.equal(own, gradient) for _, own in seen)
                assert [torch.equal(w, before) for w, _ in seen] == [True, True, False, False]
                assert all(torch.equal(w, after) for w, _ in seen[2:])
        finally:
            for handle in handles:
                handle.remove()
        optimizer.step()
        assert len(seen) == 4, "they can be removed as ever"

    def test_of_a_step_that_calls_its_parents(self):
        """torch runs the hooks of both; in between the weights are W, and nobody is called."""

        class Child(torch.optim.Adam):
            def step(self, closure=None):
                return super().step(closure)

        torch.optim.Adam(net().parameters()).zero_grad()  # torch wraps a class's step once one of it is made
        model = timm_decor.decorrelate(net(), CONFIG)
        optimizer = Child(model.parameters(), 1e-2)
        twin = timm_decor.decorrelate(net(), CONFIG)
        twin_optimizer = torch.optim.Adam(twin.parameters(), 1e-2)
        seen = []
        optimizer.register_step_post_hook(lambda *_: seen.append(model[0].weight.detach().clone()))
        handle = timm_decor.attach(model, optimizer)
        timm_decor.attach(twin, twin_optimizer)
        for seed in range(5):
            assert step(model, optimizer, seed) == step(twin, twin_optimizer, seed)
            assert torch.equal(seen[-1], twin[0].weight)
        assert handle.step == len(seen) == 5

    def test_a_scheduler_made_before_or_after(self, recwarn):
        for before in (True, False):
            model = timm_decor.decorrelate(net(), CONFIG)
            optimizer = KINDS["decaying"](model.parameters())
            if before:
                scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            handle = timm_decor.attach(model, optimizer)
            if not before:
                scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            for seed in range(3):
                step(model, optimizer, seed)
                scheduler.step()
            assert handle.step == 3
            handle.detach()
            step(model, optimizer, 3)
            assert handle.step == 3
        assert not [each for each in recwarn if "lr_scheduler" in str(each.message)]

    def test_a_scheduler_does_not_keep_what_was_detached(self):
        model, optimizer, handle = bound("linear")
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        step(model, optimizer, 0)
        handle.detach()
        gone = weakref.ref(handle)
        del handle
        gc.collect()
        assert gone() is None
        before = weights(model)
        step(model, optimizer, 1)
        scheduler.step()
        assert not same(before, weights(model))


class TestFailure:
    @pytest.mark.parametrize("kind", KINDS)
    def test_half_way_leaves_the_weights_and_the_engine(self, kind, caplog):
        """The second of two groups has a broken rate: the first has stepped when that is found out."""
        model = timm_decor.decorrelate(net(), DecorConfig(every=2, sample=1.0, output_every=1))
        optimizer = KINDS[kind]([{"params": list(model[:3].parameters())}, {"params": list(model[3:].parameters())}])
        handle = timm_decor.attach(model, optimizer)
        for seed in range(3):
            step(model, optimizer, seed)
        x, y = batch(3)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before, state, rate = weights(model), copy.deepcopy(handle.state()), optimizer.param_groups[1]["lr"]
        gradients = [p.grad.clone() for p in model.parameters()]
        optimizer.param_groups[1]["lr"] = "broken"
        with pytest.raises(Exception):  # noqa: B017  # whatever torch makes of it
            optimizer.step()
        decorrelated = [0, 2, 4]
        assert all(torch.equal(model[i].weight, before[2 * n]) for n, i in enumerate(decorrelated))
        assert same([p.grad for p in model.parameters()], gradients)
        assert same_tree(handle.state(), state) and handle.step == 3
        assert "step 3 did not end" in caplog.text
        optimizer.param_groups[1]["lr"] = rate
        optimizer.step()
        assert handle.step == 4 and all(p.isfinite().all() for p in model.parameters())

    def test_in_the_refresh_leaves_them_too(self, monkeypatch):
        model, optimizer, handle = bound("decaying")
        for seed in range(2):
            step(model, optimizer, seed)
        before, state = weights(model)[::2], copy.deepcopy(handle.state())
        monkeypatch.setattr("timm_decor.engine.flight.refreshed", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(model, optimizer, 2)
        assert same(weights(model)[::2], before) and handle.step == 2
        assert same_tree(without_recorded(handle.state()), without_recorded(state))
        monkeypatch.undo()
        step(model, optimizer, 3)
        assert handle.step == 3

    @fuses_on_a_cpu
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("preserve", [True, False])
    def test_a_fused_step_that_is_skipped_moves_and_counts_nothing(self, kind, preserve):
        if kind == "general":
            make = lambda p, fused: torch.optim.Adam(p, 1e-2, fused=fused)  # noqa: E731
        else:
            cls = {"linear": torch.optim.SGD, "decaying": torch.optim.AdamW}[kind]
            make = lambda p, fused: cls(p, 1e-2, weight_decay=0.1, fused=fused)  # noqa: E731
        ends = []
        for fused in (False, True):
            model = timm_decor.decorrelate(net(), DecorConfig(every=2, sample=1.0, preserve_function=preserve))
            optimizer = make(model.parameters(), fused)
            handle, scaler = timm_decor.attach(model, optimizer), torch.amp.GradScaler("cpu", init_scale=4.0)
            for i, bad in enumerate([False, False, True, False, True, True, False, False]):
                x, y = batch(i)
                optimizer.zero_grad()
                scaler.scale(F.cross_entropy(model(x), y)).backward()
                before = weights(model)
                if bad:
                    model[0].weight.grad[0, 0] = float("inf")
                scaler.step(optimizer)
                scaler.update()
                assert same(weights(model), before) == bad
            assert handle.step == 5 and {row.skips for row in handle.report().rows} == {0}
            ends.append((weights(model), [row.refreshes for row in handle.report().rows]))
        assert ends[0][1] == ends[1][1] == [3, 3, 3]


def without_recorded(state):
    layers = {n: {k: v for k, v in e.items() if k != "recorded"} for n, e in state["layers"].items()}
    return {**state, "layers": layers}


def same_tree(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_tree(first[key], second[key]) for key in first)
    return first == second


class TestOptimizers:
    @pytest.mark.parametrize("name", ["madgrad", "lookahead_madgrad"])
    def test_that_keep_weights_are_refused(self, name):
        model = timm_decor.decorrelate(net())
        with pytest.raises(ValueError, match="keeps a copy of the weights in its state"):
            timm_decor.attach(model, timm.optim.create_optimizer_v2(model, name, lr=0.1))

    def test_that_keep_them_in_nested_state_or_on_themselves_are_refused(self):
        class Nested(torch.optim.SGD):
            def step(self, closure=None):
                super().step(closure)
                for p in (p for group in self.param_groups for p in group["params"]):
                    self.state[p].setdefault("slow", {"copies": [p.detach().clone()]})

        class OnItself(torch.optim.SGD):
            def step(self, closure=None):
                super().step(closure)
                self.slow = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]

        for kind, where in ((Nested, "slow.copies.0"), (OnItself, "self.slow.0.0"), (torch.optim.ASGD, "ax")):
            model = timm_decor.decorrelate(net())
            with pytest.raises(ValueError, match=f"{kind.__name__} keeps a copy.*{where}"):
                timm_decor.attach(model, kind(model.parameters(), lr=0.1))

    @pytest.mark.parametrize(
        "name", ["sgd", "momentum", "adam", "adamw", "nadam", "lamb", "lars", "lion", "rmsprop", "adafactor", "adan",
                 "adopt", "radam", "kron", "muon", "laprop", "mars", "sgdw", "adabelief", "adagrad", "adadelta"]
    )  # fmt: skip
    def test_that_keep_none_are_taken(self, name, caplog):
        model = timm_decor.decorrelate(net())
        optimizer = timm.optim.create_optimizer_v2(model, name, lr=1e-3, weight_decay=0.05)
        state, rng = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
        refuse(optimizer, [model[0].weight, model[4].weight])
        assert not [record for record in caplog.records if record.name.startswith("timm_decor")]
        assert same_tree(optimizer.state_dict(), state), "the probe is another optimizer"
        assert torch.equal(torch.get_rng_state(), rng)

    def test_one_that_cannot_be_tried_is_named(self, caplog):
        class OnlyMine(torch.optim.SGD):
            def step(self, closure=None):
                assert all(p.numel() > 100 for p in self.param_groups[0]["params"][:1])
                return super().step(closure)

        model = timm_decor.decorrelate(net())
        timm_decor.attach(model, OnlyMine(model.parameters(), lr=0.1))
        assert "OnlyMine could not be tried on a small weight" in caplog.text

    def test_lbfgs_and_second_derivatives_are_refused(self):
        model = timm_decor.decorrelate(net())
        with pytest.raises(ValueError, match="LBFGS evaluates its closure several times"):
            timm_decor.attach(model, torch.optim.LBFGS(model.parameters()))

    @pytest.mark.parametrize("kind", list(DECAYING), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
    def test_steps_from_zero_equal_the_general_way(self, kind, monkeypatch):
        """Where W is never formed: the factor of A is that of W, of matrices and of what Muon leaves to AdamW."""

        def train(general):
            model = net()
            if kind.__module__.startswith("torch.") and kind.__name__ == "Muon":  # takes matrices alone
                hidden, head = nn.Linear(192, 8, bias=False), nn.Linear(8, 3, bias=False)
                model = nn.Sequential(nn.Flatten(), hidden, nn.Tanh(), head)
            # The scale has another measure here: decay is projected out where it is not known.
            config = DecorConfig(every=2, sample=1.0, sides="both", graft=False)
            model = timm_decor.decorrelate(model.double(), config)
            optimizer = kind(model.parameters(), lr=0.02, weight_decay=0.5)
            if general:
                monkeypatch.setattr("timm_decor.engine.flight.step_type", lambda _: coordinates.General)
            timm_decor.attach(model, optimizer)
            for seed in range(7):
                step(model, optimizer, seed, dtype=torch.float64)
            monkeypatch.undo()
            return weights(model)

        torch.manual_seed(0)
        first = train(general=False)
        torch.manual_seed(0)
        for a, b in zip(first, train(general=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class TestWrappers:
    @pytest.mark.skipif(torch.__version__ < (2, 6), reason="compiling an optimizer's step is young")
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_compiled_step_is_the_same(self, kind):
        """Dynamo must not trace the hooks: it would step from what the weights held before them."""
        (eager, its, handle), (model, optimizer, other) = bound(kind), bound(kind)
        compiled = torch.compile(optimizer.step, backend="eager")
        for seed in range(5):
            step(eager, its, seed)
            optimizer.zero_grad()
            F.cross_entropy(model(batch(seed)[0]), batch(seed)[1]).backward()
            compiled()
        for a, b in zip(eager.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b)
        assert handle.step == other.step == 5
        assert [row.refreshes for row in other.report().rows] == [3, 3, 3]

    def test_around_the_inner_optimizer_are_taken_off(self):
        for name in ("optimizer", "optim", "base_optimizer", "_base_optimizer"):
            model = timm_decor.decorrelate(net(), CONFIG)
            inner = torch.optim.SGD(model.parameters(), 0.1)
            handle = timm_decor.attach(model, type("Wrapper", (), {name: inner})())
            step(model, inner, 0)
            assert handle.step == 1

    def test_whose_own_step_is_never_called_are_told_of(self, caplog):
        """The attached optimizer is not the one that moves the weights."""
        model = timm_decor.decorrelate(net(), CONFIG)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)  # kept: a binding ends with its optimizer
        handle = timm_decor.attach(model, optimizer)
        other = torch.optim.SGD(model.parameters(), 0.1)
        for seed in range(4):
            step(model, other, seed)
        assert handle.step == 0
        told = [record for record in caplog.records if "step() of the attached SGD is not called" in record.message]
        assert len(told) == 1

    @pytest.mark.parametrize("fused", [False, pytest.param(True, marks=fuses_on_a_cpu)])
    def test_beside_a_fused_one_too(self, fused, caplog):
        """Fused optimizers do not count their writes in a tensor's version."""
        model = timm_decor.decorrelate(net(), CONFIG)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        timm_decor.attach(model, optimizer)
        other = torch.optim.AdamW(model.parameters(), 1e-5, fused=fused)
        for seed in range(8):
            step(model, other, seed)
        assert caplog.text.count("step() of the attached SGD is not called") == 1

    def test_many_batches_before_a_step_are_no_sign_of_it(self, caplog):
        model, optimizer, handle = bound("linear")
        for seed in range(20):
            F.cross_entropy(model(batch(seed)[0]), batch(seed)[1]).backward()
        optimizer.step()
        assert handle.step == 1 and not caplog.records

    def test_that_load_a_decorrelated_state_too_early_are_refused(self):
        model, optimizer, _ = bound("decaying")
        step(model, optimizer, 0)
        plain = timm_decor.decorrelate(net(), CONFIG)
        other = torch.optim.AdamW(plain.parameters(), 1e-2)
        other.load_state_dict(optimizer.state_dict())
        with pytest.raises(ValueError, match="loaded a decorrelated run's state before attach"):
            timm_decor.attach(plain, other)

    def test_one_without_hooks_is_refused(self):
        class Bare(torch.optim.Optimizer):
            def __init__(self, parameters):
                self.param_groups = [{"params": list(parameters)}]

        model = timm_decor.decorrelate(net())
        with pytest.raises(ValueError, match="never ran torch.optim.Optimizer.__init__"):
            timm_decor.attach(model, Bare(model.parameters()))


class TestClosures:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("how", ["positional", "keyword"])
    def test_of_one_evaluation_equal_none(self, kind, how):
        """Lightning gives one to every step, with zero_grad, forward and backward in it."""
        model, optimizer, handle = bound(kind)
        twin, twin_optimizer, _ = bound(kind)
        for seed in range(5):
            x, y = batch(seed)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            loss = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
            assert float(loss) == step(twin, twin_optimizer, seed)
        assert handle.step == 5 and same(weights(model), weights(twin))

    def test_a_second_evaluation_raises_and_aborts(self):
        class Twice(torch.optim.SGD):
            def step(self, closure=None):
                with torch.enable_grad():
                    closure()
                    super().step()
                    return closure()

        model = timm_decor.decorrelate(net(), CONFIG)
        optimizer = Twice(model.parameters(), 0.1)
        handle = timm_decor.attach(model, optimizer)
        x, y = batch(0)
        before = weights(model)[::2]
        with pytest.raises(RuntimeError, match="evaluates its closure once"):
            optimizer.step(lambda: F.cross_entropy(model(x), y).backward())
        assert same(weights(model)[::2], before) and handle.step == 0

    def test_one_that_raises_leaves_everything(self):
        model, optimizer, handle = bound("decaying")
        before = weights(model)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        assert same(weights(model), before) and handle.step == 0
        step(model, optimizer, 0)
        assert handle.step == 1


class TestCopies:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("steps", [0, 4, 5])
    def test_of_both_go_on_as_the_original(self, kind, steps):
        model, optimizer, _ = bound(kind)
        for seed in range(steps):
            step(model, optimizer, seed)
        twin, twin_optimizer = copy.deepcopy((model, optimizer))
        for seed in range(steps, steps + 5):
            assert step(model, optimizer, seed) == step(twin, twin_optimizer, seed)
        assert "timm_decor" in twin_optimizer.state_dict()
        assert twin_optimizer.param_groups[0]["params"][0] is twin[0].weight

    def test_of_the_optimizer_alone_say_that_they_are_plain(self, caplog):
        model, optimizer, _ = bound("decaying")
        step(model, optimizer, 0)
        alone = copy.deepcopy(optimizer)
        assert "timm_decor" not in alone.state_dict() and not caplog.records
        alone.step()
        alone.step()
        assert caplog.text.count("a copy of an attached optimizer steps plainly") == 1
        step(model, optimizer, 1)  # the original does not mind

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_all_three_are_bound_to_each_other(self, kind):
        """What holds a model, an optimizer and their handle (a trainer) is copied as a whole."""
        model, optimizer, handle = bound(kind)
        for seed in range(3):
            step(model, optimizer, seed)
        for order in ((model, optimizer, handle), (handle, model, optimizer)):
            found = copy.deepcopy(order)
            twin, twin_optimizer, copied = (found[order.index(each)] for each in (model, optimizer, handle))
            for seed in range(3, 6):
                step(twin, twin_optimizer, seed)
            assert copied.step == 6 == twin_optimizer.state_dict()["timm_decor"]["step"] and handle.step == 3
            copied.detach()
            assert "timm_decor" not in twin_optimizer.state_dict() and "timm_decor" in optimizer.state_dict()
            again = timm_decor.attach(twin, twin_optimizer)
            step(twin, twin_optimizer, 6)
            assert again.step == 1
            assert copy.deepcopy((twin, twin_optimizer, copied))[2].step == 6  # a detached one
            again.detach()
        with pytest.raises(TypeError, match="model first"):
            copy.deepcopy((optimizer, handle))

    def test_pickled_ones_say_so_as_they_are_written(self, caplog):
        model, optimizer, _ = bound("linear")
        step(model, optimizer, 0)
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        assert "a pickled optimizer is a plain one, without R" in caplog.text
        file.seek(0)
        twin, twin_optimizer = torch.load(file, weights_only=False)
        step(twin, twin_optimizer, 1)


class TestDistributedCheckpoint:
    """torch.distributed.checkpoint takes `state` and `param_groups` alone out of an optimizer's state."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_carries_r(self, kind, flat, dtype, caplog):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model, optimizer, _ = bound(kind, model=net(dtype))
        for seed in range(4):
            step(model, optimizer, seed, dtype=dtype)
        saved = copy.deepcopy(get_state_dict(model, optimizer, options=options))
        expected = [step(model, optimizer, seed, dtype=dtype) for seed in range(4, 9)]
        again, again_optimizer, handle = bound(kind, model=net(dtype))
        if flat and kind == "linear":
            return  # torch unflattens no momentum into an SGD that has none yet
        set_state_dict(again, again_optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
        if flat:  # it takes the names that the optimizer's own state has, and says what is missing
            assert "the optimizer state has no decorrelation state: R starts from the identity" in caplog.text
            return
        assert handle.step == 4
        assert {t.dtype for group in handle._groups for t in group.sides.tensors().values()} == {torch.float32}
        assert [step(again, again_optimizer, seed, dtype=dtype) for seed in range(4, 9)] == expected

    def test_looking_for_the_state_counts_nothing(self):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        model, optimizer, handle = bound("decaying")
        get_optimizer_state_dict(model, optimizer)
        assert handle.step == 0
        step(model, optimizer, 0)
        assert all(row.refreshes == 1 and not row.skips for row in handle.report().rows)

    def test_a_plain_optimizer_loads_the_rest(self):
        model, optimizer, _ = bound("decaying")
        step(model, optimizer, 0)
        plain = net()
        other = torch.optim.AdamW(plain.parameters(), 1e-2)
        other.load_state_dict(optimizer.state_dict())
        step(plain, other, 1)


class TestChanges:
    """What happens to a model after `attach`."""

    def test_unfrozen_layers_are_taken_in(self):
        model = timm_decor.decorrelate(timm.create_model("test_resnet", num_classes=10), CONFIG)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("fc"))
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        handle = timm_decor.attach(model, optimizer)
        images = torch.randn(6, 3, 32, 32)

        def train(steps):
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(model(images), torch.arange(6)).backward()
                optimizer.step()

        train(3)
        head = next(row for row in handle.report().rows if row.name == "fc").refreshes
        model.requires_grad_(True)
        train(5)
        rows = {row.name: row for row in handle.report().rows}
        assert len(rows) == len(model.decor_report.decorrelated) > 10
        assert rows["fc"].refreshes == head + 2
        assert all(row.refreshes == 2 and not row.skips for name, row in rows.items() if name != "fc")
        saved = optimizer.state_dict()
        assert saved["timm_decor"]["layers"].keys() == rows.keys()

    @pytest.mark.parametrize("kind", KINDS)
    def test_unfrozen_layers_go_on_with_their_r(self, kind):
        """Who resumes attaches as before, with frozen layers, loads, and unfreezes again."""

        def begun():
            model = net()
            model[0].requires_grad_(False)
            return bound(kind, model=model)

        model, optimizer, handle = begun()
        step(model, optimizer, 0)
        model.requires_grad_(True)
        for seed in range(1, 6):
            step(model, optimizer, seed)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        again, its, other = begun()
        again.load_state_dict(saved[0])
        its.load_state_dict(saved[1])
        assert same_tree(its.state_dict(), saved[1])
        again.requires_grad_(True)
        for seed in range(6, 9):
            step(model, optimizer, seed)
            step(again, its, seed)
        assert same(weights(model), weights(again)) and other.report() == handle.report()
        assert again.decor_report == model.decor_report

    def test_layers_that_have_no_part_in_a_refreshs_step_have_their_r(self):
        """Two heads that train in turns: every refresh falls on a step of the first."""

        class Heads(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.heads = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 3) for _ in range(3))

            def forward(self, x, head):
                return self.heads[head](self.body(x).relu())

        def trained(steps, saved=None):
            torch.manual_seed(0)
            model, optimizer, handle = bound("linear", DecorConfig(every=4, sample=1.0), Heads())
            if saved is not None:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            for seed in steps:
                generator = torch.Generator().manual_seed(seed)
                optimizer.zero_grad()
                F.cross_entropy(model(torch.randn(9, 8, generator=generator), seed % 2), torch.arange(9) % 3).backward()
                optimizer.step()
            return model, handle, copy.deepcopy((model.state_dict(), optimizer.state_dict()))

        model, handle, _ = trained(range(12))
        rows = {row.name: row for row in handle.report().rows}
        assert rows["body"].refreshes == rows["heads.0"].refreshes == 3
        assert rows["heads.1"].refreshes >= 1 and rows["heads.1"].correlation_after is not None
        assert rows["heads.2"].refreshes == 0 and not any(row.skips for row in rows.values())
        again, its, _ = trained(range(6, 12), trained(range(6))[2])  # saved while the second one records
        assert same(weights(model), weights(again)) and its.report() == handle.report()

    def test_a_late_layer_is_the_loaded_runs(self):
        """One that waits for inputs keeps none of those before a load, and its checkpoint has always the same keys."""

        def begun():
            torch.manual_seed(0)
            return bound("linear", DecorConfig(every=4, sample=1.0), nn.ModuleList(nn.Linear(6, 6) for _ in range(2)))

        def train(model, optimizer, steps):
            for seed in steps:
                x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
                optimizer.zero_grad()
                sum(layer(x).square().mean() for layer in model[: 1 + (seed % 4 > 0)]).backward()
                optimizer.step()

        model, optimizer, handle = begun()
        train(model, optimizer, range(2))
        saved, keys = copy.deepcopy((model.state_dict(), optimizer.state_dict())), []
        for seed in range(2, 9):
            train(model, optimizer, [seed])
            entries = optimizer.state_dict()["state"].values()
            keys += [entry["timm_decor"].get("recorded") for entry in entries if "timm_decor" in entry]
        assert len(keys) == 14 and not any(keys), "torch.distributed.checkpoint loads into tensors of the same names"
        wanted = handle.report()
        model.load_state_dict(saved[0])  # back, in the same process
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        train(model, optimizer, range(2, 9))
        assert handle.report() == wanted
        assert [row.refreshes for row in wanted.rows] == [3, 1]

    def test_a_late_layer_recovers_from_an_overflow(self, caplog):
        model, optimizer, handle = bound("linear", DecorConfig(every=1, sample=1.0), nn.Sequential(nn.Linear(4, 4)))
        for scale in (1.0, 1e30, 1.0, 1.0):
            optimizer.zero_grad()
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
            model(x).square().mean().backward()
            if scale > 1:  # each batch is finite, and their sum is not
                handle._groups[0].layers[0].moments = {n: m * math.inf for n, m in model[0].moments.items()}
            optimizer.step()
        (row,) = handle.report().rows
        assert (row.refreshes, row.skips) == (3, 1)

    def test_a_step_without_a_gradient_is_none(self, monkeypatch):
        model, optimizer, handle = bound("linear")
        optimizer.step()
        assert handle.step == 0
        monkeypatch.setattr("timm_decor.engine.flight.processes", lambda: 2)
        optimizer.step()
        assert handle.step == 1, "others may have one, and all must refresh in the same step"
        monkeypatch.undo()
        model, optimizer, handle = bound("linear")
        step(model, optimizer, 0)
        assert [row.refreshes for row in handle.report().rows] == [1, 1, 1]

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_replaced_weight_is_plain_and_named_once(self, kind, caplog):
        model, optimizer, handle = bound(kind)
        step(model, optimizer, 0)
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())
        before = model[2].weight.detach().clone()
        for seed in range(1, 4):
            step(model, optimizer, seed)
        assert handle.step == 4 and torch.equal(model[2].weight, before)
        assert caplog.text.count("layer 2 is plain: its weight was replaced after attach") == 1
        optimizer.state_dict()
        model, optimizer, _ = bound(kind, DecorConfig(every=1, sample=1.0, preserve_function=False))
        model[2].weight = nn.Parameter(before.clone())
        for seed in range(3):
            step(model, optimizer, seed)
        assert torch.equal(model[2].weight, before)

    def test_a_refused_state_changes_nothing(self):
        saved = bound("linear")
        for seed in range(3):
            step(*saved[:2], seed)
        model = timm_decor.decorrelate(net(), CONFIG)
        groups = [{"params": [p for p in model.parameters() if p.dim() == d]} for d in (1, 2, 4)]
        optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9)
        handle = timm_decor.attach(model, optimizer)
        step(model, optimizer, 7)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict(saved[1].state_dict())
        assert same_tree(optimizer.state_dict(), before) and handle.step == 1

    def test_a_refused_attach_leaves_the_config(self):
        model = timm_decor.decorrelate(net(), DecorConfig(damping=0.5))
        with pytest.raises(ValueError, match="does not hold the weight"):
            timm_decor.attach(model, torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1), DecorConfig(damping=2.0))
        assert timm_decor.attach(model, torch.optim.SGD(model.parameters(), 0.1)).config.damping == 0.5

    def test_added_and_frozen_ones_are_named_once(self, caplog):
        model, optimizer, _ = bound("decaying")
        model.append(nn.Linear(3, 3))
        optimizer.add_param_group({"params": list(model[5].parameters())})
        model[2].requires_grad_(False)
        for seed in range(6):
            step(model, optimizer, seed)
        assert caplog.text.count("layer 5 is plain: it came after attach") == 1
        assert caplog.text.count("layer 2 is plain: it was frozen after attach") == 1

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_moved_weights_take_r_along(self, kind, dtype):
        model, optimizer, handle = bound(kind)
        for seed in range(3):
            step(model, optimizer, seed)
        r = {name: entry["r"] for name, entry in handle.state()["layers"].items()}
        model.to(dtype)
        for state in optimizer.state.values():  # torch leaves the optimizer's own where they are
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    state[name] = value.to(dtype)
        x, y = batch(3, dtype=dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        wanted = torch.promote_types(dtype, torch.float32)
        for name, entry in handle.state()["layers"].items():
            for key, value in entry["r"].items():
                assert value.dtype == wanted
                assert key == SCALE or torch.equal(value.float(), r[name][key].float())
        step(model, optimizer, 4, dtype=dtype)
        assert handle.step == 5 and all(p.isfinite().all() for p in model.parameters())

    def test_a_state_saved_alone_loads_stacked(self, monkeypatch):
        """On a CPU each layer is a group, on a GPU those of equal shape are one."""
        model = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def trained(steps, saved=None):
            own = timm_decor.decorrelate(copy.deepcopy(model), DecorConfig(every=2, sample=1.0))
            optimizer = torch.optim.AdamW(own.parameters(), 1e-2)
            handle = timm_decor.attach(own, optimizer)
            if saved:
                own.load_state_dict(saved[0])
                optimizer.load_state_dict(copy.deepcopy(saved[1]))
            for seed in steps:
                x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
                optimizer.zero_grad()
                sum(layer(x).square().mean() for layer in own).backward()
                optimizer.step()
            return handle, (copy.deepcopy(own.state_dict()), copy.deepcopy(optimizer.state_dict()))

        _, saved = trained(range(3))
        _, alone = trained(range(3, 7), saved)
        monkeypatch.setattr("timm_decor.engine.group._STACKED_ELEMENTS", {})
        handle, stacked = trained(range(3, 7), saved)
        assert len(handle._groups) == 1
        for name, value in alone[0].items():
            torch.testing.assert_close(stacked[0][name], value)


class TestPieces:
    """Weights that are not here as a whole."""

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_flat_ones_are_refused(self, when):
        """What FSDP's first form and DeepSpeed's third stage leave of a weight between steps."""
        model = timm_decor.decorrelate(net(), CONFIG)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if when == "after":
            timm_decor.attach(model, optimizer)
        model[0].weight.data = model[0].weight.data.flatten()[:7]
        model[0].weight.grad = torch.ones(7)
        with pytest.raises(ValueError, match="the weight of 0 is here in flat pieces without rows .*: use FSDP2"):
            timm_decor.attach(model, optimizer) if when == "before" else optimizer.step()

    def test_fully_shard_behind_attach_is_refused(self, tmp_path):
        """The optimizer holds the weights of before, which nothing trains any more."""
        fsdp = pytest.importorskip("torch.distributed.fsdp")
        if not hasattr(fsdp, "fully_shard"):
            pytest.skip("this torch has it elsewhere")
        from torch.distributed.device_mesh import init_device_mesh

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model = timm_decor.decorrelate(net(), CONFIG)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            timm_decor.attach(model, optimizer)
            fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            with pytest.raises(ValueError, match="the optimizer does not hold the weight of 0"):
                step(model, optimizer, 0)
        finally:
            dist.destroy_process_group()

    def test_copies_of_data_parallel_are_refused(self):
        """A GPU's share of a batch goes through a copy, which sees inputs that the layer itself never sees."""
        model, _, _ = bound("linear")
        copy_of_layer = model[0]._replicate_for_data_parallel()
        copy_of_layer.weight, copy_of_layer.bias = model[0].weight, model[0].bias
        with pytest.raises(ValueError, match="nn.DataParallel runs on copies"):
            copy_of_layer(batch(0)[0])
        with torch.no_grad():
            assert torch.equal(copy_of_layer(batch(0)[0]), model[0](batch(0)[0]))


class TestInputs:
    def test_that_cannot_be_recorded_are_counted(self):
        from torch.func import functional_call, grad, jvp, vmap

        model = timm_decor.decorrelate(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), CONFIG)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        handle = timm_decor.attach(model, optimizer)
        x, y, values = torch.randn(32, 8), torch.randn(32, 4), {k: v.detach() for k, v in model.named_parameters()}

        def loss(values, x, y):
            return (functional_call(model, values, (x,)) - y).pow(2).mean()

        each = vmap(grad(loss), (None, 0, 0))(values, x, y)
        jvp(lambda v: loss(v, x, y), (values,), (each and {k: torch.ones_like(v) for k, v in values.items()},))
        for layout in (torch.jagged, torch.strided):
            model[0](torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout))
        model[0](torch.randn(4, 8).to_sparse().requires_grad_())
        assert [model[0].unrecorded, model[2].unrecorded, float(model[0].rows)] == [5, 2, 0]
        with pytest.raises(RuntimeError):
            model[0](torch.randn(4, 8, device="meta"))  # torch's own error: the weights are here
        assert model[0].unrecorded == 6
        model[0].unrecorded = 5
        model[0](torch.randn(0, 8))
        assert handle.report().rows[0].unrecorded == 5
        model(x).sum().backward()
        assert float(model[0].rows) == 32

    def test_that_the_layer_refuses_are_refused_by_the_layer(self):
        model, _, _ = bound("linear", model=nn.Sequential(nn.Conv2d(6, 4, 5)))
        for size in ((9, 3), (3, 3)):  # too small one way, and both ways
            with pytest.raises(RuntimeError, match="[Kk]ernel size can't be greater"):
                model[0](torch.randn(2, 6, *size))

    def test_within_each_other(self):
        model, _, handle = bound("linear")
        x, _ = batch(0)
        with torch.no_grad(), handle.recording():
            with handle.recording():
                pass
            model(x)
        assert float(model[0].rows) > 0
        before = float(model[0].rows)
        with torch.no_grad():
            model(x)
        assert float(model[0].rows) == before

    def test_while_gradients_are_off_on_request(self):
        model, optimizer, handle = bound("linear")
        x, _ = batch(0)
        with torch.no_grad():
            model(x)
            assert not model[0].rows
            with handle.recording():
                model(x)
        assert float(model[0].rows) > 0
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        assert all(row.refreshes == 1 for row in handle.report().rows)

    @pytest.mark.parametrize("kind", KINDS)
    def test_weights_in_an_odd_layout_train_the_same(self, kind):
        twin, twin_optimizer, _ = bound(kind, model=net(torch.float64))
        odd = net(torch.float64)
        state = {k: v.mT.contiguous().mT if v.dim() == 4 else v for k, v in odd.state_dict().items()}
        odd.load_state_dict(state, assign=True)
        model, optimizer, _ = bound(kind, model=odd)
        assert not model[0].weight.is_contiguous()
        for seed in range(5):
            expected = step(twin, twin_optimizer, seed, dtype=torch.float64)
            assert step(model, optimizer, seed, dtype=torch.float64) == pytest.approx(expected, rel=1e-10)


class TestCoordinates:
    """What training without backpropagation needs of the engine."""

    @pytest.mark.parametrize("structure", ["full", "kronecker", "space"])
    @pytest.mark.parametrize("sides", ["input", "both"])
    def test_directions_and_gradients_go_there_and_back(self, structure, sides):
        config = DecorConfig(structure=structure, sides=sides, every=1, sample=1.0, output_every=1)
        model, optimizer, handle = bound("decaying", config, net(torch.float64))
        for seed in range(3):
            step(model, optimizer, seed, dtype=torch.float64)
        names = [f"{name}.weight" for name in handle.names]
        draw = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        direction, gradient = handle.kernel_direction(draw), handle.kernel_gradient(other)
        for name, value in draw.items():
            attached_here = name in names
            assert torch.equal(direction[name], value) != attached_here
            # <L V R, L^-T G R^-T> = <V, G>
            torch.testing.assert_close((direction[name] * gradient[name]).sum(), (value * other[name]).sum())

    def test_by_the_names_of_a_wrapped_model(self):
        model, optimizer, handle = bound("decaying", DecorConfig(every=1, sample=1.0))
        for seed in range(2):
            step(model, optimizer, seed)
        draw = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        plain = handle.kernel_direction(draw)
        for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."):
            wrapped = handle.kernel_direction({prefix + name: value for name, value in draw.items()})
            assert same([wrapped[prefix + name] for name in draw], plain.values())
        for ask in (handle.kernel_direction, handle.kernel_gradient):
            with pytest.raises(ValueError, match=r"'net\.0' is no parameter of the attached model, as '0\.weight' is"):
                ask({"net.0": draw["0.weight"]})
            assert ask({"0.bias": draw["0.bias"]})["0.bias"] is draw["0.bias"] and ask({}) == {}

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_step_that_is_running_is_not_saved(self, kind, monkeypatch):
        """A signal's handler, or a thread: what the optimizer works on is not the model's weights."""
        model, optimizer, handle = bound(kind)
        for seed in range(2):
            step(model, optimizer, seed)
        before = weights(model)
        said = []

        def asking(update):
            def asked(*args, **kwargs):
                for ask in (optimizer.state_dict, handle.report):
                    with pytest.raises(RuntimeError, match="the optimizer's step is running"):
                        ask()
                    said.append(ask)
                return update(*args, **kwargs)

            return asked

        places = [(coordinates.step_type(optimizer), "enter"), (StepInFlight, "land"), (handle_module, "look_at")]
        places += [(sys.modules[f"torch.optim.{name}"], name) for name in ("sgd", "adam", "adamw")]
        for owner, name in places:
            monkeypatch.setattr(owner, name, asking(getattr(owner, name)))
        step(model, optimizer, 2)  # one with a refresh
        assert len(said) >= 2 * len(places[:3]) + 2 and handle.step == 3 and not same(weights(model), before)
        optimizer.state_dict()

    def test_an_unfinished_step_is_said_and_undone(self, caplog):
        """Who kept `step` from before `attach` calls past the guard: the next touch puts the weights back."""
        model = timm_decor.decorrelate(net(), CONFIG)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        kept = optimizer.step
        handle = timm_decor.attach(model, optimizer)
        step(model, optimizer, 0)
        before = weights(model)[::2]
        rate, optimizer.param_groups[0]["betas"] = optimizer.param_groups[0]["betas"], None
        with pytest.raises(TypeError), caplog.at_level(logging.WARNING):
            kept()
        optimizer.param_groups[0]["betas"] = rate
        handle.report()
        assert same(weights(model)[::2], before) and "step 1 did not end" in caplog.text
        x, y = batch(1)
        F.cross_entropy(model(x), y).backward()
        kept()
        assert handle.step == 2


def test_kinds_are_what_their_names_say():
    ways = {"linear": coordinates.Linear, "decaying": coordinates.Decaying, "general": coordinates.General}
    for (kind, make), (name, way) in itertools.product(KINDS.items(), ways.items()):
        assert (coordinates.step_type(make(net().parameters())) is way) == (kind == name)
    assert attached(opt="adamw")[2].step == 0
