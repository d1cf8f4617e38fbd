"""From channels-first to channels-last memory, where a kernel that reads x many times is worth one pass over it."""

import math

import torch
import triton
import triton.language as tl

from ..runtime import device_guard

BLOCK = 64  # channels by pixels: rows of whole sectors on both sides; unmeasured


@triton.jit(do_not_specialize=["CHANNELS", "PIXELS", "stride_xn", "stride_xc"])
def to_channels_last_kernel(
    x_ptr,  # (N, CHANNELS, PIXELS), pixels contiguous
    y_ptr,  # (N, PIXELS, CHANNELS), contiguous
    CHANNELS,
    PIXELS,
    stride_xn,
    stride_xc,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[n, p, c] = x[n, c, p], BLOCK channels by BLOCK pixels: read along the pixels, written along the channels.

    PIXELS and the strides of x are multiples of X_VEC, CHANNELS of Y_VEC.
    """
    tiles_p = tl.cdiv(PIXELS, BLOCK)
    tiles_c = tl.cdiv(CHANNELS, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    n = pid // (tiles_p * tiles_c)
    offs_c = (pid // tiles_p % tiles_c) * BLOCK + tl.arange(0, BLOCK)
    offs_p = (pid % tiles_p) * BLOCK + tl.arange(0, BLOCK)
    mask_c = tl.max_constancy(offs_c < CHANNELS, Y_VEC)
    mask_p = tl.max_constancy(offs_p < PIXELS, X_VEC)
    offs_x = tl.multiple_of(n * stride_xn + offs_c * stride_xc, X_VEC)
    offs_y = tl.multiple_of((n * PIXELS + offs_p) * CHANNELS, Y_VEC)
    x = tl.load(x_ptr + offs_x[:, None] + offs_p[None, :], mask=mask_c[:, None] & mask_p[None, :], other=0.0)
    tl.store(y_ptr + offs_y[:, None] + offs_c[None, :], tl.trans(x), mask=mask_p[:, None] & mask_c[None, :])


def to_channels_last(x: torch.Tensor) -> torch.Tensor:
    """x (N, C, *spatial) in new memory with the channels innermost."""
    batch, channels, *size = x.shape
    y = torch.empty((batch, *size, channels), dtype=x.dtype, device=x.device)
    image = x[0, 0]
    if not image.is_contiguous():
        return y.movedim(-1, 1).copy_(x)
    stride_n, stride_c, *_ = x.stride()
    vectors = {"X_VEC": math.gcd(16, image.numel(), stride_n, stride_c), "Y_VEC": math.gcd(16, channels)}
    grid = (batch * triton.cdiv(channels, BLOCK) * triton.cdiv(image.numel(), BLOCK),)
    with device_guard(x):
        to_channels_last_kernel[grid](
            x, y, channels, image.numel(), stride_n, stride_c, **vectors, BLOCK=BLOCK, num_warps=4
        )
    return y.movedim(-1, 1)
