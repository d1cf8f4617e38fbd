"""Convolution and transposed convolution against fp64 oracles: geometry, layouts, dtypes, epilogues, gradients."""

import math

import backstride.fused_ops as fused
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from backstride.kernels import conv as kernels
from backstride.kernels.conv import launch, plan_forward, plan_weight_grad, reference
from backstride.kernels.conv.apply import conv_apply_kernel
from backstride.kernels.conv.apply_transposed import conv_apply_transposed_kernel, conv_scatter_kernel
from backstride.kernels.conv.plan import Geometry
from backstride.kernels.runtime import H200, INTERPRETED, Layout, layout_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from .modes import KERNELS_ON_CPU, run_python
from .oracle import both_layouts, check_forward_and_gradients, random_tensors

CONV = {1: (fused.conv1d, F.conv1d), 2: (fused.conv2d, F.conv2d), 3: (fused.conv3d, F.conv3d)}
TRANSPOSED = {
    1: (fused.conv_transpose1d, F.conv_transpose1d),
    2: (fused.conv_transpose2d, F.conv_transpose2d),
    3: (fused.conv_transpose3d, F.conv_transpose3d),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHORT = [pytest.param(dtype, marks=pytest.mark.smoke) for dtype in (torch.float32, torch.bfloat16)]


@st.composite
def geometries(draw):
    """Random layers with 1 to 3 axes: (axes, batch, channels, size, kernel, stride, padding, dilation, groups)."""
    axes = draw(st.integers(1, 3))

    def axis(low, high):
        return draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes))

    kernel, dilation, padding = axis(1, 4 if axes < 3 else 3), axis(1, 3), axis(0, 3)
    stride = kernel if draw(st.booleans()) else axis(1, 4)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.sampled_from([1, 2, 17])), groups * draw(st.sampled_from([1, 3, 16]))
    return axes, draw(st.integers(1, 2)), channels, axis(1, 6), kernel, stride, padding, dilation, groups


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(geometries(), st.integers(0, 3))
def test_random_convolutions(layer, seed):
    axes, batch, (c_in, c_out), size, kernel, stride, padding, dilation, groups = layer
    assume(all(i + 2 * p > d * (k - 1) for i, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    x, w, b = random_tensors(seed, (batch, c_in, *size), (c_out, c_in // groups, *kernel), (c_out,))
    tensors = [t.requires_grad_() for t in (x, w, b)]
    ours, theirs = CONV[axes]
    arguments = (stride, padding, dilation, groups)
    check_forward_and_gradients(lambda *t: ours(*t, *arguments), lambda *t: theirs(*t, *arguments), tensors)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(geometries(), st.integers(0, 3), st.data())
def test_random_transposed_convolutions(layer, seed, data):
    axes, batch, (c_out, c_in), size, kernel, stride, padding, dilation, groups = layer
    extra = [data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    sizes = [
        (i - 1) * s - 2 * p + d * (k - 1) + e + 1
        for i, s, p, d, k, e in zip(size, stride, padding, dilation, kernel, extra, strict=True)
    ]
    assume(min(sizes) > 0)
    x, w, b = random_tensors(seed, (batch, c_in, *size), (c_in, c_out // groups, *kernel), (c_out,))
    tensors = [t.requires_grad_() for t in (x, w, b)]
    ours, theirs = TRANSPOSED[axes]
    arguments = (stride, padding, extra, groups, dilation)
    check_forward_and_gradients(lambda *t: ours(*t, *arguments), lambda *t: theirs(*t, *arguments), tensors)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(geometries())
def test_reference_is_the_definition(layer):
    """The readable reference agrees with torch, forward and both gradients."""
    axes, batch, (c_in, c_out), size, kernel, stride, padding, dilation, groups = layer
    assume(all(i + 2 * p > d * (k - 1) for i, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    x, w = random_tensors(0, (batch, c_in, *size), (c_out, c_in // groups, *kernel))
    y = CONV[axes][1](x, w, None, stride, padding, dilation, groups)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    (grad,) = random_tensors(1, y.shape)
    grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
        grad, x, w, None, stride, padding, dilation, False, [0] * axes, groups, (True, True, False)
    )
    torch.testing.assert_close(reference.apply(x, w, y.shape[2:], geometry), y)
    torch.testing.assert_close(reference.apply_transposed(grad, w, size, geometry), grad_x)
    torch.testing.assert_close(reference.weight_grad(x, grad, kernel, geometry), grad_w)


# One layer for each kernel and code path: few channels (flat reduction), k = s (scatter), phases with and without
# taps, cropped scatter, groups, several tiles.
LAYERS = {
    "few channels": (2, (2, 3, 9, 8), 20, (3, 3), 1, 1, 1, 1),
    "many channels": (2, (1, 70, 6, 7), 36, (3, 2), (1, 2), (1, 0), (2, 1), 1),
    "patches": (2, (2, 16, 8, 6), 32, (2, 2), 2, 0, 1, 1),
    "cropped patches": (2, (1, 16, 7, 6), 8, (3, 3), 3, 1, 1, 1),
    "gaps between taps": (2, (1, 16, 9, 9), 16, (2, 2), 3, 0, 1, 1),
    "groups": (2, (1, 24, 6, 6), 48, (3, 3), 2, 1, 1, 3),
    "1-D": (1, (2, 17, 150), 33, (5,), 2, 2, 2, 1),
    "3-D": (3, (1, 16, 4, 5, 6), 16, (2, 3, 2), (1, 2, 1), 1, 1, 1),
}


# Whether a tap meets a pixel is a bit of a 32-bit word up to 32 taps, and compared in the loop beyond.
MANY_TAPS = {
    "32 taps": (2, (2, 16, 5, 6), 16, (4, 8), 1, (2, 5), 1, 1),
    "33 taps, blocks that are not full": (2, (1, 20, 3, 7), 17, (3, 11), 1, (2, 6), 1, 1),
    "1-D, dilated, strided": (1, (2, 18, 40), 16, (37,), 2, 30, 2, 1),
    "3-D": (3, (1, 16, 3, 4, 3), 16, (2, 4, 4), (1, 2, 1), (1, 3, 2), 1, 1),
    "3-D, 45 taps": (3, (1, 16, 3, 2, 4), 16, (3, 3, 5), 1, (2, 1, 3), 1, 1),
}


@pytest.mark.parametrize("name", list(MANY_TAPS))
def test_many_taps(name):
    axes, shape, c_out, kernel, stride, padding, dilation, groups = MANY_TAPS[name]
    ours, theirs = CONV[axes]
    x, w = random_tensors(21, shape, (c_out, shape[1], *kernel))
    arguments = (None, stride, padding, dilation, groups)
    for tensors in both_layouts(x, w):
        tensors = [t.detach().requires_grad_() for t in tensors]
        check_forward_and_gradients(lambda *t: ours(*t, *arguments), lambda *t: theirs(*t, *arguments), tensors)


@pytest.fixture(params=list(LAYERS))
def layer(request):
    return LAYERS[request.param]


def assert_same_format(ours, theirs):
    """Equal strides; only that torch's 3-D convolution on the CPU gives up channels_last, which we keep everywhere."""
    if ours.dim() == 5 and not ours.is_cuda and ours.is_contiguous(memory_format=torch.channels_last_3d):
        return
    assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", [*SHORT, torch.float16], ids=str)
def test_dtypes_and_layouts(layer, dtype, device):
    axes, shape, c_out, kernel, stride, padding, dilation, groups = layer
    ours, theirs = CONV[axes]
    x, w, b = random_tensors(3, shape, (c_out, shape[1] // groups, *kernel), (c_out,), dtype=dtype, device=device)
    arguments = (stride, padding, dilation, groups)
    for tensors in both_layouts(x, w, b):
        tensors = [t.detach().requires_grad_() for t in tensors]
        result, expected = check_forward_and_gradients(
            lambda *t: ours(*t, *arguments), lambda *t: theirs(*t, *arguments), tensors
        )
        assert_same_format(result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_dtypes_and_layouts(layer, dtype, device):
    axes, shape, c_in, kernel, stride, padding, dilation, groups = layer
    ours, theirs = TRANSPOSED[axes]
    shape, c_out = (shape[0], c_in, *shape[2:]), shape[1]
    x, w, b = random_tensors(4, shape, (c_in, c_out // groups, *kernel), (c_out,), dtype=dtype, device=device)
    arguments = (stride, padding, 0, groups, dilation)
    for tensors in both_layouts(x, w, b):
        tensors = [t.detach().requires_grad_() for t in tensors]
        result, expected = check_forward_and_gradients(
            lambda *t: ours(*t, *arguments), lambda *t: theirs(*t, *arguments), tensors
        )
        assert_same_format(result, expected)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_epilogues(relu, with_residual, device):
    x, w, b, r = random_tensors(5, (2, 5, 6, 7), (8, 5, 3, 3), (8,), (2, 8, 6, 7), dtype=torch.float32, device=device)
    tensors = [t.requires_grad_() for t in (x, w, b, r)] if with_residual else [t.requires_grad_() for t in (x, w, b)]

    def ours(x, w, b, r=None):
        return fused.conv2d(x, w, b, padding=1, activation="relu" if relu else None, residual=r)

    def theirs(x, w, b, r=None):
        y = F.conv2d(x, w, b, padding=1)
        y = y if r is None else y + r
        return F.relu(y) if relu else y

    check_forward_and_gradients(ours, theirs, tensors)


def test_epilogues_of_the_transposed_convolution(device):
    x, w, b, r = random_tensors(6, (2, 8, 4, 3), (8, 5, 4, 4), (5,), (2, 5, 8, 6), dtype=torch.float32, device=device)
    tensors = [t.requires_grad_() for t in (x, w, b, r)]
    check_forward_and_gradients(
        lambda x, w, b, r: fused.conv_transpose2d(x, w, b, 2, 1, activation="relu", residual=r),
        lambda x, w, b, r: F.relu(F.conv_transpose2d(x, w, b, 2, 1) + r),
        tensors,
    )


def test_residual_of_another_layout(device):
    x, w, r = random_tensors(8, (1, 4, 5, 5), (4, 4, 1, 1), (1, 4, 5, 5), dtype=torch.float32, device=device)
    expected = F.conv2d(x, w) + r
    result = fused.conv2d(x, w, residual=r.to(memory_format=torch.channels_last))
    torch.testing.assert_close(result, expected)
    assert result.stride() == expected.stride()


def test_relu_lets_nan_through(device):
    x = torch.tensor([math.nan, 1.0, -1.0], device=device).view(1, 1, 3)
    result = fused.conv1d(x, torch.ones(1, 1, 1, device=device), activation="relu")
    assert result.isnan().flatten().tolist() == [True, False, False]
    assert result.flatten()[1:].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kernel, stride, padding", [(2, 2, 0), (3, 2, 1)], ids=["scatter", "phases"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_concat(relu, kernel, stride, padding, memory_format, device):
    size = [(i - 1) * stride - 2 * padding + kernel for i in (4, 3)]
    x, skip, w, b = random_tensors(
        9, (2, 8, 4, 3), (2, 6, *size), (8, 5, kernel, kernel), (5,), dtype=torch.float32, device=device
    )
    tensors = [
        t.to(memory_format=memory_format).requires_grad_() if t.dim() == 4 else t.requires_grad_()
        for t in (x, skip, w, b)
    ]

    def theirs(x, skip, w, b):
        up = F.conv_transpose2d(x, w, b, stride, padding)
        return torch.cat([skip, F.relu(up) if relu else up], dim=1)

    def ours(x, skip, w, b):
        return fused.conv_transpose2d_concat(x, skip, w, b, stride, padding, activation="relu" if relu else None)

    result, expected = check_forward_and_gradients(ours, theirs, tensors)
    assert result.stride() == expected.stride()


def test_concat_of_a_cropped_skip_and_unbatched_input(device):
    x, skip, w = random_tensors(10, (4, 3, 3), (2, 8, 9), (4, 5, 2, 2), dtype=torch.float32, device=device)
    cropped = skip[:, 1:7, 2:8]
    result = fused.conv_transpose2d_concat(x, cropped, w, stride=2)
    torch.testing.assert_close(result, torch.cat([cropped, F.conv_transpose2d(x, w, stride=2)]))


def matrix_of_the_lecture(x, y, z):
    """X of a 3-tap, stride-2 convolution of 4 elements with padding 1: it acts on the padded 6-vector."""
    return torch.tensor([[x, y, z, 0, 0, 0], [0, 0, x, y, z, 0]], dtype=torch.float64)


def test_convolution_is_the_lectures_matrix():
    x, y, z, a, b, c, d = 2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0
    matrix, kernel = matrix_of_the_lecture(x, y, z), torch.tensor([[[x, y, z]]], dtype=torch.float64)
    signal = torch.tensor([[[a, b, c, d]]], dtype=torch.float64)
    product = matrix @ F.pad(signal.flatten(), (1, 1))
    assert product.tolist() == [a * y + b * z, b * x + c * y + d * z]
    assert fused.conv1d(signal, kernel, stride=2, padding=1).flatten().tolist() == product.tolist()


def test_transposed_convolution_is_the_transposed_matrix():
    x, y, z, a, b = 2.0, 3.0, 5.0, 7.0, 11.0
    matrix, kernel = matrix_of_the_lecture(x, y, z), torch.tensor([[[x, y, z]]], dtype=torch.float64)
    product = matrix.T @ torch.tensor([a, b], dtype=torch.float64)
    assert product.tolist() == [a * x, a * y, a * z + b * x, b * y, b * z, 0]
    signal = torch.tensor([[[a, b]]], dtype=torch.float64)
    # Before its padding is cropped, the result is the whole product: the last 0 is output_padding.
    whole = fused.conv_transpose1d(signal, kernel, stride=2, output_padding=1)
    assert whole.flatten().tolist() == product.tolist()
    cropped = fused.conv_transpose1d(signal, kernel, stride=2, padding=1, output_padding=1)
    assert cropped.flatten().tolist() == product.tolist()[1:5]


def test_the_lectures_picture_needs_output_padding():
    """3x3, stride 2, padding 1 from 2x2: 4x4 with output_padding=1, and 3x3 without."""
    x, w = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 3, 3)
    assert fused.conv_transpose2d(x, w, stride=2, padding=1).shape[2:] == (3, 3)
    assert fused.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1).shape[2:] == (4, 4)


def test_empty_batch_and_its_gradients(device):
    x = torch.randn(0, 3, 8, 8, device=device, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    y = fused.conv2d(x, w, padding=1)
    assert y.shape == (0, 4, 8, 8)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert w.grad is not None and w.grad.abs().sum() == 0


def test_expanded_and_sliced_tensors(device):
    base, weight = random_tensors(11, (2, 8, 9, 12), (1, 4, 3, 3), dtype=torch.float32, device=device)
    x, w = base[:, ::2, 1:, ::2], weight.expand(6, 4, 3, 3)
    torch.testing.assert_close(fused.conv2d(x, w), F.conv2d(x, w))
    y = fused.conv_transpose2d(x, w.transpose(0, 1), stride=2)
    torch.testing.assert_close(y, F.conv_transpose2d(x, w.transpose(0, 1), stride=2))


STRIDED = {
    "dense": (fused.conv2d, F.conv2d, (4, 3, 3, 3), {}),
    "depthwise": (fused.conv2d, F.conv2d, (3, 1, 3, 3), {"groups": 3}),
    "scatter": (fused.conv_transpose2d, F.conv_transpose2d, (3, 4, 2, 2), {"stride": 2}),
    "phases": (fused.conv_transpose2d, F.conv_transpose2d, (3, 4, 3, 3), {"stride": 2}),
    "pyramid": (
        lambda x, w, b: fused.atrous_pyramid(x, [w, w], [b, b], [1, 2]),
        lambda x, w, b: torch.cat([F.conv2d(x, w, b, 1, d, d) for d in (1, 2)], 1),
        (4, 3, 3, 3),
        {},
    ),
}


@pytest.mark.parametrize("name", STRIDED)
def test_gradients_have_memory_of_their_own(name, device):
    """A second backward adds in place, and doubles them."""
    ours, _, shape, options = STRIDED[name]
    leaves = random_tensors(
        0, (2, 3, 5, 6), shape, (3 if options.get("groups") else 4,), dtype=torch.float32, device=device
    )
    for leaf in leaves:
        leaf.requires_grad_()
    once = torch.autograd.grad(ours(*leaves, **options).square().sum(), leaves)
    for _ in range(2):
        ours(*leaves, **options).square().sum().backward()
    grads = [leaf.grad for leaf in leaves]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == len(grads)
    for twice, single in zip(grads, once, strict=True):
        torch.testing.assert_close(twice, 2 * single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("bias", [torch.arange(8.0)[::2], torch.tensor([2.0]).expand(4)], ids=["strided", "expanded"])
def test_a_bias_that_is_not_contiguous(name, bias, device):
    """Its memory has other numbers between, or ends after one."""
    ours, theirs, shape, options = STRIDED[name]
    x, w = random_tensors(0, (2, 3, 5, 6), shape, dtype=torch.float32, device=device)
    bias = bias.to(device)[: 3 if options.get("groups") else 4]
    torch.testing.assert_close(ours(x, w, bias, **options), theirs(x, w, bias, **options), rtol=1e-3, atol=1e-3)


def test_every_output_element_is_written(layer, device):
    """Outputs full of NaN beforehand, and NaN around a slice that must stay."""
    axes, shape, c_out, kernel, stride, padding, dilation, groups = layer
    x, w = random_tensors(12, shape, (c_out, shape[1] // groups, *kernel), dtype=torch.float32, device=device)
    expected = CONV[axes][1](x, w, None, stride, padding, dilation, groups)
    per_axis = [(v,) * axes if isinstance(v, int) else v for v in (stride, padding, dilation)]
    geometry = Geometry(*per_axis, groups)
    if x.device.type == "cpu" and not INTERPRETED:
        pytest.skip("the kernels run on a GPU or interpreted")
    wide = torch.full((shape[0], c_out + 3, *expected.shape[2:]), math.nan, device=device)
    kernels.apply(x, w, None, None, wide[:, 2:-1], geometry)
    torch.testing.assert_close(wide[:, 2:-1], expected, rtol=1e-4, atol=1e-4)
    assert wide[:, :2].isnan().all() and wide[:, -1].isnan().all()
    grad_x, grad_w = torch.full_like(x, math.nan), torch.full_like(w, math.nan)
    kernels.apply_transposed(expected, w, None, None, grad_x, geometry)
    kernels.weight_grad(x, expected, grad_w, geometry)
    assert not grad_x.isnan().any() and not grad_w.isnan().any()


def test_two_runs_are_bitwise_equal(device):
    x, w = random_tensors(13, (1, 8, 24, 24), (8, 8, 3, 3), dtype=torch.float32, device=device)
    x, w = x.requires_grad_(), w.requires_grad_()
    first, second = (torch.autograd.grad(fused.conv2d(x, w).square().sum(), (x, w)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_indices_past_31_bits():
    """Three images 2^30 elements apart: the third is out of 32-bit reach. In a process of its own: a miss segfaults."""
    code = """
import torch, torch.nn.functional as F
import backstride.fused_ops as fused
S = 2**30
x = torch.empty(2 * S + 2 * 6 * 6, dtype=torch.float16).as_strided((3, 2, 6, 6), (S, 36, 6, 1))
x.copy_(torch.randn(3, 2, 6, 6))
w = torch.randn(2, 2, 3, 3, dtype=torch.float16)
torch.testing.assert_close(fused.conv2d(x, w), F.conv2d(x.contiguous(), w), rtol=1e-2, atol=1e-2)
w.requires_grad_()
expected = F.conv_transpose2d(x.contiguous(), w, stride=2)
torch.testing.assert_close(fused.conv_transpose2d(x, w, stride=2), expected, rtol=1e-2, atol=1e-2)
g = torch.randn(3, 2, 4, 4, dtype=torch.float16)
a, = torch.autograd.grad(fused.conv2d(x, w), w, g)
b, = torch.autograd.grad(F.conv2d(x.contiguous(), w), w, g)
torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
"""
    run_python("-c", code, interpreted="1")


def test_pixel_indices_widen_near_the_limit():
    def index(batch):
        image = Layout((batch, 1, 2**15, 2**15), (2**30, 1, 2**15, 1))
        geometry = Geometry((1, 1), (0, 0), (1, 1), 1)
        plan = launch.plan_apply(image, (1, 1, 1, 1), image, geometry, torch.float16, False, H200)
        return str(plan.constants["INDEX"])

    assert (index(1), index(2)) == ("int32", "int64")


@pytest.mark.skipif(not INTERPRETED, reason="forces 64-bit pixel indices on the interpreted kernels")
def test_64_bit_pixel_indices(monkeypatch, layer):
    axes, shape, c_out, kernel, stride, padding, dilation, groups = layer
    plans = (launch.plan_apply, launch.plan_apply_transposed, launch.plan_weight_grad)
    for module in (plan_forward, plan_weight_grad):
        monkeypatch.setattr(module, "index_dtype", lambda *numbers: tl.int64)
    for plan in plans:
        plan.cache_clear()
    try:
        x, w = random_tensors(15, shape, (c_out, shape[1] // groups, *kernel))
        ours, theirs = (
            f(x.requires_grad_(), w.requires_grad_(), None, stride, padding, dilation, groups) for f in CONV[axes]
        )
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, w)) for y in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b)
    finally:
        for plan in plans:
            plan.cache_clear()


def test_new_sizes_need_no_new_kernel():
    """Other batch and image sizes of a layer with several tiles for each multiprocessor: one compiled kernel."""
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)

    def constants(batch, size):
        x = layout_of(torch.empty(batch, 64, size, size).to(memory_format=torch.channels_last))
        y = layout_of(torch.empty(batch, 128, size, size).to(memory_format=torch.channels_last))
        arguments = (geometry, torch.bfloat16, False, H200)
        weight = (128, 64, 3, 3)
        return [
            tuple(sorted((k, str(v)) for k, v in plan.constants.items()))
            for plan in (
                launch.plan_apply(x, weight, y, *arguments),
                launch.plan_apply_transposed(y, weight, x, *arguments),
                launch.plan_weight_grad(x, weight, True, y, *arguments),
            )
        ]

    assert (
        len({tuple(constants(batch, size)) for batch, size in [(17, 65), (8, 96), (9, 111), (16, 128), (31, 77)]}) == 1
    )
    from backstride.kernels.conv.tile import CHANNEL_STRIDES, RUNTIME

    for kernel in (conv_apply_kernel, conv_apply_transposed_kernel, conv_scatter_kernel):
        sizes = [
            n for n in kernel.arg_names if n not in constants(8, 65)[0] and n.split("_")[0] in ("N", "ID", "stride")
        ]
        assert set(sizes) <= set(RUNTIME) | set(CHANNEL_STRIDES)


@pytest.mark.gpu
def test_new_sizes_compile_nothing():
    """All so large that their tiles fill the GPU several times: smaller layers have other tiles."""
    x = torch.randn(2, 64, 193, 193, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.float16)
    fused.conv2d(x, w, padding=1)
    cached = len(conv_apply_kernel.device_caches[x.device.index][0])
    for size in (194, 207, 224, 229):
        fused.conv2d(
            torch.randn(2, 64, size, size, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last),
            w,
            padding=1,
        )
    assert len(conv_apply_kernel.device_caches[x.device.index][0]) == cached


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, device):
    x, w, b, skip = random_tensors(
        16, (1, 3, 5, 5), (3, 4, 2, 2), (4,), (1, 2, 10, 10), dtype=torch.float32, device=device
    )
    with torch.autocast(device, dtype):
        y = fused.conv_transpose2d(x, w, b, stride=2)
        both = fused.conv_transpose2d_concat(x, skip, w, b, stride=2)
        double = fused.conv_transpose2d(x.double(), w.double(), stride=2)
    assert y.dtype == both.dtype == dtype and double.dtype == torch.float64
    torch.testing.assert_close(y.float(), F.conv_transpose2d(x, w, b, stride=2), rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
def test_cuda_graph():
    x = torch.randn(2, 16, 12, 12, device="cuda")
    w = torch.randn(16, 8, 2, 2, device="cuda")
    fused.conv_transpose2d(x, w, stride=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused.conv_transpose2d(x, w, stride=2)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, F.conv_transpose2d(x, w, stride=2), rtol=1e-3, atol=1e-3)


def test_complex_and_integer_inputs_take_torchs_way():
    x, w = torch.randn(1, 2, 5, dtype=torch.complex64), torch.randn(3, 2, 3, dtype=torch.complex64)
    assert fused.explain(fused.conv1d, x, w).name == "aten"
    torch.testing.assert_close(fused.conv1d(x, w), F.conv1d(x, w))
    x, w = torch.arange(10).view(1, 1, 10), torch.arange(3).view(1, 1, 3)
    torch.testing.assert_close(fused.conv1d(x, w), F.conv1d(x, w))


def test_wrong_activation_residual_and_skip_are_named():
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 3, 2, 2)
    with pytest.raises(ValueError, match="activation must be None or \"relu\", got 'gelu'"):
        fused.conv_transpose2d(x, w, activation="gelu")
    with pytest.raises(ValueError, match=r"output's shape \(1, 3, 10, 10\), got \(1, 3, 9, 9\)"):
        fused.conv_transpose2d(x, w, stride=2, residual=torch.randn(1, 3, 9, 9))
    with pytest.raises(TypeError, match="dtype torch.float32, got torch.float64"):
        fused.conv_transpose2d(x, w, stride=2, residual=torch.randn(1, 3, 10, 10).double())
    with pytest.raises(ValueError, match=r"shape \(1, channels, 10, 10\).*got \(1, 3, 12, 12\); crop it"):
        fused.conv_transpose2d_concat(x, torch.randn(1, 3, 12, 12), w, stride=2)
    with pytest.raises(TypeError, match="residual must be a tensor of the output's shape, got float"):
        fused.conv_transpose2d(x, w, stride=2, residual=3.0)
    with pytest.raises(TypeError, match="skip must be a tensor to stand beside the up-convolution, got NoneType"):
        fused.conv_transpose2d_concat(x, None, w, stride=2)
    with pytest.raises(ValueError, match="residual must be on the output's device cpu, got meta; move it"):
        fused.conv_transpose2d(x, w, stride=2, residual=torch.randn(1, 3, 10, 10, device="meta"))
    with pytest.raises(ValueError, match="skip must be on the output's device cpu, got meta; move it"):
        fused.conv_transpose2d_concat(x, torch.randn(1, 3, 10, 10, device="meta"), w, stride=2)
    with pytest.raises(TypeError, match="skip must have the output's dtype"):
        fused.conv_transpose2d_concat(x, torch.randn(1, 3, 10, 10).double(), w, stride=2)


def test_explain_names_path_and_reason():
    x, w = torch.randn(1, 4, 5, 5), torch.randn(2, 4, 3, 3)
    path = fused.explain(fused.conv2d, x, w, padding=1)
    assert path.name == ("interpreted kernel" if KERNELS_ON_CPU else "aten")
    assert fused.explain(fused.conv2d, x, w[:, :3]).name == "aten"
    skip = torch.randn(1, 4, 7, 7)
    assert fused.explain(fused.conv_transpose2d_concat, torch.randn(1, 2, 5, 5), skip, w).name == path.name
    with pytest.raises(ValueError, match="explain knows the ops"):
        fused.explain(F.conv2d, x, w)


@pytest.mark.parametrize("interpreted", ["0", "1"], ids=["aten", "kernels"])
def test_torch_compile_without_graph_breaks(interpreted):
    run_python("-m", "tests.conv_compiled", interpreted=interpreted)
