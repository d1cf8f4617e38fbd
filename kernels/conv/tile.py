"""What the convolution kernels share: pixel indices, addresses, bounds and the epilogue."""

import triton
import triton.language as tl

# Sizes and strides never trigger a recompilation; only a unit channel stride (channels_last) is told apart, since
# contiguous channels are what wide loads need.
RUNTIME = [
    "N",
    "ID",
    "IH",
    "IW",
    "OD",
    "OH",
    "OW",
    "GROUPS",
    "IN_UNITS",
    "OUT_UNITS",
    "PAD_D",
    "PAD_H",
    "PAD_W",
]
RUNTIME += [f"stride_{tensor}{axis}" for tensor in "xy" for axis in "ndhw"]
CHANNEL_STRIDES = ["stride_xc", "stride_yc"]


@triton.jit
def unravel(pixel, D, H, W, NDIM: tl.constexpr):
    """Flat pixel index over (n, d, h, w), w fastest, to its four coordinates."""
    w = pixel % W
    n = pixel // W
    h = w * 0
    d = w * 0
    if NDIM >= 2:
        h = n % H
        n = n // H
    if NDIM == 3:
        d = n % D
        n = n // D
    return n, d, h, w


@triton.jit
def element_offset(n, d, h, w, stride_n, stride_d, stride_h, stride_w, NDIM: tl.constexpr, VEC: tl.constexpr):
    """Element offset of a pixel, in 64 bits: tensors may pass 2^31 elements. All offsets are multiples of VEC."""
    offset = n.to(tl.int64) * stride_n + w.to(tl.int64) * stride_w
    if NDIM >= 2:
        offset += h.to(tl.int64) * stride_h
    if NDIM == 3:
        offset += d.to(tl.int64) * stride_d
    # Said here and not by the caller: on the result of a call the hint would be lost when the call is inlined.
    return tl.multiple_of(offset, VEC)


@triton.jit
def in_bounds(d, h, w, D, H, W, NDIM: tl.constexpr):
    mask = (w >= 0) & (w < W)
    if NDIM >= 2:
        mask = mask & (h >= 0) & (h < H)
    if NDIM == 3:
        mask = mask & (d >= 0) & (d < D)
    return mask


@triton.jit
def store_tile(
    acc,  # [BLOCK_M, BLOCK_N]
    bias_ptr,
    residual_ptr,
    y_ptr,
    offs_bias,  # [BLOCK_N]
    offs_y,  # [BLOCK_M, BLOCK_N]
    mask_n,  # [BLOCK_N]
    mask,  # [BLOCK_M, BLOCK_N]
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):
    """y = relu(acc + bias + residual), each part optional. The residual has y's strides."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_bias, mask=mask_n, other=0.0)
        acc += bias.to(acc.dtype)[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offs_y, mask=mask, other=0.0)
        acc += residual.to(acc.dtype)
    if RELU:
        # Not tl.maximum: NaN has to come through, as it does in torch.
        acc = tl.where(acc < 0, 0.0, acc).to(acc.dtype)
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask)
