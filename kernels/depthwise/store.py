"""How a lane of `depthwise_apply_kernel` writes what it made."""

# A static_range and arithmetic on constexpr are fine for Triton and wrong for a type checker.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from ..lanes import pack


@triton.jit
def _finish(
    acc,
    residual_ptr,
    y_ptr,
    offs,
    mask,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):
    """y = relu(acc + residual), each part optional. The residual has y's strides."""
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(acc.dtype)
    if RELU:
        # Not tl.maximum: NaN has to come through, as it does in torch.
        acc = tl.where(acc < 0, 0.0, acc).to(acc.dtype)
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_row(
    acc,  # output channels of a group by columns
    residual_ptr,
    y_ptr,
    offs_y,  # [ROWS]: of the image row, and of the first channel unless CHANNELS_LAST
    mask_row,  # [ROWS]
    ow,  # first column of every lane
    channel_y,  # first channel
    mask_c,
    OW,
    stride_yc,
    stride_yw,
    APART: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP_Y: tl.constexpr,
    Y_VEC: tl.constexpr,
    JOIN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    U: tl.constexpr,
):
    """One row of every lane: U columns, APART from each other."""
    if JOIN:
        # Contiguous columns, written together. The width's divisor is said again for the mask's sake.
        ow = ow[None, :, None] + tl.arange(0, U)[None, None, :]
        mask = mask_row[:, None, None] & (ow < OW // Y_VEC * Y_VEC)
        for o in tl.static_range(GROUP_Y):
            offs = (offs_y + o * stride_yc)[:, None, None] + ow.to(tl.int64) * stride_yw
            offs = tl.multiple_of(offs, (1, 1, Y_VEC))
            y = pack(acc[o * U : (o + 1) * U], U)
            _finish(y, residual_ptr, y_ptr, offs, mask, HAS_RESIDUAL, RELU)
    elif CHANNELS_LAST and GROUP_Y > 1:
        # So are the channels of a group.
        channel_y = channel_y[None, :, None] + tl.arange(0, GROUP_Y)[None, None, :]
        for j in tl.static_range(U):
            parts = ()
            for o in tl.static_range(GROUP_Y):
                parts = parts + (acc[o * U + j],)
            offs_w = (ow + j * APART).to(tl.int64) * stride_yw
            offs = tl.multiple_of(offs_y + offs_w, Y_VEC)[:, None, None] + channel_y * stride_yc
            mask = (mask_row & (ow + j * APART < OW))[:, None, None] & mask_c[None, :, None]
            y = pack(parts, GROUP_Y)
            _finish(y, residual_ptr, y_ptr, offs, mask, HAS_RESIDUAL, RELU)
    else:
        for o in tl.static_range(GROUP_Y):
            for j in tl.static_range(U):
                offs_w = (ow + j * APART).to(tl.int64) * stride_yw
                if CHANNELS_LAST:
                    offs = tl.multiple_of(offs_y + offs_w, Y_VEC)[:, None] + (channel_y * stride_yc)[None, :]
                    mask = (mask_row & (ow + j * APART < OW))[:, None] & mask_c[None, :]
                else:
                    offs = (offs_y + o * stride_yc)[:, None] + offs_w[None, :]
                    mask = mask_row[:, None] & (ow + j * APART < OW)[None, :]
                _finish(acc[o * U + j], residual_ptr, y_ptr, offs, mask, HAS_RESIDUAL, RELU)
