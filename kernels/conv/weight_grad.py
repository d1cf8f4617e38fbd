"""The weight gradient of both convolution and transposed convolution."""

import triton
import triton.language as tl

from ..tile import dot, element_offset, in_bounds, unravel
from .tile import CHANNEL_STRIDES, RUNTIME


@triton.jit
def _reached(offset, S: tl.constexpr, SIZE, OUT):
    """First output pixel o of one axis whose input pixel S o + offset exists, and how many follow each other."""
    low = (tl.maximum(-offset, 0) + S - 1) // S
    high = tl.minimum((tl.maximum(SIZE - offset, 0) + S - 1) // S, OUT)
    return low, tl.maximum(high - low, 0)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=CHANNEL_STRIDES)
def conv_weight_grad_kernel(
    x_ptr,  # (N, groups * B, ID, IH, IW)
    y_ptr,  # (N, groups * A, OD, OH, OW)
    w_ptr,  # (splits, groups * A, B, KD * KH * KW) by its strides
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
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    W_CHANNELS_LAST: tl.constexpr,
    FLATTEN: tl.constexpr,
    SWAP: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """w[a, b, r] = sum over pixels of y[n, a, o] x[n, b, s o - p + d r]: BLOCK_M channels a by BLOCK_N columns.

    A tile's columns are channels b of one tap, and its sum runs over the pixels that this tap brings to an input pixel:
    a box of them, so no padding is multiplied. With FLATTEN columns are flat (tap, b) indices, for inputs with few
    channels, and the sum runs over all pixels. It is split over the launch grid's second axis, in blocks of BLOCK_K,
    into as many partial results. With SWAP, for few channels a, the product is taken the other way round: matrix
    instructions have no fewer than 16 rows, but 8 columns.
    """
    B = IN_UNITS * IN_VEC
    A = OUT_UNITS * OUT_VEC
    TAPS: tl.constexpr = KD * KH * KW
    tiles_m = tl.cdiv(A, BLOCK_M)
    tiles_b = tl.cdiv(TAPS * B, BLOCK_N) if FLATTEN else tl.cdiv(B, BLOCK_N)
    pid = tl.program_id(0)
    pid_m = pid % tiles_m
    pid_b = pid // tiles_m % tiles_b
    group = (pid // (tiles_m * tiles_b) % GROUPS).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)

    offs_a = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_a = offs_a < A
    column = pid_b * BLOCK_N + tl.arange(0, BLOCK_N)
    if FLATTEN:
        tap = column // B
        b = column % B
        mask_b = column < TAPS * B
    else:
        tap = pid // (tiles_m * tiles_b) // GROUPS
        b = column
        mask_b = b < B
    rd = (tap // (KH * KW)) * DD - PAD_D
    rh = (tap // KW % KH) * DH - PAD_H
    rw = (tap % KW) * DW - PAD_W
    offs_tap = element_offset(tap * 0, rd, rh, rw, 0, stride_xd, stride_xh, stride_xw, NDIM, X_VEC)
    offs_xc = (group * B + b) * stride_xc
    offs_yc = (group * A + offs_a) * stride_yc

    if FLATTEN:
        pixels = N.to(INDEX) * OD * OH * OW
    else:
        low_d, OD = _reached(rd, SD, ID, OD)
        low_h, OH = _reached(rh, SH, IH, OH)
        low_w, OW = _reached(rw, SW, IW, OW)
        pixels = N.to(INDEX) * OD * OH * OW
        # No pixel is no step; but the compiler may divide by these ahead of the loop.
        OD = tl.maximum(OD, 1)
        OH = tl.maximum(OH, 1)
        OW = tl.maximum(OW, 1)
    split_steps = tl.cdiv(pixels, tl.num_programs(1) * BLOCK_K)

    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=ACC)
    pixel0 = split.to(INDEX) * split_steps * BLOCK_K + tl.arange(0, BLOCK_K)
    for step in range(0, split_steps):
        n, od, oh, ow = unravel(pixel0 + step * BLOCK_K, OD, OH, OW, NDIM)
        mask_k = n < N
        if not FLATTEN:
            od += low_d
            oh += low_h
            ow += low_w
        offs_y = element_offset(n, od, oh, ow, stride_yn, stride_yd, stride_yh, stride_yw, NDIM, Y_VEC)
        y = tl.load(y_ptr + offs_y[:, None] + offs_yc[None, :], mask=mask_k[:, None] & mask_a[None, :], other=0.0)
        i_d = od * SD
        i_h = oh * SH
        i_w = ow * SW
        offs_x = element_offset(n, i_d, i_h, i_w, stride_xn, stride_xd, stride_xh, stride_xw, NDIM, X_VEC)
        if FLATTEN:
            mask_x = in_bounds(
                i_d[:, None] + rd[None, :],
                i_h[:, None] + rh[None, :],
                i_w[:, None] + rw[None, :],
                ID,
                IH,
                IW,
                NDIM,
            )
            mask_x = mask_x & mask_k[:, None] & mask_b[None, :]
            x_ptrs = x_ptr + offs_x[:, None] + (offs_tap + offs_xc)[None, :]
        else:
            mask_x = mask_k[:, None] & mask_b[None, :]
            x_ptrs = x_ptr + (offs_x + offs_tap)[:, None] + offs_xc[None, :]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        rows = x if SWAP else y
        acc = dot(tl.trans(rows), y if SWAP else x, acc, PRECISION, UPCAST)
    if SWAP:
        acc = tl.trans(acc)

    offs_w = (split * GROUPS + group) * A + offs_a
    offs_column = tap * B + b if W_CHANNELS_LAST else b * TAPS + tap
    tl.store(
        w_ptr + (offs_w * (TAPS * B))[:, None] + offs_column[None, :],
        acc.to(w_ptr.dtype.element_ty),
        mask=mask_a[:, None] & mask_b[None, :],
    )


@triton.jit(do_not_specialize=["NUMEL", "SPLITS"])
def reduce_splits_kernel(partial_ptr, w_ptr, NUMEL, SPLITS, BLOCK: tl.constexpr):
    """w[i] = sum_s partial[s, i], added in the order of s whatever the launch: bitwise reproducible."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < NUMEL
    acc = tl.zeros((BLOCK,), dtype=partial_ptr.dtype.element_ty)
    for split in range(0, SPLITS):
        acc += tl.load(partial_ptr + split * tl.cast(NUMEL, tl.int64) + offs, mask=mask, other=0.0)
    tl.store(w_ptr + offs, acc.to(w_ptr.dtype.element_ty), mask=mask)
