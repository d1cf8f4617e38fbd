"""fp32 operands rounded to TF32 for the tensor cores, which cut off the bits that they don't take.

cuDNN rounds, and so must who wants its errors: cut off, every product is too small by 7e-4 on average, which no sum
averages out (measured on an H200: bench/results/tf32_rounding_nvidia-h200.csv). The first operand of a product passes
through registers and is rounded there; the second is read from shared memory and has to be rounded before.
"""

from __future__ import annotations

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


@triton.jit(do_not_specialize=["NUMEL"])
def round_kernel(x_ptr, y_ptr, NUMEL, BLOCK: tl.constexpr):
    """y = x, rounded."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < NUMEL
    tl.store(y_ptr + offs, rounded(tl.load(x_ptr + offs, mask=mask, other=0.0), "tf32"), mask=mask)


@lru_cache(maxsize=1024)
def _plan(numel: int) -> Plan:
    return Plan(round_kernel, (triton.cdiv(numel, BLOCK),), (numel,), {"BLOCK": BLOCK, "num_warps": 4})


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """x rounded, in memory of its own, with x's strides where those leave no gaps."""
    y = torch.empty_like(x)
    source = x if y.stride() == x.stride() else y.copy_(x)
    with device_guard(x):
        _plan(x.numel()).launch(source, y)
    return y
