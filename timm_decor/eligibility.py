"""Which layers can be decorrelated, which are better left plain, and why: by what they are, in every model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from timm_decor.layers import DECOR_TYPES, PLAIN_TYPES, class_of

# Modules of timm (and torchvision) that scale channels by what they make of a globally pooled vector, by their class's
# name: several of timm's models have their own.
_GATES = {
    "SEModule", "EffectiveSEModule", "EseModule", "SqueezeExcite", "SqueezeExciteCl", "SqueezeExcitation",
    "GatherExcite", "ChannelAttn", "LightChannelAttn", "SelectiveKernelAttn",
}  # fmt: skip
_GATE_PARTS = {  # what else these have sees the whole map
    "SplitAttn": ("fc1", "fc2"),
    "GlobalContext": ("mlp_add", "mlp_scale"),
}
_GATE_NAME = "se"  # timm's name for them, whatever their class
_FEWEST_POSITIONS = 49  # of a depthwise kernel: MobileNetV3's 3x3 and 5x5 lose, ConvNeXt's 7x7 gain

_GATE = "a channel gate: it sees one vector an image, too few rows for R"
_DEPTHWISE = "a depthwise convolution with a kernel below 7x7: in MobileNetV3 it cost accuracy"

# Their matrices are multiplied inside of one fused call, or are no factor of their input.
_UNSEEN = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)


def own_name(name: str) -> str:
    """A module's name without what wrappers inside of the model put into it (torch.compile, checkpoint_wrapper)."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a user would expect in the report: they multiply their input by a weight matrix of their own."""
    for name, module in ((own_name(name), module) for name, module in model.named_modules()):
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            # Not the attribute: where it is computed (spectral_norm), reading it moves the model's state.
            if module._parameters.get("weight") is not None or own_matrices(module):
                yield name, module
        elif isinstance(module, _UNSEEN):
            if own_matrices(module):
                yield name, module
        # Layers of timm's own that are neither, such as CondConv2d. An embedding looks its rows up.
        elif not isinstance(module, nn.Embedding):
            weight = module._parameters.get("weight")
            if weight is not None and _is_matrix(weight):
                yield name, module


def own_matrices(module: nn.Module) -> list[Tensor]:
    """A module's own stored weights with two dimensions or more, or what a parametrization computes them from."""
    stored = dict(module._parameters)
    for name, each in getattr(module, "parametrizations", {}).items():
        stored |= {f"{name}.{key}": value for key, value in each._parameters.items()}
    return [p for name, p in stored.items() if p is not None and "weight" in name and _is_matrix(p)]


def _is_matrix(weight: Tensor) -> bool:
    """Whether a weight is known to have two dimensions or more; a lazy layer's has no shape yet."""
    return not isinstance(weight, nn.parameter.UninitializedParameter) and weight.dim() >= 2


class Reasons:
    """Why layers of one model cannot be decorrelated, or are better left plain.

    Args:
        model: whose modules will be asked about.
    """

    def __init__(self, model: nn.Module) -> None:
        self._shared, self._read_past = _shared_weights(model), _read_past_forward(model)
        self._gates = _gates(model)

    def unfit(self, module: Any) -> str:
        """Why a layer cannot be decorrelated; "" if it can, as far as its class and weight go."""
        kind = class_of(module).__name__
        if isinstance(module, _UNSEEN):
            return f"{kind}: what its weights multiply is never seen"
        if "weight" not in module._parameters:
            return f"{kind}: its weight is computed from other parameters (weight_norm, pruning, a parametrization)"
        # The exact type: a subclass may standardise its weight, or mix it with another; then A = W R does not hold.
        if class_of(module) not in DECOR_TYPES and class_of(module) not in PLAIN_TYPES:
            return f"{kind} may not multiply its input by its weight as it is"
        if module in self._read_past:
            return "the module above it reads its weight past its forward, so its input is not seen"
        weight = module.weight
        if isinstance(weight, nn.parameter.UninitializedParameter):
            return "its shape is not known before the first forward pass"
        if not weight.is_floating_point():
            return f"its weight is {str(weight.dtype).removeprefix('torch.')}: only real numbers are decorrelated"
        if id(weight) in self._shared:
            return "its weight is shared with another layer, whose inputs differ"
        return ""

    def better_plain(self, name: str, module: nn.Module) -> str:
        """Why a layer that can be decorrelated is better left plain; "" for most.

        Channel gates see one vector an image, so that R comes from few rows; a depthwise convolution has one R for all
        of its channels. Both were measured by benchmarks/zoo_study.py.
        """
        if module in self._gates or _GATE_NAME in name.split("."):
            return _GATE
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            positions = module.kernel_size[0] * module.kernel_size[1]
            return _DEPTHWISE if positions < _FEWEST_POSITIONS else ""
        return ""


def _gates(model: nn.Module) -> set[nn.Module]:
    """Every module inside of a channel gate."""
    found: set[nn.Module] = set()
    for module in model.modules():
        kind = class_of(module).__name__
        if kind in _GATES:
            found |= set(module.modules())
        for name in _GATE_PARTS.get(kind, ()):
            if (part := getattr(module, name, None)) is not None:
                found |= set(part.modules())
    return found


def _shared_weights(model: nn.Module) -> set[int]:
    """ids of Parameters that several modules hold."""
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {key for key, count in holders.items() if count > 1}


def _read_past_forward(model: nn.Module) -> set[nn.Module]:
    """Layers whose weight the module above them uses itself.

    timm's attention of BEiT, EVA and Swin V2 adds biases of its own: F.linear(x, self.qkv.weight, cat(q_bias, ...)).
    """
    parents = (module for module in model.modules() if getattr(module, "q_bias", None) is not None)
    return {layer for layer in (getattr(parent, "qkv", None) for parent in parents) if isinstance(layer, nn.Module)}
