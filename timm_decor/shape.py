"""What structures of R and those who batch them speak of: a layer's sizes, its moments, the pace of a refresh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer: g groups, C input channels a group, S kernel positions, O outputs a group."""

    groups: int
    channels: int
    positions: int
    outputs: int

    @property
    def dim(self) -> int:
        """D, the length of one patch of one group."""
        return self.channels * self.positions


class Pace(NamedTuple):
    """How strong a refresh is: the config's values, as its schedule and warm-up have them at this step.

    Attributes:
        decor_lr: step size of the iterating rules.
        damping: of the whitening ones.
        output_damping: of the output side.
        strength: share of the way from the identity to damped whitening, in [0, 1]; see `rules.whiten`.
    """

    decor_lr: float
    damping: float
    output_damping: float
    strength: float = 1.0


OUTPUT_MOMENT = "output"  # taken from gradients; all others are of a layer's inputs
MEAN = "patch_mean"  # not a moment, but recorded like one


def moment_shape(name: str, shape: LayerShape) -> tuple[int, int, int]:
    """Shape of a layer's moment: "patch", "patch_mean", "channel", "space", "output" (one a group), "shared_space" (one
    a layer), or "patch/b" (the patch's, in b blocks of channels a group).
    """
    if name == OUTPUT_MOMENT:
        return shape.groups, shape.outputs, shape.outputs
    if name == MEAN:
        return shape.groups, 1, shape.dim
    if name == "shared_space":
        return 1, shape.positions, shape.positions
    name, _, blocks = name.partition("/")
    side = {"patch": shape.dim // int(blocks or 1), "channel": shape.channels, "space": shape.positions}[name]
    return shape.groups * int(blocks or 1), side, side


def parts(tensor: Tensor, count: int) -> Tensor:
    """A tensor of `count` layers, (n g, ...), with the layers on an axis of their own: (n, g, ...)."""
    return tensor.unflatten(0, (count, len(tensor) // count))


REPORTED_ENTRIES = 1024


def reported_entries(size: int, device: torch.device) -> Tensor:
    """Which entries of x and z a report looks at: all, or the same ones each time (D = 25 088 in VGG's first head).

    Drawn rather than evenly spaced: a spacing of S would only ever compare one kernel position.
    """
    if size <= REPORTED_ENTRIES:
        return torch.arange(size, device=device)
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:REPORTED_ENTRIES]
    return drawn.sort().values.to(device)
