"""The weight gradient of both convolution of few channels and its transpose."""

# A static_range and arithmetic on constexpr are fine for Triton and wrong for a type checker.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false

import triton
import triton.language as tl

from ..lanes import chunks, holds, lane_axis, lane_start, lanes_along, positions, whole
from ..tile import divide_by, divisor, inside
from .tile import (
    RUNTIME,
    UNIT_STRIDES,
    across,
    add_products,
    along,
    lane_pointers,
    load_lanes,
    terms,
)


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
    SPLIT_STEPS,
    PAD_H: tl.constexpr,
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
    SPACING_H: tl.constexpr,
    SPACING_W: tl.constexpr,
    UNIT: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    X_CHUNK: tl.constexpr,
    Y_CHUNK: tl.constexpr,
    TAP_ROWS: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    V: tl.constexpr,
    U: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """w[c, r] = sum over pixels of y[n, c, o] x[n, c / MULTIPLIER, s o - p + d r], for TAP_ROWS rows of taps.

    A channel c stands for GROUP_X channels of x and GROUP_Y of y, of which a lane joins all PAIRS.

    The lanes are those of `depthwise_apply_kernel`, V rows by U columns of one channel's images, or with CHANNELS_LAST
    of any pixels and channels. Every lane adds up its own products, one sum a tap; the lanes are added at the end. They
    are split over the grid's second axis, SPLIT_STEPS tiles each, into as many partial results. Without WINDOW a
    program has one tap.
    """
    CHANNELS = UNITS * UNIT
    TAPS: tl.constexpr = KD * KH * KW
    PAIRS: tl.constexpr = GROUP_X * GROUP_Y
    TAP_COLUMNS: tl.constexpr = KW if WINDOW else 1
    KEPT: tl.constexpr = TAP_ROWS * TAP_COLUMNS
    PARTS_H: tl.constexpr = (KH + TAP_ROWS - 1) // TAP_ROWS
    PARTS_W: tl.constexpr = KW // TAP_COLUMNS
    AXIS_H: tl.constexpr = lane_axis(V, PAD_H, TAP_ROWS, SH, DH, SPACING_H, False)
    AXIS_W: tl.constexpr = lane_axis(U, PAD_W, TAP_COLUMNS, SW, DW, SPACING_W, False)
    READ_H: tl.constexpr = positions(AXIS_H)
    CHUNKS: tl.constexpr = chunks(AXIS_W, X_CHUNK)
    MOVES_H: tl.constexpr = DH if SPACING_H > 0 else 1
    MOVES_W: tl.constexpr = DW if SPACING_W > 0 else 1
    APART_H: tl.constexpr = SPACING_H if SPACING_H > 0 else 1
    APART_W: tl.constexpr = SPACING_W if SPACING_W > 0 else 1
    split = tl.program_id(1).to(tl.int64)
    # Parts of the taps change fastest: they read the same pixels, side by side.
    part = tl.program_id(0) % (KD * PARTS_H * PARTS_W)
    tile = tl.program_id(0) // (KD * PARTS_H * PARTS_W)
    tap_d = part // (PARTS_H * PARTS_W)
    tap_h = part // PARTS_W % PARTS_H * TAP_ROWS
    tap_w = part % PARTS_W * TAP_COLUMNS
    QH = lanes_along(OH, V, SPACING_H).to(INDEX)
    QW = lanes_along(OW, U, SPACING_W).to(INDEX)
    channel = (tile * COLS + tl.arange(0, COLS) if CHANNELS_LAST else tile).to(tl.int64)
    mask_c = channel < CHANNELS
    offs_xc = (channel if MULTIPLIER == 1 else channel // MULTIPLIER) * GROUP_X * stride_xc
    offs_yc = channel * GROUP_Y * stride_yc

    acc = ()  # taps by pairs
    for _ in tl.static_range(KEPT * PAIRS):
        acc = acc + (tl.zeros((ROWS, COLS), dtype=ACC),)
    tiles_w = QW if CHANNELS_LAST else tl.cdiv(QW, COLS)
    by_w = divisor(tiles_w)
    by_h = divisor(QH) if NDIM >= 2 else by_w
    by_d = divisor(tl.cast(OD, INDEX)) if NDIM == 3 else by_h
    x_d = whole(stride_xd, X_VEC)
    x_h = whole(stride_xh, X_VEC)
    x_w = whole(stride_xw, X_VEC if CHANNELS_LAST else 1)
    y_h = whole(stride_yh, Y_VEC)
    y_w = whole(stride_yw, Y_VEC if CHANNELS_LAST else 1)
    first_step = split.to(INDEX) * SPLIT_STEPS
    for step in range(0, SPLIT_STEPS):
        block = first_step + step
        if CHANNELS_LAST:
            lane = block * ROWS + tl.arange(0, ROWS)
            line = divide_by(lane, by_w)
            qw = (lane - line * tiles_w).to(tl.int32)
        else:
            lines = divide_by(block, by_w)
            qw = ((block - lines * tiles_w) * COLS).to(tl.int32) + tl.arange(0, COLS)
            line = lines * ROWS + tl.arange(0, ROWS)
        plane = divide_by(line, by_h) if NDIM >= 2 else line
        qh = (line - plane * QH).to(tl.int32) if NDIM >= 2 else (line * 0).to(tl.int32)
        n = divide_by(plane, by_d) if NDIM == 3 else plane
        od = (plane - n * OD).to(tl.int32) if NDIM == 3 else qh * 0
        oh, ih0 = lane_start(qh, PAD_H, V, SH, SPACING_H, False)
        ow, iw0 = lane_start(qw, PAD_W, U, SW, SPACING_W, False)
        i_d = od * SD - PAD_D + tap_d * DD
        ih0 += tap_h * DH
        iw0 += tap_w * DW
        mask_n = n < N
        offs_y = n.to(tl.int64) * whole(stride_yn, Y_VEC) + od.to(tl.int64) * whole(stride_yd, Y_VEC)
        offs_y += oh.to(tl.int64) * y_h
        offs_x = n.to(tl.int64) * whole(stride_xn, X_VEC) + i_d.to(tl.int64) * x_d + ih0.to(tl.int64) * x_h
        offs_yw = ow.to(tl.int64) * y_w
        offs_xw = iw0.to(tl.int64) * x_w
        y_ptrs = lane_pointers(
            y_ptr,
            offs_y + offs_yw if CHANNELS_LAST else offs_y + offs_yc,
            offs_yc if CHANNELS_LAST else offs_yw,
            stride_yc,
            CHANNELS_LAST,
            GROUP_Y,
            Y_CHUNK,
        )
        x_ptrs = lane_pointers(
            x_ptr,
            offs_x + offs_xw if CHANNELS_LAST else offs_x + offs_xc,
            offs_xc if CHANNELS_LAST else offs_xw,
            stride_xc,
            CHANNELS_LAST,
            GROUP_X,
            X_CHUNK,
        )
        loaded = ()  # rows by chunks by channels by columns
        for v in tl.static_range(V):
            mask_h = across(mask_n & holds(oh, v * APART_H, OH, True), mask_c, CHANNELS_LAST)
            row_ptrs = y_ptrs + v * APART_H * y_h
            for j in tl.static_range(0, U, Y_CHUNK):
                loaded = loaded + load_lanes(
                    row_ptrs + j * APART_W * y_w,
                    mask_h & along(holds(ow, j * APART_W, OW, True), CHANNELS_LAST),
                    stride_yc,
                    CHANNELS_LAST,
                    GROUP_Y,
                    Y_CHUNK,
                    Y_VEC,
                    ACC,
                    ASSEMBLY,
                )
        grads = ()  # channels by rows by columns
        for o in tl.static_range(GROUP_Y):
            for m in tl.static_range(V * U // Y_CHUNK):
                grads = grads + loaded[(m * GROUP_Y + o) * Y_CHUNK : (m * GROUP_Y + o + 1) * Y_CHUNK]
        mask_d = mask_n & inside(i_d, ID)
        in_image = ()
        for k in tl.static_range(len(CHUNKS)):
            mask = holds(iw0, CHUNKS[k] * X_CHUNK * MOVES_W, IW, WINDOW and SPACING_W == 0)
            in_image = in_image + (along(mask, CHANNELS_LAST),)
        for i in tl.static_range(len(READ_H)):
            mask = mask_d & holds(ih0, READ_H[i] * MOVES_H, IH, SPACING_H == 0)
            mask_h = across(mask, mask_c, CHANNELS_LAST)
            row_ptrs = x_ptrs + READ_H[i] * MOVES_H * x_h
            for k in tl.static_range(len(CHUNKS)):
                elements = load_lanes(
                    row_ptrs + CHUNKS[k] * X_CHUNK * MOVES_W * x_w,
                    mask_h & in_image[k],
                    stride_xc,
                    CHANNELS_LAST,
                    GROUP_X,
                    X_CHUNK,
                    X_VEC,
                    ACC,
                    ASSEMBLY,
                )
                acc = add_products(
                    acc,
                    elements,
                    grads,
                    terms(AXIS_H, AXIS_W, READ_H[i], CHUNKS[k], X_CHUNK, GROUP_X, GROUP_Y),
                    False,
                )

    offs_w = (split * CHANNELS + channel) * (PAIRS * TAPS)
    for a in tl.static_range(KEPT * PAIRS):
        total = tl.sum(acc[a], axis=0)
        total = total if CHANNELS_LAST else tl.sum(total, axis=0)
        row = tap_h + a // PAIRS // TAP_COLUMNS
        tap = (tap_d * KH + row) * KW + tap_w + a // PAIRS % TAP_COLUMNS
        offs = a % PAIRS // GROUP_X * (GROUP_X * TAPS)
        offs += tap * GROUP_X + a % GROUP_X if W_CHANNELS_LAST else a % GROUP_X * TAPS + tap
        tl.store(w_ptr + offs_w + offs, total.to(w_ptr.dtype.element_ty), mask=mask_c & (row < KH))
