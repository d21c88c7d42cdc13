"""The zoo: one row for each of timm's modules whose models have `decor_` twins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """Models of one timm module that have twins.

    Attributes:
        module: timm's module; the twins are filed under `decor_<module>`.
        example: the member that tables show and tests train: small, and known.
        plain: why layers are left plain, by a wildcard over their names; beside what `decorrelate` leaves so itself.
        measured: the example's accuracy against the plain model, at its learning rate (benchmarks/zoo_study.py).
    """

    module: str
    example: str
    plain: Mapping[str, str] = field(default_factory=dict)
    measured: str = "not measured"


FAMILIES = (
    Family("resnet", "resnet18", measured="gains: +8.1 points (resnet14t, sgd)"),
    Family("vgg", "vgg11_bn"),
    Family("regnet", "regnety_002", measured="gains: +8.0 points (sgd)"),
    Family("densenet", "densenet121", measured="gains: +10.5 points (adapted, sgd)"),
    Family("convnext", "convnext_atto", measured="gains: +3.4 points (adapted, adamw)"),
    Family("mobilenetv3", "mobilenetv3_small_100", measured="level: -1.4 points (adamw)"),
    Family("efficientnet", "efficientnet_b0", measured="level: +1.2 points (tinynet_e, adamw)"),
    Family("vision_transformer", "vit_tiny_patch16_224", measured="gains: +8.4 points (adapted, adamw)"),
    Family("deit", "deit_tiny_patch16_224"),
    Family("mlp_mixer", "mixer_s16_224", measured="one seed: +8.5 points (adamw)"),
    Family("swin_transformer", "swin_tiny_patch4_window7_224", measured="gains: +6.5 points (adapted, adamw)"),
)
