"""The merged view equals the explicit z = R x, y = W z: every rule, structure, layer kind and optimizer, in float64."""

import dataclasses

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from reference import ExplicitLayer, explicit_twin, kernel_gradient, measured, rescale
from torch import nn

import timm_decor
from timm_decor import DecorConfig
from timm_decor.config import RULE_STRUCTURES
from timm_decor.engine import group as group_module

STEPS = 15
RULES = [(rule, structure) for rule, structures in RULE_STRUCTURES.items() for structure in structures]


class Net(nn.Module):
    """One layer of each kind that the engine claims to handle; two are there twice, to be one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(6, 6, 3, padding=2, dilation=2, bias=False)
        self.grouped = nn.Conv2d(6, 4, (3, 2), padding=(1, 0), groups=2, padding_mode="reflect")
        self.pointwise = nn.Conv2d(4, 5, 1, bias=False)
        self.tokens = nn.Linear(5, 6)  # 3 dimensions
        self.maps = nn.Linear(6, 6, bias=False)  # 4 dimensions
        self.normed = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.dilated2 = nn.Conv2d(6, 6, 3, padding=2, dilation=2, bias=False)
        self.maps2 = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 3)  # 2 dimensions

    def forward(self, x):
        x = self.strided(x).tanh()
        x = x + self.dilated(x)
        x = x + self.dilated2(x.tanh())
        x = x + self.norm(self.normed(x.tanh() + 1))
        x = self.pointwise(self.grouped(x).tanh())
        x = self.tokens(x.flatten(2).transpose(1, 2)).tanh()
        x = x + self.maps(x[:, None])[:, 0]
        x = x + self.maps2(x.tanh())
        return self.head(x.mean(1))


def data(images=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, images, 3, 9, 9, generator=generator, dtype=torch.float64).cumsum(3).cumsum(4) * 0.2
    return x, torch.randint(0, 3, (STEPS, images), generator=generator)


def make_optimizer(name, model):
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    if name == "adam":  # W is needed: the decay is in the gradient
        return torch.optim.Adam(model.parameters(), 1e-2, weight_decay=0.1)
    return timm.optim.create_optimizer_v2(model, "muon", lr=0.02, weight_decay=0.1)


def train(model, optimizer, x, y, before_step=lambda step: None, after_step=lambda step: None):
    losses = []
    for step in range(STEPS):
        loss = F.cross_entropy(model(x[step]), y[step])
        optimizer.zero_grad()
        loss.backward()
        before_step(step)
        optimizer.step()
        after_step(step)
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def decided(config, optimizer_name):
    """The config with what `attach` makes of sides="auto"."""
    both = config.rule == "whiten" and optimizer_name == "sgd"
    return dataclasses.replace(config, sides="both" if both else "input") if config.sides == "auto" else config


def compare(config, optimizer_name, batches=False):
    """Largest difference of the losses and kernels after STEPS steps, engine against reference.

    Args:
        config: of both.
        optimizer_name: of both.
        batches: layers of equal shape are expected to share a batch.
    """
    torch.manual_seed(0)
    plain = Net().double()

    def fits(layer):
        return config.structure != "space" or layer.weight[0, 0].numel() > 1

    explicit = explicit_twin(plain, decided(config, optimizer_name), fits, centred=["normed"])
    layers = {name: module for name, module in explicit.named_modules() if isinstance(module, ExplicitLayer)}

    reference = make_optimizer(optimizer_name, explicit)
    starts, gradients = {}, {}

    def refresh(step):
        """R and L, and the scale: measured at the step after, but for the first one; steadied by the one before."""
        own, now = list(layers.values()), []

        def measure():
            if config.graft:
                now.append(measured(own, reference, starts.values(), stepped, gradients.values()))

        stepped = [layer.weight.detach().clone() for layer in own]
        if step and (step % config.every == 1 % config.every or (step < config.every and step in (1, 2, 4, 8, 16))):
            measure()
        if step % config.every == 0:
            for layer in own:
                layer.refresh()
        if not step:
            measure()
        for c in now:
            rescale(own, c if step <= config.every else (c * own[0].c) ** 0.5)

    def look(step):
        for name, layer in layers.items():
            if step % config.output_every == 0:
                layer.look()
            starts[name], gradients[name] = layer.weight.detach().clone(), kernel_gradient(layer)
            if optimizer_name != "sgd":  # does not care for the gradient's size, and is not to see a change of scale
                layer.weight.grad /= layer.c

    x, y = data()
    expected = train(explicit, reference, x, y, look, refresh)

    model = timm_decor.decorrelate(plain, config)
    optimizer = make_optimizer(optimizer_name, model)
    handle = timm_decor.attach(model, optimizer)
    losses = train(model, optimizer, x, y)
    assert (len(handle._groups) < len(handle.names)) == batches

    assert {row.name for row in handle.report().rows} == set(layers)
    assert all(row.refreshes == -(-STEPS // config.every) and not row.skips for row in handle.report().rows)
    scales = {float(c) for group in handle._groups if group.sides.scale is not None for c in group.sides.scale}
    assert len(scales) == config.graft, "one number for the network"
    for value in scales:
        assert abs(value - 1) > 1e-4, "the scale hardly moved"
        assert value == pytest.approx(next(iter(layers.values())).c, rel=1e-9)
    differences = [(losses - expected).abs().max()]
    for name, layer in layers.items():
        differences.append((model.get_submodule(name).weight.detach() - layer.kernel).abs().max())
    moved = max((layer.R - torch.eye(layer.dim)).abs().max() for layer in layers.values())
    assert moved > 1e-2, "R hardly moved: the comparison would prove nothing"
    if decided(config, optimizer_name).sides == "both":
        turned = min((layer.L - layer.L[:, :1, :1] * torch.eye(layer.outputs)).abs().max() for layer in layers.values())
        assert all(layer.two_sided for layer in layers.values()) and turned > 1e-3, "L hardly moved"
    return max(float(d) for d in differences)


@pytest.fixture
def one_batch(monkeypatch):
    """Layers of equal shape step and refresh together, as they do on a GPU; on a CPU each would go alone."""
    monkeypatch.setattr(group_module, "_STACKED_ELEMENTS", {})


OWN = {  # knobs of one rule
    "dbp": {"kappa": 0.3, "decor_lr": 0.05},
    "crgd": {"decor_lr": 0.05},
    "whiten": {"damping": 0.5, "stat_decay": 0.3},
}


def knobs(rule, structure, **others):
    return DecorConfig(
        rule=rule, structure=structure, every=3, sample=1.0, rank=2, output_damping=0.4, output_every=2,
        output_decay=0.6, **OWN[rule], **others,
    )  # fmt: skip


@pytest.mark.parametrize("preserve", [True, False], ids=["preserve", "move"])
@pytest.mark.parametrize("rule,structure", RULES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adam", "muon"])
def test_engine_equals_explicit_layers(optimizer, rule, structure, preserve):
    assert compare(knobs(rule, structure, preserve_function=preserve), optimizer) < 1e-10


NOT_AUTO = [  # whiten has both sides with SGD by itself, the other rules have the inputs
    *(("sgd", "input" if rule == "whiten" else "both", rule, structure) for rule, structure in RULES),
    *((optimizer, "both", rule, structure) for optimizer in ("adamw", "muon") for rule, structure in RULES),
]


@pytest.mark.parametrize("preserve", [True, False], ids=["preserve", "move"])
@pytest.mark.parametrize("optimizer,sides,rule,structure", NOT_AUTO)
def test_each_side_asked_for(optimizer, sides, rule, structure, preserve):
    """What "auto" does not choose: the output side with every optimizer and rule, and SGD without it."""
    assert compare(knobs(rule, structure, preserve_function=preserve, sides=sides), optimizer) < 1e-10


@pytest.mark.parametrize("sides", ["input", "both"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adam", "muon"])
def test_without_a_scale(optimizer, sides):
    assert compare(knobs("whiten", "kronecker", sides=sides, graft=False), optimizer) < 1e-10


@pytest.mark.parametrize("structure", ["full", "kronecker", "space"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_statistics_that_are_not_centred(optimizer, structure):
    assert compare(knobs("whiten", structure, center=False), optimizer) < 1e-10


@pytest.mark.parametrize("rule,structure", RULES)
@pytest.mark.parametrize("optimizer,preserve", [("sgd", False), ("adamw", True)])
def test_layers_of_equal_shape_as_one_batch(one_batch, optimizer, preserve, rule, structure):
    assert compare(knobs(rule, structure, preserve_function=preserve), optimizer, batches=True) < 1e-10


@pytest.mark.parametrize("rule,structure", RULES)
def test_a_sample_of_the_images(rule, structure):
    own = {} if rule == "whiten" else {"decor_lr": 0.05}
    config = DecorConfig(rule=rule, structure=structure, every=2, sample=0.4, **own)
    assert compare(config, "sgd") < 1e-10


@pytest.mark.parametrize("rank,every", [(1, 1), (32, 1), (1, 7), (32, 7)])
def test_kronecker_ranks_and_intervals(rank, every):
    assert compare(DecorConfig(rank=rank, every=every, sample=1.0), "sgd") < 1e-10
