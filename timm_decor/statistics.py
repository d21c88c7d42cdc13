"""Second moments of a layer's inputs: pure functions from activations to sums over rows.

A row is one patch of a convolution (C channels a group times S = kh * kw positions) or one vector of a linear layer
(S = 1). Sums, not averages: they add up over micro-batches and processes, and are divided by the row count once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_decor.shape import LayerShape

# Elements of one unfolded chunk: 256 MiB in float32. Unfolding is S times the input; nothing else here is larger.
_CHUNK_ELEMENTS = 64 * 2**20


class ConvShape(NamedTuple):
    """What of a 2-d convolution decides its patches; the input must already be padded."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def _positions(shape: ConvShape) -> int:  # not a property: torch.compile of torch 2.3 trips over one here
    """S, positions of the kernel."""
    return shape.kernel_size[0] * shape.kernel_size[1]


def sample_images(x: Tensor, share: float, most: int) -> Tensor:
    """Evenly spaced images of a batch, at least one: the same ones each time, and no random state is touched.

    Args:
        x: (N, ...).
        share: in (0, 1]; 1.0 returns x itself.
        most: images that a share below 1.0 may come to.
    """
    count = len(x) if share == 1 else max(1, min(most, round(len(x) * share)))
    if count >= len(x):
        return x
    return x[torch.arange(count, device=x.device) * len(x) // count]


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where that is float64: second moments overflow in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def conv_rows(x: Tensor, shape: ConvShape) -> int:
    """Number of patches in padded input x, (N, g * C, H, W)."""
    out = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            x.shape[-2:], shape.kernel_size, shape.stride, shape.dilation, strict=True
        )
    ]
    return len(x) * out[0] * out[1]


def patch_moment(x: Tensor, shape: ConvShape) -> Tensor:
    """Sum over rows of p p^T for whole patches p, ordered (channel, position) as `F.unfold` has them.

    Args:
        x: padded input, (N, g * C, H, W).

    Returns:
        (g, C * S, C * S).
    """
    size = x.shape[1] // shape.groups * _positions(shape)
    total = x.new_zeros(shape.groups, size, size)
    for part in _chunks(x, _positions(shape)):
        patches = _unfold(part, shape).unflatten(1, (shape.groups, -1)).transpose(0, 1)  # (g, n, C * S, L)
        rows = patches.transpose(1, 2).flatten(2)  # (g, C * S, n * L)
        total += rows @ rows.mT
    return total


def patch_sum(x: Tensor, shape: ConvShape) -> Tensor:
    """Sum of the rows themselves, entries ordered as in `patch_moment`: (g, 1, C * S)."""
    total = x.new_zeros(x.shape[1] * _positions(shape))
    for part in _chunks(x, _positions(shape)):
        total += _unfold(part, shape).sum((0, 2))
    return total.view(shape.groups, 1, -1)


def channel_moment(x: Tensor, shape: ConvShape) -> Tensor:
    """Sum over rows of the patches' partial trace over positions, divided by S: (g, C, C).

    Each pixel counts as often as patches cover it, so no patch has to be formed: one weighted product over pixels.
    """
    n, _, height, width = x.shape
    cover = _unfold(torch.ones_like(x[:1, :1]), shape)
    weight = F.fold(cover, (height, width), shape.kernel_size, shape.dilation, 0, shape.stride).flatten()
    pixels = x.flatten(2).unflatten(1, (shape.groups, -1)).permute(1, 2, 0, 3)  # (g, C, N, H * W)
    weighted = pixels * (weight / _positions(shape))
    return weighted.flatten(2) @ pixels.flatten(2).mT


def space_moment(x: Tensor, shape: ConvShape) -> Tensor:
    """Sum over rows of the patches' partial trace over channels, divided by C: (g, S, S)."""
    channels = x.shape[1] // shape.groups
    total = x.new_zeros(shape.groups, _positions(shape), _positions(shape))
    for part in _chunks(x, _positions(shape)):
        patches = _unfold(part, shape).unflatten(1, (shape.groups, channels, _positions(shape)))  # (n, g, C, S, L)
        rows = patches.permute(1, 3, 0, 2, 4).flatten(2)  # (g, S, n * C * L)
        total += rows @ rows.mT
    return total / channels


def mean_moment(name: str, mean: Tensor, shape: LayerShape) -> Tensor:
    """What a moment would be if every row were the mean row: the part that centring takes out of it.

    Args:
        name: of the moment; see `shape.moment_shape`.
        mean: the mean row, (n g, 1, C * S).
        shape: of the layer.
    """
    rows = mean.unflatten(2, (shape.channels, shape.positions)).squeeze(1)  # (n g, C, S)
    if name == "channel":
        return rows @ rows.mT / shape.positions
    if name == "patch" or name.startswith("patch/"):
        blocks = int(name.partition("/")[2] or 1)
        each = mean.unflatten(2, (blocks, -1)).movedim(2, 1).flatten(0, 1)
        return each.mT @ each
    space = rows.mT @ rows / shape.channels
    if shape.positions == 1:  # one position: the factor is a number, whose size is that of the channels' factor
        space = torch.zeros_like(space)
    return space.unflatten(0, (-1, shape.groups)).mean(1) if name == "shared_space" else space


def vector_moment(x: Tensor, blocks: int = 1) -> Tensor:
    """Sum over rows of x x^T for a linear layer's input (..., C), within blocks of channels: (blocks, C / b, C / b)."""
    rows = x.flatten(0, -2).unflatten(1, (blocks, -1)).transpose(0, 1)
    return rows.mT @ rows


def mean_correlation(sigma: Tensor) -> float:
    """Mean absolute correlation between different entries: |Sigma_ij| / sqrt(Sigma_ii Sigma_jj), i != j.

    Args:
        sigma: (g, D, D). Entries that never fire (zero variance) count as uncorrelated.

    Returns:
        In [0, 1]; 0 for D = 1.
    """
    size = sigma.shape[-1]
    if size == 1:
        return 0.0
    scale = sigma.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    correlation = (sigma * inverse[..., :, None] * inverse[..., None, :]).abs()
    off_diagonal = correlation.sum() - correlation.diagonal(dim1=-2, dim2=-1).sum()
    return float(off_diagonal / (len(sigma) * size * (size - 1)))


def _unfold(x: Tensor, shape: ConvShape) -> Tensor:
    return F.unfold(x, shape.kernel_size, shape.dilation, 0, shape.stride)


def _chunks(x: Tensor, positions: int) -> Iterator[Tensor]:
    """x in pieces whose unfolded form stays under the chunk size (at stride 1, the largest)."""
    yield from x.split(max(1, _CHUNK_ELEMENTS // max(1, x[0].numel() * positions)))
