"""The networks: timm's, with a stem for small images, and a small ResNet for one CPU core."""

from __future__ import annotations

from typing import Any

import timm
import torch.nn.functional as F
from torch import Tensor, nn

from timm_decor.errors import UserError, first_line


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_chs != out_chs:
            self.shortcut = nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, stride, bias=False), nn.BatchNorm2d(out_chs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


def small_resnet(num_classes: int) -> nn.Sequential:
    """9 convolutions, 0.3 M parameters, 12 MMACs at 32 px."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes),
    )  # fmt: skip


def create(name: str, num_classes: int, img_size: int, stem: str) -> nn.Module:
    """A network by name.

    Args:
        name: `small_resnet` or a timm model.
        num_classes: of the head.
        img_size: height and width in pixels.
        stem: `timm` for the model as it is, or `small`: a ResNet whose first stage sees 32 x 32 positions, with a 3x3
            convolution of stride img_size / 32 for its first and without its max-pool: what people mean by ResNet-18 on
            CIFAR-10. timm's own stem takes 32 px to 8 x 8 before the first stage and to 1 x 1 before the last.

    Raises:
        UserError: timm has no such model, or it has no such stem.
    """
    if name == "small_resnet":
        return small_resnet(num_classes)
    try:
        model: Any = timm.create_model(name, num_classes=num_classes)
    except RuntimeError as error:
        raise UserError(f"model {name}: {first_line(error)}") from error
    if stem == "small":
        if not isinstance(getattr(model, "conv1", None), nn.Conv2d) or not hasattr(model, "maxpool"):
            raise UserError(f"--stem small replaces conv1 and maxpool; {name} has no such stem: use --stem timm")
        stride = max(1, img_size // 32)
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, stride, 1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's ResNet does
        model.maxpool = nn.Identity()
    return model
