"""The weight gradient of both depthwise convolution and its transpose."""

# A static_range and arithmetic on constexpr are fine for Triton and wrong for a type checker.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false

import triton
import triton.language as tl

from ..tile import unravel
from .tile import RUNTIME, UNIT_STRIDES, add_at, first_chunk, is_read, last_chunk, load_chunk, tap_between


@triton.jit(do_not_specialize=[*RUNTIME, "SPLIT_STEPS"], do_not_specialize_on_alignment=UNIT_STRIDES)
def depthwise_weight_grad_kernel(
    x_ptr,  # (N, C, ID, IH, IW)
    y_ptr,  # (N, C * MULTIPLIER, OD, OH, OW)
    w_ptr,  # (splits, C * MULTIPLIER, KD * KH * KW)
    N,
    ID,
    IH,
    IW,
    OD,
    OH,
    OW,
    UNITS,
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
    SPLIT_STEPS,
    PAD_W: tl.constexpr,
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
    MULTIPLIER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WINDOW: tl.constexpr,
    UNIT: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    X_CHUNK: tl.constexpr,
    Y_CHUNK: tl.constexpr,
    TAP_ROWS: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    U: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """w[c, r] = sum over pixels of y[n, c, o] x[n, c / MULTIPLIER, s o - p + d r], for TAP_ROWS rows of taps.

    The lanes are those of `depthwise_apply_kernel`, over one channel's image rows and columns, or with CHANNELS_LAST
    over pixels and channels. Every lane adds up its own products, one sum a tap; the lanes are added at the end. The
    pixels are split over the grid's second axis, SPLIT_STEPS tiles each, into as many partial results. Without WINDOW
    a program has one tap.
    """
    CHANNELS = UNITS * UNIT
    TAPS: tl.constexpr = KD * KH * KW
    KEPT: tl.constexpr = KW if WINDOW else 1
    GROUPS: tl.constexpr = (KD * KH + TAP_ROWS - 1) // TAP_ROWS if WINDOW else TAPS
    FIRST: tl.constexpr = first_chunk(X_CHUNK, PAD_W, KW, SW, DW, False)
    LAST: tl.constexpr = last_chunk(X_CHUNK, U, PAD_W, KW, SW, DW, False)
    split = tl.program_id(1).to(tl.int64)
    # Groups of taps change fastest: they read the same pixels, side by side.
    group = tl.program_id(0) % GROUPS
    tile = tl.program_id(0) // GROUPS
    across = tl.cdiv(OW, U)
    lanes_across = 1 if CHANNELS_LAST else tl.cdiv(across, COLS)
    channel = (tile * COLS + tl.arange(0, COLS) if CHANNELS_LAST else tile).to(tl.int64)
    mask_c = channel < CHANNELS
    offs_xc = (channel if MULTIPLIER == 1 else channel // MULTIPLIER) * stride_xc
    offs_yc = channel * stride_yc

    acc = ()
    for _ in tl.static_range(TAP_ROWS * KEPT):
        acc = acc + (tl.zeros((ROWS, COLS), dtype=ACC),)
    first_step = split.to(INDEX) * SPLIT_STEPS
    for step in range(0, SPLIT_STEPS):
        block = first_step + step
        row = block // lanes_across * ROWS + tl.arange(0, ROWS)
        if CHANNELS_LAST:
            n, od, oh, qw = unravel(row, OD, OH, across, NDIM)
        else:
            qw = (block % lanes_across * COLS).to(tl.int32) + tl.arange(0, COLS)
            if NDIM == 1:
                n, od, oh = row, row * 0, row * 0
            else:
                n, zero, od, oh = unravel(row, 1, OD, OH, NDIM - 1)
        mask_row = n < N
        offs_y = n.to(tl.int64) * stride_yn + od.to(tl.int64) * stride_yd + oh.to(tl.int64) * stride_yh
        offs_x = n.to(tl.int64) * stride_xn
        if not CHANNELS_LAST:
            offs_y += offs_yc
            offs_x += offs_xc
        grads = ()
        for chunk in tl.static_range(U // Y_CHUNK):
            grads = grads + load_chunk(
                y_ptr,
                offs_y,
                offs_yc,
                mask_row,
                mask_c,
                qw * U + chunk * Y_CHUNK,
                OW,
                stride_yw,
                CHANNELS_LAST,
                Y_CHUNK,
                Y_VEC,
            )
        for t in tl.static_range(TAP_ROWS):
            tap_row = group * TAP_ROWS + t if WINDOW else group // KW
            i_d = od * SD - PAD_D + tap_row // KH * DD
            i_h = oh * SH - PAD_H + tap_row % KH * DH
            mask_x = mask_row & (i_d >= 0) & (i_d < ID) & (i_h >= 0) & (i_h < IH)
            if TAP_ROWS > 1:
                mask_x = mask_x & (tap_row < KD * KH)
            offs_row = offs_x + i_d.to(tl.int64) * stride_xd + i_h.to(tl.int64) * stride_xh
            if WINDOW:
                sums = acc[t * KW : (t + 1) * KW]
                for chunk in tl.static_range(FIRST, LAST + 1):
                    if is_read(chunk, X_CHUNK, U, PAD_W, KW, SW, DW, False):
                        columns = load_chunk(
                            x_ptr,
                            offs_row,
                            offs_xc,
                            mask_x,
                            mask_c,
                            qw * (U * SW) + chunk * X_CHUNK,
                            IW,
                            stride_xw,
                            CHANNELS_LAST,
                            X_CHUNK,
                            X_VEC,
                        )
                        for i in tl.static_range(X_CHUNK):
                            x = columns[i].to(ACC)
                            for j in tl.static_range(U):
                                if tap_between(chunk * X_CHUNK + i, j, PAD_W, KW, SW, DW, False) >= 0:
                                    sums = add_at(
                                        sums,
                                        tap_between(chunk * X_CHUNK + i, j, PAD_W, KW, SW, DW, False),
                                        x * grads[j].to(ACC),
                                    )
                acc = acc[: t * KW] + sums + acc[(t + 1) * KW :]
            else:
                columns = load_chunk(
                    x_ptr,
                    offs_row,
                    offs_xc,
                    mask_x,
                    mask_c,
                    qw * SW - PAD_W + group % KW * DW,
                    IW,
                    stride_xw,
                    CHANNELS_LAST,
                    1,
                    X_VEC,
                )
                acc = (acc[0] + columns[0].to(ACC) * grads[0].to(ACC),)

    offs_w = (split * CHANNELS + channel) * TAPS + group * (TAP_ROWS * KEPT)
    for a in tl.static_range(TAP_ROWS * KEPT):
        total = tl.sum(acc[a], axis=0)
        total = total if CHANNELS_LAST else tl.sum(total, axis=0)
        mask = mask_c & (group * (TAP_ROWS * KEPT) + a < TAPS)
        tl.store(w_ptr + offs_w + a, total.to(w_ptr.dtype.element_ty), mask=mask)
