"""Results written into a given tensor (`out=`): slices of a wider buffer, what may overlap it, and what is refused."""

import math

import backstride.fused_ops as fused
import pytest
import torch
import torch.nn.functional as F
from backstride.fused_ops.conv import out as given
from backstride.kernels.runtime import INTERPRETED
from hypothesis import given as sampled
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from .oracle import assert_as_exact_as, both_layouts, random_tensors

# One layer for each kernel: function, input, weight, and stride, padding, ... as the function takes them.
LAYERS = {
    "flat reduction": ("conv2d", (2, 3, 5, 6), (5, 3, 3, 3), (1, 1)),
    "tiles": ("conv2d", (2, 20, 5, 6), (18, 20, 3, 3), (1, 1)),
    "zones": ("conv2d", (2, 16, 12, 12), (16, 16, 3, 3), (1, 9, 9)),
    "groups": ("conv2d", (1, 12, 5, 5), (18, 4, 3, 3), (2, 1, 1, 3)),
    "depthwise": ("conv2d", (2, 6, 6, 9), (12, 1, 3, 3), (1, 1, 1, 6)),
    "1-D": ("conv1d", (2, 5, 17), (6, 5, 3), (2, 1)),
    "3-D": ("conv3d", (1, 4, 3, 4, 5), (6, 4, 2, 2, 2), (1,)),
    "scatter": ("conv_transpose2d", (2, 16, 3, 4), (16, 6, 2, 2), (2,)),
    "scatter, several taps": ("conv_transpose2d", (1, 16, 17, 18), (16, 3, 4, 4), (2, 1)),
    "phases": ("conv_transpose2d", (2, 16, 3, 4), (16, 6, 3, 3), (2, 1, 1)),
    "flat transposed": ("conv_transpose2d", (1, 3, 5, 5), (3, 5, 3, 3), (1, 1)),
    "depthwise transposed": ("conv_transpose2d", (2, 6, 4, 5), (6, 1, 4, 4), (2, 1, 0, 6)),
    "transposed 1-D": ("conv_transpose1d", (2, 5, 7), (5, 6, 4), (2, 1)),
    "transposed 3-D": ("conv_transpose3d", (1, 4, 2, 3, 2), (4, 5, 2, 2, 2), (2,)),
}


def inputs(layer, dtype=torch.float32, device="cpu"):
    """(ours, torch's, x, weight, bias, residual, the rest of the arguments)."""
    name, x, weight, arguments = LAYERS[layer]
    theirs = getattr(F, name)
    shape = theirs(torch.empty(x, device="meta"), torch.empty(weight, device="meta"), None, *arguments).shape
    tensors = random_tensors(0, x, weight, (shape[1],), shape, dtype=dtype, device=device)
    return getattr(fused, name), theirs, *tensors, arguments


def poisoned(like, before, after, memory_format):
    """A buffer of NaN with channels around those of `like`, and the slice that is to be written."""
    shape = (like.shape[0], before + like.shape[1] + after, *like.shape[2:])
    buffer = torch.full(shape, math.nan, dtype=like.dtype, device=like.device).to(memory_format=memory_format)
    return buffer, buffer[:, before : before + like.shape[1]]


def formats(like):
    return {
        3: [torch.contiguous_format],
        4: [torch.contiguous_format, torch.channels_last],
        5: [torch.contiguous_format, torch.channels_last_3d],
    }[like.dim()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_slice_of_a_buffer(layer, dtype, device):
    """Every layout of the operands into every layout of the buffer, with the whole epilogue."""
    ours, theirs, x, w, b, r, arguments = inputs(layer, dtype, device)

    def reference(x, w, b, r):
        return F.relu(theirs(x, w, b, *arguments) + r)

    exact = [t.cpu().double() for t in (x, w, b, r)]
    oracles = reference(*exact), reference(*(t.abs() for t in exact))
    for tensors in both_layouts(x, w, b, r):
        for memory_format in formats(x):
            buffer, out = poisoned(r, 3, 2, memory_format)
            result = ours(*tensors[:3], *arguments, activation="relu", residual=tensors[3], out=out)
            assert result is out
            assert_as_exact_as(out, reference(*tensors), *oracles)
            assert buffer[:, :3].isnan().all() and buffer[:, -2:].isnan().all()


@pytest.mark.smoke
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_skip_in_place(memory_format, device):
    """U-Net's concat without a copy: the encoder writes the left half of the buffer, the up-convolution the right."""
    x, deep, w, up, b = random_tensors(
        1, (2, 3, 8, 6), (2, 8, 4, 3), (5, 3, 3, 3), (8, 4, 2, 2), (4,), dtype=torch.float32, device=device
    )
    x, deep = x.to(memory_format=memory_format), deep.to(memory_format=memory_format)
    buffer = torch.full((2, 9, 8, 6), math.nan, device=device).to(memory_format=memory_format)
    skip = fused.conv2d(x, w, padding=1, activation="relu", out=buffer[:, :5])
    fused.conv_transpose2d(deep, up, b, stride=2, out=buffer[:, 5:])
    expected = fused.conv_transpose2d_concat(deep, F.relu(F.conv2d(x, w, padding=1)), up, b, stride=2)
    torch.testing.assert_close(buffer, expected)
    assert skip.data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize("layer", LAYERS)
def test_accumulation(layer, device):
    """`out` itself as the residual: what is there is added to."""
    ours, theirs, x, w, b, r, arguments = inputs(layer, device=device)
    for memory_format in formats(x):
        buffer, out = poisoned(r, 1, 1, memory_format)
        out.copy_(r)
        ours(x, w, b, *arguments, residual=out, out=out)
        torch.testing.assert_close(out, theirs(x, w, b, *arguments) + r, rtol=1e-4, atol=1e-4)
        assert buffer[:, 0].isnan().all() and buffer[:, -1].isnan().all()


def test_unbatched_steps_and_permutations(device):
    x, w, r = random_tensors(2, (3, 6, 7), (4, 3, 3, 3), (4, 6, 7), dtype=torch.float32, device=device)
    expected = F.conv2d(x, w, padding=1) + r
    wide = torch.full((9, 12, 7), math.nan, device=device)
    every_other = wide[1:9:2, ::2]
    assert fused.conv2d(x, w, padding=1, residual=r, out=every_other) is every_other
    torch.testing.assert_close(every_other, expected)
    assert wide[::2].isnan().all() and wide[:, 1::2].isnan().all()
    turned = torch.full((7, 4, 6), math.nan, device=device).permute(1, 2, 0)
    torch.testing.assert_close(fused.conv2d(x, w, padding=1, residual=r, out=turned), expected)


def test_empty_batch(device):
    out = torch.empty(0, 4, 6, 7, device=device)
    x, w = torch.empty(0, 3, 6, 7, device=device), torch.randn(4, 3, 3, 3, device=device)
    assert fused.conv2d(x, w, padding=1, out=out) is out


def test_other_channels_of_the_buffer_may_be_read(device):
    """As a dense block does: input and out lie between each other in memory, and have no element in common."""
    buffer, w = random_tensors(3, (2, 9, 5, 5), (4, 5, 3, 3), dtype=torch.float32, device=device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        buffer = buffer.to(memory_format=memory_format)
        expected = F.conv2d(buffer[:, :5], w, padding=1)
        torch.testing.assert_close(fused.conv2d(buffer[:, :5], w, padding=1, out=buffer[:, 5:]), expected)


@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual", "out"])
def test_overlap_is_refused_and_nothing_written(name, device):
    x, w, b, r = random_tensors(4, (1, 4, 4, 4), (4, 4, 3, 3), (4,), (1, 4, 4, 4), dtype=torch.float32, device=device)
    memory = torch.randn(400, device=device)
    out = memory[:64].view(1, 4, 4, 4)
    if name == "input":
        x = memory[63:127].view(1, 4, 4, 4)
    elif name == "weight":
        w = memory[40:184].view(4, 4, 3, 3)
    elif name == "bias":
        b = memory[60:76:4]
    elif name == "residual":
        r = memory[:64].view(1, 4, 4, 4).transpose(2, 3)
    else:
        out = memory[:16].view(1, 1, 4, 4).expand(1, 4, 4, 4)
    before = memory.clone()
    with pytest.raises(RuntimeError, match=rf"{name}.* refer to a single memory location"):
        fused.conv2d(x, w, b, padding=1, residual=r, out=out)
    assert torch.equal(memory, before)


@st.composite
def views(draw):
    """Start, shape and strides inside of 64 elements, overlapping itself or not."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    strides = [draw(st.integers(0, 12)) for _ in shape]
    return draw(st.integers(0, 10)), shape, strides


@settings(max_examples=200, deadline=None, derandomize=True)
@sampled(views(), views())
def test_overlap_is_exact(first, second):
    memory = torch.arange(96, dtype=torch.float16)
    a, b = (memory.as_strided(shape, strides, start) for start, shape, strides in (first, second))
    places = [t.flatten().tolist() for t in (a, b)]
    assert given.overlap(a, b) == bool(set(places[0]) & set(places[1]))
    reach, apart = given._reach(a.shape, a.stride())
    assert reach == max(places[0]) - min(places[0]) + 1
    if apart:
        assert len(set(places[0])) == len(places[0])


def test_wrong_out_is_named(device):
    x, w = torch.randn(1, 3, 5, 5, device=device), torch.randn(4, 3, 3, 3, device=device)
    for out, error, message in (
        (torch.empty(1, 4, 3, 4, device=device), ValueError, r"result's shape \(1, 4, 3, 3\), got \(1, 4, 3, 4\)"),
        (torch.empty(4, 3, 3, device=device), ValueError, r"result's shape \(1, 4, 3, 3\), got \(4, 3, 3\)"),
        (torch.empty(0, device=device), ValueError, "result's shape"),
        (torch.empty(1, 4, 3, 3, device=device).half(), TypeError, r"torch.float32, .*, got torch.float16"),
        (torch.empty(1, 4, 3, 3, device="meta"), TypeError, "got torch.float32, meta"),
        ([], TypeError, "out must be a tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            fused.conv2d(x, w, out=out)
        if isinstance(out, torch.Tensor) and out.device.type == device:
            assert out.shape != (1, 4, 3, 3) or out.dtype != torch.float32
    with pytest.raises(RuntimeError, match="channels"):  # torch's own words come first
        fused.conv2d(x, w[:, :2], out=torch.empty(1, 4, 3, 3, device=device))


def test_no_gradients(device):
    x, w = torch.randn(1, 3, 5, 5, device=device), torch.randn(4, 3, 3, 3, device=device)
    out = torch.zeros(1, 4, 3, 3, device=device)
    message = "don't support automatic differentiation.*torch.no_grad"
    for arguments in (
        {"input": x.clone().requires_grad_(), "weight": w},
        {"input": x, "weight": nn.Parameter(w)},
        {"input": x, "weight": w, "bias": torch.zeros(4, device=device, requires_grad=True)},
        {"input": x, "weight": w, "residual": out.clone().requires_grad_()},
        {"input": x, "weight": w, "out": out.clone().requires_grad_()},
    ):
        with pytest.raises(RuntimeError, match=message):
            fused.conv2d(**({"out": out} | arguments))
        with torch.no_grad():
            fused.conv2d(**({"out": out.clone()} | arguments))
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda x: fused.conv2d(x, w, out=out).sum())(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode"):
        fused.conv2d(forward_ad.make_dual(x, x), w, out=out)
    with pytest.raises(RuntimeError, match="vmap does not support out="):
        torch.vmap(lambda x, out: fused.conv2d(x, w, out=out))(x[None], out[None])
    assert not out.any()


def test_what_was_saved_for_a_gradient_is_known_to_have_changed(device):
    x, w = torch.randn(1, 3, 5, 5, device=device), torch.randn(4, 3, 3, 3, device=device)
    buffer = torch.randn(1, 6, 3, 3, device=device)
    product = (buffer * torch.ones_like(buffer, requires_grad=True)).sum()
    fused.conv2d(x, w, out=buffer[:, 1:5])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        fresh = fused.conv2d(x, w, out=torch.empty(1, 4, 3, 3, device=device))
        torch.testing.assert_close(fresh, fused.conv2d(x, w, out=buffer[:, 2:]))


def test_autocast(device):
    """Operands are cast as without out=, so out has autocast's dtype."""
    x, w, r = random_tensors(5, (1, 3, 5, 5), (4, 3, 3, 3), (1, 4, 3, 3), dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = torch.empty(1, 4, 3, 3, dtype=torch.bfloat16, device=device)
        assert fused.conv2d(x, w, residual=r, out=out) is out
        torch.testing.assert_close(out, fused.conv2d(x, w, residual=r), rtol=0, atol=0)
        with pytest.raises(TypeError, match="bfloat16"):
            fused.conv2d(x, w, out=out.float())


def test_tensors_without_memory():
    """Meta and fake tensors, on either path."""
    x, w, out = (torch.empty(s, device="meta") for s in ((1, 3, 5, 5), (4, 3, 3, 3), (1, 4, 3, 3)))
    assert fused.conv2d(x, w, residual=out, out=out) is out
    with FakeTensorMode():
        x, w, out = torch.empty(1, 3, 5, 5), torch.empty(4, 3, 3, 3), torch.empty(1, 6, 3, 3)[:, :4]
        assert fused.conv2d(x, w, residual=out, out=out) is out


def test_tensors_without_a_kernel_take_torchs_way():
    x, w = torch.randn(1, 2, 5, dtype=torch.complex64), torch.randn(3, 2, 3, dtype=torch.complex64)
    buffer = torch.zeros(1, 5, 3, dtype=torch.complex64)
    assert fused.explain(fused.conv1d, x, w, out=buffer[:, :3]).name == "aten"
    fused.conv1d(x, w, out=buffer[:, :3])
    torch.testing.assert_close(buffer[:, :3], F.conv1d(x, w))
    assert not buffer[:, 3:].any()
    negative = torch.zeros(1, 3, 3, dtype=torch.complex64).conj().imag
    torch.testing.assert_close(fused.conv1d(x.real, w.real, out=negative), F.conv1d(x.real, w.real))


def test_explain():
    x, w = torch.randn(2, 16, 12, 12), torch.randn(16, 16, 3, 3)
    buffer = torch.empty(2, 20, 12, 12)
    path = fused.explain(fused.conv2d, x, w, padding=9, dilation=9, out=buffer[:, 4:])
    assert path == fused.explain(fused.conv2d, x, w, padding=9, dilation=9)
    assert ("zones" in path.reason) == INTERPRETED
    fused.explain(fused.conv2d, x[0], w, padding=1, out=buffer[0, 4:])
    if INTERPRETED:
        with pytest.raises(ValueError, match="out must have the result's shape"):
            fused.explain(fused.conv2d, x, w, padding=1, out=buffer)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["conv_out", "conv_transpose_out"])
def test_opcheck(name, memory_format):
    x, w, r = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.randn(1, 6, 3, 3)
    if name == "conv_transpose_out":
        x, r = r, x
    out = poisoned(r, 1, 1, memory_format)[1]
    bias = torch.randn(r.shape[1])
    for residual in (None, r, out.nan_to_num_()):
        arguments = (x, w, bias, residual, [2, 2], [1, 1], [1, 1], 1, True, out)
        torch.library.opcheck(getattr(torch.ops.backstride, name).default, arguments, rtol=1e-4, atol=1e-4)
