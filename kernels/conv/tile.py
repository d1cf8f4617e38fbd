"""What the convolution kernels share: which arguments never recompile, and the epilogue."""

import triton
import triton.language as tl

from ..tile import outer_sum

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
def _halves(tile):
    """Of the first axis."""
    tile = tl.reshape(tile, [2, tile.shape[0] // 2, tile.shape[1]])
    return tl.split(tl.permute(tile, [1, 2, 0]))


@triton.jit
def _store(
    acc,
    residual_ptr,
    y_ptr,
    offs_m,
    offs_n,
    mask,
    Y_LAST: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """y = relu(acc + residual), without Y_LAST in 2^HALVINGS parts of the channels, one after the other."""
    if HALVINGS > 0:
        acc_low, acc_high = _halves(acc)  # pyright: ignore[reportGeneralTypeIssues]
        mask_low, mask_high = _halves(mask)
        low, high = _halves(offs_n[:, None])
        low, high = tl.reshape(low, [low.shape[0]]), tl.reshape(high, [high.shape[0]])
        rest: tl.constexpr = HALVINGS - 1
        _store(acc_low, residual_ptr, y_ptr, offs_m, low, mask_low, Y_LAST, HAS_RESIDUAL, RELU, rest)
        _store(acc_high, residual_ptr, y_ptr, offs_m, high, mask_high, Y_LAST, HAS_RESIDUAL, RELU, rest)
    else:
        offs_y = outer_sum(offs_m, offs_n, Y_LAST)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + offs_y, mask=mask, other=0.0)
            acc += residual.to(acc.dtype)
        if RELU:
            # Not tl.maximum: NaN has to come through, as it does in torch.
            acc = tl.where(acc < 0, 0.0, acc).to(acc.dtype)
        tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(
    acc,  # [BLOCK_M, BLOCK_N]
    bias_ptr,
    residual_ptr,
    y_ptr,
    offs_bias,  # [BLOCK_N]
    offs_m,  # [BLOCK_M]
    offs_n,  # [BLOCK_N]
    mask_n,  # [BLOCK_N]
    mask,  # as the tile of outer_sum
    Y_LAST: tl.constexpr,
    Y_VEC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):
    """y = relu(acc + bias + residual), each part optional. The residual has y's strides."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_bias, mask=mask_n, other=0.0)
        acc += bias.to(acc.dtype)[None, :]
    if not Y_LAST:
        acc = tl.trans(acc)
    # Pixels stored one by one have an address each, in registers: those of a quarter of a large tile fit.
    LARGE: tl.constexpr = not Y_LAST and Y_VEC < 4 and acc.shape[0] * acc.shape[1] >= 128 * 128  # pyright: ignore[reportAssignmentType]
    _store(acc, residual_ptr, y_ptr, offs_m, offs_n, mask, Y_LAST, HAS_RESIDUAL, RELU, 2 if LARGE else 0)
