"""Validity zones: what they save, that they cover the output once, and both kernels over them against fp64."""

import itertools
import math
import sys

import backstride.fused_ops as fused
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from backstride.kernels import conv as kernels
from backstride.kernels.conv import launch, plan_forward, plan_weight_grad, zones
from backstride.kernels.conv.plan import Geometry
from backstride.kernels.runtime import H200, INTERPRETED, Layout

from .oracle import assert_as_exact_as, to_fp64

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PLANNERS = (launch.plan_apply, launch.plan_apply_transposed, launch.plan_weight_grad)


def tile_taps(size: int, dilation: int, transposed: bool = False) -> tuple[int, int]:
    """Of a 3x3 layer with batch 8 in tiles of 128 pixels: over plain tiles, over zones."""
    kernel, one, d = (3, 3), (1, 1), (dilation, dilation)
    found = zones.find_zones(kernel, one, d, d, (size, size), (size, size), transposed)
    assert found is not None and len(found) == 9
    plain = zones.plain_tile_taps(kernel, one, (size, size), transposed, 8, 128)
    return plain, zones.tile_taps(found, 8, 128)


@pytest.mark.parametrize("transposed", [False, True], ids=["X", "X^T"])
@pytest.mark.parametrize(
    ("size", "dilations", "ratios", "whole"),
    [
        (33, (6, 12, 18), (1.26, 1.70, 2.34), 1.66),
        (41, (6, 12, 18, 24), (1.21, 1.52, 1.92, 2.56), 1.67),
        (65, (12, 24, 36), (1.29, 1.74, 2.49), 1.72),
        (65, (4,), (1.08,), 1.08),
    ],
)
def test_exact_work(size, dilations, ratios, whole, transposed):
    """The multiplications that zones spare, partly filled tiles counted in full: those of an ASPP, and of all of it."""
    counts = [tile_taps(size, dilation, transposed) for dilation in dilations]
    assert [plain / zoned for plain, zoned in counts] == pytest.approx(ratios, abs=0.006)
    assert sum(plain for plain, _ in counts) / sum(zoned for _, zoned in counts) == pytest.approx(whole, abs=0.006)


def brute_force(kernel, stride, padding, dilation, size, out, transposed):
    """{output pixel: {(tap, input pixel), ...}} of one axis, by the definition."""
    reached = {o: set() for o in range(out)}
    for r in range(kernel):
        if transposed:
            for i in range(size):
                if 0 <= (o := stride * i - padding + dilation * r) < out:
                    reached[o].add((r, i))
        else:
            for o in range(out):
                if 0 <= (i := stride * o - padding + dilation * r) < size:
                    reached[o].add((r, i))
    return reached


@pytest.mark.parametrize("transposed", [False, True], ids=["X", "X^T"])
def test_zones_are_the_definition(transposed):
    """Every output pixel lies in one zone, and meets just the pairs of tap and input pixel that exist."""
    for axis in itertools.product(
        (1, 2, 3, 5), (1, 2, 3), (0, 1, 2, 7), (1, 2, 3, 6, 9), (1, 4, 7), (1, 5, 8), [transposed]
    ):
        kernel, stride, padding, dilation, size, out, _ = axis
        found = zones.find_zones((kernel,), (stride,), (padding,), (dilation,), (size,), (out,), transposed)
        assert [zone.taps for zone in found] == sorted((zone.taps for zone in found), reverse=True)
        reached = {}
        for *_, run in (zone.runs for zone in found):
            for q in range(run.length):
                assert run.start + run.step * q not in reached
                reached[run.start + run.step * q] = {
                    (run.tap + run.tap_step * j, run.first + run.stride * q + run.hop * j) for j in range(run.taps)
                }
        assert reached == brute_force(*axis), axis


def plan(batch, channels, size, dilation, transposed=False, kernel=3):
    image = Layout((batch, channels, size, size), (size * size * channels, 1, size * channels, channels))
    d = dilation * (kernel - 1) // 2
    geometry = Geometry((1, 1), (d, d), (dilation, dilation), 1)
    planner = launch.plan_apply_transposed if transposed else launch.plan_apply
    return planner(image, (channels, channels, kernel, kernel), image, geometry, torch.bfloat16, False, H200)


@pytest.mark.parametrize("transposed", [False, True], ids=["X", "X^T"])
def test_zones_or_tiles_is_a_matter_of_geometry(transposed):
    def has_zones(*arguments):
        return plan(*arguments, transposed).table is not None

    assert has_zones(8, 256, 33, 6) and has_zones(8, 256, 65, 36) and has_zones(8, 32, 96, 16)
    assert not has_zones(8, 256, 33, 1) and not has_zones(8, 256, 65, 4)
    # 1 kernel of 63 taps on 33 pixels: 65 x 65 zones are too many.
    assert plan(8, 64, 33, 1, transposed, kernel=63).table is None
    assert "57% of the taps meet pixels" in plan(8, 256, 33, 12, transposed).note


@pytest.mark.parametrize("transposed", [False, True], ids=["X", "X^T"])
@pytest.mark.parametrize(
    "axis",
    [(3, 1, 2, 2, 7, 7), (2, 3, 0, 1, 4, 11), (3, 2, 1, 1, 5, 9), (4, 2, 3, 2, 6, 9), (1, 2, 1, 1, 1, 1)],
    ids=str,
)
def test_the_share_of_taps_that_meet_pixels(axis, transposed):
    """Beside the pairs that exist stand those that would, if the input went on for ever."""
    kernel, stride, padding, dilation, size, out = axis
    met, all_of = (
        sum(map(len, brute_force(kernel, stride, padding + reach, dilation, size + width, out, transposed).values()))
        for reach, width in ((0, 0), (60 * stride if transposed else -60, 120))
    )
    found = zones.find_zones((kernel,), (stride,), (padding,), (dilation,), (size,), (out,), transposed)
    share = zones.met_share(found, (kernel,), (stride,), (padding,), (dilation,), (out,), transposed)
    assert share == (met / all_of if all_of else 1)


def test_explain_names_the_zones():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("the kernels run on a GPU or interpreted")
    x, w = torch.empty(8, 256, 33, 33), torch.empty(16, 256, 3, 3)
    x, w = (t.cuda() for t in (x, w)) if torch.cuda.is_available() else (x, w)
    reason = fused.explain(fused.conv2d, x, w, padding=12, dilation=12).reason
    assert "validity zones: 57% of the taps meet pixels" in reason
    assert "zones" not in fused.explain(fused.conv2d, x, w, padding=1).reason
    reason = fused.explain(fused.conv_transpose2d, x, w.transpose(0, 1), padding=12, dilation=12).reason
    assert "validity zones: 57% of the taps meet pixels" in reason


@pytest.fixture
def zones_always(monkeypatch):
    """Zones however little they spare: tiny layers are mostly partial tiles."""
    monkeypatch.setattr(zones, "WORTH", math.inf)
    for planner in PLANNERS:
        planner.cache_clear()
    yield
    for planner in PLANNERS:
        planner.cache_clear()


# axes, shape of x, channels out, kernel, stride, padding before, padding behind, dilation, groups
LAYERS = {
    "ASPP": (2, (2, 17, 7, 6), 18, (3, 3), (1, 1), (3, 3), (3, 3), (3, 3), 1),
    "taps beyond the map": (2, (2, 16, 6, 5), 17, (3, 3), (1, 1), (7, 7), (7, 7), (7, 7), 1),
    "no tap meets the border": (2, (1, 16, 3, 4), 16, (2, 2), (1, 1), (4, 5), (4, 5), (2, 1), 1),
    "even kernel, asymmetric": (2, (1, 17, 7, 8), 16, (2, 4), (1, 1), (1, 2), (2, 4), (3, 2), 1),
    "stride 2, groups": (2, (1, 32, 7, 6), 34, (3, 2), (2, 1), (4, 2), (4, 2), (4, 5), 2),
    "stride 3 of dilation 6": (1, (2, 16, 23), 16, (3,), (3,), (6,), (5,), (6,), 1),
    "more than three runs": (1, (2, 16, 9), 16, (5,), (1,), (6,), (6,), (3,), 1),
    "3-D": (3, (1, 16, 3, 4, 5), 16, (3, 1, 3), (1, 1, 1), (2, 0, 3), (2, 0, 3), (2, 1, 3), 1),
}


@pytest.fixture(params=list(LAYERS))
def layer(request):
    return LAYERS[request.param]


def random_tensors(seed, *shapes, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def reference(layer, x, w):
    axes, *_, stride, before, behind, dilation, groups = layer
    pads = [p for pair in reversed(list(zip(before, behind, strict=True))) for p in pair]
    return CONV[axes](F.pad(x, pads), w, None, stride, 0, dilation, groups)


def run(layer, x, w, grad):
    """[X x, X^T grad, weight gradient] by the kernels, into buffers of NaN."""
    _, _, _, _, stride, padding, _, dilation, groups = layer
    geometry = Geometry(stride, padding, dilation, groups)
    y, grad_x, grad_w = (torch.full_like(t, math.nan) for t in (grad, x, w))
    kernels.apply(x, w, None, None, y, geometry)
    kernels.apply_transposed(grad, w, None, None, grad_x, geometry)
    kernels.weight_grad(x, grad, grad_w, geometry)
    return y, grad_x, grad_w


def wanted(layer, x, w, grad):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = reference(layer, x, w)
    return (y.detach(), *torch.autograd.grad(y, (x, w), grad))


@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [(torch.float64, False), (torch.float32, True), (torch.float16, True)],
    ids=["fp64, contiguous", "fp32, channels_last", "fp16, channels_last"],
)
def test_every_direction(layer, dtype, channels_last, zones_always, device):
    """Everything is written, and as exact as torch's own; on a GPU without fp64, which is ATen's there."""
    if device == "cpu" and not INTERPRETED or device == "cuda" and dtype == torch.float64:
        pytest.skip("the kernels run on a GPU or, fp64 too, interpreted")
    axes, shape, c_out, kernel, *_, groups = layer
    x, w = random_tensors(1, shape, (c_out, shape[1] // groups, *kernel), dtype=dtype, device=device)
    if channels_last and axes > 1:
        memory_format = torch.channels_last if axes == 2 else torch.channels_last_3d
        x, w = (t.to(memory_format=memory_format) for t in (x, w))
    grad = torch.randn_like(reference(layer, x, w))
    exact = to_fp64(x, w, grad)
    theirs = wanted(layer, x, w, grad)
    oracle, scale = wanted(layer, *exact), wanted(layer, *(t.abs() for t in exact))
    for name, *results in zip(("X", "X^T", "weight"), run(layer, x, w, grad), theirs, oracle, scale, strict=True):
        assert_as_exact_as(*results, name)


@pytest.mark.skipif(not INTERPRETED, reason="forces 64-bit pixel indices on the interpreted kernels")
def test_64_bit_pixel_indices(monkeypatch, zones_always):
    for module in (plan_forward, plan_weight_grad):
        monkeypatch.setattr(module, "index_dtype", lambda *numbers: tl.int64)
    layer = LAYERS["stride 3 of dilation 6"]
    x, w = random_tensors(6, layer[1], (layer[2], 16, 3), dtype=torch.float64)
    grad = torch.randn_like(reference(layer, x, w))
    for result, expected in zip(run(layer, x, w, grad), wanted(layer, x, w, grad), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.smoke
def test_forward_and_gradients_through_the_op(zones_always, device):
    """With bias, residual and ReLU, and a second derivative."""
    shapes = (2, 17, 6, 5), (16, 17, 3, 3), (16,), (2, 16, 6, 5)
    tensors = [t.requires_grad_() for t in random_tensors(2, *shapes, device=device)]
    x, w, b, r = tensors
    y = fused.conv2d(x, w, b, padding=4, dilation=4, residual=r, activation="relu")
    expected = F.relu(F.conv2d(x, w, b, padding=4, dilation=4) + r)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(*(torch.autograd.grad(t.square().sum(), tensors) for t in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not INTERPRETED, reason="fp64 runs on the kernels only when they are interpreted")
def test_gradients_of_any_order(zones_always):
    shapes = (1, 16, 4), (2, 16, 3), (2,)
    tensors = [t.requires_grad_() for t in random_tensors(3, *shapes, dtype=torch.float64)]

    def function(x, w, b):
        return fused.conv1d(x, w, b, padding=3, dilation=3, activation="relu")

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_two_runs_are_bitwise_equal(zones_always, device):
    x, w = (t.requires_grad_() for t in random_tensors(4, (2, 16, 9, 9), (16, 16, 3, 3), device=device))
    first, second = (
        torch.autograd.grad(fused.conv2d(x, w, padding=4, dilation=4).square().sum(), (x, w)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="counts the interpreted kernels' products")
def test_products_that_are_really_computed(monkeypatch):
    """20x20 with d = 15, 16 channels in tiles of 128 x 16: 9 taps of 4 plain tiles, and just the zones' tile-taps."""
    counted = []
    for name in ("walk", "weight_grad"):
        module = sys.modules[f"{kernels.__name__}.{name}"]
        product = module.dot

        def counting(*arguments, product=product):
            counted.append(arguments[0].shape)
            return product(*arguments)

        monkeypatch.setattr(module, "dot", counting)
    x, w = random_tensors(5, (1, 16, 20, 20), (16, 16, 3, 3), dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last)
    geometry = Geometry((1, 1), (15, 15), (15, 15), 1)
    y = torch.empty_like(x)
    kernels.apply(x, w, None, None, y, geometry)
    found = zones.find_zones((3, 3), (1, 1), (15, 15), (15, 15), (20, 20), (20, 20), False)
    # Corners of 5 x 5 pixels meet 4 taps, edges of 5 x 10 meet 2, the middle of 10 x 10 meets 1: one tile each.
    assert len(counted) == zones.tile_taps(found, 1, 128) == 4 * 4 + 4 * 2 + 1
    counted.clear()
    kernels.weight_grad(x, y, torch.empty_like(w), geometry)
    # Corner taps meet 5 x 5 pixels, edge taps 5 x 20, the middle one all 400: blocks of 128.
    assert len(counted) == 4 * 1 + 4 * 1 + 4
