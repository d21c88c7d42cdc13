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
        kwargs: for the model. Patches are half of those for 224 px, so that a transformer has tokens to mix.
    """

    model: str
    opt: str
    lrs: tuple[float, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join([self.model, *(f"{key} {value}" for key, value in self.kwargs.items() if key != "img_size")])


_SGD, _ADAMW = (0.1, 0.2, 0.4), (1e-3, 2e-3, 4e-3)
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 48, "depths": (2, 2, 4, 2), "num_heads": (2, 4, 8, 16)}

FAMILIES = {
    "resnet": Setting("resnet26", "sgd", _SGD),
    "regnet": Setting("regnety_002", "sgd", _SGD),
    "densenet": Setting("densenet121", "sgd", _SGD, {"growth_rate": 16, "block_config": (3, 6, 12, 8)}),
    "convnext": Setting("convnext_atto", "adamw", (2e-3, 4e-3, 8e-3), {"patch_size": 2}),
    "mobilenetv3": Setting("mobilenetv3_small_100", "adamw", (4e-3, 8e-3, 1.6e-2)),
    "efficientnet": Setting("efficientnet_b0", "adamw", (2e-3, 4e-3, 8e-3)),
    "vision_transformer": Setting("vit_tiny_patch16_224", "adamw", _ADAMW, {"img_size": 64, "patch_size": 8}),
    "deit": Setting("deit_tiny_patch16_224", "adamw", _ADAMW, {"img_size": 64, "patch_size": 8}),
    "mlp_mixer": Setting("mixer_s16_224", "adamw", _ADAMW, {"img_size": 64}),
    "swin_transformer": Setting("swin_tiny_patch4_window7_224", "adamw", _ADAMW, SWIN),
    "vgg": Setting("vgg11_bn", "sgd", (0.025, 0.05, 0.1)),
}  # fmt: skip
