"""Second moments of a layer's inputs and of its output errors: their names, their shapes, how they are taken. Pure.

A row is one patch of a convolution (C channels a group times S = kh * kw positions) or one vector of a linear layer
(S = 1). Of the inputs these are sums, not averages: they add up over micro-batches and processes, and are divided by
the row count once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_decor.shape import LayerShape

OUTPUT_MOMENT = "output"  # taken from gradients; all others are of a layer's inputs
MEAN = "patch_mean"  # not a moment, but recorded like one
REPORTED_ENTRIES = 1024
_NAN = float("nan")
_MOST_COLUMNS = 512  # of a gradient in one look, about: more cost more than they tell

# Elements of one unfolded chunk: 256 MiB in float32. Unfolding is S times the input; nothing else here is larger.
_CHUNK_ELEMENTS = 64 * 2**20


def moment_shape(name: str, shape: LayerShape) -> tuple[int, int, int]:
    """Shape of a layer's moment: "patch", "patch_mean", "channel", "space", "output" (one a group), or "shared_space"
    (one a layer).
    """
    if name == MEAN:
        return shape.groups, 1, shape.dim
    if name == "shared_space":
        return 1, shape.positions, shape.positions
    side = {
        "patch": shape.dim,
        "channel": shape.channels,
        "space": shape.positions,
        OUTPUT_MOMENT: shape.outputs,
    }[name]
    return shape.groups, side, side


def normalized(sigma: Tensor) -> Tensor:
    """Sigma in units of its mean eigenvalue: trace / D = 1, (g, D, D); NaN for a group without a positive trace."""
    mean = sigma.diagonal(dim1=-2, dim2=-1).mean(-1)
    return sigma / torch.where(mean > 0, mean, _NAN)[..., None, None]


def reported_entries(size: int, device: torch.device) -> Tensor:
    """Which entries of x and z a report looks at: all, or the same ones each time (D = 25 088 in VGG's first head).

    Drawn rather than evenly spaced: a spacing of S would only ever compare one kernel position.
    """
    if size <= REPORTED_ENTRIES:
        return torch.arange(size, device=device)
    generator = torch.Generator("cpu").manual_seed(0)  # whatever torch.set_default_device says
    drawn = torch.randperm(size, generator=generator, device="cpu")[:REPORTED_ENTRIES]
    return drawn.sort().values.to(device)


def looked_at(shape: LayerShape) -> slice:
    """Which input channels of a wide gradient `gradient_moment` needs: evenly spaced, at every kernel position."""
    return slice(None, None, max(1, min(shape.channels, shape.dim // _MOST_COLUMNS)))


def gradient_moment(rows: Tensor) -> Tensor:
    """Second moment of the output errors as a gradient shows it, in units of its mean eigenvalue: (n g, O, O).

    G R^T is the sum of d z^T over a batch's rows, d the errors at the outputs and z the decorrelated inputs. Where
    errors and inputs are independent of each other, as K-FAC assumes, its product with its own transpose is <d d^T> up
    to a factor in expectation. It is there in every step, the same on every process, and costs no look at the backward
    pass.

    Args:
        rows: G R^T, (n g, O, C, S); of wide gradients only the channels that `looked_at` names.

    Returns:
        NaN for a gradient that is zero or not finite.
    """
    rows = rows.transpose(2, 3).flatten(2)  # products with R leave the channels last in memory
    scale = torch.linalg.matrix_norm(rows)[..., None, None]
    rows = rows / torch.where(scale > 0, scale, _NAN)
    return rows.shape[1] * (rows @ rows.mT)


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
        x: (N, ...); N counts windows, not images, where Swin cuts images into them.
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
    """Number of patches in padded input x, (N, g * C, H, W); 0 where the kernel does not fit."""
    out = [
        max(0, (size - dilation * (kernel - 1) - 1) // stride + 1)
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
        name: of the moment; see `moment_shape`.
        mean: the mean row, (n g, 1, C * S).
        shape: of the layer.
    """
    rows = mean.unflatten(2, (shape.channels, shape.positions)).squeeze(1)  # (n g, C, S)
    if name == "channel":
        return rows @ rows.mT / shape.positions
    if name == "patch":
        return mean.mT @ mean
    space = rows.mT @ rows / shape.channels
    if shape.positions == 1:  # one position: the factor is a number, whose size is that of the channels' factor
        space = torch.zeros_like(space)
    return space.unflatten(0, (-1, shape.groups)).mean(1) if name == "shared_space" else space


def centred(moments: Mapping[str, Tensor], shape: LayerShape) -> dict[str, Tensor]:
    """Moments less their mean rows' part, where the mean is kept beside them."""
    mean = moments.get(MEAN)
    if mean is None:
        return dict(moments)
    own = {name: moment for name, moment in moments.items() if name not in (MEAN, OUTPUT_MOMENT)}
    return {**moments, **{name: moment - mean_moment(name, mean, shape) for name, moment in own.items()}}


def vector_moment(x: Tensor) -> Tensor:
    """Sum over rows of x x^T for a linear layer's input (..., C): (1, C, C)."""
    rows = x.flatten(0, -2)
    return (rows.mT @ rows)[None]


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
    """As `F.unfold`, which starts a kernel for each image on a GPU: (N, C, H, W) to (N, C * S, L)."""
    if x.device.type == "cpu":
        return F.unfold(x, shape.kernel_size, shape.dilation, 0, shape.stride)
    return _unfold_at_once(x, shape)


def _unfold_at_once(x: Tensor, shape: ConvShape) -> Tensor:
    """The same in one copy."""
    for axis, (kernel, stride, dilation) in enumerate(
        zip(shape.kernel_size, shape.stride, shape.dilation, strict=True), 2
    ):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]  # (N, C, h, w, kh, kw) in the end
    return x.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)


def _chunks(x: Tensor, positions: int) -> Iterator[Tensor]:
    """x in pieces whose unfolded form stays under the chunk size (at stride 1, the largest)."""
    yield from x.split(max(1, _CHUNK_ELEMENTS // max(1, x[0].numel() * positions)))
