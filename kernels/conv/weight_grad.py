"""The weight gradient of both convolution and transposed convolution."""

import triton
import triton.language as tl

from ..tf32 import rounded
from ..tile import divide_by, divisor, dot, inside, outer_row, outer_sum, rows_by_columns
from .tile import CHANNEL_STRIDES, RUNTIME
from .walk import within


@triton.jit
def _reached(offset, S: tl.constexpr, SIZE, OUT):
    """First output pixel o of one axis whose input pixel S o + offset exists, and how many follow each other."""
    low = (tl.maximum(-offset, 0) + S - 1) // S
    high = tl.minimum((tl.maximum(SIZE - offset, 0) + S - 1) // S, OUT)
    return low, tl.maximum(high - low, 0)


@triton.jit
def _gaps(
    rows,
    planes,
    images,
    D,
    H,
    W,
    step_n,
    step_d,
    step_h,
    step_w,
    NDIM: tl.constexpr,
    OFFSET: tl.constexpr,
    VEC: tl.constexpr,
    RUN: tl.constexpr,
):
    """Element offset of a flat pixel index over (n, d, h, w), beyond a step along w for each pixel.

    All are multiples of VEC, and each RUN of pixels, which is VEC then, have the same.
    """
    step_n = step_n.to(OFFSET)
    if NDIM == 1:
        step_h = step_n
    elif NDIM == 2:
        step_d = step_n
    offset = rows.to(OFFSET) * (step_h - W * step_w)
    if NDIM >= 2:
        offset += planes.to(OFFSET) * (step_d - H * step_h)
    if NDIM == 3:
        offset += images.to(OFFSET) * (step_n - D * step_d)
    offset = tl.multiple_of(offset, VEC)
    if RUN > 1:
        offset = tl.max_constancy(offset, RUN)
    return offset


@triton.jit
def _line(step_w, BLOCK: tl.constexpr, VEC: tl.constexpr, RUN: tl.constexpr):
    """Element offsets of BLOCK pixels side by side."""
    offset = tl.multiple_of(tl.arange(0, BLOCK) * step_w, VEC)
    if RUN > 1:
        offset = tl.max_contiguous(offset, RUN)
    return offset


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
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    W_CHANNELS_LAST: tl.constexpr,
    FLATTEN: tl.constexpr,
    PADDED: tl.constexpr,
    SWAP: tl.constexpr,
    INDEX: tl.constexpr,
    OFFSET: tl.constexpr,
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
    channels, and the sum runs over all pixels; without PADDED no tap falls outside of x there. The sum is split over
    the launch grid's second axis, in blocks of BLOCK_K, into as many partial results. With SWAP, for few channels a,
    the product is taken the other way round: matrix instructions have no fewer than 16 rows, but 8 columns.
    """
    X_RUN: tl.constexpr = tl.constexpr(1) if X_LAST else X_VEC
    Y_RUN: tl.constexpr = tl.constexpr(1) if Y_LAST else Y_VEC
    RUN: tl.constexpr = X_RUN if X_RUN > Y_RUN else Y_RUN
    B = IN_UNITS * IN_VEC
    A = OUT_UNITS * OUT_VEC
    TAPS: tl.constexpr = KD * KH * KW
    tiles_m = tl.cdiv(A, BLOCK_M)
    tiles_b = tl.cdiv(TAPS * B, BLOCK_N) if FLATTEN else tl.cdiv(B, BLOCK_N)
    pid = tl.program_id(0)
    pid_m = pid % tiles_m
    pid_b = pid // tiles_m % tiles_b
    group = pid // (tiles_m * tiles_b) % GROUPS
    split = tl.program_id(1)

    offs_a = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_a = offs_a < A
    column = pid_b * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_b = column < (TAPS * B if FLATTEN else B)
    # What lies beside the matrix is never stored, so its operands may be any that exist: no load asks for its channel.
    read_a = within(offs_a, A, OUT_VEC)
    if FLATTEN:
        tap = tl.minimum(column // B, TAPS - 1)
        b = column % B
    else:
        tap = pid // (tiles_m * tiles_b) // GROUPS
        b = within(column, B, IN_VEC)
    rd = (tap // (KH * KW)) * DD - PAD_D
    rh = (tap // KW % KH) * DH - PAD_H
    rw = (tap % KW) * DW - PAD_W
    x_d = stride_xd.to(OFFSET)
    x_h = stride_xh.to(OFFSET)
    x_w = stride_xw.to(OFFSET)
    y_d = stride_yd.to(OFFSET)
    y_h = stride_yh.to(OFFSET)
    y_w = stride_yw.to(OFFSET)
    offs_x0 = rd * x_d + rh * x_h + rw * x_w
    if FLATTEN:
        offs_y0 = tl.full((), 0, OFFSET)
    else:
        low_d, OD = _reached(rd, SD, ID, OD)
        low_h, OH = _reached(rh, SH, IH, OH)
        low_w, OW = _reached(rw, SW, IW, OW)
        offs_x0 += low_d * SD * x_d + low_h * SH * x_h + low_w * SW * x_w
        offs_y0 = low_d * y_d + low_h * y_h + low_w * y_w
    pixels = N.to(INDEX) * OD * OH * OW
    if not FLATTEN:
        # No pixel is no step; but the reciprocals are taken ahead of the loop.
        OD = tl.maximum(OD, 1)
        OH = tl.maximum(OH, 1)
        OW = tl.maximum(OW, 1)
    offs_xc = (group * B + b).to(OFFSET) * stride_xc + tl.multiple_of(offs_x0, X_VEC)
    if not X_LAST:
        offs_xc = tl.multiple_of(offs_xc, X_VEC)
    offs_yc = (group * A + read_a).to(OFFSET) * stride_yc + tl.multiple_of(offs_y0, Y_VEC)
    if not Y_LAST:
        offs_yc = tl.multiple_of(offs_yc, Y_VEC)

    # A tile's offsets are those of pixels side by side, and what lies between one row, plane or image and the next.
    by_w = divisor(OW.to(INDEX))
    by_h = divisor(OH.to(INDEX) * OW) if NDIM >= 2 else by_w
    by_d = divisor(OD.to(INDEX) * OH * OW) if NDIM == 3 else by_h
    line_y = _line(y_w, BLOCK_K, Y_VEC, Y_RUN)
    line_x = _line(SW * x_w, BLOCK_K, X_VEC, X_RUN)

    split_steps = tl.cdiv(pixels, tl.num_programs(1) * BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=ACC)
    first = split.to(INDEX) * split_steps * BLOCK_K
    x_at = x_ptr + tl.multiple_of(first.to(OFFSET) * (SW * x_w), X_VEC) + offs_xc
    y_at = y_ptr + tl.multiple_of(first.to(OFFSET) * y_w, Y_VEC) + offs_yc
    for _ in range(0, split_steps):
        pixel = first + tl.arange(0, BLOCK_K)
        mask_k = tl.max_constancy(tl.arange(0, BLOCK_K) < pixels - first, RUN)
        rows = divide_by(pixel, by_w)
        planes = divide_by(pixel, by_h) if NDIM >= 2 else rows
        images = divide_by(pixel, by_d) if NDIM == 3 else planes
        gaps_y = _gaps(rows, planes, images, OD, OH, OW, stride_yn, y_d, y_h, y_w, NDIM, OFFSET, Y_VEC, Y_RUN)
        y_ptrs = outer_sum(gaps_y + line_y, y_at, Y_LAST)
        y = tl.load(y_ptrs, mask=outer_row(mask_k, Y_LAST), other=0.0)
        gaps_x = _gaps(
            rows, planes, images, OD, OH, OW, stride_xn, SD * x_d, SH * x_h, SW * x_w, NDIM, OFFSET, X_VEC, X_RUN
        )
        x_ptrs = outer_sum(gaps_x + line_x, x_at, X_LAST)
        mask_x = outer_row(mask_k, X_LAST)
        if FLATTEN and PADDED:
            mask_x = mask_x & inside(outer_sum((pixel - rows * OW).to(tl.int32) * SW, rw, X_LAST), IW)
            if NDIM >= 2:
                mask_x = mask_x & inside(outer_sum((rows - planes * OH).to(tl.int32) * SH, rh, X_LAST), IH)
            if NDIM == 3:
                mask_x = mask_x & inside(outer_sum((planes - images * OD).to(tl.int32) * SD, rd, X_LAST), ID)
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        x = rows_by_columns(x, X_LAST)
        y = rows_by_columns(y, Y_LAST)
        left = x if SWAP else y
        acc = dot(rounded(tl.trans(left), PRECISION), y if SWAP else x, acc, PRECISION, UPCAST)
        first += BLOCK_K
        x_at += tl.multiple_of(BLOCK_K * SW * x_w, X_VEC)
        y_at += tl.multiple_of(BLOCK_K * y_w, Y_VEC)
    if SWAP:
        acc = tl.trans(acc)

    offs_w = (split.to(tl.int64) * GROUPS + group) * A + offs_a
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
