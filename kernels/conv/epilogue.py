"""What stands around a convolution whose products a library computes: bias, residual and ReLU in one pass, and their
gradients in one."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..pixelwise import channels_are_lanes, offsets, relu, strides_of, through_relu, tile_constants, tile_of
from ..runtime import Device, Layout, Plan, device_guard, device_of, layout_of

TILE = 4096  # elements
GRAD_TILE = 2048  # where three tensors have addresses, and sums their registers
LITTLE = 2**18  # elements
PROGRAMS = 8  # on a multiprocessor, of those that add up

RUNTIME = ["N", "CHANNELS", "PIXELS", "stride_n", "stride_r"]
GRAD_RUNTIME = ["N", "CHANNELS", "PIXELS", *(f"stride_{tensor}{axis}" for tensor in "gyz" for axis in "nr")]


@triton.jit(do_not_specialize=RUNTIME)
def epilogue_kernel(
    y_ptr,  # (N, CHANNELS, PIXELS)
    bias_ptr,  # (CHANNELS,)
    residual_ptr,  # as y
    N,
    CHANNELS,
    PIXELS,
    stride_n,
    stride_r,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """y = relu(y + bias + residual), each part optional, in place: one program makes BLOCK_C by BLOCK_P."""
    tiles_c = tl.cdiv(CHANNELS, BLOCK_C)
    pid_c = tl.program_id(0) % tiles_c
    unit = tl.program_id(0) // tiles_c
    n, rows, lanes, mask = tile_of(unit, pid_c, CHANNELS, PIXELS, LAST, VEC, BLOCK_C, BLOCK_P)
    offs = offsets(n, rows, lanes, stride_n, stride_r, VEC)
    y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(ACC)
    if HAS_BIAS:
        if LAST:
            y += tl.load(bias_ptr + lanes, mask=lanes < CHANNELS, other=0.0).to(ACC)[None, :]
        else:
            y += tl.load(bias_ptr + rows, mask=rows < CHANNELS, other=0.0).to(ACC)[:, None]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(ACC)
    if RELU:
        y = relu(y)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=GRAD_RUNTIME)
def epilogue_grad_kernel(
    grad_ptr,  # (N, CHANNELS, PIXELS)
    y_ptr,  # as grad
    z_ptr,  # as grad
    partial_ptr,  # (splits, CHANNELS)
    N,
    CHANNELS,
    PIXELS,
    stride_gn,
    stride_gr,
    stride_yn,
    stride_yr,
    stride_zn,
    stride_zr,
    RELU: tl.constexpr,
    STORES: tl.constexpr,
    SUMS: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """z = grad where y > 0, else 0, or without RELU all of grad; and with SUMS sum over pixels of z.

    The grid's first axis counts blocks of channels, the second the partial sums: each adds up the blocks of pixels
    that follow each other, in their order.
    """
    pid_c = tl.program_id(0)
    split = tl.program_id(1)
    units = N * tl.cdiv(PIXELS, BLOCK_P)
    share = tl.cdiv(units, tl.num_programs(1))
    acc = tl.zeros((BLOCK_P, BLOCK_C) if LAST else (BLOCK_C, BLOCK_P), dtype=ACC)
    for unit in range(split * share, tl.minimum((split + 1) * share, units)):
        n, rows, lanes, mask = tile_of(unit, pid_c, CHANNELS, PIXELS, LAST, VEC, BLOCK_C, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
        grad = tl.load(grad_ptr + offsets(n, rows, lanes, stride_gn, stride_gr, VEC), mask=mask, other=0.0)
        if RELU:
            y = tl.load(y_ptr + offsets(n, rows, lanes, stride_yn, stride_yr, VEC), mask=mask, other=0.0)
            grad = through_relu(grad, y)
        if STORES:
            tl.store(z_ptr + offsets(n, rows, lanes, stride_zn, stride_zr, VEC), grad, mask=mask)
        if SUMS:
            acc += grad.to(ACC)
    if SUMS:
        channels = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
        sums = tl.sum(acc, axis=0 if LAST else 1)
        tl.store(partial_ptr + split.to(tl.int64) * CHANNELS + channels, sums, mask=channels < CHANNELS)


@lru_cache(maxsize=4096)
def plan_epilogue(y: Layout, dtype: torch.dtype) -> Plan:
    last = bool(channels_are_lanes(y))
    constants = tile_constants([y], last, TILE, dtype)
    batch, channels, pixels = y.shape[0], y.shape[1], math.prod(y.shape[2:])
    units = batch * triton.cdiv(pixels, constants["BLOCK_P"])
    grid = (units * triton.cdiv(channels, constants["BLOCK_C"]),)
    return Plan(epilogue_kernel, grid, (batch, channels, pixels, *(strides_of(y, last) or ())), constants)


@lru_cache(maxsize=4096)
def plan_epilogue_grad(grad: Layout, y: Layout, z: Layout, dtype: torch.dtype, device: Device) -> Plan:
    """The grid's second axis counts the partial sums."""
    last = bool(channels_are_lanes(grad, y, z))
    constants = tile_constants([grad, y, z], last, GRAD_TILE, dtype)
    batch, channels, pixels = grad.shape[0], grad.shape[1], math.prod(grad.shape[2:])
    units = batch * triton.cdiv(pixels, constants["BLOCK_P"])
    tiles = triton.cdiv(channels, constants["BLOCK_C"])
    splits = max(min(PROGRAMS * device.multiprocessors // tiles, units), 1)
    splits = triton.cdiv(units, triton.cdiv(units, splits))  # none without a block
    strides = [stride for layout in (grad, y, z) for stride in strides_of(layout, last) or ()]
    return Plan(epilogue_grad_kernel, (tiles, splits), (batch, channels, pixels, *strides), constants)


def add_epilogue(y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, *, relu: bool) -> None:
    """y = relu(y + bias + residual) in place. Shapes: y and residual (N, K, *size) of the same strides, contiguous or
    channels_last; bias (K,)."""
    if y.numel() == 0:
        return
    bias = None if bias is None else bias.contiguous()
    with device_guard(y):
        plan_epilogue(layout_of(y), y.dtype).launch(
            y, bias, residual, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, RELU=relu
        )


def epilogue_grad(
    grad: torch.Tensor, y: torch.Tensor | None, z: torch.Tensor | None, *, sums: bool
) -> torch.Tensor | None:
    """Write grad where y > 0, else 0, into z; without y all of grad, and without z nothing. With `sums` returns what it
    adds up to over batch and pixels, (K,).

    Shapes: all (N, K, *size), not empty, and such that `channels_are_lanes` says how to walk them.
    """
    layout = layout_of(grad)
    others = (layout if each is None else layout_of(each) for each in (y, z))
    plan = plan_epilogue_grad(layout, *others, grad.dtype, device_of(grad))
    partial = None
    if sums:
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        partial = torch.empty((plan.grid[1], grad.shape[1]), dtype=dtype, device=grad.device)
    with device_guard(grad):
        plan.launch(grad, y, z, partial, RELU=y is not None, STORES=z is not None, SUMS=sums)
    return None if partial is None else partial.sum(0).to(grad.dtype)


def copy(x: torch.Tensor, y: torch.Tensor) -> None:
    """y = x, of one shape and dtype. torch's own copy moves one number at a time where it meets a slice; but its call
    is shorter, so what is little is left to it."""
    if x.numel() > LITTLE and channels_are_lanes(layout_of(x), layout_of(y)) is not None:
        epilogue_grad(x, None, y, sums=False)
    else:
        y.copy_(x)
