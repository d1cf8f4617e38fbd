"""The weight gradient of convolutions over boxes of pixels of every kind: narrower than a step of its sum, or empty."""

import random

import backstride.fused_ops as fused
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from backstride.kernels import conv as kernels
from backstride.kernels.conv import config, launch, reference
from backstride.kernels.conv.plan import Geometry
from backstride.kernels.runtime import H200, INTERPRETED, Layout, device_of, layout_of
from backstride.kernels.tile import quotient, reciprocal

from .modes import kernels_run
from .oracle import both_layouts, random_tensors, to_tf32

pytestmark = kernels_run

# x, channels out, kernel, stride, padding, dilation, groups, and the least number of partial results. A step takes 16
# pixels or more.
LAYERS = {
    "one pixel each": ((300, 3, 1, 1), 4, (1, 1), 1, 0, 1, 1, 2),
    "one pixel each, under one of nine taps": ((260, 20, 1, 1), 4, (3, 3), 1, 1, 1, 1, 2),
    "one column": ((70, 4, 5, 1), 3, (3, 1), 1, (1, 0), 1, 1, 2),
    "one row, strided": ((90, 17, 1, 7), 3, (1, 2), (1, 2), 0, 1, 1, 2),
    "rows of three": ((1, 2, 101, 3), 5, (2, 1), 1, 0, 1, 1, 2),
    "boxes of a column and a row": ((13, 18, 4, 5), 6, (3, 3), 1, (3, 4), (3, 4), 1, 2),
    "taps that meet nothing": ((29, 18, 3, 3), 6, (3, 3), 1, (4, 5), (4, 5), 1, 2),
    "padding past everything": ((9, 17, 2, 3), 3, (2, 2), (2, 1), (5, 4), (2, 3), 1, 1),
    "1-D, one pixel each": ((300, 6, 1), 4, (1,), 1, 0, 1, 2, 2),
    "1-D, one image": ((1, 3, 613), 4, (5,), 2, 3, 2, 1, 2),
    "64 channels to 20": ((2, 66, 5, 4), 20, (1, 2), 1, (0, 1), 1, 1, 1),
    "3-D": ((5, 2, 5, 4, 3), 3, (2, 2, 3), (1, 2, 1), (1, 0, 1), (2, 1, 1), 1, 1),
    "3-D, one plane of columns": ((45, 18, 1, 6, 1), 3, (1, 3, 1), 1, (0, 2, 0), (1, 2, 1), 1, 2),
}


def geometry_of(layer):
    shape, _, kernel, *rest, groups, _ = layer
    axes = len(shape) - 2
    stride, padding, dilation = ((value,) * axes if isinstance(value, int) else value for value in rest)
    sizes = zip(shape[2:], kernel, stride, padding, dilation, strict=True)
    return Geometry(stride, padding, dilation, groups), [
        (i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in sizes
    ]


@pytest.fixture
def partial_results_are_free(monkeypatch):
    """So that sums as small as these are cut too."""
    monkeypatch.setattr(config, "REDUCTION", 0.0)
    monkeypatch.setattr(config, "BANDWIDTH", float("inf"))
    launch.plan_weight_grad.cache_clear()
    yield
    launch.plan_weight_grad.cache_clear()


@pytest.mark.usefixtures("partial_results_are_free")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in LAYERS), ("one row, strided", torch.float16), ("3-D", torch.float16)],
)
def test_boxes_of_pixels(name, dtype, device):
    shape, c_out, kernel, *_, groups, splits = LAYERS[name]
    geometry, out = geometry_of(LAYERS[name])
    tensors = random_tensors(30, shape, (shape[0], c_out, *out), dtype=dtype, device=device)
    weight = (c_out, shape[1] // groups, *kernel)
    expected = reference.weight_grad(*(t.double() for t in tensors), kernel, geometry)
    for x, y in both_layouts(*tensors):
        result = torch.full(weight, torch.nan, dtype=dtype, device=device)
        plan = launch.plan_weight_grad(layout_of(x), weight, False, layout_of(y), geometry, dtype, False, H200)
        assert plan.grid[1] >= splits
        assert plan.constants["INDEX"] == plan.constants["OFFSET"] == tl.int32
        kernels.weight_grad(x, y, result, geometry)
        tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-2}
        torch.testing.assert_close(result.double(), expected, **tolerance)


@pytest.mark.parametrize("last_y", [False, True])
@pytest.mark.parametrize("last_x", [False, True])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (1, 0)])
def test_tf32_takes_both_sides_as_they_lie(kernel, padding, last_x, last_y, device):
    """Channels-first sides with full tiles, and at 1x1 several pixels at once; nothing is copied first."""
    x, y = random_tensors(33, (3, 20, 6, 8), (3, 36, 6, 8), dtype=torch.float32, device=device)
    geometry, weight = Geometry((1, 1), (padding,) * 2, (1, 1), 1), (36, 20, kernel, kernel)
    expected = reference.weight_grad(to_tf32(x).double(), to_tf32(y).double(), weight[2:], geometry)
    x, y = (t.to(memory_format=torch.channels_last) if last else t for t, last in ((x, last_x), (y, last_y)))
    plan = launch.plan_weight_grad(layout_of(x), weight, False, layout_of(y), geometry, x.dtype, True, H200)
    assert not any(plan.copies) and plan.constants["BLOCK_N"] == 32 and plan.constants["BLOCK_K"] == 32
    vectors = plan.constants["X_VEC"], plan.constants["Y_VEC"]
    assert vectors == tuple(1 if last or kernel == 3 else 16 for last in (last_x, last_y))
    result = torch.full(weight, torch.nan, device=device)
    kernels.weight_grad(x, y, result, geometry, tf32=True)
    tolerance = 1e-4 if INTERPRETED else 2e-2
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance * 10)


def test_a_neighbouring_channel_full_of_nan_stays_outside(device):
    """Columns beside the matrix are loaded like others but never stored; and no padding is multiplied."""
    x, y = random_tensors(31, (2, 24, 5, 4), (2, 20, 5, 4), dtype=torch.float32, device=device)
    part_x, part_y = x[:, 4:21], y[:, 3:16]
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    expected = reference.weight_grad(part_x.double(), part_y.double(), (3, 3), geometry)
    for outside in (x[:, :4], x[:, 21:], y[:, :3], y[:, 16:]):
        outside.fill_(torch.nan)
    result = torch.full((13, 17, 3, 3), torch.nan, device=device)
    kernels.weight_grad(part_x, part_y, result, geometry)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


def test_offsets_widen_where_31_bits_do_not_hold_them():
    def offset(batch, *strides):
        x = Layout((batch, 32, 2**10, 2**10), strides)
        geometry = Geometry((1, 1), (0, 0), (1, 1), 1)
        plan = launch.plan_weight_grad(x, (32, 32, 1, 1), True, x, geometry, torch.float16, False, H200)
        assert plan.constants["INDEX"] == tl.int32
        return plan.constants["OFFSET"]

    images = 2**25, 1, 2**15, 2**5
    assert (offset(63, *images), offset(64, *images)) == (tl.int32, tl.int64)
    columns = 2**15, 1, 2**5, 2**15  # of one image only: a step of w for each of its pixels goes past all of them
    assert offset(1, *columns) == tl.int64


@pytest.mark.skipif(not INTERPRETED, reason="maps a gigabyte and touches little of it")
def test_pixels_far_apart():
    """All within reach of 31 bits, but not as many steps of the last axis as there are pixels."""
    x, y = random_tensors(32, (1, 1, 8, 8), (1, 3, 8, 8), dtype=torch.float16)
    apart = torch.empty_strided(x.shape, (1, 1, 1, 2**26), dtype=x.dtype).copy_(x)
    result = torch.full((3, 1, 1, 1), torch.nan, dtype=x.dtype)
    geometry = Geometry((1, 1), (0, 0), (1, 1), 1)
    kernels.weight_grad(apart, y, result, geometry)
    expected = reference.weight_grad(x.double(), y.double(), (1, 1), geometry)
    torch.testing.assert_close(result.double(), expected, rtol=2e-3, atol=2e-2)


@triton.jit(do_not_specialize=["size"])
def quotients_kernel(pixel_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """y = pixel // size."""
    offs = tl.arange(0, BLOCK)
    factor, shift = reciprocal(size)
    tl.store(y_ptr + offs, quotient(tl.load(pixel_ptr + offs), factor, shift))


@pytest.mark.smoke
def test_quotients_are_exact(device):
    """At both sides of multiples, where a factor that is off by one shows, up to 31 bits of either number."""
    draw, top = random.Random(0), 2**31 - 1
    sizes = [1, 2, 3, 5, 7, top - 1, top, *(2**bits + by for bits in range(2, 31) for by in (-1, 0, 1))]
    sizes += [draw.randrange(1, 2 ** draw.randrange(2, 32)) for _ in range(200)]
    for size in sizes:
        multiples = [1, top // size, *(draw.randrange(top // size + 1) for _ in range(80))]
        pixels = [0, top, *(min(max(size * m + by, 0), top) for m in multiples for by in (-1, 0, 1))]
        pixel = torch.tensor(pixels + [0] * (256 - len(pixels)), dtype=torch.int32, device=device)
        result = torch.empty_like(pixel)
        quotients_kernel[(1,)](pixel, result, size, BLOCK=256)
        assert torch.equal(result, pixel // size), size


@pytest.mark.usefixtures("partial_results_are_free")
def test_weight_gradient_is_split_and_right(device):
    """Enough pixels for several partial results, in both memory formats of the weight."""
    x, y = random_tensors(14, (1, 8, 24, 24), (1, 8, 22, 22), dtype=torch.float32, device=device)
    plan = launch.plan_weight_grad(
        layout_of(x),
        (8, 8, 3, 3),
        False,
        layout_of(y),
        Geometry((1, 1), (0, 0), (1, 1), 1),
        x.dtype,
        False,
        device_of(x),
    )
    assert plan.grid[1] > 1
    for tensors in both_layouts(x, y):
        w = torch.randn(8, 8, 3, 3, device=device, requires_grad=True)
        (expected,) = torch.autograd.grad(F.conv2d(tensors[0].double(), w.double()), w, tensors[1].double())
        (result,) = torch.autograd.grad(fused.conv2d(tensors[0], w), w, tensors[1])
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 20, 3, 3), (5, 16, 7), (2, 17, 2, 3, 2)], ids=["2-D", "1-D", "3-D"])
def test_large_weights_are_brought_in_order(shape, monkeypatch, device):
    """The same sums as those that are stored tap by tap."""
    a, b, *kernel = shape
    x, y = random_tensors(32, (2, b, *[9] * len(kernel)), (2, a, *[10 - k for k in kernel]), device=device)
    x, y = x.float(), y.float()
    geometry = Geometry(*[(value,) * len(kernel) for value in (1, 0, 1)], 1)
    tap_by_tap, brought = (torch.full(shape, torch.nan, device=device) for _ in range(2))
    kernels.weight_grad(x, y, tap_by_tap, geometry)
    monkeypatch.setattr(launch, "LARGE_WEIGHT", 1)
    kernels.weight_grad(x, y, brought, geometry)
    torch.testing.assert_close(brought, tap_by_tap, rtol=1e-6, atol=1e-6)


def test_how_sums_are_cut_and_how_many_blocks_are_in_flight():
    """As was fastest on an H200, in bf16 and channels_last (bench/results/tune_conv_nvidia-h200.csv)."""
    layers = {  # name: (tiles, steps, elements, (rows, columns), splits within, stages of a launch that is not cut)
        "U-Net encoder 64": (9, 5041, 36864, (64, 64), (40, 44), 4),
        "U-Net up 128": (4, 16384, 32768, (128, 64), (60, 99), 4),
        "U-Net decoder 1024": (288, 46, 4718592, (128, 128), (1, 1), 4),
        "PSPNet head": (1152, 450, 18874368, (128, 128), (1, 1), 3),
    }
    for name, (tiles, steps, elements, (m, n), (fewest, most), stages) in layers.items():
        shipped = config.ConvConfig(m, n, 64, 8 if m * n == 128 * 128 else 4, 4 if n == 64 == m else 3)
        assert fewest <= config.choose_splits(tiles, steps, elements, shipped, 2, H200) <= most, name
        assert config.choose_stages((m, n, 64), tiles, 2, H200) == stages, name
