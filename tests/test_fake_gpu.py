"""A GPU run without a GPU: under FakeTensorMode a model on `cuda` takes steps, and each wait for the device is seen.

Gradients are set by hand, because a backward pass needs a device.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import timm.optim
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import timm_decor
from timm_decor import DecorConfig, moments
from timm_decor.config import RULE_STRUCTURES
from timm_decor.engine import handle as handle_module
from timm_decor.moments import ConvShape
from timm_decor.shape import LayerShape
from timm_decor.structures import eigen
from timm_decor.structures.base import LowRank
from timm_decor.structures.kronecker import KroneckerR
from timm_decor.training.evaluate import evaluate
from timm_decor.training.seeing.losswatch import LossWatch

STEPS, EVERY = 10, 3
PAIRS = [(rule, structure) for rule, structures in RULE_STRUCTURES.items() for structure in structures]
OPTIMIZERS = {  # one of each kind of step (engine/coordinates.py), and their variants
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "muon": lambda p: timm.optim.Muon(p, lr=0.01, capturable=True),
}
# Operations that make the host wait for the device. `eigh` is torch's own check of its solver.
WAITS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select")
SOLVERS = ("linalg_eigh", "_linalg_eigh")


class Waits(TorchDispatchMode):
    """Counts, by name, what waits for the device and what comes back from it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        out = func(*args, **(kwargs or {}))
        on_gpu = any(isinstance(arg, torch.Tensor) and arg.device.type == "cuda" for arg in args)
        if on_gpu and (name in WAITS or name in SOLVERS):
            self.seen[name] += 1
        if name in ("_to_copy", "copy_") and isinstance(out, torch.Tensor):
            from_gpu = [arg for arg in args if isinstance(arg, torch.Tensor)][-1].device.type == "cuda"
            if from_gpu and out.device.type == "cpu":
                self.seen["look"] += 1
            if not from_gpu and out.device.type == "cuda" and not (kwargs or {}).get("non_blocking"):
                self.seen["sent"] += 1
        return out


class Operations(TorchDispatchMode):
    """Counts all of them, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """Layers of each kind, two of them of equal shape; a BatchNorm behind one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, (3, 2), groups=2, stride=2),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture(autouse=True)
def _looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refresh's look cannot be answered by tensors without values: it is counted, and every layer takes its R."""

    def look_at(flags: Sequence[torch.Tensor]) -> list[list[list[bool]]]:
        torch.zeros((), device="cuda").cpu()  # what is counted
        return [[[True] * each.shape[1]] * 3 for each in flags]

    monkeypatch.setattr(handle_module, "look_at", look_at)


def train(config: DecorConfig, opt: str, plain: bool = False) -> list[Counter[str]]:
    """What each step waited for."""
    found = []
    with FakeTensorMode():
        with torch.device("cuda"):
            model = Net().train()
        if not plain:
            timm_decor.decorrelate(model, config)
        optimizer = OPTIMIZERS[opt](model.parameters())
        handle = None if plain else timm_decor.attach(model, optimizer)
        for _ in range(STEPS):
            model(torch.randn(4, 3, 9, 9, device="cuda"))
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            with Waits() as waits:
                optimizer.step()
            found.append(waits.seen)
        if handle is not None:
            for group in handle._groups:
                held = (*group.sides.tensors().values(), *group.moments.values())
                assert {tensor.device.type for tensor in held} == {"cuda"}
            groups = [len(group.layers) for group in handle._groups]
            assert max(groups) == 2, "layers of equal shape are stacked on a GPU"
    return found


# SGD's and Adam's steps multiply by R in all of its ways; the others' ways are among those.
CASES = [(opt, *pair) for opt in ("sgd", "adam") for pair in PAIRS]
CASES += [(opt, "whiten", "kronecker") for opt in OPTIMIZERS if opt not in ("sgd", "adam")]


@pytest.mark.parametrize("opt,rule,structure", CASES)
def test_nothing_waits_but_a_refresh(opt: str, rule: str, structure: str) -> None:
    """Between refreshes no wait that the plain optimizer does not have; at one a single look, and eigh's own checks."""
    # With an output side and a function that moves there is more to do than by default.
    config = DecorConfig(rule=rule, structure=structure, every=EVERY, sides="both", preserve_function=False)
    plain, ours = train(config, opt, plain=True), train(config, opt)
    for step, (theirs, own) in enumerate(zip(plain, ours, strict=True)):
        more = own - theirs
        for solver in SOLVERS:
            more.pop(solver, None)
        looks = more.pop("look", 0)
        assert not more, f"step {step} waits: {more}"
        assert looks == (step % EVERY == 0), f"step {step}: {looks} looks"


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_a_model_on_two_devices_takes_its_steps(opt: str) -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(40, 40, device="cuda:0"), nn.Linear(40, 5, device="cuda:1"))
        timm_decor.decorrelate(model, DecorConfig(every=4))
        optimizer = OPTIMIZERS[opt](model.parameters())
        handle = timm_decor.attach(model, optimizer)
        for _ in range(STEPS):
            model[1](model[0](torch.randn(30, 40, device="cuda:0")).to("cuda:1"))
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        for group, device in zip(handle._groups, ("cuda:0", "cuda:1"), strict=True):
            assert {str(tensor.device) for tensor in group.sides.tensors().values()} == {device}


def test_the_loss_is_watched_without_a_wait() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        watch = LossWatch(SimpleNamespace(device=torch.device("cuda"), num_processes=1), 50)
        output = torch.randn(4, 5)
        with Waits() as waits:
            for step in (1, 2):
                watch.see(output.square().mean(), output, torch.zeros(4, dtype=torch.int64), step)
    assert not waits.seen


def test_evaluation_waits_at_its_end_alone() -> None:
    accelerator = SimpleNamespace(
        device=torch.device("cuda"), autocast=contextlib.nullcontext, gather_for_metrics=lambda of: of
    )
    with FakeTensorMode(), torch.device("cuda"):
        model, batch = Net(), (torch.randn(4, 3, 9, 9), torch.zeros(4, dtype=torch.int64))
        before_the_end = []

        def loader():
            yield batch
            yield batch
            before_the_end.append(Counter(waits.seen))

        with Waits() as waits, pytest.raises(DataDependentOutputException):  # the sums, which have no values here
            evaluate(model, loader(), accelerator)
    assert before_the_end == [Counter()]


def test_statistics_start_no_kernel_for_each_image() -> None:
    shape = ConvShape((3, 2), (1, 2), (2, 1), 2)
    with FakeTensorMode(), Operations() as operations:
        x = torch.randn(4, 6, 9, 9, device="cuda")
        for of in (moments.patch_moment, moments.patch_sum, moments.space_moment):
            of(x, shape)
    assert operations.seen["aten::bmm"] and not operations.seen["aten::im2col"]


@pytest.mark.parametrize("groups", [1, 4])
def test_a_step_starts_as_many_products_for_many_groups(groups: int) -> None:
    shape = LayerShape(groups, 8, 9, 8)
    like = torch.empty(0)
    r = KroneckerR.identity(shape, 4, like, inverse=False)
    more = LowRank(torch.randn(groups, 8, 2), torch.randn(groups, 2, 8, 9))
    with Operations() as operations:
        r.apply_gram(torch.randn(groups, 8, 8, 9), plus=more)
    assert operations.seen["aten::baddbmm_"] == 2


def test_a_mac_decomposes_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs have no float64."""
    seen = []

    def decomposed(sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(sigma.device.type)
        return sigma[..., 0], sigma

    monkeypatch.setattr(eigen, "_of_finite", decomposed)
    with FakeTensorMode():
        sigma = torch.randn(1, 90, 90, device="mps")
        found = [*eigen.eigenpairs(sigma), *eigen.leading_eigenpairs(sigma, 4, torch.randn(1, 90, 4, device="mps"))]
    assert seen == ["cpu", "cpu"] and {each.device.type for each in found} == {"mps"}
