"""Groups of few channels: how much of what the matrix units multiply is wanted, and the results against fp64."""

import backstride.fused_ops as fused
import pytest
import torch
import torch.nn.functional as F
from backstride.kernels import depthwise
from backstride.kernels.conv import launch
from backstride.kernels.conv.plan import Geometry
from backstride.kernels.conv.plan_forward import is_better_flat
from backstride.kernels.conv.weight_grad import conv_weight_grad_kernel
from backstride.kernels.runtime import H200, Device, Layout, Plan

from .cross_compile import read_table, table_path
from .test_conv import both_layouts, check_forward_and_gradients, random_tensors

GROUPS, TAPS = 32, 9


def padded(size: int, block: int) -> int:
    return -(-size // block) * block


def useful_share(plan: Plan, channels: int) -> float:
    """Multiply-adds of the layer over those of its tiles, for each group's 3x3 taps, its channels in and out."""
    c = plan.constants
    if plan.kernel is conv_weight_grad_kernel:
        columns = padded(TAPS * channels, c["BLOCK_N"]) if c["FLATTEN"] else TAPS * padded(channels, c["BLOCK_N"])
        issued = padded(channels, c["BLOCK_M"]) * columns
    else:
        terms = padded(TAPS * channels, c["BLOCK_K"]) if c.get("FLATTEN") else TAPS * padded(channels, c["BLOCK_K"])
        issued = terms * padded(channels, c["BLOCK_N"])
    return TAPS * channels * channels / issued


def plans(channels: int, device: Device) -> tuple[Plan, ...]:
    """Forward, input gradient and weight gradient of ResNeXt's 3x3 layer in bf16, channels_last."""
    total = GROUPS * channels
    image = Layout((8, total, 33, 33), (33 * 33 * total, 1, 33 * total, total))
    geometry = Geometry((1, 1), (1, 1), (1, 1), GROUPS)
    weight = (total, channels, 3, 3)
    rest = torch.bfloat16, False, device
    assert is_better_flat(weight, geometry) == (channels < 16)
    return (
        launch.plan_apply(image, weight, image, geometry, *rest),
        launch.plan_apply_transposed(image, weight, image, geometry, *rest),
        launch.plan_weight_grad(image, weight, True, image, geometry, *rest),
    )


@pytest.mark.parametrize(
    ("channels", "shares"),
    [
        (8, (0.90, 0.90, 0.75)),
        (16, (1, 1, 1)),
        (32, (1, 1, 1)),
    ],
)
def test_share_of_wanted_products(channels, shares):
    """With 16 columns at least, and the input gradient's channels padded tap by tap, the shares of 8 channels were
    0.45 forward, 0.25 by the input and 0.38 by the weight. Two and four channels, of which matrix instructions would
    use 0.14 and 0.38, go without them."""
    assert not depthwise.takes((GROUPS * channels, channels, 3, 3), GROUPS)
    assert [useful_share(plan, channels) for plan in plans(channels, H200)] == pytest.approx(shares, abs=0.006)


@pytest.mark.parametrize("channels", [2, 4])
def test_the_smallest_groups_need_no_matrix_units(channels):
    assert depthwise.takes((GROUPS * channels, channels, 3, 3), GROUPS)
    rows = [row for row in read_table(table_path()) if f"groups of {channels}" in row.case]
    assert {row.kernel for row in rows} == {"depthwise_apply_kernel", "depthwise_weight_grad_kernel"}
    assert not any(row.matrix_instruction for row in rows)


def test_wider_matrix_instructions_have_wider_tiles():
    for plan in plans(4, H200._replace(matrix_columns=16)):
        assert min(plan.constants["BLOCK_M"], plan.constants["BLOCK_N"]) == 16


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "c_out", "kernel", "stride", "padding", "dilation", "groups"),
    [
        ((2, 9, 5, 4), 12, (3, 3), 1, 1, 1, 3),
        ((1, 6, 6, 5), 6, (2, 3), (1, 2), (0, 2), 2, 2),
        ((1, 16, 5, 5), 4, (3, 1), 1, (4, 0), 1, 2),
    ],
    ids=["3 to 4 channels", "stride 2", "8 to 2, padding beyond the taps"],
)
def test_against_torch(shape, c_out, kernel, stride, padding, dilation, groups, dtype, device):
    x, w, b = random_tensors(17, shape, (c_out, shape[1] // groups, *kernel), (c_out,), dtype=dtype, device=device)
    arguments = (stride, padding, dilation, groups)
    for tensors in both_layouts(x, w, b):
        tensors = [t.detach().requires_grad_() for t in tensors]
        check_forward_and_gradients(
            lambda *t: fused.conv2d(*t, *arguments), lambda *t: F.conv2d(*t, *arguments), tensors
        )


def test_transposed_epilogue_of_few_channels(device):
    """At stride 1 it runs as a convolution: with bias, residual, ReLU, and more padding than taps."""
    shapes = (1, 4, 7, 6), (4, 3, 3, 2), (6,), (1, 6, 3, 3)
    tensors = [t.requires_grad_() for t in random_tensors(18, *shapes, dtype=torch.float32, device=device)]
    check_forward_and_gradients(
        lambda x, w, b, r: fused.conv_transpose2d(x, w, b, padding=(3, 2), groups=2, residual=r, activation="relu"),
        lambda x, w, b, r: F.relu(F.conv_transpose2d(x, w, b, padding=(3, 2), groups=2) + r),
        tensors,
    )


def test_weight_gradient_of_few_channels_is_split_and_right(device):
    x, w = random_tensors(19, (1, 12, 20, 20), (12, 3, 3, 3), dtype=torch.float32, device=device)
    w.requires_grad_()
    (expected,) = torch.autograd.grad(F.conv2d(x.double(), w.double(), groups=4).sin().sum(), w)
    (result,) = torch.autograd.grad(fused.conv2d(x, w, groups=4).sin().sum(), w)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)
