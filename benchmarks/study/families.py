"""The zoo's families, each by a small member and with the recipe that its own papers use: SGD or AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setting:
    """How a family is measured, on images of 64 px.

    Attributes:
        model: timm's name.
        opt: of study.presets.OPTIMIZERS.
        lrs: plain training's grid; grown where its best lies at the edge.
        kwargs: for the model: those that make it small enough for two cores, and patches of half of their size.
        amp: bfloat16; where depthwise convolutions make it slower on a CPU, float32.
    """

    model: str
    opt: str
    lrs: tuple[float, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    amp: bool = True

    def __str__(self) -> str:
        return ", ".join([self.model, *(f"{key} {value}" for key, value in self.kwargs.items())])


_SGD, _ADAMW = (0.1, 0.2, 0.4), (1e-3, 2e-3, 4e-3)
_SWIN = {"window_size": 4, "embed_dim": 48, "depths": (2, 2, 4, 2), "num_heads": (2, 4, 8, 16)}

FAMILIES = {
    "resnet": Setting("resnet14t", "sgd", _SGD),
    "regnet": Setting("regnety_002", "sgd", _SGD),
    "densenet": Setting("densenet121", "sgd", _SGD, {"growth_rate": 16, "block_config": (3, 6, 12, 8)}),
    "convnext": Setting("convnext_atto", "adamw", (2e-3, 4e-3, 8e-3), {"patch_size": 2}, amp=False),
    "mobilenetv3": Setting("mobilenetv3_small_100", "adamw", (4e-3, 8e-3, 1.6e-2), amp=False),
    "efficientnet": Setting("tinynet_e", "adamw", (4e-3, 8e-3, 1.6e-2), amp=False),
    "vision_transformer": Setting("vit_tiny_patch16_224", "adamw", _ADAMW, {"patch_size": 8, "depth": 6}),
    "deit": Setting("deit_tiny_distilled_patch16_224", "adamw", _ADAMW, {"patch_size": 8, "depth": 6}),
    "mlp_mixer": Setting("mixer_s16_224", "adamw", _ADAMW),
    "swin_transformer": Setting("swin_tiny_patch4_window7_224", "adamw", _ADAMW, _SWIN),
}  # fmt: skip
