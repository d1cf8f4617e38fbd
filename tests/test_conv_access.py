"""How kernels walk channels-first and channels-last tensors: what the compiler is told about alignment is true, and the
results are right either way."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from backstride import fused_ops
from backstride.kernels.conv import access, launch, reference
from backstride.kernels.conv.plan import Geometry
from backstride.kernels.conv.transpose import copy_to_channels_last, from_channels_last, to_channels_last
from backstride.kernels.runtime import H200, INTERPRETED, Layout, device_of, layout_of
from hypothesis import given, settings
from hypothesis import strategies as st

from .cross_compile import printed_by
from .oracle import both_layouts, check_forward_and_gradients, random_tensors, to_tf32

IMAGES = {
    "dense": lambda: torch.empty(2, 3, 8, 12),
    "odd plane": lambda: torch.empty(2, 3, 5, 7),
    "even rows": lambda: torch.empty(2, 3, 5, 12),
    "1-D": lambda: torch.empty(2, 3, 32),
    "3-D": lambda: torch.empty(2, 3, 3, 4, 8),
    "crop of the width": lambda: torch.empty(2, 3, 8, 16)[..., :12],
    "crop of the height": lambda: torch.empty(2, 3, 8, 12)[:, :, 2:6],
    "slice of the channels": lambda: torch.empty(2, 9, 8, 12)[:, 3:6],
    "every other pixel": lambda: torch.empty(2, 3, 8, 24)[..., ::2],
    "one row": lambda: torch.empty(2, 3, 1, 16),
    "one column": lambda: torch.empty(2, 3, 16, 1),
    "one channel": lambda: torch.empty(2, 1, 8, 12),
    "expanded rows": lambda: torch.empty(2, 3, 1, 12).expand(2, 3, 8, 12),
    "expanded columns": lambda: torch.empty(2, 3, 8, 1).expand(2, 3, 8, 12),
    "expanded batch": lambda: torch.empty(1, 3, 8, 12).expand(2, 3, 8, 12),
    "axes swapped": lambda: torch.empty(2, 3, 12, 8).transpose(2, 3),
}


def assert_true_of(claim: access.Access, layout: Layout) -> None:
    """Rows of `claim.vector` pixels are consecutive, begin at a multiple of it, and stay within an image."""
    (batch, channels, *size), (stride_n, stride_c, *steps) = layout
    assert not claim.last
    pixels = torch.zeros(batch, *size, dtype=torch.int64)
    for axis, stride in enumerate((stride_n, *steps)):
        shape = [-1 if other == axis else 1 for other in range(pixels.dim())]
        pixels += (torch.arange(pixels.shape[axis]) * stride).view(shape)
    assert math.prod(size) % claim.vector == 0
    runs = pixels.reshape(-1, claim.vector)
    assert (runs == runs[:, :1] + torch.arange(claim.vector)).all()
    assert (runs[:, 0] % claim.vector == 0).all()
    assert channels == 1 or stride_c % claim.vector == 0


WRITES = [partial(access.write, in_order=True), access.write_rows]


@pytest.mark.parametrize("write", WRITES, ids=["images", "rows"])
@pytest.mark.parametrize("name", IMAGES)
def test_aligned_runs_of_pixels(name, write):
    layout = layout_of(IMAGES[name]())
    assert_true_of(write(layout), layout)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_aligned_runs_of_pixels_of_any_view(data):
    """Views of a dense tensor by cropping, stepping and permuting."""
    axes = data.draw(st.integers(1, 3))
    tensor = torch.empty(
        [data.draw(st.integers(1, 4)) * data.draw(st.sampled_from([1, 2, 4])) for _ in range(axes + 2)]
    )
    for axis in range(tensor.dim()):
        step = data.draw(st.sampled_from([1, 1, 1, 2]))
        tensor = tensor.movedim(axis, 0)[data.draw(st.integers(0, tensor.shape[axis] - 1)) :: step].movedim(0, axis)
    layout = layout_of(tensor.permute(data.draw(st.permutations(range(tensor.dim())))))
    claim = access.write(layout, in_order=True)
    if claim.last:
        assert layout.strides[1] == 1 and all(s % claim.vector == 0 for s in claim.strides if s != 1)
    else:
        assert_true_of(claim, layout)
        rows = access.write_rows(layout)
        assert_true_of(rows, layout)
        assert layout.shape[-1] % rows.vector == 0


def test_whole_images_are_read_and_written_sixteen_at_a_time():
    assert access.write(layout_of(IMAGES["dense"]()), in_order=True).vector == 16
    assert access.write(layout_of(IMAGES["even rows"]()), in_order=True).vector == 4
    assert access.write(layout_of(IMAGES["odd plane"]()), in_order=True).vector == 1
    assert access.write(layout_of(IMAGES["dense"]()), in_order=False).vector == 1
    assert access.write_rows(layout_of(IMAGES["dense"]())).vector == 4
    assert access.write_rows(layout_of(IMAGES["crop of the height"]())).vector == 4


def test_many_channels_first_are_read_from_a_channels_last_copy():
    many, few = (layout_of(torch.empty(2, channels, 9, 9)) for channels in (64, 3))
    last = layout_of(torch.empty(2, 64, 9, 9).to(memory_format=torch.channels_last))
    copied = access.read(many, False, 64, 32)
    assert copied.copied and copied.last and copied.vector == 16
    assert copied.strides == access.write(last, False).strides
    assert not access.read(few, False, 3, 32).copied
    assert not access.read(last, False, 64, 32).copied
    assert not access.read(layout_of(torch.empty(2, 64, 8, 8)), True, 64, 32).copied, "aligned as it lies"


def plans(channels: int, size: int, kernel: int, padding: int, memory_format=torch.contiguous_format):
    """The launches of X, X^T and the weight gradient of a layer to 32 channels, both of its sides laid alike."""
    geometry = Geometry((1, 1), (padding, padding), (1, 1), 1)
    out = size + 2 * padding - kernel + 1
    images = torch.empty(2, channels, size, size), torch.empty(2, 32, out, out)
    x, y = (layout_of(image.to(memory_format=memory_format)) for image in images)
    weight = (32, channels, kernel, kernel)
    tail = geometry, torch.float16, False, H200
    return [
        launch.plan_apply(x, weight, y, *tail),
        launch.plan_apply_transposed(y, weight, x, *tail),
        launch.plan_weight_grad(x, weight, False, y, *tail),
    ]


@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (1, 0)])
def test_channels_first_layers_have_the_tiles_of_channels_last_ones(kernel, padding):
    layer = 64, 32, kernel, padding
    for plan, last in zip(plans(*layer), plans(*layer, torch.channels_last), strict=True):
        for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
            assert plan.constants[block] == last.constants[block]
        assert any(plan.copies) == (kernel == 3) and not any(last.copies)
        assert plan.constants["Y_VEC"] == 16


def test_padding_is_looked_for_only_where_there_is_some():
    for padding, padded in ((0, False), (1, True)):
        apply, _, weight_grad = plans(8, 8, 3, padding)
        assert apply.constants["PADDED"] is weight_grad.constants["PADDED"] is padded


@pytest.mark.parametrize("shape", [(2, 70, 5, 13), (1, 3, 66), (2, 16, 2, 3, 4), (1, 1, 1, 1), (3, 300, 3, 3)])
def test_to_channels_last_and_back(device, shape):
    x = torch.randn(shape, device=device)
    y = to_channels_last(x)
    assert torch.equal(x, y)
    assert y.movedim(1, -1).is_contiguous()
    cut = torch.randn(*shape[:-1], shape[-1] + 3, device=device)[..., 1:-2]
    assert torch.equal(to_channels_last(cut), cut)
    wide = torch.full((shape[0], shape[1] + 2, *shape[2:]), math.nan, device=device)
    for back in (torch.empty_like(x), torch.empty_like(cut), wide[:, 1:-1]):
        from_channels_last(y, back)
        assert torch.equal(back, x)
    assert wide.isnan().sum() == wide[:, :2].numel()


def test_a_slice_of_channels_last_memory(device):
    """Its neighbours stay as they are; and one pixel that stands for all of an image is read as such."""
    (x,) = random_tensors(3, (2, 6, 4, 5), dtype=torch.float32, device=device)
    whole = torch.full((2, 16, 4, 5), torch.nan, device=device).to(memory_format=torch.channels_last)
    copy_to_channels_last(x, whole[:, 4:10])
    assert torch.equal(whole[:, 4:10], x) and whole[:, :4].isnan().all() and whole[:, 10:].isnan().all()
    pooled = x[..., :1, :1].to(memory_format=torch.channels_last).expand_as(x)
    for image in (whole[:, 4:10], pooled):
        back = torch.full_like(x, torch.nan)
        from_channels_last(image, back)
        assert torch.equal(back, image)


CASES = {
    "3x3 padded": (2, 3, 1, 1, False),
    "3x3 valid": (2, 3, 1, 0, False),
    "1x1": (2, 1, 1, 0, False),
    "1x1 strided": (2, 1, 2, 0, False),
    "3-D": (3, 2, 1, 0, False),
    "up 2x2": (2, 2, 2, 0, True),
    "up 3x3": (2, 3, 2, 1, True),
    "1-D up": (1, 4, 2, 1, True),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CASES), ("3x3 padded", torch.float16), ("1x1", torch.float16)],
)
def test_many_channels_in_both_layouts(device, name, dtype):
    """Values and gradients with 16 and 20 channels; the output's gradient is channels-first in either case."""
    axes, kernel, stride, padding, transposed = CASES[name]
    op = getattr(fused_ops, f"conv_transpose{axes}d" if transposed else f"conv{axes}d")
    shapes = (2, 16, *[4 if axes < 3 else 3] * axes), ((16, 20) if transposed else (20, 16)) + (kernel,) * axes, (20,)
    tensors = random_tensors(0, *shapes, dtype=dtype, device=device)
    for laid in both_layouts(*tensors):
        leaves = [t.detach().requires_grad_() for t in laid]
        options = {"stride": stride, "padding": padding}
        check_forward_and_gradients(partial(op, **options), partial(getattr(F, op.__name__), **options), leaves)


UPS = {
    "2x2": ((2, 16, 5, 9), 6, (2, 2), 1),
    "3x8, rows of 8": ((1, 17, 3, 3), 3, (3, 8), 1),
    "4x4, one column, groups": ((2, 10, 4, 1), 3, (4, 4), 2),
    "1-D": ((2, 9, 33), 5, (4,), 1),
    "3-D": ((1, 9, 2, 3, 4), 2, (1, 3, 2), 1),
}


@pytest.mark.parametrize("name", UPS)
def test_up_convolutions_of_channels_first(name, device):
    """Where the stride is the kernel's size, rows of the output are written whole: all that a store can have, against
    torch's, and into a slice."""
    shape, b, kernel, groups = UPS[name]
    axes, out = len(kernel), [i * k for i, k in zip(shape[2:], kernel, strict=True)]
    shapes = shape, (shape[1], b, *kernel), (b * groups,), (shape[0], b * groups, *out)
    tensors = [t.requires_grad_() for t in random_tensors(27, *shapes, dtype=torch.float32, device=device)]
    ours, theirs = (getattr(module, f"conv_transpose{axes}d") for module in (fused_ops, F))
    result, _ = check_forward_and_gradients(
        lambda x, w, b, r: ours(x, w, b, kernel, groups=groups, residual=r, activation="relu"),
        lambda x, w, b, r: F.relu(theirs(x, w, b, kernel, groups=groups) + r),
        tensors,
    )
    x, w, bias, residual = (t.detach() for t in tensors)
    if device == "cpu" and not INTERPRETED:
        pytest.skip("the kernels run on a GPU or interpreted")
    wide = torch.full((shape[0], b * groups + 3, *out), math.nan, device=device)
    part = wide[:, 2:-1]
    geometry = Geometry(kernel, (0,) * axes, (1,) * axes, groups)
    launch.apply_transposed(x, w, bias, strides_like(part, residual), part, geometry, relu=True)
    assert torch.equal(part, result)
    assert wide.isnan().sum() == wide[:, :3].numel()


def strides_like(part, tensor):
    """The tensor with the strides of the part."""
    return torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=tensor.device).copy_(tensor)


ROWS = {  # size of x, kernel, stride, padding, dilation; in NCHW, the kernel and how many residues lie across a row
    "one tap": ((4, 4), (2, 2), (2, 2), 0, 1, "conv_scatter_kernel", 2),
    "three columns": ((4, 4), (2, 3), (2, 3), 0, 1, "conv_scatter_kernel", 1),
    "many columns": ((4, 4), (2, 16), (2, 16), 0, 1, "conv_scatter_kernel", 16),
    "several taps": ((20, 20), (4, 4), (2, 2), 1, 1, "conv_scatter_kernel", 2),
    "taps along one axis": ((9, 9), (3, 8), (1, 4), 1, 1, "conv_scatter_kernel", 4),
    "small image": ((4, 4), (4, 4), (2, 2), 1, 1, "conv_apply_transposed_kernel", None),
    "no multiple": ((20, 20), (3, 3), (2, 2), 0, 1, "conv_apply_transposed_kernel", None),
    "dilated": ((20, 20), (4, 4), (2, 2), 0, 3, "conv_zones_kernel", None),
}


def plan_of_row(name, memory_format, rows=None):
    """The launch of X^T from 16 to 12 channels, with the result cropped to so many rows."""
    size, kernel, stride, padding, dilation, *_ = ROWS[name]
    sides = zip(size, kernel, stride, strict=True)
    out = [(i - 1) * s + dilation * (k - 1) + 1 - 2 * padding for i, k, s in sides]
    x, y = torch.empty(1, 16, *size), torch.empty(1, 12, rows or out[0], out[1])
    x, y = (layout_of(t.to(memory_format=memory_format)) for t in (x, y))
    geometry = Geometry(stride, (padding,) * 2, (dilation,) * 2, 1)
    return launch.plan_apply_transposed(x, (16, 12, *kernel), y, geometry, torch.float16, False, H200)


@pytest.mark.parametrize("name", ROWS)
def test_which_up_convolutions_write_rows(name):
    *_, kernel, across = ROWS[name]
    plan = plan_of_row(name, torch.contiguous_format)
    assert (plan.kernel.__name__, plan.constants.get("ACROSS")) == (kernel, across)
    assert plan.residues == (ROWS[name][2] if "taps" in name else ())
    innermost = plan_of_row(name, torch.channels_last)
    assert innermost.kernel.__name__ == ("conv_apply_transposed_kernel" if plan.residues else kernel)
    assert innermost.constants.get("ACROSS", 1) == 1


def test_rows_that_are_cut_off_are_written_one_by_one():
    whole, cropped = (plan_of_row("one tap", torch.contiguous_format, rows).constants for rows in (8, 7))
    assert (whole["ACROSS"], whole["CROP"], whole["Y_VEC"]) == (2, False, 8)
    assert (cropped["ACROSS"], cropped["CROP"], cropped["Y_VEC"]) == (2, True, 1)


STAGED = {  # x, channels of the result in a group, kernel, stride, padding, dilation, groups, transposed
    "odd sizes": ((2, 16, 5, 7), 16, (3, 3), 1, 1, 1, 1, False),
    "zones": ((2, 16, 13, 12), 16, (3, 3), 1, 8, 8, 1, False),
    "zones, transposed": ((2, 16, 13, 12), 16, (3, 3), 1, 8, 8, 1, True),
    "residue phases, groups": ((1, 32, 4, 6), 16, (3, 3), 2, 1, 1, 2, True),
    "1-D": ((2, 16, 21), 24, (5,), 2, 0, 1, 1, True),
    "3-D": ((1, 16, 4, 4, 4), 16, (2, 2, 2), 1, 0, 1, 1, False),
}


@pytest.mark.parametrize("name", STAGED)
def test_results_that_are_staged(name, device):
    """Channels-first results whose pixels would be stored one by one: all of them, with the residual, in a slice."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("the kernels run on a GPU or interpreted")
    shape, channels, kernel, stride, padding, dilation, groups, transposed = STAGED[name]
    axes = len(kernel)
    planner, run, definition, sides = (
        (launch.plan_apply_transposed, launch.apply_transposed, reference.apply_transposed, (shape[1], channels))
        if transposed
        else (launch.plan_apply, launch.apply, reference.apply, (channels * groups, shape[1] // groups))
    )
    out = [
        (i - 1) * stride + dilation * (k - 1) + 1 - 2 * padding
        if transposed
        else (i + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for i, k in zip(shape[2:], kernel, strict=True)
    ]
    total = channels * groups
    tensors = random_tensors(33, shape, (*sides, *kernel), (total,), (shape[0], total, *out), device=device)
    x, w, bias, residual = (t.half() for t in tensors)
    geometry = Geometry((stride,) * axes, (padding,) * axes, (dilation,) * axes, groups)
    wide = torch.full((shape[0], total + 3, *out), math.nan, dtype=torch.half, device=device)
    part = wide[:, 2:-1]
    plan = planner(layout_of(x), w.shape, layout_of(part), geometry, x.dtype, False, device_of(x))
    assert plan.staged and plan.constants["Y_LAST"]
    run(x, w, bias, strides_like(part, residual), part, geometry, relu=True)
    expected = definition(x.double(), w.double(), out, geometry) + bias.double().view(-1, *[1] * axes)
    torch.testing.assert_close(part.double(), (expected + residual.double()).relu(), rtol=1e-2, atol=5e-2)
    assert wide.isnan().sum() == wide[:, :3].numel()


RESIDUES = {  # x, output channels of a group, kernel, stride, padding, output padding, groups
    "4x4 s2": ((2, 20, 18, 17), 6, (4, 4), 2, 1, 0, 1),
    "one row more": ((1, 16, 19, 18), 5, (4, 4), 2, 1, 1, 1),
    "8x8 s4": ((1, 17, 9, 8), 3, (8, 8), 4, 0, 0, 1),
    "three taps": ((2, 16, 40), 5, (6,), 2, 2, 0, 1),
    "one axis, groups": ((1, 24, 9, 20), 4, (3, 4), (1, 2), (1, 1), 0, 3),
    "a few of many residues": ((1, 16, 30), 2, (64,), 32, 5, 0, 1),
    "3-D": ((1, 16, 3, 18, 17), 2, (2, 4, 4), 2, (0, 1, 1), 0, 1),
    "few channels": ((1, 3, 16, 18), 2, (4, 4), 2, 1, 0, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", RESIDUES)
def test_residues_as_columns(name, dtype, device):
    """Every element is written, in torch's own, in a slice of a wider tensor, and with the weights of TF32."""
    shape, b, kernel, stride, padding, extra, groups = RESIDUES[name]
    if device == "cpu" and not INTERPRETED:
        pytest.skip("the kernels run on a GPU or interpreted")
    axes = len(kernel)
    stride, padding = (value if isinstance(value, tuple) else (value,) * axes for value in (stride, padding))
    sides = zip(shape[2:], kernel, stride, padding, strict=True)
    out = [(i - 1) * s + k - 2 * p + extra for i, k, s, p in sides]
    geometry = Geometry(stride, padding, (1,) * axes, groups)
    tensors = random_tensors(
        29, shape, (shape[1], b, *kernel), (b * groups,), (shape[0], b * groups, *out), dtype=dtype, device=device
    )
    x, w, bias, residual = tensors
    wide = torch.full((shape[0], b * groups + 3, *out), math.nan, dtype=dtype, device=device)
    part = wide[:, 2:-1]
    for y, tf32 in ((torch.full_like(residual, math.nan), True), (part, False)):
        plan = launch.plan_apply_transposed(layout_of(x), w.shape, layout_of(y), geometry, dtype, tf32, device_of(x))
        assert plan.kernel.__name__ == "conv_scatter_kernel" and plan.residues == stride
        # From tap to tap, and with padding along a row, pixels are aligned to nothing.
        assert plan.constants["X_LAST"] or plan.constants["X_VEC"] == 1
        assert plan.constants["Y_VEC"] == 1 or padding[-1] == 0
        launch.apply_transposed(x, w, bias, strides_like(y, residual), y, geometry, tf32=tf32)
        operands = [to_tf32(t) for t in (x, w)] if tf32 and dtype == torch.float32 else [x, w]
        expected = reference.apply_transposed(*(t.double() for t in operands), out, geometry)
        expected += bias.double().view(-1, *[1] * axes) + residual.double()
        tolerance = 1e-2 if dtype == torch.float16 or device != "cpu" else 1e-5
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=5 * tolerance, check_stride=False)
    assert wide.isnan().sum() == wide[:, :3].numel()


@pytest.mark.skipif(not INTERPRETED, reason="fp64 runs on the kernels only when they are interpreted")
@pytest.mark.parametrize("transposed", [False, True])
def test_large_tiles_are_stored_in_parts(transposed):
    """Channels-first, of pixels that are aligned to nothing: every element is written, with its own residual."""
    a, b = (16, 130) if transposed else (130, 16)
    x, w, bias, residual = random_tensors(30, (1, 16, 11, 13), (a, b, 3, 3), (130,), (1, 130, 11, 13))
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    planner = launch.plan_apply_transposed if transposed else launch.plan_apply
    y = torch.full_like(residual, math.nan)
    constants = planner(layout_of(x), w.shape, layout_of(y), geometry, x.dtype, False, H200).constants
    assert (constants["BLOCK_M"], constants["BLOCK_N"], constants["Y_VEC"]) == (128, 128, 1)
    run, definition = (
        (launch.apply_transposed, reference.apply_transposed) if transposed else (launch.apply, reference.apply)
    )
    run(x, w, bias, residual, y, geometry, relu=True)
    expected = definition(x, w, (11, 13), geometry) + bias.view(-1, 1, 1) + residual
    torch.testing.assert_close(y, expected.relu())


SUMS = {  # x of X^T, output channels, kernel, stride, padding, dilation
    "1-D": ((2, 18, 9), 5, 3, 2, 1, 1, "conv_apply_transposed_kernel"),
    "1-D, several taps": ((1, 18, 20), 5, 6, 2, 1, 1, "conv_scatter_kernel"),
    "3-D": ((1, 18, 3, 4, 3), 5, 3, 2, 1, 1, "conv_zones_kernel"),
    "scatter": ((1, 20, 3, 4), 3, 2, 2, 0, 1, "conv_scatter_kernel"),
    "residue phases": ((1, 18, 4, 5), 5, 3, 2, 1, 1, "conv_apply_transposed_kernel"),
    "zones": ((2, 34, 12, 12), 17, 3, 1, 8, 8, "conv_zones_kernel"),
}


@pytest.mark.parametrize("name", SUMS)
def test_weights_of_tf32_lie_along_the_sum(name, device):
    """Which the matrix units of Hopper ask for; of X^T they have to be brought so."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("the kernels run on a GPU or interpreted")
    shape, b, kernel, stride, padding, dilation, launched = SUMS[name]
    out = [(i - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 for i in shape[2:]]
    axes = len(shape) - 2
    x, w = random_tensors(28, shape, (shape[1], b, *[kernel] * axes), dtype=torch.float32, device=device)
    geometry = Geometry((stride,) * axes, (padding,) * axes, (dilation,) * axes, 1)
    expected = reference.apply_transposed(to_tf32(x).double(), to_tf32(w).double(), out, geometry)
    for image, y in both_layouts(x, torch.full((shape[0], b, *out), math.nan, device=device)):
        plan = launch.plan_apply_transposed(layout_of(image), w.shape, layout_of(y), geometry, w.dtype, True, H200)
        assert plan.kernel.__name__ == launched and plan.constants["SUM_LAST"]
        launch.apply_transposed(image, w, None, None, y, geometry, tf32=True)
        tolerance = 1e-4 if device == "cpu" else 2e-2
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * 10, check_stride=False)


@pytest.mark.compile
def test_results_are_stored_sixteen_bytes_at_a_time():
    """In both layouts: a lost hint about divisibility costs bandwidth, and nothing else would show it."""
    code = """
import re
from tests import cross_compile, cross_compile_conv
for case in cross_compile_conv.cases(cross_compile.TARGETS["sm_90"]):
    kernel = case.kernel.__name__
    wanted = {"transpose_kernel": "", "conv_apply_kernel": "U-Net 3x3", "conv_scatter_kernel": "U-Net up"}
    wanted["conv_apply_transposed_kernel"] = "U-Net 3x3"
    if case.dtype == "bf16" and case.name.startswith(wanted.get(kernel, "none")):
        ptx = cross_compile.Compilation(case, "sm_90").compile().asm["ptx"]
        print(kernel, case.name, set(re.findall(r"st\\.global\\S*", ptx)), sep="; ")
"""
    lines = printed_by(code)
    assert len(lines) == 9  # four launches in two layouts, and the transposing copy
    assert not [line for line in lines if not line.endswith("{'st.global.v4.b32'}")]
