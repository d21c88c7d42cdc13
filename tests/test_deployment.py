"""Out of the zoo: what can be done with a plain timm model can be done with one that was trained decorrelated.

docs/deployment.md says what to call; here every way out gives the numbers of the model that was trained.
"""

from __future__ import annotations

import copy
import inspect
import io
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3, reparameterize_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import timm_decor
from timm_decor import DecorConfig, DecorConv2d, DecorHandle, DecorLinear

CONFIG = DecorConfig(every=2, sample=1.0)
CLASSES = 5

SLIM: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48), "stem_width": 16}
ARGUMENTS: dict[str, dict[str, Any]] = {  # timm's models, small enough to test many ways out of them
    "resnet18": SLIM,
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 48},
    "repvit_m0_9": {"embed_dim": (16, 24, 32, 48), "depth": (1, 1, 1, 1)},
    "repvgg_a0": {"width_factor": 0.25},
}


class Trained(NamedTuple):
    """A model that made a few decorrelated steps, and what must come out of every way to deploy it."""

    decorrelated: nn.Module  # detached
    plain: nn.Module  # its copy after to_plain
    twin: nn.Module  # timm's own model with the checkpoint loaded
    images: Tensor
    outputs: Tensor  # of the model while it was still attached


def ordinary(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES, **ARGUMENTS[name])


def images(count: int = 4) -> Tensor:
    noise = torch.randn(count, 3, 32, 32)
    return noise + noise.roll(1, 3) + noise.roll(1, 1) + 0.5  # pixels and colours alike: something to decorrelate


def attached(model: nn.Module) -> tuple[torch.optim.Optimizer, DecorHandle]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return optimizer, timm_decor.attach(model, optimizer)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss = F.cross_entropy(model.train()(images()), torch.arange(4))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def assert_decorrelating(handle: DecorHandle) -> None:
    """Every R was refreshed and is far from the identity: W and A = W R are different numbers."""
    rows = handle.report().rows
    assert rows and all(row.refreshes > 0 and row.condition > 1.05 for row in rows), handle.report()


def train(name: str) -> Trained:
    torch.manual_seed(0)  # the fixtures below outlive the test that makes them
    model = timm_decor.decorrelate(ordinary(name), CONFIG)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.9  # or three steps leave features too small to show in the outputs
    optimizer, handle = attached(model)
    for _ in range(3):
        step(model, optimizer)
    assert_decorrelating(handle)
    x = images(3)
    with torch.no_grad():
        outputs = model.eval()(x)
    assert outputs.std(0).max() > 0.02
    handle.detach()
    twin = ordinary(name).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    return Trained(model, timm_decor.to_plain(copy.deepcopy(model)), twin, x, outputs)


@pytest.fixture(scope="module", params=["resnet18", "vit_tiny_patch16_224"])
def trained(request: pytest.FixtureRequest) -> Trained:
    return train(request.param)


@pytest.fixture(scope="module", params=["repvit_m0_9", "repvgg_a0"])
def branched(request: pytest.FixtureRequest) -> Trained:
    """A model whose branches become one convolution for inference."""
    return train(request.param)


def kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def assert_same(outputs: Tensor, expected: Tensor) -> None:
    """To rounding error in outputs, which are small after a few steps from random weights."""
    assert_close(outputs, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# Exchange formats


def test_the_outputs_are_the_twins(trained: Trained) -> None:
    with torch.no_grad():
        assert torch.equal(trained.plain(trained.images), trained.outputs)
        assert torch.equal(trained.twin(trained.images), trained.outputs)


def test_a_pickled_plain_model_needs_no_plugin(trained: Trained) -> None:
    with io.BytesIO() as file:
        torch.save(trained.plain, file)
        assert b"timm_decor" not in file.getvalue()
        file.seek(0)
        again = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(trained.images), trained.outputs)


def onnx_bytes(model: nn.Module, x: Tensor) -> bytes:
    """The model as ONNX, for batches of any size."""
    file = io.BytesIO()
    if torch.__version__ >= (2, 6) and "dynamic_shapes" in inspect.signature(torch.onnx.export).parameters:
        pytest.importorskip("onnxscript")
        program = torch.onnx.export(
            model, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        program.save(file)
    else:
        torch.onnx.export(model, (x,), file, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    return file.getvalue()


def test_onnx(trained: Trained) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    exported = onnx_bytes(trained.plain, trained.images)
    assert b"DecorConv2d" not in exported and b"DecorLinear" not in exported  # torch writes the modules' classes down
    session = runtime.InferenceSession(exported, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

    assert_same(run(trained.images), trained.outputs)
    assert_same(run(trained.images[:2]), trained.outputs[:2])


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.filterwarnings("ignore")  # torch warns of tracing, and of TorchScript itself
def test_torchscript(trained: Trained, how: str) -> None:
    if how == "script":
        converted = torch.jit.script(trained.plain)
    else:
        converted = torch.jit.trace(trained.plain, trained.images[:2])
    with io.BytesIO() as file:
        torch.jit.save(converted, file)
        file.seek(0)
        again = torch.jit.load(file)
    with torch.no_grad():
        assert_same(again(trained.images), trained.outputs)


def test_torch_export(trained: Trained) -> None:
    program = torch.export.export(trained.plain, (trained.images,))
    with io.BytesIO() as file:
        torch.export.save(program, file)
        file.seek(0)
        again = torch.export.load(file)
    with torch.no_grad():
        assert_same(again.module()(trained.images), trained.outputs)


# Reparameterised


def test_reparameterized(branched: Trained) -> None:
    fused = reparameterize_model(branched.plain)
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in branched.plain.parameters())
    assert kinds(fused) == {nn.Conv2d, nn.Linear}
    with torch.no_grad():
        assert_same(fused(branched.images), branched.outputs)
        assert torch.equal(fused(branched.images), reparameterize_model(branched.twin)(branched.images))


def test_reparameterized_before_plain(branched: Trained) -> None:
    """The other order: timm makes its fused layers plain, and to_plain the rest."""
    fused = reparameterize_model(branched.decorrelated)
    with torch.no_grad():
        assert_same(fused(branched.images), branched.outputs)
        assert kinds(timm_decor.to_plain(fused)) == {nn.Conv2d, nn.Linear}
        assert torch.equal(fused(branched.images), reparameterize_model(branched.plain)(branched.images))
    assert kinds(branched.decorrelated) & {DecorConv2d, DecorLinear}  # only the copy was fused


def test_reparameterized_while_attached(branched: Trained) -> None:
    """A copy is fused and free; the model trains on. In place, to_plain says that the optimizer must go first."""
    model = copy.deepcopy(branched.decorrelated)
    optimizer, handle = attached(model)
    step(model, optimizer)
    model.eval()
    fused = timm_decor.to_plain(reparameterize_model(model))
    with torch.no_grad():
        assert_same(fused(branched.images), model(branched.images))
    step(model, optimizer)
    step(model, optimizer)  # the second refresh, which needs the layers still to record
    assert all(row.refreshes == 2 for row in handle.report().rows)

    reparameterize_model(model.eval(), inplace=True)
    if kinds(model) & {DecorConv2d, DecorLinear}:  # RepVGG's head is left; of RepViT every attached layer was fused
        with pytest.raises(ValueError, match="detach"):
            timm_decor.to_plain(model)
    else:
        assert "repvit" in model.pretrained_cfg["architecture"]  # type: ignore[operator, index]
    handle.detach()
    assert kinds(timm_decor.to_plain(model)) == {nn.Conv2d, nn.Linear}


# Compiled


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("which", ["plain", "decorrelated"])
def test_compiled(trained: Trained, which: str) -> None:
    compiled = torch.compile(getattr(trained, which), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(trained.images), trained.outputs)


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="before torch 2.6 recording breaks the graph")
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_training_has_no_graph_breaks(trained: Trained) -> None:
    """Steps that record statistics and steps that do not, against the same steps without the compiler."""
    models = [copy.deepcopy(trained.decorrelated) for _ in range(2)]
    forwards = [models[0], torch.compile(models[1], backend="eager", fullgraph=True)]
    for model, forward in zip(models, forwards, strict=True):
        torch.manual_seed(1)
        optimizer, handle = attached(model)
        for _ in range(3):
            step(forward, optimizer)
        assert_decorrelating(handle)
    for key, value in models[0].state_dict().items():
        assert_close(models[1].state_dict()[key], value, rtol=1e-3, atol=1e-5)


# 8 bits


def quantized_modules(model: nn.Module) -> int:
    return sum("quantized" in type(module).__module__ for module in model.modules())


def quantize_dynamic(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torch.ao.quantization")
    return quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def quantize_static(model: nn.Module) -> nn.Module:
    """After training, with ranges from a few batches."""
    quantization = pytest.importorskip("torch.ao.quantization")
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = quantization.get_default_qconfig_mapping(torch.backends.quantized.engine)
    prepared = fx.prepare_fx(copy.deepcopy(model), mapping, (images(),))
    torch.manual_seed(1)
    for _ in range(2):
        prepared(images())
    return fx.convert_fx(prepared)


@pytest.mark.filterwarnings("ignore")  # torch.ao is on its way out
@pytest.mark.parametrize("quantize", [quantize_dynamic, quantize_static])
def test_int8(trained: Trained, quantize: Callable[[nn.Module], nn.Module]) -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch was built without a quantized engine")
    with torch.no_grad():
        plain, twin = quantize(trained.plain), quantize(trained.twin)
        assert quantized_modules(plain) == quantized_modules(twin) > 0
        outputs = plain(trained.images)
        assert torch.equal(outputs, twin(trained.images))
    # 8 bits lose something, but the quantized model is of the trained one.
    correlation = torch.corrcoef(torch.stack([outputs.flatten(), trained.outputs.flatten()]))[0, 1]
    assert not torch.equal(outputs, trained.outputs) and correlation > 0.9


# Backbones


class Pyramid(nn.Module):
    """A `features_only` model as torchvision's detectors take their backbone."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body = backbone(name, out_indices=(3, 4))
        self.out_channels = 16
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(index), feature) for index, feature in enumerate(self.body(x))))


class Segmenter(nn.Module):
    """A `features_only` model with torchvision's FCN head, for training as torchvision's detectors are."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body = backbone(name, out_indices=(3,))
        self.head = FCNHead(self.body.feature_info.channels()[-1], CLASSES)

    def forward(self, x: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        scores = F.interpolate(self.head(self.body(torch.stack(x))[-1]), x[0].shape[-2:], mode="bilinear")
        if targets is None:
            return [{"scores": image} for image in scores]
        return {"loss": F.cross_entropy(scores, torch.stack([target["mask"] for target in targets]))}


def backbone(name: str, **kwargs: Any) -> nn.Module:
    if name.startswith("decor_"):
        kwargs["decor_config"] = CONFIG
    return timm.create_model(name, features_only=True, **SLIM, **kwargs)


def detector(name: str) -> nn.Module:
    return FasterRCNN(
        Pyramid(name),
        num_classes=3,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], output_size=3, sampling_ratio=2),
        rpn_post_nms_top_n_train=20,
        rpn_post_nms_top_n_test=20,
    )


def scenes() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    mask = torch.zeros(64, 64, dtype=torch.long)
    mask[20:50, 20:60] = 1
    boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [20.0, 20.0, 60.0, 50.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "mask": mask}
    return [torch.rand(3, 64, 64) for _ in range(2)], [target, target]


def assert_equal_predictions(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> None:
    assert all(len(image["scores"]) > 0 for image in one)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("whole", [False, True], ids=["backbone", "whole"])
@pytest.mark.parametrize("make", [detector, Segmenter])
def test_backbone(make: Callable[[str], nn.Module], whole: bool) -> None:
    """Only the backbone decorrelated, as it comes from `decor_resnet18`, or the whole model, by `decorrelate`."""
    model = make("resnet18" if whole else "decor_resnet18")
    if whole:
        timm_decor.decorrelate(model, CONFIG)
    optimizer, handle = attached(model)
    inputs, targets = scenes()
    losses = []
    for _ in range(4):
        loss = sum(model.train()(inputs, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    names = {row.name for row in handle.report().rows}
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert names == {name for name in layers if whole or "body." in name}
    assert_decorrelating(handle)

    with torch.no_grad():
        before = model.eval()(inputs)
        handle.detach()
        assert_equal_predictions(timm_decor.to_plain(model)(inputs), before)
        assert kinds(model) == {nn.Conv2d} | ({nn.Linear} & kinds(model))
        twin = make("resnet18").eval()
        twin.load_state_dict(model.state_dict(), strict=True)
        assert_equal_predictions(twin(inputs), before)


def test_nothing_stays_in_a_plain_model_around_a_backbone() -> None:
    model = timm_decor.to_plain(Segmenter("decor_resnet18"))
    with io.BytesIO() as file:
        torch.save(model, file)
        assert b"timm_decor" not in file.getvalue()
    with pytest.raises(ValueError, match="no decorrelated layers"):
        timm_decor.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


# Averaged


def floats(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if value.is_floating_point()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_average(averaged: nn.Module, expected: dict[str, Tensor], moved: dict[str, Tensor]) -> None:
    """The average, and not just the last weights."""
    entries = averaged.state_dict()
    for key, value in expected.items():
        assert_close(entries[key], value)
    assert max(float((entries[key] - value).abs().max()) for key, value in moved.items()) > 1e-3


def assert_loads_as_plain(averaged: nn.Module) -> None:
    """timm's resnet18 takes the checkpoint, and to_plain the model, although its original is attached."""
    twin, x = ordinary("resnet18").eval(), images()
    twin.load_state_dict(averaged.state_dict(), strict=True)
    with torch.no_grad():
        expected = averaged.eval()(x)
        assert torch.equal(twin(x), expected)
        assert torch.equal(timm_decor.to_plain(averaged)(x), expected)
    assert kinds(averaged) == {nn.Conv2d, nn.Linear}


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights as an ordinary model holds them that computes what the attached one does."""
    twin, x = ordinary("resnet18").eval(), images()
    twin.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(twin(x), model.eval()(x))
    return floats(twin)


def test_moving_average() -> None:
    model = timm_decor.decorrelate(ordinary("resnet18"), CONFIG)
    optimizer, handle = attached(model)
    ema = ModelEmaV3(model, decay=0.75)
    expected = plain_weights(model)
    for _ in range(4):
        step(model, optimizer)
        ema.update(model)
        for key, value in plain_weights(model).items():
            expected[key] = 0.75 * expected[key] + 0.25 * value
    assert_decorrelating(handle)
    assert_average(ema.module, expected, parameters(model))
    assert_loads_as_plain(ema.module)
    step(model, optimizer)  # the original is attached as before
    assert all(row.refreshes == 3 for row in handle.report().rows)


def test_stochastic_weight_average() -> None:
    model = timm_decor.decorrelate(ordinary("resnet18"), CONFIG)
    optimizer, handle = attached(model)
    averaged, snapshots = AveragedModel(model), []
    for _ in range(4):
        step(model, optimizer)
        averaged.update_parameters(model)
        snapshots.append(plain_weights(model))
    assert_decorrelating(handle)
    expected = {key: torch.stack([snapshot[key] for snapshot in snapshots]).mean(0) for key in parameters(model)}
    assert_average(averaged.module, expected, parameters(model))
    assert_loads_as_plain(averaged.module)
