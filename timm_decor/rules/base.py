"""What a rule is: which statistics it wants, how they are averaged, and how they move R. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from timm_decor.config import DecorConfig
from timm_decor.shape import LayerShape
from timm_decor.structures import Structure


class Rule(ABC):
    """A rule that moves R. A new one needs `refreshed`, and the rest where it differs.

    Nothing here raises or waits for a GPU because of what is in the statistics. Where they cannot be used (all zero,
    not finite, singular without damping), that layer's result is NaN and the other layers' are not touched; who keeps R
    looks at it once for all layers.

    Args:
        config: whose knobs of this rule it takes.
    """

    name: ClassVar[str]
    gives_inverse: ClassVar[bool] = False  # R^-1 comes with R, and is kept beside it
    both_sides: ClassVar[bool] = False  # what sides="auto" is with SGD

    def __init__(self, config: DecorConfig) -> None:
        self.config = config

    def moments(self, structure: type[Structure], shape: LayerShape) -> tuple[str, ...]:
        """Names of the inputs' moments that are kept between refreshes, the structure's first."""
        return structure.moments(shape)

    def recorded(self, structure: type[Structure], shape: LayerShape, before_norm: bool) -> tuple[str, ...]:
        """Names of what the layers record of their inputs.

        Args:
            structure: of R.
            shape: of the layer.
            before_norm: whether a BatchNorm takes the layer's output.
        """
        return self.moments(structure, shape)

    def averaged(self, averages: dict[str, Tensor], blind: Tensor, shape: LayerShape) -> dict[str, Tensor]:
        """The moments of a refresh from averages over rows of what was recorded.

        Args:
            averages: by name, (n g, ., .); of a layer that saw no row NaN.
            blind: (n,) 1 where the gradient is blind to the layer's mean input, because of a BatchNorm behind it.
            shape: of each layer.
        """
        return averages

    def running(self, old: Mapping[str, Tensor], fresh: Mapping[str, Tensor], started: Tensor) -> dict[str, Tensor]:
        """What R is refreshed from: this refresh's moments, or a running average that they enter.

        Args:
            old: the moments of the last refresh.
            fresh: from `averaged`.
            started: (n,) whether the layer was refreshed before.
        """
        return dict(fresh)

    @abstractmethod
    def refreshed(self, r: Structure, moments: Mapping[str, Tensor]) -> Structure:
        """R after one refresh; NaN where the moments cannot be used."""


def of_layers(per_layer: Tensor, like: Tensor) -> Tensor:
    """One value a layer, (n,) or (n, 1), as a factor of `like`, (n g, ...)."""
    groups = len(like) // len(per_layer)
    return per_layer.flatten().repeat_interleave(groups).view(-1, *[1] * (like.dim() - 1))


def stable(decor_lr: float, step: Tensor) -> Tensor:
    """decor_lr, (g, 1, 1), or less where R <- R - decor_lr step R could diverge.

    That is where decor_lr times an eigenvalue of the symmetric `step` exceeds 2, of which the Frobenius norm knows.
    """
    return decor_lr / (decor_lr * torch.linalg.matrix_norm(step)).clamp_min(1)[..., None, None]
