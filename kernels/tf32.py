"""fp32 operands rounded to TF32 for the tensor cores, which cut off the bits that they don't take.

cuDNN rounds, and so must who wants its errors: cut off, every product is too small by 7e-4 on average, which no sum
averages out (measured on an H200: bench/results/tf32_rounding_nvidia-h200.csv). The first operand of a product passes
through registers and is rounded there; the second is read from shared memory and has to be rounded before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .runtime import Plan, device_guard

BLOCK = 1024


@triton.jit
def rounded(tile, PRECISION: tl.constexpr):
    """The nearest TF32 numbers, ties away from zero, as cvt.rna.tf32 has them; infinity and NaN as they are."""
    if PRECISION == "tf32":
        bits = tile.to(tl.int32, bitcast=True)
        # All but NaN, which would be carried over into a zero; infinity loses again what is added.
        bits = tl.where(tile == tile, tl.add(bits, 0x1000, sanitize_overflow=False) & -0x2000, bits)
        tile = bits.to(tl.float32, bitcast=True)
    return tile


@triton.jit(do_not_specialize=["NUMEL", "ROWS", "COLUMNS", "stride_0", "stride_1", "stride_2"])
def round_kernel(
    x_ptr, y_ptr, NUMEL, ROWS, COLUMNS, stride_0, stride_1, stride_2, FLAT: tl.constexpr, BLOCK: tl.constexpr
):
    """y = x, rounded; y is contiguous, and with FLAT x is too, else it has the shape (-1, ROWS, COLUMNS)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < NUMEL
    source = offs
    if not FLAT:
        row = offs // COLUMNS
        source = row // ROWS * stride_0 + row % ROWS * stride_1 + offs % COLUMNS * stride_2
    tl.store(y_ptr + offs, rounded(tl.load(x_ptr + source, mask=mask, other=0.0), "tf32"), mask=mask)


def three_axes(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int, int, int] | None:
    """The second and third size, and the strides, of a tensor seen with at most three axes; None where it has more."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if axes and axes[-1][1] == size * stride:
            axes[-1] = axes[-1][0] * size, stride
        elif size > 1:
            axes.append((size, stride))
    if len(axes) > 3:
        return None
    (_, first), (rows, second), (columns, third) = [(1, 0)] * (3 - len(axes)) + axes
    return rows, columns, first, second, third


@lru_cache(maxsize=1024)
def plan_rounding(shape: tuple[int, ...], strides: tuple[int, ...]) -> Plan | None:
    """Launch from a tensor of these strides into a contiguous one; None where it has too many axes."""
    axes, numel = three_axes(shape, strides), math.prod(shape)
    flat = axes is not None and axes[1] == numel and axes[-1] == 1
    constants = {"FLAT": flat, "BLOCK": BLOCK, "num_warps": 4}
    return axes and Plan(round_kernel, (triton.cdiv(numel, BLOCK),), (numel, *axes), constants)


def _round(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether y could be written: the numbers of x, rounded, one after another in memory."""
    plan = plan_rounding(x.shape, x.stride())
    if plan is None:
        return False
    with device_guard(x):
        plan.launch(x, y)
    return True


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """x rounded, in memory of its own, with x's strides where those leave no gaps."""
    y = torch.empty_like(x)
    source = x if y.stride() == x.stride() else y.copy_(x)
    _round(source.as_strided((x.numel(),), (1,)), y)
    return y


def round_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x rounded, in contiguous memory of its own."""
    y = x.new_empty(x.shape)
    if not _round(x, y):
        _round(y.copy_(x), y)
    return y
