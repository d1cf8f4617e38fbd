"""Max-pooling and unpooling against torch: places, overlaps, gradients, layouts, duplicate and bad indices."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import backstride.fused_ops as fused
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from backstride.fused_ops.pool import ops
from backstride.kernels import pool as kernels
from backstride.kernels.pool import Windows, launch, reference
from backstride.kernels.runtime import INTERPRETED
from torch import nn

from .modes import EMULATED, KERNELS_ON_CPU

checked = pytest.mark.skipif(EMULATED, reason="what stands for a GPU gives no answer that a check could wait for")
fp64_kernels = pytest.mark.skipif(not INTERPRETED, reason="fp64 runs on the kernels only when they are interpreted")

# axes, image, kernel, stride, padding, dilation, ceil_mode: patches, overlaps, gaps, odd ends, one to three axes.
WINDOWS = {
    "2x2": (2, (2, 3, 6, 8), 2, 2, 0, 1, False),
    "overlap": (2, (1, 3, 7, 9), 3, 2, 1, 1, True),
    "gaps": (2, (1, 2, 9, 7), 2, 3, 0, 1, False),
    "dilated": (2, (1, 2, 9, 9), (3, 2), (1, 2), (1, 0), (2, 3), False),
    "large": (2, (1, 2, 9, 9), 6, 3, 2, 1, True),
    "1-D": (1, (2, 3, 11), 3, 2, 1, 1, False),
    "16 channels": (2, (1, 16, 4, 6), 2, 2, 0, 1, False),
    "rows of 16": (2, (2, 8, 9, 16), 3, 2, 1, 1, False),
    "stride 1": (2, (1, 8, 6, 8), 3, 1, 1, 1, False),
    "ragged": (2, (1, 3, 7, 21), (2, 3), (2, 1), (1, 0), 1, True),
    "stride 3": (2, (1, 2, 7, 24), (3, 4), 3, (0, 2), 1, True),
    "3-D": (3, (1, 2, 5, 4, 6), 2, (1, 2, 2), 0, 1, False),
    "3-D overlap": (3, (1, 8, 5, 4, 16), 3, 2, 1, 1, False),
}
POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@pytest.fixture(params=list(WINDOWS))
def layer(request):
    return WINDOWS[request.param]


def images(shape, device, dtype=torch.float32):
    """Random, and full of ties, infinities and NaN; contiguous, channels_last and sliced."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    yield x
    hostile = x.round().clone()
    hostile.view(-1)[::7], hostile.view(-1)[3::5], hostile.view(-1)[1::11] = float("-inf"), float("inf"), float("nan")
    yield hostile
    if dtype != torch.float32:
        return
    if len(shape) > 3:
        channels_last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        yield x.to(memory_format=channels_last)
        yield torch.cat([x, x, x], dim=1).to(memory_format=channels_last)[:, : shape[1]]
    yield torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_places_and_the_way_back(layer, dtype, device):
    axes, shape, *windows, ceil_mode = layer
    for x in images(shape, device, dtype):
        values, indices = POOL[axes](x, *windows, ceil_mode, return_indices=True)
        ours = getattr(fused, f"max_pool{axes}d")(x, *windows, ceil_mode, True)
        torch.testing.assert_close(ours, (values, indices), rtol=0, atol=0, equal_nan=True)
        assert ours[0].stride() == values.stride()
        small, offsets = getattr(fused, f"max_pool{axes}d_with_offsets")(x, *windows, ceil_mode)
        torch.testing.assert_close(small, values, rtol=0, atol=0, equal_nan=True)
        assert offsets.dtype == torch.uint8 and offsets.stride() == small.stride() == values.stride()
        assert torch.equal(fused.offsets_to_indices(offsets, x.shape, *windows), indices)
        assert torch.equal(fused.indices_to_offsets(indices, x.shape, *windows), offsets)
        marks = torch.arange(values.numel(), device=device).view_as(values).to(dtype)
        back = getattr(fused, f"max_unpool{axes}d_with_offsets")(marks, offsets, x.shape, *windows)
        expected = reference.max_unpool(marks.cpu(), indices.cpu(), x.shape[2:])
        assert torch.equal(back.cpu(), expected)


def test_gradient_is_torchs(layer, device):
    axes, shape, *windows, ceil_mode = layer
    for x in images(shape, device):
        x = x.detach().requires_grad_()
        results = [f(x, *windows, ceil_mode) for f in (getattr(fused, f"max_pool{axes}d"), POOL[axes])]
        seed = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(1)).to(device)
        gradients = [torch.autograd.grad(y, x, seed)[0] for y in results]
        torch.testing.assert_close(*gradients)


@fp64_kernels
@pytest.mark.parametrize("name", [name for name in WINDOWS if name not in ("large", "16 channels")])
def test_derivatives(name):
    """First and second, backward and forward, of pooling and unpooling, by indices and by offsets."""
    axes, shape, *windows, ceil_mode = WINDOWS[name]
    shape = (1, 1, *[min(n, 6) for n in shape[2:]])
    x = torch.randperm(torch.Size(shape).numel(), generator=torch.Generator().manual_seed(0)).double()
    x = (x / 7).view(shape).requires_grad_()
    pool, with_offsets, unpool = (
        getattr(fused, f"max_{name}")
        for name in (f"pool{axes}d", f"pool{axes}d_with_offsets", f"unpool{axes}d_with_offsets")
    )
    check = partial(torch.autograd.gradcheck, fast_mode=True, check_forward_ad=True)
    assert check(lambda x: pool(x, *windows, ceil_mode), x)
    assert torch.autograd.gradgradcheck(lambda x: pool(x, *windows, ceil_mode), x, fast_mode=True)
    values, offsets = with_offsets(x.detach(), *windows, ceil_mode)
    y = values.clone().requires_grad_()
    indices = fused.offsets_to_indices(offsets, shape, *windows)
    if indices.unique().numel() < indices.numel():
        return check_overlaps(unpool, y, offsets, indices, shape, windows)
    assert check(lambda y: unpool(y, offsets, shape, *windows), y)
    assert torch.autograd.gradgradcheck(lambda y: unpool(y, offsets, shape, *windows), y, fast_mode=True)


def check_overlaps(unpool, y, offsets, indices, shape, windows):
    """As in torch, a value that was overwritten still has the gradient of where it went."""
    result = unpool(y, offsets, shape, *windows)
    seed = torch.randn(shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(result, y, seed)
    assert torch.equal(gradient, seed.flatten(2).gather(2, indices.flatten(2)).view_as(y))


@fp64_kernels
def test_derivatives_of_unpooling_by_indices():
    indices = torch.tensor([[[[3, 0], [9, 14]]]])
    y = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: fused.max_unpool2d(y, indices, 2), y, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda y: fused.max_unpool2d(y, indices, 2), y)


def test_any_indices_and_duplicates(device):
    """The last in row-major order stands, as on torch's CPU; planes do not mix."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 24, (2, 3, 4, 5), generator=generator)
    values = torch.randn(2, 3, 4, 5, generator=generator)
    expected = torch.zeros(2, 3, 24)
    for n in range(2):
        for c in range(3):
            for i, v in zip(indices[n, c].flatten(), values[n, c].flatten(), strict=True):
                expected[n, c, i] = v
    result = kernels_unpool(values.to(device), indices.to(device), (4, 6))
    assert torch.equal(result.cpu().flatten(2), expected)
    unpooled = reference.max_unpool(values, indices, (4, 6))
    assert torch.equal(unpooled.flatten(2), expected)


def test_duplicates_on_the_cpu_whatever_torch_does(monkeypatch):
    """torch's threads write in any order; here in the opposite one."""

    def backwards(values, indices, size):
        x = torch.zeros(*values.shape[:2], 24)
        for i, v in zip(indices.flatten().flip(0), values.flatten().flip(0), strict=True):
            x[..., i] = v
        return x.view(1, 1, *size)

    monkeypatch.setattr(torch.ops.aten, "max_unpool2d", backwards)
    values = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    for indices in ([[5, 6], [7, 8]], [[5, 5], [7, 5]]):
        places = torch.tensor([[indices]])
        expected = reference.max_unpool(values, places, (4, 6))
        assert torch.equal(ops._aten_max_unpool(values, places, (4, 6)), expected)


def kernels_unpool(values, indices, size):
    result = torch.full((*values.shape[:2], *size), torch.nan, device=values.device)
    kernels.max_unpool(values, indices, result)
    return result


@pytest.mark.parametrize("wrong", [-1, 24, 2**32 + 3, -(2**40)])
def test_indices_outside_write_nothing(wrong, device):
    """Compared in 64 bits: torch's own kernel takes 2^32 + 3 for 3 (pytorch issue 197409)."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("the kernels run on a GPU or interpreted")
    values = torch.ones(1, 1, 2, 2, device=device)
    indices = torch.tensor([[[[5, wrong], [7, wrong]]]], device=device)
    result = kernels_unpool(values, indices, (4, 6))
    assert result.sum().item() == 2 and result.flatten()[[5, 7]].tolist() == [1, 1]
    gradient = torch.full_like(values, torch.nan)
    none = Windows((0, 0), (0, 0), (0, 0), (0, 0))
    kernels.pick(torch.ones(1, 1, 4, 6, device=device), indices, gradient, none)
    assert gradient.flatten().tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("wrong", [4, 255])
def test_offsets_outside_write_nothing(wrong, device):
    """Of the window, and of the image: offset 0 of the first window is in the padding."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("the kernels run on a GPU or interpreted")
    windows = Windows((2, 2), (2, 2), (1, 1), (1, 1))
    values = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], device=device)
    offsets = torch.tensor([[[[0, 2], [wrong, 0]]]], dtype=torch.uint8, device=device)
    back = torch.full((1, 1, 3, 3), torch.nan, device=device)
    kernels.spread(values, offsets, back, windows, total=False)
    assert back[0, 0].tolist() == [[0, 2, 0], [0, 4, 0], [0, 0, 0]]
    gradient = torch.full_like(values, torch.nan)
    kernels.pick(torch.arange(1.0, 10.0, device=device).view(1, 1, 3, 3), offsets, gradient, windows)
    assert gradient[0, 0].tolist() == [[0, 2], [0, 5]]
    pixels = fused.offsets_to_indices(offsets, (3, 3), 2, 2, 1)
    assert pixels[0, 0].tolist() == [[-1, 1], [-1, 4]]
    assert torch.equal(reference.max_unpool(values, pixels, (3, 3)), back)


@checked
def test_offsets_outside_are_named(monkeypatch, device):
    values = torch.ones(1, 1, 2, 2, device=device)
    offsets = torch.tensor([[[[0, 3], [1, 9]]]], dtype=torch.uint8, device=device)
    monkeypatch.setenv("BACKSTRIDE_CHECK_INDICES", "1")
    with pytest.raises(RuntimeError, match=r"Found an invalid max index: 9 \(output volumes are of size 4x4\)"):
        fused.max_unpool2d_with_offsets(values, offsets, (4, 4), 2)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_padding_of_more_than_half_a_kernel_is_torchs_to_refuse(axes, device):
    """Holes between its taps make a kernel no larger there."""
    x, windows = torch.randn(1, 1, *[9] * axes, device=device), (3, 1, 2, 3)
    with pytest.raises(RuntimeError) as expected:
        POOL[axes](x, *windows)
    for name in (f"max_pool{axes}d", f"max_pool{axes}d_with_offsets"):
        with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
            getattr(fused, name)(x, *windows)


def test_output_size_of_other_axes_is_named(device):
    values, offsets = torch.ones(1, 1, 2, 2, device=device), torch.zeros(1, 1, 2, 2, dtype=torch.uint8, device=device)
    for size in ([5], (4, 4, 4), ()):
        with pytest.raises(ValueError, match="output_size must have 2 numbers, or 4 as the input has axes, got"):
            fused.max_unpool2d_with_offsets(values, offsets, size, 2)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_offsets_of_an_unbatched_image(axes, device):
    x = torch.randn(2, *[6] * axes, device=device)
    pool = getattr(fused, f"max_pool{axes}d_with_offsets")
    offsets = pool(x, 2)[1]
    indices = POOL[axes](x, 2, return_indices=True)[1]
    assert torch.equal(fused.offsets_to_indices(offsets, x.shape[1:], 2), indices)
    assert torch.equal(fused.indices_to_offsets(indices, x.shape[1:], 2), offsets)


def test_places_on_another_device_are_named():
    values, offsets = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match="offsets must be on the output's device cpu, got meta; move it"):
        fused.max_unpool2d_with_offsets(values, offsets, (4, 4), 2)


def test_indices_outside_of_their_window_have_no_offsets():
    indices = torch.tensor([[[[0, 3], [9, 14]]]])
    assert fused.indices_to_offsets(indices, (4, 4), 2)[0, 0].tolist() == [[0, 1], [1, 2]]
    with pytest.raises(ValueError, match="index 8 is not in its window"):
        fused.indices_to_offsets(indices + 8, (4, 4), 2)
    with pytest.raises(ValueError, match="a window of 256 pixels has no offset in 8 bits"):
        fused.indices_to_offsets(torch.zeros(1, 1, 1, 1, dtype=torch.int64), (16, 16), 16)


@checked
def test_indices_outside_are_named(monkeypatch, device):
    values, indices = torch.ones(1, 1, 2, 2, device=device), torch.tensor([[[[0, 3], [9, 99]]]], device=device)
    monkeypatch.setenv("BACKSTRIDE_CHECK_INDICES", "1")
    with pytest.raises(RuntimeError, match=r"Found an invalid max index: 99 \(output volumes are of size 4x4\)"):
        fused.max_unpool2d(values, indices, 2)


def test_every_element_is_written(layer, device):
    if device == "cpu" and not INTERPRETED:
        pytest.skip("the kernels run on a GPU or interpreted")
    axes, shape, *windows, ceil_mode = layer
    x = torch.randn(shape, device=device)
    values, indices = POOL[axes](x, *windows, ceil_mode, return_indices=True)
    per_axis = Windows(*((v,) * axes if isinstance(v, int) else v for v in windows))
    y, places = torch.full_like(values, torch.nan), torch.full_like(indices, -7)
    kernels.max_pool(x, y, places, per_axis)
    assert torch.equal(y, values) and torch.equal(places, indices)
    back = torch.full_like(x, torch.nan)
    kernels.spread(y, places, back, per_axis, total=True)
    assert not back.isnan().any()
    assert back.sum().item() == pytest.approx(y.sum().item(), rel=1e-4, abs=1e-4)


def test_places_with_gaps_in_memory(device):
    """Sliced offsets and indices, forward and backward: the kernels read them where they lie, or pack them."""
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)).to(device)
    values, indices = F.max_pool2d(x, 2, return_indices=True)
    offsets = fused.indices_to_offsets(indices, x.shape, 2)
    seed = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(1)).to(device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        gaps = [torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0] for t in (indices, offsets)] + [
            t.repeat(1, 2, 1, 1).to(memory_format=memory_format)[:, :3] for t in (indices, offsets)
        ]
        for places in gaps:
            assert not places.is_contiguous()
            y = values.clone().requires_grad_()
            if places.dtype == torch.uint8:
                result = fused.max_unpool2d_with_offsets(y, places, (6, 8), 2)
            else:
                result = fused.max_unpool2d(y, places, 2)
            assert torch.equal(result, F.max_unpool2d(values, indices, 2))
            (gradient,) = torch.autograd.grad(result, y, seed)
            assert torch.equal(gradient, seed.flatten(2).gather(2, indices.flatten(2)).view_as(y))


def test_unpooling_keeps_channels_last(device):
    """Which torch's own loses on a GPU."""
    x = torch.randn(2, 3, 4, 6, device=device).to(memory_format=torch.channels_last)
    values, indices = fused.max_pool2d(x, 2, return_indices=True)
    assert fused.max_unpool2d(values, indices, 2).is_contiguous(memory_format=torch.channels_last)
    y = values.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(fused.max_unpool2d(y, indices, 2).sum(), y)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_same_bits_every_time(device):
    """Windows that overlap sum several gradients in one pixel, and several values claim one."""
    x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    results = []
    for _ in range(3):
        y, indices = fused.max_pool2d(x, 3, 1, return_indices=True)
        back = fused.max_unpool2d(y.sin(), indices, 3, 1)
        results.append((back, *torch.autograd.grad(back.square().sum(), x)))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_large_strides_and_counts(monkeypatch, device):
    """Offsets past 2^31 elements, in memory that is hardly touched; and elements counted in 64 bits."""
    gap = 2**30
    x = torch.empty(2 * gap + 64, dtype=torch.float16, device=device).as_strided((3, 1, 8, 8), (gap, 64, 8, 1))
    x.copy_(torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    expected = F.max_pool2d(x.float().contiguous(), 2, return_indices=True)
    common = launch._common
    for counted in (common, lambda *arguments: common(*arguments) | {"INDEX": tl.int64}):
        monkeypatch.setattr(launch, "_common", counted)
        launch._plan.cache_clear()
        y, indices = fused.max_pool2d(x, 2, return_indices=True)
        assert torch.equal(y.float(), expected[0]) and torch.equal(indices, expected[1])
        back = torch.full((3, 1, 8, 8), torch.nan, device=device)
        kernels.spread(y.float(), indices, back, Windows((2, 2), (2, 2), (0, 0), (1, 1)), total=False)
        assert torch.equal(back, F.max_unpool2d(*expected, 2))
        picked = torch.full_like(y, torch.nan)
        kernels.pick(x, indices, picked, Windows((2, 2), (2, 2), (0, 0), (1, 1)))
        assert torch.equal(picked, y)
    launch._plan.cache_clear()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_modules(axes, device):
    """Same outputs, output_size chosen or not, unbatched too, and the same representation."""
    arguments = {"kernel_size": 3, "stride": 2, "padding": 1}
    pools = [
        getattr(library, f"MaxPool{axes}d")(**arguments, return_indices=True, ceil_mode=True) for library in (fused, nn)
    ]
    unpools = [getattr(library, f"MaxUnpool{axes}d")(**arguments) for library in (fused, nn)]
    assert repr(pools[0]) == repr(pools[1]) and repr(unpools[0]) == repr(unpools[1])
    assert isinstance(pools[0], type(pools[1])) and isinstance(unpools[0], type(unpools[1]))
    x = torch.randn(2, 3, *[9] * axes, device=device)
    for image in (x, x[0]):
        values, indices = pools[0](image)
        torch.testing.assert_close((values, indices), pools[1](image))
        unique = torch.arange(values[0, 0].numel() if image is x else values[0].numel(), device=device)
        unique = unique.view(values.shape[-axes:]).expand_as(values).contiguous()
        for size in (None, [9] * axes):
            torch.testing.assert_close(unpools[0](values, unique, size), unpools[1](values, unique, size))


def test_empty_batch(device):
    x = torch.randn(0, 3, 8, 8, device=device, requires_grad=True)
    values, indices = fused.max_pool2d(x, 2, return_indices=True)
    assert values.shape == indices.shape == (0, 3, 4, 4)
    assert fused.max_unpool2d(values, indices, 2).shape == (0, 3, 8, 8)
    values.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_wrong_offsets_and_windows_are_named():
    x = torch.randn(1, 2, 8, 8)
    values, offsets = fused.max_pool2d_with_offsets(x, 2)
    with pytest.raises(ValueError, match="offsets must be uint8 of the input's shape"):
        fused.max_unpool2d_with_offsets(values, offsets.long(), (8, 8), 2)
    with pytest.raises(ValueError, match="a window of 256 pixels has no offset in 8 bits"):
        fused.max_pool2d_with_offsets(torch.randn(1, 1, 16, 16), 16)
    with pytest.raises(TypeError, match="takes floating numbers"):
        fused.max_pool2d_with_offsets(torch.ones(1, 1, 4, 4, dtype=torch.int32), 2)
    with pytest.raises(RuntimeError, match="pad should be"):
        fused.max_pool2d_with_offsets(x, 2, padding=2)
    assert fused.explain(fused.max_unpool2d_with_offsets, values, offsets, (8, 8), 2).name == (
        "interpreted kernel" if KERNELS_ON_CPU else "aten"
    )
    with pytest.raises(ValueError, match="need"):
        fused.offsets_to_indices(offsets[0, 0], (8, 8), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_lectures_unpoolings(dtype, device):
    """1 2 / 3 4 by nearest neighbour, by a bed of nails, and back to where the maxima were."""
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=dtype, device=device)
    rows = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert fused.unpool_nearest2d(x)[0].tolist() == rows
    assert fused.unpool_nails2d(x)[0].tolist() == [[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]]
    picture = torch.tensor([[[1, 2, 6, 3], [3, 5, 2, 1], [1, 2, 2, 1], [7, 3, 4, 8]]], dtype=dtype, device=device)
    maxima, indices = fused.max_pool2d(picture, 2, return_indices=True)
    assert maxima[0].tolist() == [[5, 6], [7, 8]]
    back = fused.max_unpool2d(x, indices, 2)
    assert back[0].tolist() == [[0, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0], [3, 0, 0, 4]]


@fp64_kernels
def test_adjoints_of_the_lectures_unpoolings():
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    for op in (fused.unpool_nearest2d, fused.unpool_nails2d):
        assert torch.autograd.gradcheck(lambda x, op=op: op(x, (2, 3)), x, fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda x, op=op: op(x, (2, 3)), x, fast_mode=True)
        with pytest.raises(ValueError, match="unpooling takes an image"):
            op(x[0, 0])
        with pytest.raises(ValueError, match="kernel_size 0"):
            op(x, 0)


def test_whole_numbers_take_torchs_way():
    x = torch.randint(0, 9, (1, 2, 6, 6))
    assert fused.explain(fused.max_pool2d, x, 2).name == "aten"
    assert torch.equal(fused.max_pool2d(x, 2), F.max_pool2d(x, 2))


@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_neighbours_are_loaded_and_stored_at_once(target):
    """One store of an element, or one load, would cost eight times the instructions: a lane's eight bf16 values are one
    access of 16 bytes and its offsets one of 8, and four windows that share it one of 8 and one of 4 (AMD, whose warps
    are wider, halves a lane). Only what `pick` reads lies anywhere."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.cross_compile_pool", target],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert len(found) == 6
    nvidia = {2: "b16", 4: "b32", 8: "v2.b32", 16: "v4.b32"}
    amd = {2: "ushort", 4: "dword", 8: "dwordx2", 16: "dwordx4"}
    name = (
        (lambda kind, size: f"global_{kind}_{amd[size]}")
        if target == "gfx942"
        else (lambda kind, size: f"{kind[0]}{'d' if kind == 'load' else 't'}.global.{nvidia[size]}")
    )
    half = 2 if target == "gfx942" else 1
    for case, instructions in found.items():
        pooling = case.startswith("max_pool_small_kernel")
        picking = case.startswith("pick_kernel")
        stored = [8 // half, 16 // half] if pooling else [16] if picking else [16 // half]
        assert instructions["store"] == sorted(name("store", size) for size in stored), case
        smallest = 8 if pooling or "channels_last" in case else 4
        if not picking:
            assert set(instructions["load"]) <= {name("load", size // half) for size in (smallest, 8, 16)}, case


# Kernel, stride, padding, dilation: side by side of 2 and 4 pixels, with gaps, overlaps and holes, over the edges.
LANES = [
    (2, 2, 0, 1),
    ((3, 2), 2, (1, 0), 1),
    (4, 4, 0, 1),
    ((2, 1), (2, 2), 0, 1),
    (3, 2, 1, 1),
    ((1, 3), (2, 1), (0, 1), (1, 2)),
    (2, 1, 1, 3),
    (3, 3, 1, 1),
]


@pytest.mark.smoke
@pytest.mark.parametrize("windows", LANES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_lanes_of_several_elements(windows, layout, device):
    """Rows and channels that a lane's elements divide, few values and so many ties, some NaN and -inf: to the bit.

    Against torch on the CPU: on a GPU its channels_last kernel gives a window of -inf the image's first pixel.
    """
    kernel, stride, padding, dilation = windows
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (2, 16, 12, 16), generator=generator).float()
    x[0, :3, :5] = float("-inf")
    x[1, ::5, ::3, ::4] = float("nan")
    x = x.to(device, memory_format=layout).requires_grad_()
    plain = x.detach().cpu().requires_grad_()
    theirs = F.max_pool2d(plain, kernel, stride, padding, dilation, return_indices=True)
    ours = fused.max_pool2d(x, kernel, stride, padding, dilation, return_indices=True)
    values, offsets = fused.max_pool2d_with_offsets(x, kernel, stride, padding, dilation)
    grad = torch.randn(values.shape, generator=generator).to(device)
    expected = torch.autograd.grad(theirs[0], plain, grad.cpu())[0].to(device)
    theirs = [result.to(device) for result in theirs]
    for found, right in zip((*ours, values), (*theirs, theirs[0]), strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(fused.offsets_to_indices(offsets, (12, 16), kernel, stride, padding, dilation), ours[1])
    for y in (ours[0], values):
        torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], expected, rtol=1e-6, atol=1e-6)
    back = fused.max_unpool2d_with_offsets(grad, offsets, (12, 16), kernel, stride, padding, dilation)
    last = torch.zeros(2, 16, 12 * 16, device=device)
    for i in range(values[0, 0].numel()):  # in order, so that the last of several stays
        last.scatter_(2, theirs[1].flatten(2)[..., i : i + 1], grad.flatten(2)[..., i : i + 1])
    assert torch.equal(back, last.view(x.shape))
