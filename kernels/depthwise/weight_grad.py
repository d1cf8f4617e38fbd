"""The weight gradient of both convolution of few channels and its transpose."""

# A static_range and arithmetic on constexpr are fine for Triton and wrong for a type checker.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false

import triton
import triton.language as tl

from ..tile import unravel
from .tile import RUNTIME, UNIT_STRIDES, add_at, first_chunk, is_read, last_chunk, load_chunk, pair_of, tap_between


@triton.jit(do_not_specialize=[*RUNTIME, "SPLIT_STEPS"], do_not_specialize_on_alignment=UNIT_STRIDES)
def depthwise_weight_grad_kernel(
    x_ptr,  # (N, C * GROUP_X, ID, IH, IW)
    y_ptr,  # (N, C * MULTIPLIER * GROUP_Y, OD, OH, OW)
    w_ptr,  # (splits, C * MULTIPLIER, GROUP_Y, GROUP_X, KD * KH * KW) by its strides
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
    GROUP_X: tl.constexpr,
    GROUP_Y: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    W_CHANNELS_LAST: tl.constexpr,
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

    A channel c stands for GROUP_X channels of x and GROUP_Y of y, of which a lane joins all PAIRS.

    The lanes are those of `depthwise_apply_kernel`, over one channel's image rows and columns, or with CHANNELS_LAST
    over pixels and channels. Every lane adds up its own products, one sum a tap; the lanes are added at the end. The
    pixels are split over the grid's second axis, SPLIT_STEPS tiles each, into as many partial results. Without WINDOW
    a program has one tap.
    """
    CHANNELS = UNITS * UNIT
    TAPS: tl.constexpr = KD * KH * KW
    PAIRS: tl.constexpr = GROUP_X * GROUP_Y
    KEPT: tl.constexpr = (KW if WINDOW else 1) * PAIRS
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
    offs_xc = (channel if MULTIPLIER == 1 else channel // MULTIPLIER) * GROUP_X * stride_xc
    offs_yc = channel * GROUP_Y * stride_yc

    acc = ()  # taps by pairs
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
        grads = ()  # chunks by channels by columns
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
                stride_yc,
                CHANNELS_LAST,
                GROUP_Y,
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
                sums = acc[t * KEPT : (t + 1) * KEPT]
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
                            stride_xc,
                            CHANNELS_LAST,
                            GROUP_X,
                            X_CHUNK,
                            X_VEC,
                        )
                        for i in tl.static_range(GROUP_X * X_CHUNK):
                            x = columns[i].to(ACC)
                            for j in tl.static_range(U):
                                if tap_between(chunk * X_CHUNK + i % X_CHUNK, j, PAD_W, KW, SW, DW, False) >= 0:
                                    for o in tl.static_range(GROUP_Y):
                                        sums = add_at(
                                            sums,
                                            tap_between(chunk * X_CHUNK + i % X_CHUNK, j, PAD_W, KW, SW, DW, False)
                                            * PAIRS
                                            + pair_of(i // X_CHUNK, o, GROUP_X, GROUP_Y, False),
                                            x * grads[(j // Y_CHUNK * GROUP_Y + o) * Y_CHUNK + j % Y_CHUNK].to(ACC),
                                        )
                acc = acc[: t * KEPT] + sums + acc[(t + 1) * KEPT :]
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
                    stride_xc,
                    CHANNELS_LAST,
                    GROUP_X,
                    1,
                    X_VEC,
                )
                for i in tl.static_range(GROUP_X):
                    x = columns[i].to(ACC)
                    for o in tl.static_range(GROUP_Y):
                        acc = add_at(acc, pair_of(i, o, GROUP_X, GROUP_Y, False), x * grads[o].to(ACC))

    offs_w = (split * CHANNELS + channel) * (PAIRS * TAPS)
    for a in tl.static_range(TAP_ROWS * KEPT):
        total = tl.sum(acc[a], axis=0)
        total = total if CHANNELS_LAST else tl.sum(total, axis=0)
        tap = group * (TAP_ROWS * KEPT // PAIRS) + a // PAIRS
        offs = a % PAIRS // GROUP_X * (GROUP_X * TAPS)
        offs += tap * GROUP_X + a % GROUP_X if W_CHANNELS_LAST else a % GROUP_X * TAPS + tap
        tl.store(w_ptr + offs_w + offs, total.to(w_ptr.dtype.element_ty), mask=mask_c & (tap < TAPS))
