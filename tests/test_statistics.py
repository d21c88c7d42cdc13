"""Second moments without patches equal those of patches that are really formed, for any convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn

from timm_decor import DecorConv2d, DecorConv2dSame, DecorLinear
from timm_decor import moments as moments_module
from timm_decor.moments import ConvShape, mean_correlation, sample_images


@st.composite
def convolutions(draw):
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 3))
    side = st.integers(1, 3)
    return nn.Conv2d(
        channels,
        groups * draw(st.integers(1, 3)),
        kernel_size=(draw(side), draw(side)),
        stride=(draw(side), draw(side)),
        padding=(draw(st.integers(0, 2)), draw(st.integers(0, 2))),
        dilation=(draw(side), draw(side)),
        groups=groups,
        padding_mode=draw(st.sampled_from(["zeros", "circular", "replicate"])),
    ).double()


@settings(max_examples=40, deadline=None)
@given(conv=convolutions(), height=st.integers(7, 10), width=st.integers(7, 9), seed=st.integers(0, 9))
def test_moments_of_any_convolution(conv, height, width, seed):
    x = torch.randn(3, conv.in_channels, height, width, dtype=torch.float64, generator=torch.manual_seed(seed))
    shape = (conv.groups, conv.in_channels // conv.groups, conv.kernel_size[0] * conv.kernel_size[1])
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride).unflatten(1, shape)  # (N, g, C, S, L)

    conv.__class__ = DecorConv2d
    conv.start_recording(("patch", "channel", "space", "shared_space"), 1.0)
    y = conv(x)

    moments, (g, c, s) = conv.moments, shape
    full = torch.einsum("ngcsl,ngdtl->gcsdt", patches, patches)
    assert conv.rows == y.shape[0] * y.shape[2] * y.shape[3]
    torch.testing.assert_close(moments["patch"], full.reshape(g, c * s, c * s))
    torch.testing.assert_close(moments["channel"], torch.einsum("gcsds->gcd", full) / s)
    torch.testing.assert_close(moments["space"], torch.einsum("gcsct->gst", full) / c)
    torch.testing.assert_close(moments["shared_space"], (torch.einsum("gcsct->st", full) / c / g)[None])


@pytest.mark.parametrize("size,kernel,stride,dilation", [(7, 3, 2, 1), (8, 3, 2, 1), (9, 5, 2, 1), (8, 3, 1, 2)])
def test_moments_of_same_padding(size, kernel, stride, dilation):
    """timm's Conv2dSame pads by the input's size, more on the right; seen through the convolution itself."""
    conv = Conv2dSame(2, 3, kernel, stride, dilation=dilation, bias=False).double()
    x = torch.randn(2, 2, size, size + 1, dtype=torch.float64)
    with torch.no_grad():
        # One output a patch entry: a kernel that picks it shows every patch without forming one.
        pick = Conv2dSame(2, 2 * kernel**2, kernel, stride, dilation=dilation, bias=False).double()
        pick.weight.copy_(torch.eye(2 * kernel**2, dtype=torch.float64).view(pick.weight.shape))
        patches = pick(x).flatten(2)  # (N, D, L)
    conv.__class__ = DecorConv2dSame
    conv.start_recording(("patch",), 1.0)
    conv(x)
    torch.testing.assert_close(conv.moments["patch"], torch.einsum("nil,njl->ij", patches, patches)[None])


@pytest.mark.parametrize(
    "kernel,stride,dilation", [((3, 2), (1, 2), (2, 1)), ((1, 1), (2, 2), (1, 1)), ((7, 7), (2, 2), (1, 1))]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_patches_at_once_are_those_of_unfold(kernel, stride, dilation, layout):
    x = torch.randn(3, 4, 12, 11).contiguous(memory_format=layout)
    ours = moments_module._unfold_at_once(x, ConvShape(kernel, stride, dilation, 1))
    assert torch.equal(ours, nn.functional.unfold(x, kernel, dilation, 0, stride))


def test_chunks_change_nothing(monkeypatch):
    x = torch.randn(7, 4, 8, 8, dtype=torch.float64)
    shape = ConvShape((3, 3), (1, 1), (1, 1), 2)
    whole = moments_module.patch_moment(x, shape), moments_module.space_moment(x, shape)
    monkeypatch.setattr(moments_module, "_CHUNK_ELEMENTS", 2 * 4 * 64 * 9)
    torch.testing.assert_close((moments_module.patch_moment(x, shape), moments_module.space_moment(x, shape)), whole)


def test_micro_batches_add_up():
    x = torch.randn(6, 5, 7)
    layer = nn.Linear(7, 3)
    layer.__class__ = DecorLinear
    layer.start_recording(("patch",), 1.0)
    layer(x)
    whole, rows = layer.moments["patch"], layer.rows.clone()
    layer.start_recording(("patch",), 1.0)
    layer(x[:2])
    layer(x[2:])
    assert layer.rows == rows == 30
    torch.testing.assert_close(layer.moments["patch"], whole)


def test_sums_stay_where_they_were_made():
    """CUDA graphs write over what a compiled forward has made itself."""
    layer = nn.Conv2d(3, 4, 3)
    layer.__class__ = DecorConv2d
    layer.start_recording(("channel", "space"), 1.0)
    sums = [*layer.moments.values(), layer.rows]
    places = [each.data_ptr() for each in sums]
    layer(torch.randn(2, 3, 8, 8))
    layer(torch.randn(2, 3, 8, 8))
    now = [*layer.moments.values(), layer.rows]
    assert [each.data_ptr() for each in now] == places and all(bool(each.any()) for each in sums)


def test_what_was_recorded_is_a_copy():
    layer = nn.Linear(4, 4)
    layer.__class__ = DecorLinear
    layer.start_recording(("patch",), 1.0)
    layer(torch.ones(3, 4))
    kept = layer.recorded()
    layer(torch.ones(3, 4))
    assert float(kept["rows"]) == 3 and float(kept["patch"][0, 0, 0]) == 3


def test_recording_is_for_training_inputs_only():
    layer = nn.Linear(4, 4)
    layer.__class__ = DecorLinear
    layer.start_recording(("patch",), 1.0)
    with torch.no_grad():
        layer(torch.randn(3, 4))
    layer.eval()(torch.randn(3, 4))
    assert layer.rows == 0
    layer.train()(torch.randn(3, 4))
    assert layer.rows == 3
    layer.stop_recording()
    layer(torch.randn(3, 4))
    assert not layer.recording and "moments" not in vars(layer)


@pytest.mark.parametrize("share,count", [(1.0, 10), (0.5, 5), (0.25, 2), (0.01, 1)])
def test_sample_is_evenly_spaced_and_takes_no_randomness(share, count):
    state = torch.get_rng_state()
    picked = sample_images(torch.arange(10), share, 10)
    assert len(picked) == count and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(picked, torch.tensor([i * 10 // count for i in range(count)]))


@pytest.mark.parametrize("sample,max_rows,rows", [(0.5, 10**6, 64), (0.5, 40, 32), (0.5, 1, 16), (1.0, 1, 128)])
def test_rows_are_bounded_in_whole_images(sample, max_rows, rows):
    """A share of 1.0 is every row, however many."""
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    conv.__class__ = DecorConv2d
    conv.start_recording(("channel",), sample, max_rows)
    conv(torch.randn(8, 2, 8, 8))  # 16 rows an image
    assert conv.rows == rows
    linear = nn.Linear(4, 4)
    linear.__class__ = DecorLinear
    linear.start_recording(("channel",), sample, max_rows)
    linear(torch.randn(8, 16, 4))
    assert linear.rows == rows


def test_statistics_survive_half_precision():
    layer = nn.Linear(4, 4)
    layer.__class__ = DecorLinear
    layer.start_recording(("patch",), 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.full((2, 4), 300.0, dtype=torch.float16))
    assert layer.moments["patch"].dtype == torch.float32
    torch.testing.assert_close(layer.moments["patch"], torch.full((1, 4, 4), 180000.0))


def test_rows_are_counted_in_float32():
    """Whatever torch's default is: bfloat16 would count 2002 rows as 2000."""
    layer = nn.Linear(2, 2)
    layer.__class__ = DecorLinear
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer.start_recording(("patch",), 1.0)
        layer(torch.ones(2002, 2, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(layer.rows) == 2002


def test_mean_correlation():
    sigma = torch.tensor([[[4.0, 1.0], [1.0, 1.0]]])
    assert mean_correlation(sigma) == pytest.approx(0.5)
    assert mean_correlation(torch.diag(torch.tensor([2.0, 0.0]))[None]) == 0  # a dead entry is uncorrelated
    assert mean_correlation(torch.ones(2, 1, 1)) == 0
