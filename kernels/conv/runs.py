"""X of large stride over few channels, and its weight gradient: the gradients of FCN's upsampling.

Where windows lie inside of the image, a row of a window is one run of memory: of a channel's pixels, or with the
channels innermost of all numbers in the row. A stride of many pixels keeps runs aligned, so they are read 16 bytes at a
time, while tap by tap 21 channels would come one number at a time. cuDNN pads them to 24, and takes 0.72 ms for the
gradient by the input of FCN-8s' last layer, batch 16, where its bytes take 0.05 (H200, bench/results).

    y[m, a] = sum_{l, c} x[start(m) + line(l) + c] w[a, l, c]        l counts a window's runs, c numbers in a run
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from ..runtime import Device, Layout, block_of, device_of, layout_of
from ..tf32 import round_contiguous, rounded
from ..tile import divide, divide_by, divisor, dot
from .launch import launch_split
from .plan import ConvPlan, Geometry, channels_innermost, dtype_constants, uses_tensor_cores

MOST_CHANNELS = 32  # on either side
VECTOR = 16  # bytes that are read at once
LEAST_STEPS = 8  # of a program

SIZES = ["PIXELS", "OH", "OW", "LINES", "CHANNEL_LINES", "CHANNELS", "NUMEL", "SHARE"]
STRIDES = [f"stride_x{axis}" for axis in "nijcr"] + [f"stride_y{axis}" for axis in "naij"]


@triton.jit
def _starts(m, OH, OW, by_h, by_w, stride_n, stride_i, stride_j, VEC: tl.constexpr):
    """Where pixel m, of all images', begins: its window in x, or itself in y. `by_*`: `divisor` of the size."""
    row = divide_by(m, by_w)  # pyright: ignore[reportGeneralTypeIssues]
    n = divide_by(row, by_h)  # pyright: ignore[reportGeneralTypeIssues]
    i, j = row - n * OH, m - row * OW
    return tl.multiple_of(n.to(tl.int64) * stride_n + (i.to(tl.int64) * stride_i + j * stride_j), VEC)


@triton.jit
def _line_starts(line, CHANNEL_LINES, stride_c, stride_r, VEC: tl.constexpr):
    """Where a window's line-th run begins in it."""
    channel, r = divide(line, CHANNEL_LINES)  # pyright: ignore[reportGeneralTypeIssues]
    return tl.multiple_of(channel.to(tl.int64) * stride_c + r.to(tl.int64) * stride_r, VEC)


@triton.jit(do_not_specialize=SIZES + STRIDES)
def conv_runs_kernel(
    x_ptr,
    w_ptr,  # (CHANNELS, LINES, RUN)
    y_ptr,  # or partial sums of it, in fp32, one behind the other
    PIXELS,
    OH,
    OW,
    LINES,
    CHANNEL_LINES,
    CHANNELS,
    NUMEL,
    SHARE,
    stride_xn,
    stride_xi,
    stride_xj,
    stride_xc,
    stride_xr,
    stride_yn,
    stride_ya,
    stride_yi,
    stride_yj,
    RUN: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M pixels of y; the grid's second axis counts parts of the sum, of SHARE steps each."""
    by_h, by_w = divisor(OH), divisor(OW)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < PIXELS
    start = _starts(m, OH, OW, by_h, by_w, stride_xn, stride_xi, stride_xj, VEC)  # pyright: ignore[reportGeneralTypeIssues]
    a = tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    # A step takes several runs, or a run several steps.
    PER: tl.constexpr = BLOCK_K // RUN if RUN <= BLOCK_K else 1
    PARTS: tl.constexpr = (RUN + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    first = tl.program_id(1) * SHARE
    for step in range(first, tl.minimum(first + SHARE, tl.cdiv(LINES, PER) * PARTS)):
        if RUN <= BLOCK_K:
            line = step * PER + lanes // RUN
            c = lanes % RUN
        else:
            line = step // PARTS + lanes * 0
            c = step % PARTS * BLOCK_K + lanes
        there = tl.max_constancy((line < LINES) & (c < RUN), VEC)
        offset = _line_starts(line, CHANNEL_LINES, stride_xc, stride_xr, VEC) + c  # pyright: ignore[reportGeneralTypeIssues]
        x = tl.load(x_ptr + start[:, None] + offset[None, :], mask=inside[:, None] & there[None, :], other=0.0)
        k = tl.multiple_of(line * RUN, VEC) + c
        weights = a.to(tl.int64) * (LINES * RUN)
        w = tl.load(w_ptr + weights[None, :] + k[:, None], mask=there[:, None] & (a < CHANNELS)[None, :], other=0.0)
        acc = dot(rounded(x, PRECISION), w, acc, PRECISION, UPCAST)
    rows = _starts(m, OH, OW, by_h, by_w, stride_yn, stride_yi, stride_yj, 1)  # pyright: ignore[reportGeneralTypeIssues]
    offs = tl.program_id(1).to(tl.int64) * NUMEL + rows[:, None] + a.to(tl.int64)[None, :] * stride_ya
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (a < CHANNELS)[None, :])


@triton.jit(do_not_specialize=SIZES + STRIDES)
def conv_runs_weight_grad_kernel(
    x_ptr,
    y_ptr,
    w_ptr,  # (CHANNELS, LINES, RUN), or partial sums of it, in fp32, one behind the other
    PIXELS,
    OH,
    OW,
    LINES,
    CHANNEL_LINES,
    CHANNELS,
    NUMEL,
    SHARE,
    stride_xn,
    stride_xi,
    stride_xj,
    stride_xc,
    stride_xr,
    stride_yn,
    stride_ya,
    stride_yi,
    stride_yj,
    RUN: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M of a window's numbers by all channels of y; the second axis counts parts of the sum over pixels."""
    k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    line, c = k // RUN, k % RUN
    there = tl.max_constancy(line < LINES, VEC)
    offset = _line_starts(line, CHANNEL_LINES, stride_xc, stride_xr, VEC) + c  # pyright: ignore[reportGeneralTypeIssues]
    by_h, by_w = divisor(OH), divisor(OW)
    a = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    first = tl.program_id(1) * SHARE
    for step in range(first, tl.minimum(first + SHARE, tl.cdiv(PIXELS, BLOCK_K))):
        m = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = m < PIXELS
        start = _starts(m, OH, OW, by_h, by_w, stride_xn, stride_xi, stride_xj, VEC)  # pyright: ignore[reportGeneralTypeIssues]
        x = tl.load(x_ptr + start[:, None] + offset[None, :], mask=inside[:, None] & there[None, :], other=0.0)
        rows = _starts(m, OH, OW, by_h, by_w, stride_yn, stride_yi, stride_yj, 1)  # pyright: ignore[reportGeneralTypeIssues]
        y = tl.load(
            y_ptr + rows[:, None] + a.to(tl.int64)[None, :] * stride_ya,
            mask=inside[:, None] & (a < CHANNELS)[None, :],
            other=0.0,
        )
        acc = dot(tl.trans(rounded(x, PRECISION)), rounded(y, PRECISION), acc, PRECISION, UPCAST)
    offs = tl.program_id(1).to(tl.int64) * NUMEL + a.to(tl.int64)[None, :] * (LINES * RUN) + k[:, None]
    tl.store(w_ptr + offs, acc.to(w_ptr.dtype.element_ty), mask=there[:, None] & (a < CHANNELS)[None, :])


def _lines(x: Layout, kernel: tuple[int, ...]) -> tuple[bool, int, int, int] | None:
    """Whether channels are innermost, a window's runs, those of one channel, and a run's numbers; None without runs."""
    (_, channels, height, width), (_, stride_c, _, stride_w) = x
    if stride_c == 1 and stride_w == channels and channels > 1:
        return True, kernel[0], kernel[0], kernel[1] * channels
    return (False, channels * kernel[0], kernel[0], kernel[1]) if stride_w == 1 else None


def may_be_runs(weight: Sequence[int], geometry: Geometry) -> bool:
    """A quick look, before anything is made for `apply_runs` or `weight_grad_runs`: two axes with strides, and few
    channels that are no whole vectors. Those that are cuDNN does not pad."""
    a, b, *kernel = weight
    return len(kernel) == 2 and min(geometry.stride) > 1 and max(a, b) <= MOST_CHANNELS and (a % 8 > 0 or b % 8 > 0)


@lru_cache(maxsize=4096)
def plan_runs(
    x: Layout,
    weight: tuple[int, ...],
    y: Layout,
    geometry: Geometry,
    dtype: torch.dtype,
    tf32: bool,
    device: Device,
    weight_grad: bool,
) -> ConvPlan | None:
    """Launch of y = X x, or of the weight gradient; None where another way is better, or there are no aligned runs."""
    stride, padding, dilation, groups = geometry
    kernel, channels = weight[2:], weight[0]
    few = groups == 1 and may_be_runs(weight, geometry)
    # Transposing 32-bit operands for the weight gradient would cost more than it saves.
    suits = dtype.itemsize == 2 or (not weight_grad and uses_tensor_cores(dtype, tf32))
    if not few or not suits or any(padding) or max(dilation) > 1:
        return None
    windows = zip(x.shape[2:], y.shape[2:], stride, kernel, strict=True)
    found = _lines(x, kernel)
    if found is None or any((o - 1) * s + k > i for i, o, s, k in windows):
        return None
    innermost, lines, channel_lines, run = found
    step = VECTOR // dtype.itemsize
    n, c, h, w = x.strides
    moves = (n if x.shape[0] > 1 else 0, stride[0] * h, stride[1] * w, 0 if innermost else c, h, run)
    block_k = 128 // dtype.itemsize
    # Short runs are taken several at a time, which a block has to hold a whole number of.
    if math.gcd(step, *moves) < step or (run <= block_k and block_k % run):
        return None
    pixels = y.shape[0] * math.prod(y.shape[2:])
    if max(pixels, math.prod(weight)) >= 2**31 - 2**16:
        return None
    block_n = block_of(channels, 16, MOST_CHANNELS)
    if weight_grad:
        block_m, steps, rows = 128, triton.cdiv(pixels, block_k), lines * run
    else:
        block_m = 128 if pixels >= 128 * device.multiprocessors else 64
        steps, rows = triton.cdiv(lines, max(block_k // run, 1)) * triton.cdiv(run, block_k), pixels
    tiles = triton.cdiv(rows, block_m)
    splits = max(min(triton.cdiv(2 * device.multiprocessors, tiles), steps // LEAST_STEPS), 1)
    share = triton.cdiv(steps, splits)
    numel = math.prod(weight) if weight_grad else pixels * channels
    sizes = (pixels, *y.shape[2:], lines, channel_lines, channels, numel, share, *moves[:5], *y.strides)
    constants: dict[str, Any] = {"RUN": run, "VEC": step} | dtype_constants(dtype, tf32)
    # In TF32 x is rounded in registers, of which four warps have too few on Blackwell.
    warps = 8 if dtype.itemsize == 4 and block_m == 128 else 4
    constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": 3}
    launched = conv_runs_weight_grad_kernel if weight_grad else conv_runs_kernel
    # The weight lies as the numbers of a window do.
    axes = channels_innermost(weight) if innermost else tuple(range(len(weight)))
    return ConvPlan(launched, (tiles, triton.cdiv(steps, share)), sizes, constants, axes=axes)


def apply_runs(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, geometry: Geometry, *, tf32: bool = False
) -> bool:
    """Write y = X x into `y`, contiguous or channels_last, where it is a matter of runs; else return False.

    Shapes: as for `apply`.
    """
    arguments = (weight.shape, layout_of(y), geometry, x.dtype, tf32, device_of(x), False)
    plan = plan_runs(layout_of(x), *arguments) if y.numel() else None
    if plan is None:
        return False
    packed = weight.permute(plan.axes)
    launch_split(plan, x, round_contiguous(packed) if plan.rounds else packed.contiguous(), y)
    return True


def weight_grad_runs(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, geometry: Geometry, *, tf32: bool = False
) -> bool:
    """Write the weight gradient into `weight`, contiguous or channels_last, where it is a matter of runs; else return
    False. Shapes: as for `weight_grad`."""
    arguments = (weight.shape, layout_of(y), geometry, x.dtype, tf32, device_of(x), True)
    plan = plan_runs(layout_of(x), *arguments) if y.numel() else None
    if plan is None or not weight.permute(plan.axes).is_contiguous():
        return False
    launch_split(plan, x, y, weight)
    return True
