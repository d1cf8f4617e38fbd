"""Between channels-first and channels-last memory: one pass, where walking a tensor crosswise would cost more."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..pixelwise import strides_of
from ..runtime import Layout, Plan, block_of, device_guard, layout_of
from .access import channels_last

LONGEST = 64  # rows or columns of a tile: whole sectors on both sides
TILE = LONGEST * LONGEST  # elements; where one side is short, the other is longer


@triton.jit(do_not_specialize=["ROWS", "COLUMNS", "stride_xn", "stride_xr", "stride_yn", "stride_yc"])
def transpose_kernel(
    x_ptr,  # (N, ROWS, COLUMNS), columns contiguous
    y_ptr,  # (N, COLUMNS, ROWS), rows contiguous
    ROWS,
    COLUMNS,
    stride_xn,
    stride_xr,
    stride_yn,
    stride_yc,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y[n, c, r] = x[n, r, c], BLOCK_R by BLOCK_C: read along the columns, written along the rows.

    COLUMNS and the strides of x are multiples of X_VEC, ROWS and those of y of Y_VEC.
    """
    tiles_c = tl.cdiv(COLUMNS, BLOCK_C)
    tiles_r = tl.cdiv(ROWS, BLOCK_R)
    pid = tl.program_id(0).to(tl.int64)
    n = pid // (tiles_c * tiles_r)
    offs_r = (pid // tiles_c % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_r = tl.max_constancy(offs_r < ROWS, Y_VEC)
    mask_c = tl.max_constancy(offs_c < COLUMNS, X_VEC)
    offs_x = tl.multiple_of(n * stride_xn + offs_r * stride_xr, X_VEC)
    offs_y = tl.multiple_of(n * stride_yn + offs_c * stride_yc, Y_VEC)
    x = tl.load(x_ptr + offs_x[:, None] + offs_c[None, :], mask=mask_r[:, None] & mask_c[None, :], other=0.0)
    tl.store(y_ptr + offs_y[:, None] + offs_r[None, :], tl.trans(x), mask=mask_c[:, None] & mask_r[None, :])


@lru_cache(maxsize=4096)
def _plan(x: Layout, y: Layout, into_last: bool) -> Plan | None:
    """Launch of y = x, from channels-first images into channels-last ones or else the other way; None where the images
    lie in memory in neither."""
    first, last = (x, y) if into_last else (y, x)
    x_strides, y_strides = strides_of(first, last=False), strides_of(last, last=True)
    if x_strides is None or y_strides is None:
        return None
    batch, rows, *size = x.shape
    columns = math.prod(size)
    if not into_last:
        (rows, x_strides), (columns, y_strides) = (columns, y_strides), (rows, x_strides)
    block_c = block_of(columns, 16, LONGEST)
    block_r = block_of(rows, 16, TILE // block_c)
    block_c = block_of(columns, 16, TILE // block_r)
    constants = {
        "X_VEC": math.gcd(16, columns, *x_strides),
        "Y_VEC": math.gcd(16, rows, *y_strides),
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
        "num_warps": 4,
    }
    grid = (batch * triton.cdiv(rows, block_r) * triton.cdiv(columns, block_c),)
    return Plan(transpose_kernel, grid, (rows, columns, *x_strides, *y_strides), constants)


def _copy(x: torch.Tensor, y: torch.Tensor, into_last: bool) -> None:
    plan = _plan(layout_of(x), layout_of(y), into_last)
    if plan is None:
        y.copy_(x)
        return
    with device_guard(x):
        plan.launch(x, y)


def empty_channels_last(like: torch.Tensor) -> torch.Tensor:
    """New memory for such a tensor (N, C, *spatial), channels innermost."""
    return like.new_empty_strided(*channels_last(layout_of(like)))


def to_channels_last(x: torch.Tensor) -> torch.Tensor:
    """x (N, C, *spatial) in new memory with the channels innermost."""
    y = empty_channels_last(x)
    copy_to_channels_last(x, y)
    return y


def copy_to_channels_last(x: torch.Tensor, y: torch.Tensor) -> None:
    """Write x into y of the same shape, by a kernel where the channels of x are contiguous and those of y innermost."""
    _copy(x, y, True)


def from_channels_last(x: torch.Tensor, y: torch.Tensor) -> None:
    """Write x, as `empty_channels_last` makes it, into y of the same shape and any strides."""
    _copy(x, y, False)
