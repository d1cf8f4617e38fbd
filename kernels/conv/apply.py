"""X: convolution, and the input gradient of transposed convolution."""

import triton
import triton.language as tl

from ..tile import element_offset, outer_and, outer_sum, unravel
from .tile import CHANNEL_STRIDES, RUNTIME, store_tile
from .walk import make_jumps, walk, walk_flat, within


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=CHANNEL_STRIDES)
def conv_apply_kernel(
    x_ptr,  # (N, groups * B, ID, IH, IW)
    w_ptr,  # (groups * A, KD * KH * KW, B)
    bias_ptr,  # (groups * A,)
    residual_ptr,  # as y
    y_ptr,  # (N, groups * A, OD, OH, OW)
    N,
    ID,
    IH,
    IW,
    OD,
    OH,
    OW,
    GROUPS,
    IN_UNITS,
    OUT_UNITS,
    stride_xn,
    stride_xc,
    stride_xd,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yc,
    stride_yd,
    stride_yh,
    stride_yw,
    PAD_D,
    PAD_H,
    PAD_W,
    NDIM: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DD: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    IN_VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    FLATTEN: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = relu(X x + bias + residual): one program makes BLOCK_M output pixels by BLOCK_N output channels.

    The reduction runs over (tap, block of input channels); with FLATTEN over the flat (tap, channel) index, which
    wastes nothing when there are fewer input channels than BLOCK_K. Without PADDED no tap falls outside of x.
    """
    X_RUN: tl.constexpr = tl.constexpr(1) if X_LAST else X_VEC
    Y_RUN: tl.constexpr = tl.constexpr(1) if Y_LAST else Y_VEC
    B = IN_UNITS * IN_VEC
    A = OUT_UNITS * OUT_VEC
    TAPS: tl.constexpr = KD * KH * KW
    tiles_n = tl.cdiv(A, BLOCK_N)
    pid_m = tl.program_id(0) // (GROUPS * tiles_n)
    pid_n = tl.program_id(0) % tiles_n
    group = (tl.program_id(0) // tiles_n % GROUPS).to(tl.int64)

    pixel = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, od, oh, ow = unravel(pixel, OD, OH, OW, NDIM)
    mask_m = tl.max_constancy(n < N, X_RUN if X_RUN > Y_RUN else Y_RUN)
    n = tl.minimum(n, N - 1)
    id0 = od * SD - PAD_D
    ih0 = oh * SH - PAD_H
    iw0 = ow * SW - PAD_W
    offs_x = element_offset(n, id0, ih0, iw0, stride_xn, stride_xd, stride_xh, stride_xw, NDIM, X_VEC, X_RUN)

    offs_k = tl.arange(0, BLOCK_K)
    offs_a = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_a = offs_a < A
    channel = group * A + offs_a
    offs_group = group * B * stride_xc
    if not X_LAST:
        offs_group = tl.multiple_of(offs_group, X_VEC)
    x_ptr += offs_group
    offs_w = (group * A + within(offs_a, A, OUT_VEC)) * (TAPS * B)

    strides = stride_xd, stride_xh, stride_xw
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if FLATTEN:
        acc = walk_flat(
            acc,
            x_ptr + offs_x,
            w_ptr + offs_w,
            stride_xc,
            strides,
            (id0, ih0, iw0),
            (DD, DH, DW),
            (ID, IH, IW),
            B,
            NDIM,
            PADDED,
            (KD, KH, KW),
            X_LAST,
            INDEX,
            PRECISION,
            UPCAST,
            BLOCK_K,
        )
    else:
        blocks = tl.cdiv(B, BLOCK_K)
        offs_b = offs_k.to(tl.int64) * stride_xc
        if not X_LAST:
            offs_b = tl.multiple_of(offs_b, X_VEC)
        acc = walk(
            acc,
            x_ptr + outer_sum(offs_x, offs_b, X_LAST),
            w_ptr + offs_w[None, :] + offs_k[:, None],
            make_jumps(BLOCK_K, stride_xc, (DD, DH, DW), strides, (KD, KH, KW), blocks, INDEX),
            make_jumps(BLOCK_K, 1, (0, 0, 1), (0, 0, B), (KD, KH, KW), blocks, INDEX),
            (id0, ih0, iw0),
            (DD, DH, DW),
            (ID, IH, IW),
            (KD, KH, KW),
            B,
            NDIM,
            1,
            TAPS > 1,
            PADDED,
            (KD, KH, KW),
            EVEN,
            X_LAST,
            X_VEC,
            IN_VEC,
            PRECISION,
            UPCAST,
            BLOCK_K,
        )

    offs_y = element_offset(n, od, oh, ow, stride_yn, stride_yd, stride_yh, stride_yw, NDIM, Y_VEC, Y_RUN)
    offs_channel = channel * stride_yc
    if not Y_LAST:
        offs_channel = tl.multiple_of(offs_channel, Y_VEC)
    store_tile(
        acc,
        bias_ptr,
        residual_ptr,
        y_ptr,
        channel,
        offs_y,
        offs_channel,
        mask_a,
        outer_and(mask_m, mask_a, Y_LAST),
        Y_LAST,
        Y_VEC,
        HAS_BIAS,
        HAS_RESIDUAL,
        RELU,
    )
