"""Convolution in groups of one to four channels, and its transpose: `kernels.depthwise` against fp64 oracles."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import backstride.fused_ops as fused
import pytest
import torch
import torch.nn.functional as F
from backstride.kernels import conv, depthwise
from backstride.kernels.conv import Geometry, reference
from backstride.kernels.depthwise import config, launch
from backstride.kernels.runtime import H200, INTERPRETED, Layout, layout_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, vmap
from torch.testing._internal.common_methods_invocations import op_db

from .cross_compile import printed_by
from .modes import KERNELS_ON_CPU
from .oracle import both_layouts, check_forward_and_gradients, random_tensors

CONV = {1: (fused.conv1d, F.conv1d), 2: (fused.conv2d, F.conv2d), 3: (fused.conv3d, F.conv3d)}
TRANSPOSED = {
    1: (fused.conv_transpose1d, F.conv_transpose1d),
    2: (fused.conv_transpose2d, F.conv_transpose2d),
    3: (fused.conv_transpose3d, F.conv_transpose3d),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# One layer for each code path: wide and narrow chunks, strides with gaps and shared factors, several channels out of
# one, groups of several channels, kernels too long and strides too large for a window. (X's input, channels of a group
# out and in, kernel, stride, padding, dilation)
LAYERS = {
    "chunks of four": ((2, 3, 4, 8), (1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    "chunks of two": ((1, 5, 4, 6), (1, 1), (3, 3), (1, 2), (1, 1), (2, 1)),
    "odd width": ((1, 3, 5, 7), (2, 1), (2, 3), (1, 1), (0, 1), (1, 3)),
    "bilinear": ((1, 4, 4, 16), (1, 1), (4, 4), (2, 2), (1, 1), (1, 1)),
    "stride 3": ((1, 2, 7, 12), (1, 1), (3, 4), (3, 3), (1, 2), (1, 1)),
    "gaps and shared factors": ((1, 2, 7, 13), (3, 1), (2, 2), (3, 4), (0, 2), (1, 2)),
    "causal": ((2, 9, 16), (1, 1), (4,), (1,), (3,), (1,)),
    "long kernel": ((1, 2, 8), (1, 1), (65,), (1,), (32,), (1,)),
    "large stride": ((1, 2, 36), (2, 1), (2,), (33,), (0,), (11,)),
    "3-D": ((1, 2, 3, 4, 4), (1, 1), (2, 1, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1)),
    "groups of 4, a lane left over": ((2, 12, 5, 8), (4, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
    "groups of 4 to 2, stride 2": ((1, 12, 6, 16), (2, 4), (4, 4), (2, 2), (1, 1), (1, 1)),
    "groups of 2 to 4, gaps": ((1, 4, 7, 13), (4, 2), (2, 2), (3, 4), (0, 2), (1, 2)),
    "groups of 4 to 1, odd width": ((2, 12, 9), (1, 4), (3,), (1,), (2,), (2,)),
    "groups of 2, large stride": ((1, 4, 36), (2, 2), (2,), (33,), (0,), (11,)),
    "groups of 2, 3-D": ((1, 4, 3, 4, 4), (2, 2), (2, 1, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1)),
}


@pytest.fixture(params=list(LAYERS))
def layer(request):
    return LAYERS[request.param]


def layer_tensors(layer, seed, dtype=torch.float64, device="cpu"):
    """Both sides of X, its weight, and its geometry."""
    shape, (a, b), kernel, *geometry = layer
    n, c, *size = shape
    out = [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in zip(size, kernel, *geometry, strict=True)]
    shapes = shape, (n, c // b * a, *out), (c // b * a, b, *kernel)
    return *random_tensors(seed, *shapes, dtype=dtype, device=device), Geometry(*geometry, c // b)


def needs_kernels(tensor):
    if tensor.device.type == "cpu" and not INTERPRETED:
        pytest.skip("the kernels run on a GPU or interpreted")


def check_kernels(x, y, w, geometry):
    """All three, into buffers of NaN; the weight gradient in the weight's own layout."""
    out, back, gradient = (torch.full_like(t, math.nan) for t in (y, x, w))
    depthwise.apply(x, w, None, None, out, geometry)
    depthwise.apply_transposed(y, w, None, None, back, geometry)
    depthwise.weight_grad(x, y, gradient, geometry)
    torch.testing.assert_close(out, reference.apply(x, w, y.shape[2:], geometry), check_stride=False)
    torch.testing.assert_close(back, reference.apply_transposed(y, w, x.shape[2:], geometry), check_stride=False)
    torch.testing.assert_close(gradient, reference.weight_grad(x, y, w.shape[2:], geometry), check_stride=False)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["chunks of four", "bilinear", "groups of 4, a lane left over"])
def test_kernels_are_the_reference(name, device):
    dtype = torch.float64 if device == "cpu" else torch.float32
    x, y, w, geometry = layer_tensors(LAYERS[name], 0, dtype, device)
    needs_kernels(x)
    for wide, narrow, weight in both_layouts(x, y, w):
        check_kernels(wide, narrow, weight, geometry)


def test_layers(layer, device):
    """Forward and all gradients, in both directions and layouts, beside torch's own."""
    x, y, w, geometry = layer_tensors(layer, 1, torch.float32, device)
    axes, (stride, padding, dilation, groups) = x.dim() - 2, geometry
    extra = [
        i - ((o - 1) * s - 2 * p + d * (k - 1) + 1)
        for i, o, k, s, p, d in zip(x.shape[2:], y.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
    ]
    directions = (
        (x, CONV[axes], (stride, padding, dilation, groups)),
        (y, TRANSPOSED[axes], (stride, padding, extra, groups, dilation)),
    )
    for input, (ours, theirs), arguments in directions:
        kernel = "depthwise kernel" if w.shape[1] == 1 else "small-group kernel"
        assert kernel in fused.explain(ours, input, w, None, *arguments).reason or not INTERPRETED
        channels = (x if input is y else y).shape[1]
        (bias,) = random_tensors(2, (channels,), dtype=torch.float32, device=device)
        for tensors in both_layouts(input, w, bias):
            leaves = [t.detach().requires_grad_() for t in tensors]
            result, expected = check_forward_and_gradients(
                lambda *t, f=ours, a=arguments: f(*t, *a), lambda *t, f=theirs, a=arguments: f(*t, *a), leaves
            )
            assert result.stride() == expected.stride() or axes == 3


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["chunks of four", "odd width", "groups of 4, a lane left over"])
def test_half_precision(name, dtype, device):
    x, y, w, (stride, padding, dilation, groups) = layer_tensors(LAYERS[name], 3, dtype, device)
    for tensors in both_layouts(x, w):
        leaves = [t.detach().requires_grad_() for t in tensors]
        check_forward_and_gradients(
            lambda x, w: fused.conv2d(x, w, None, stride, padding, dilation, groups),
            lambda x, w: F.conv2d(x, w, None, stride, padding, dilation, groups),
            leaves,
        )
    y = y.requires_grad_()
    check_forward_and_gradients(
        lambda y, w: fused.conv_transpose2d(y, w, None, stride, padding, 0, groups, dilation),
        lambda y, w: F.conv_transpose2d(y, w, None, stride, padding, 0, groups, dilation),
        (y, w.requires_grad_()),
    )


@st.composite
def layers(draw):
    axes = draw(st.integers(1, 3))

    def axis(low, high):
        return draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes))

    kernel, dilation, padding = axis(1, 4 if axes < 3 else 2), axis(1, 3), axis(0, 3)
    stride = kernel if draw(st.booleans()) else axis(1, 3)
    size = [*axis(1, 5)[1:], draw(st.sampled_from([1, 3, 5, 8, 12]))]
    assume(all(i + 2 * p > d * (k - 1) for i, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    a, b = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (3, 1), (2, 2), (4, 2), (1, 4), (4, 4)]))
    shape = (draw(st.integers(1, 2)), b * draw(st.sampled_from([2, 3, 5])), *size)
    return shape, (a, b), kernel, tuple(stride), tuple(padding), tuple(dilation)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layers(), st.booleans())
def test_random_layers(layer, channels_last):
    x, y, w, geometry = layer_tensors(layer, 4)
    needs_kernels(x)
    x, y, w = list(both_layouts(x, y, w))[-1 if channels_last else 0]
    check_kernels(x, y, w, geometry)


# Rows of output that are no multiple of a lane's: side by side, and a dilation apart; of X^T a multiple of the stride.
LEFT_OVER = {
    "dilation 2": (((1, 2, 9, 8), (1, 1), (3, 3), (1, 1), (2, 2), (2, 2)), (2, 4)),
    "dilation 3, stride 2": (((1, 2, 13, 16), (1, 1), (3, 3), (2, 2), (3, 0), (3, 3)), (2,)),
    "kernel 4, stride 2": (((1, 2, 11, 12), (1, 1), (4, 4), (2, 2), (1, 1), (1, 1)), (2, 4)),
    "groups of 2": (((1, 4, 7, 5), (2, 2), (3, 3), (1, 1), (2, 2), (2, 2)), (2,)),
}


@pytest.mark.parametrize("name", list(LEFT_OVER))
def test_rows_left_over(name, monkeypatch, device):
    """Lanes of several rows, whatever would be chosen."""
    layer, rows = LEFT_OVER[name]
    x, y, w, geometry = layer_tensors(layer, 15, torch.float64 if device == "cpu" else torch.float32, device)
    needs_kernels(x)
    for plan in (launch.plan_apply, launch.plan_weight_grad):
        monkeypatch.setattr(launch, plan.__name__, plan.__wrapped__)
    tensors = list(both_layouts(x, y, w))
    for v in rows:
        spaced = []

        def several_rows(channels, height, *rest, v=v, spaced=spaced, **options):
            chosen = config.choose_config(channels, height, *rest, **options)
            spaced.append(height.spacings[-1])
            assert height.size % (v * max(spaced[-1], 1)), "no rows are left over"
            return replace(chosen, window_h=True, v=v, spacing_h=spaced[-1])

        monkeypatch.setattr(launch, "choose_config", several_rows)
        for tensor in tensors:
            check_kernels(*tensor, geometry)
        assert max(geometry.dilation) == 1 or max(spaced) > 1


def test_lanes_of_real_layers_have_several_rows():
    """Where rows of taps share what they read; dilated, in channels_last, the outputs that do lie a dilation apart.

    Of 7x7 taps the products of several rows would keep the compiler busy for half a minute.
    """

    def chosen(channels, size, kernel, dilation, channels_last):
        x = torch.empty(8, channels, size, size, device="meta", dtype=torch.bfloat16)
        x = layout_of(x.to(memory_format=torch.channels_last) if channels_last else x)
        geometry = Geometry((1, 1), (dilation * (kernel // 2),) * 2, (dilation,) * 2, channels)
        plans = (
            launch.plan_apply(x, (channels, 1, kernel, kernel), x, geometry, torch.bfloat16, False),
            launch.plan_apply(x, (channels, 1, kernel, kernel), x, geometry, torch.bfloat16, True),
            launch.plan_weight_grad(x, (channels, 1, kernel, kernel), False, x, geometry, torch.bfloat16, H200),
        )
        return [[plan.constants[name] for name in ("V", "U", "SPACING_H", "SPACING_W")] for plan in plans]

    assert chosen(728, 64, 3, 2, True) == [[4, 4, 2, 2]] * 3
    assert chosen(728, 64, 3, 2, False) == [[4, 8, 2, 0]] * 3
    assert chosen(192, 56, 7, 1, True) == [[1, 4, 0, 0]] * 2 + [[2, 4, 0, 0]]


def test_epilogues(device):
    x, y, w, geometry = layer_tensors(LAYERS["bilinear"], 5, torch.float32, device)
    stride, padding, dilation, groups = geometry
    for input, residual in ((x, y), (y, x)):
        ours, theirs = (fused.conv2d, F.conv2d) if input is x else (fused.conv_transpose2d, F.conv_transpose2d)
        (bias,) = random_tensors(6, (groups,), dtype=torch.float32, device=device)
        arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        for tensors in both_layouts(input, w, bias, residual):
            check_forward_and_gradients(
                lambda x, w, b, r, f=ours, a=arguments: f(x, w, b, **a, activation="relu", residual=r),
                lambda x, w, b, r, f=theirs, a=arguments: F.relu(f(x, w, b, **a) + r),
                [t.detach().requires_grad_() for t in tensors],
            )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_concat(memory_format, device):
    """FCN's bilinear upsampling, written beside a skip connection."""
    x, skip, w = random_tensors(7, (1, 4, 3, 4), (1, 3, 6, 8), (4, 1, 4, 4), dtype=torch.float32, device=device)
    tensors = [t.to(memory_format=memory_format).requires_grad_() for t in (x, skip, w)]
    result, expected = check_forward_and_gradients(
        lambda x, skip, w: fused.conv_transpose2d_concat(x, skip, w, None, 2, 1, groups=4, activation="relu"),
        lambda x, skip, w: torch.cat([skip, F.conv_transpose2d(x, w, None, 2, 1, groups=4).relu()], dim=1),
        tensors,
    )
    assert result.stride() == expected.stride()


def test_same_padding_and_large_output_padding(device):
    x, w = random_tensors(8, (1, 3, 6, 8), (3, 1, 2, 4), dtype=torch.float32, device=device)
    torch.testing.assert_close(
        fused.conv2d(x, w, padding="same", dilation=(3, 1), groups=3),
        F.conv2d(F.pad(x, (1, 2, 1, 2)), w, dilation=(3, 1), groups=3),
    )
    arguments = {"output_padding": (2, 1), "dilation": (4, 3), "stride": (1, 2), "groups": 3}
    torch.testing.assert_close(
        fused.conv_transpose2d(x, w, **arguments), F.conv_transpose2d(x, w, **arguments), rtol=1e-4, atol=1e-5
    )


def test_expanded_sliced_and_mixed_layouts(device):
    base, weight = random_tensors(9, (2, 8, 6, 9), (1, 1, 3, 3), dtype=torch.float32, device=device)
    w = weight.expand(4, 1, 3, 3)
    convolve = partial(F.conv2d, weight=w, groups=4)
    views = {
        "sliced": base[:, ::2, 1:, ::2],
        "one off an aligned start": base[:, 1:5, :, 1:],
        "transposed": base[:, :4].transpose(2, 3),
        "expanded": base[:1, :1].expand(2, 4, 6, 9),
        "channels_last": base[:, :4].to(memory_format=torch.channels_last),
    }
    for name, x in views.items():
        torch.testing.assert_close(fused.conv2d(x, w, groups=4), convolve(x), msg=lambda m, n=name: f"{n}: {m}")
    needs_kernels(base)
    geometry = Geometry((1, 1), (0, 0), (1, 1), 4)
    x, y = views["channels_last"], torch.full((2, 4, 4, 7), math.nan, device=device)
    depthwise.apply(x, w, None, None, y, geometry)
    torch.testing.assert_close(y, convolve(x))
    gradient = torch.full_like(weight.expand(4, 1, 3, 3).contiguous(), math.nan)
    depthwise.weight_grad(x, y, gradient, geometry)
    torch.testing.assert_close(gradient, reference.weight_grad(x, y, (3, 3), geometry), rtol=1e-4, atol=1e-4)


def test_nothing_is_written_outside_of_a_slice(device):
    x, y, w, geometry = layer_tensors(LAYERS["bilinear"], 10, torch.float32, device)
    needs_kernels(x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for transposed, (input, result) in enumerate([(x, y), (y, x)]):
            n, c, *size = result.shape
            wide = torch.full((n, c + 3, *size), math.nan, device=device).to(memory_format=memory_format)
            run = depthwise.apply_transposed if transposed else depthwise.apply
            run(input, w, None, None, wide[:, 2:-1], geometry)
            assert wide.isnan().sum() == 3 * n * math.prod(size)
            assert not wide[:, 2:-1].isnan().any()


def test_empty_batch(device):
    x = torch.randn(0, 3, 8, 8, device=device, requires_grad=True)
    w = torch.randn(6, 1, 3, 3, device=device, requires_grad=True)
    y = fused.conv2d(x, w, padding=1, groups=3)
    assert y.shape == (0, 6, 8, 8)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert w.grad is not None and w.grad.abs().sum() == 0


@pytest.mark.parametrize("group", [1, 2])
def test_weight_gradient_is_split_right_and_reproducible(group, monkeypatch, device):
    shape = (1, 2 * group, 64, 36) if device == "cpu" else (1, 2 * group, 512, 288)
    x, y, w = random_tensors(11, shape, shape, (2 * group, group, 1, 3), dtype=torch.float32, device=device)
    needs_kernels(x)
    monkeypatch.setattr(config, "INTERPRETED_LANES", 32)
    geometry = Geometry((1, 1), (0, 1), (1, 1), 2)
    for wide, narrow, weight in both_layouts(x, y, w):
        last = not weight.is_contiguous()
        plan = launch.plan_weight_grad(layout_of(wide), w.shape, last, layout_of(narrow), geometry, x.dtype, H200)
        assert plan.grid[1] > 1
        first, second = torch.full_like(weight, math.nan), torch.full_like(weight, math.nan)
        depthwise.weight_grad(wide, narrow, first, geometry)
        depthwise.weight_grad(wide, narrow, second, geometry)
        expected = reference.weight_grad(x.double(), y.double(), (1, 3), geometry)
        torch.testing.assert_close(first.double(), expected, rtol=1e-4, atol=1e-3, check_stride=False)
        assert torch.equal(first, second)


def test_indices_past_31_bits():
    """Three images 2^30 elements apart: the third is out of 32-bit reach. In a process of its own: a miss segfaults."""
    code = """
import torch, torch.nn.functional as F
import backstride.fused_ops as fused
S = 2**30
storage = torch.empty(2 * S + 2 * 5 * 8, dtype=torch.float16)
x = storage.as_strided((3, 2, 5, 8), (S, 40, 8, 1))
x.copy_(torch.randn(3, 2, 5, 8))
w = torch.randn(2, 1, 3, 3, dtype=torch.float16)
expected = F.conv2d(x.contiguous(), w, groups=2), F.conv_transpose2d(x.contiguous(), w, stride=2, groups=2)
torch.testing.assert_close(fused.conv2d(x, w, groups=2), expected[0], rtol=1e-2, atol=1e-2)
torch.testing.assert_close(fused.conv_transpose2d(x, w, stride=2, groups=2), expected[1], rtol=1e-2, atol=1e-2)
w.requires_grad_()
g = torch.randn(3, 2, 3, 6, dtype=torch.float16)
a, = torch.autograd.grad(fused.conv2d(x, w, groups=2), w, g)
b, = torch.autograd.grad(F.conv2d(x.contiguous(), w, groups=2), w, g)
torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
x = storage.as_strided((3, 2, 5, 8), (S, 1, 16, 2)).copy_(x.clone())
torch.testing.assert_close(fused.conv2d(x, w.detach(), groups=2), expected[0], rtol=1e-2, atol=1e-2)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_row_indices_widen_near_the_limit():
    def index(batch):
        image = Layout((batch, 2**9, 2**10, 2**10), (2**29, 2**20, 2**10, 1))
        geometry = Geometry((1, 1), (0, 0), (1, 1), 2**9)
        plan = launch.plan_apply(image, (2**9, 1, 1, 1), image, geometry, torch.float16, False)
        gradient = launch.plan_weight_grad(image, (2**9, 1, 1, 1), False, image, geometry, torch.float16, H200)
        return str(plan.constants["INDEX"]), str(gradient.constants["INDEX"])

    assert index(16) == ("int32", "int32")
    assert index(2**13) == ("int64", "int64")


@pytest.mark.skipif(not INTERPRETED, reason="forces 64-bit row indices on the interpreted kernels")
def test_64_bit_row_indices(monkeypatch):
    monkeypatch.setattr(launch, "index_dtype", lambda positions: launch.tl.int64)
    for plan in (launch.plan_apply, launch.plan_weight_grad):
        monkeypatch.setattr(launch, plan.__name__, plan.__wrapped__)
    for name in ("bilinear", "causal"):
        test_kernels_are_the_reference(name, "cpu")


def test_new_sizes_need_no_new_kernel():
    """Other batch and image sizes of one layer have the same compile-time arguments: one compiled kernel."""

    def constants(batch, size, memory_format):
        x = torch.empty(batch, 64, size, size, device="meta", dtype=torch.bfloat16).to(memory_format=memory_format)
        x, weight, geometry = layout_of(x), (64, 1, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 64)
        plans = (
            launch.plan_apply(x, weight, x, geometry, torch.bfloat16, False),
            launch.plan_apply(x, weight, x, geometry, torch.bfloat16, True),
            launch.plan_weight_grad(x, weight, False, x, geometry, torch.bfloat16, H200),
        )
        return tuple(tuple(sorted((k, str(v)) for k, v in plan.constants.items())) for plan in plans)

    assert len({constants(n, size, torch.channels_last) for n, size in [(8, 65), (8, 96), (3, 111), (16, 128)]}) == 1
    assert (
        len({constants(n, size, torch.contiguous_format) for n, size in [(8, 64), (8, 128), (3, 192), (16, 448)]}) == 1
    )


def test_the_choice_of_kernels():
    x = torch.randn(1, 4, 5, 5)
    path = fused.explain(fused.conv2d, x, torch.randn(8, 1, 3, 3), groups=4)
    assert path.name == ("interpreted kernel" if KERNELS_ON_CPU else "aten")
    assert ("depthwise kernel" in path.reason) == KERNELS_ON_CPU
    path = fused.explain(fused.conv2d, x, torch.randn(8, 2, 3, 3), groups=2)
    assert ("small-group kernel" in path.reason) == KERNELS_ON_CPU
    # One group of one channel is a dense layer: there is nothing to take apart.
    assert "depthwise" not in fused.explain(fused.conv2d, x[:, :1], torch.randn(8, 1, 3, 3)).reason
    taken = [
        ((8, 1, 3), 4),
        ((8, 2, 3), 4),
        ((4, 4, 3, 3), 4),
        ((8, 4, 4, 2, 2), 2),
        ((4, 2, 7, 7), 2),
        ((6, 1, 65), 2),
    ]
    # One group; three channels; too many channels, taps, or taps in a row.
    others = [((8, 1, 3), 1), ((4, 4, 3), 1), ((6, 2, 3), 2), ((4, 3, 3), 4), ((16, 8, 3), 2), ((16, 4, 3), 2)]
    others += [((8, 4, 5, 5), 2), ((8, 4, 6), 2)]
    assert [depthwise.takes(*layer) for layer in taken + others] == [True] * len(taken) + [False] * len(others)


def test_depthwise_layers_never_reach_the_dense_kernels(monkeypatch):
    for name in ("apply", "apply_transposed", "weight_grad"):
        monkeypatch.setattr(conv, name, lambda *a, **k: pytest.fail("a depthwise layer ran on the dense kernels"))
    x, w = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)
    fused.conv2d(x, w, groups=4).square().sum().backward()
    fused.conv_transpose2d(x, w, groups=4).square().sum().backward()
    fused.conv_transpose2d_concat(x, torch.randn(1, 1, 7, 7), w, groups=4)
    w = torch.randn(4, 2, 3, 3, requires_grad=True)
    fused.conv2d(x, w, groups=2).square().sum().backward()
    fused.conv_transpose2d(x, w, groups=2).square().sum().backward()


@pytest.mark.skipif(not INTERPRETED, reason="on the CPU only the interpreter runs the kernels")
def test_torchs_own_samples_hold_depthwise_layers():
    """tests/test_conv_torch.py runs them all; some have to take this path."""
    reasons = []
    for info in op_db:
        if info.name.startswith("nn.functional.conv") and hasattr(fused, name := info.name.rpartition(".")[2]):
            for sample in info.sample_inputs("cpu", torch.float64):
                path = fused.explain(getattr(fused, name), sample.input, *sample.args, **sample.kwargs)
                reasons.append("depthwise kernel" in path.reason)
    assert sum(reasons) >= 5


@pytest.mark.skipif(not INTERPRETED, reason="fp64 runs on the kernels only when they are interpreted")
@pytest.mark.parametrize("transposed", [False, True])
def test_first_and_second_gradients(transposed):
    x, w, b = random_tensors(12, (1, 4 if transposed else 2, 4), (4, 1, 3), (2 if transposed else 4,))
    op = fused.conv_transpose1d if transposed else fused.conv1d
    function = partial(op, stride=2, padding=1, groups=2)
    tensors = [t.requires_grad_() for t in (x, w, b)]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("name", ["conv", "conv_transpose", "conv_weight_grad", "conv_transpose_concat"])
def test_opcheck(name):
    wide, narrow, w = (torch.randn(shape, requires_grad=True) for shape in ((1, 2, 5, 5), (1, 4, 3, 3), (4, 1, 3, 3)))
    geometry = ([2, 2], [1, 1], [1, 1], 2)
    arguments = {
        "conv": (wide, w, torch.randn(4), None, [3, 3], *geometry, True),
        "conv_transpose": (narrow, w, torch.randn(2), wide.detach(), [5, 5], *geometry, False),
        "conv_weight_grad": (wide, narrow, [3, 3], *geometry),
        "conv_transpose_concat": (narrow, torch.randn(1, 3, 5, 5), w, None, [5, 5], *geometry, True),
    }[name]
    torch.library.opcheck(getattr(torch.ops.backstride, name).default, arguments, rtol=1e-4, atol=1e-4)


def test_per_sample_gradients(device):
    """torch.func: a weight of its own for every sample makes the samples groups."""
    module = fused.Conv2d(2, 4, 3, groups=2).to(device)
    plain = torch.nn.Conv2d(2, 4, 3, groups=2).to(device)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(3, 1, 2, 4, 5, device=device)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss(net, params, x):
        return functional_call(net, params, (x,)).square().sum()

    gradients = [vmap(grad(partial(loss, net)), (None, 0))(params, x) for net in (module, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.compile
def test_loads_and_stores_are_wide():
    """In both layouts: a lost hint about divisibility costs bandwidth, and nothing else would show it."""
    code = """
from tests import cross_compile, cross_compile_depthwise
for case in cross_compile_depthwise.cases(cross_compile.TARGETS["sm_90"]):
    if case.name.startswith("Xception"):
        ptx = cross_compile.Compilation(case, "sm_90").compile().asm["ptx"]
        print(*(ptx.count(f"{access}.global.v4.b32") + ptx.count(f"{access}.global.v2.b32") for access in ("ld", "st")))
"""
    counts = [tuple(map(int, line.split())) for line in printed_by(code)]
    # Forward and weight gradient. In channels_last, of 4 rows and 4 columns: six rows of six columns, nine weights, the
    # bias and the residual; both tensors. In NCHW: six rows of three chunks, and the residual or gradient.
    # Sums are written singly.
    assert counts == [(36 + 9 + 1 + 16, 16), (36 + 16, 0), (18 + 4, 4), (18 + 4, 0)]


def test_autocast(device):
    x, w = random_tensors(13, (1, 3, 5, 8), (3, 1, 3, 3), dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = fused.conv2d(x, w, groups=3)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.conv2d(x, w, groups=3), rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_large_layers(dtype, memory_format):
    shapes = (2, 96, 65, 64), (96, 1, 7, 7), (96,)
    x, w, b = random_tensors(14, *shapes, dtype=dtype, device="cuda")
    tensors = [x.to(memory_format=memory_format).requires_grad_(), w.requires_grad_(), b.requires_grad_()]
    for ours, theirs in ((fused.conv2d, F.conv2d), (fused.conv_transpose2d, F.conv_transpose2d)):
        check_forward_and_gradients(
            lambda *t, f=ours: f(*t, stride=2, padding=3, groups=96),
            lambda *t, f=theirs: f(*t, stride=2, padding=3, groups=96),
            tensors,
        )


@pytest.mark.gpu
def test_cuda_graph():
    x, w = torch.randn(2, 16, 12, 12, device="cuda"), torch.randn(16, 1, 4, 4, device="cuda")
    upsample = partial(fused.conv_transpose2d, weight=w, stride=2, padding=1, groups=16)
    upsample(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = upsample(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, F.conv_transpose2d(x, w, stride=2, padding=1, groups=16), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_more_than_31_bits_of_elements():
    x = torch.randn(1, 2, 2**15, 2**15 + 8, device="cuda", dtype=torch.float16)
    w = torch.randn(2, 1, 3, 3, device="cuda", dtype=torch.float16)
    y = fused.conv2d(x, w, padding=1, groups=2)
    last = F.conv2d(x[:, :, -3:].contiguous().float(), w.float(), padding=(0, 1), groups=2)
    torch.testing.assert_close(y[:, :, -2:-1].float(), last, rtol=1e-2, atol=1e-2)
