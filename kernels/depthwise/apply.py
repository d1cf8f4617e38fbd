"""X and X^T where every few channels are convolved by themselves: forward, and the input gradients of each other."""

# A static_range and arithmetic on constexpr are fine for Triton and wrong for a type checker.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false

import triton
import triton.language as tl

from ..lanes import chunks, holds, lane_axis, lane_start, lanes_along, positions, unpack, whole
from ..tile import inside, residue_phase, unravel
from .store import store_row
from .tile import (
    RUNTIME,
    UNIT_STRIDES,
    across,
    add_products,
    along,
    lane_pointers,
    load_lanes,
    taps_until,
    terms,
)


@triton.jit
def _axis(q, phase, PAD, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, G: tl.constexpr, TRANSPOSED: tl.constexpr):
    """At positions q of one axis: output index, input index through the first tap, first tap, number of taps."""
    if TRANSPOSED:
        first, taps, residue, base = residue_phase(phase, PAD, K, S, D, G)
        return q * S + residue, q + base, first, taps
    else:
        return q, q * S - PAD, phase * 0, phase * 0 + K


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNIT_STRIDES)
def depthwise_apply_kernel(
    x_ptr,  # (N, C * GROUP_X, ID, IH, IW), or with TRANSPOSED (N, C * MULTIPLIER * GROUP_X, ID, IH, IW)
    w_ptr,  # (C * MULTIPLIER, PAIRS, KD * KH * KW), or with CHANNELS_LAST (KD * KH * KW, C * MULTIPLIER, PAIRS)
    bias_ptr,  # (channels of y,)
    residual_ptr,  # as y
    y_ptr,  # (N, C * MULTIPLIER * GROUP_Y, OD, OH, OW), or with TRANSPOSED (N, C * GROUP_Y, OD, OH, OW)
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
    GD: tl.constexpr,
    GH: tl.constexpr,
    GW: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    GROUP_X: tl.constexpr,
    GROUP_Y: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_H: tl.constexpr,
    SPACING_H: tl.constexpr,
    SPACING_W: tl.constexpr,
    UNIT: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    X_CHUNK: tl.constexpr,
    JOIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    V: tl.constexpr,
    U: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y = relu(X x + bias + residual), or with TRANSPOSED X^T: ROWS x COLS lanes of V rows by U columns of outputs.

    ROWS counts images' lanes (n, c, d, h), and lanes go along W; with CHANNELS_LAST it counts (n, d, h, w), and lanes
    go over channels. Along W and H a lane goes once over all it reads, every tap known: a lane of X^T makes a multiple
    of the stride along both. Without WINDOW_H (many taps, or a large stride) V is 1, the taps along H are looped over,
    and X^T is taken by residue phases along H, one a program; without WINDOW the same holds along W, too. Along D it
    always does.

    A channel c stands for GROUP_X channels of x and GROUP_Y of y, of which a lane joins all PAIRS: depthwise, both are
    1; in groups of a few channels MULTIPLIER is.
    """
    PAIRS: tl.constexpr = GROUP_X * GROUP_Y
    CHANNELS = UNITS * UNIT
    WEIGHTS = CHANNELS * MULTIPLIER if TRANSPOSED else CHANNELS
    TAPS: tl.constexpr = KD * KH * KW
    # A step along the taps of an axis, what it moves in the input, and the most steps that a phase has.
    TAP_D: tl.constexpr = SD // GD if TRANSPOSED else 1
    TAP_H: tl.constexpr = SH // GH if TRANSPOSED else 1
    TAP_W: tl.constexpr = SW // GW if TRANSPOSED else 1
    MOVE_D: tl.constexpr = -(DD // GD) if TRANSPOSED else DD
    MOVE_H: tl.constexpr = -(DH // GH) if TRANSPOSED else DH
    MOVE_W: tl.constexpr = -(DW // GW) if TRANSPOSED else DW
    STEPS_D: tl.constexpr = (KD + TAP_D - 1) // TAP_D
    STEPS_H: tl.constexpr = 1 if WINDOW_H else (KH + TAP_H - 1) // TAP_H
    STEPS_W: tl.constexpr = 1 if WINDOW else (KW + TAP_W - 1) // TAP_W
    PHASES_H: tl.constexpr = SH if TRANSPOSED and not WINDOW_H else 1
    PHASES_W: tl.constexpr = SW if TRANSPOSED and not WINDOW else 1
    PHASES: tl.constexpr = (SD if TRANSPOSED else 1) * PHASES_H * PHASES_W
    # What a lane reads in one step: for all taps of an axis, or for one.
    ONE: tl.constexpr = lane_axis(1, 0, 1, 1, 1, 0, TRANSPOSED)
    AXIS_H: tl.constexpr = lane_axis(V, PAD_H, KH, SH, DH, SPACING_H, TRANSPOSED) if WINDOW_H else ONE
    AXIS_W: tl.constexpr = lane_axis(U, PAD_W, KW, SW, DW, SPACING_W, TRANSPOSED) if WINDOW else ONE
    TAP_COLUMNS: tl.constexpr = KW if WINDOW else 1
    READ_H: tl.constexpr = positions(AXIS_H)
    CHUNKS: tl.constexpr = chunks(AXIS_W, X_CHUNK)
    MOVES_H: tl.constexpr = DH if SPACING_H > 0 else 1
    MOVES_W: tl.constexpr = DW if SPACING_W > 0 else 1
    APART_H: tl.constexpr = SPACING_H if SPACING_H > 0 else 1
    APART_W: tl.constexpr = SPACING_W if SPACING_W > 0 else 1

    QD = tl.cdiv(OD, SD) if TRANSPOSED else OD
    QH = lanes_along(OH, V, SPACING_H) if WINDOW_H else tl.cdiv(OH, PHASES_H)
    QW = lanes_along(OW, U, SPACING_W) if WINDOW else tl.cdiv(OW, PHASES_W)
    tiles = tl.cdiv(CHANNELS if CHANNELS_LAST else QW, COLS)
    # Phases change faster than rows, so that programs that share input rows run side by side.
    phase = tl.program_id(0) // tiles % PHASES
    row = (tl.program_id(0) // (tiles * PHASES)).to(INDEX) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) % tiles
    col = tile * COLS + tl.arange(0, COLS)
    if CHANNELS_LAST:
        n, qd, qh, qw = unravel(row, QD, QH, QW, NDIM)
        channel = col
    else:
        qw = col
        if NDIM == 1:
            n, qd, qh, channel = unravel(row, 1, 1, CHANNELS, 1)
        elif NDIM == 2:
            n, qd, channel, qh = unravel(row, 1, CHANNELS, QH, 2)
        else:
            n, channel, qd, qh = unravel(row, CHANNELS, QD, QH, 3)
    mask_row = n < N
    mask_c = channel < CHANNELS
    channel = channel.to(tl.int64)

    od, id0, first_d, taps_d = _axis(qd, phase // (PHASES_W * PHASES_H), PAD_D, KD, SD, DD, GD, TRANSPOSED)
    if WINDOW_H:
        oh, ih0 = lane_start(qh, PAD_H, V, SH, SPACING_H, TRANSPOSED)
        first_h, taps_h = 0, 1
    else:
        oh, ih0, first_h, taps_h = _axis(qh, phase // PHASES_W % PHASES_H, PAD_H, KH, SH, DH, GH, TRANSPOSED)
    if WINDOW:
        ow, iw0 = lane_start(qw, PAD_W, U, SW, SPACING_W, TRANSPOSED)
        first_w, taps_w = 0, 1
    else:
        ow, iw0, first_w, taps_w = _axis(qw, phase % PHASES_W, PAD_W, KW, SW, DW, GW, TRANSPOSED)
    mask_row = mask_row & (od < OD)
    to_d = whole(stride_xd, X_VEC)
    to_h = whole(stride_xh, X_VEC)
    to_w = whole(stride_xw, X_VEC if CHANNELS_LAST else 1)
    offs_row = n.to(tl.int64) * whole(stride_xn, X_VEC) + id0.to(tl.int64) * to_d + ih0.to(tl.int64) * to_h
    offs_y = n.to(tl.int64) * stride_yn + od.to(tl.int64) * stride_yd + oh.to(tl.int64) * stride_yh
    offs_w0 = iw0.to(tl.int64) * to_w
    channel_y = channel * GROUP_Y
    if CHANNELS_LAST:
        offs_row += offs_w0
    else:
        offs_y += channel_y * stride_yc

    acc = ()  # output channels by rows by columns
    for o in tl.static_range(GROUP_Y):
        start = tl.zeros((ROWS, COLS), dtype=ACC)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + channel_y + o, mask=mask_c, other=0.0).to(ACC)
            start += bias[None, :] if CHANNELS_LAST else bias[:, None]
        for _ in tl.static_range(V * U):
            acc = acc + (start,)
    REPEATS: tl.constexpr = MULTIPLIER if TRANSPOSED else 1
    TO_TAP = WEIGHTS * PAIRS if CHANNELS_LAST else 1
    for step in range(0, REPEATS * STEPS_D * STEPS_H * STEPS_W):
        jd = step // (STEPS_W * STEPS_H) % STEPS_D
        jh = step // STEPS_W % STEPS_H
        jw = step % STEPS_W
        mask_tap = (jd < taps_d) & (jh < taps_h) & (jw < taps_w)
        mask_w = mask_c & mask_tap
        mask_plane = mask_row & mask_tap & inside(id0 + jd * MOVE_D, ID)
        first_row = ih0 + jh * MOVE_H
        first_column = iw0 + jw * MOVE_W
        if MULTIPLIER == 1:
            channel_x = channel
        elif TRANSPOSED:
            channel_x = channel * MULTIPLIER + step // (STEPS_D * STEPS_H * STEPS_W)
        else:
            channel_x = channel // MULTIPLIER
        channel_w = channel_x if TRANSPOSED else channel
        tap = ((first_d + jd * TAP_D) * KH + first_h + jh * TAP_H) * KW + first_w + jw * TAP_W
        offs_w = (tap * WEIGHTS + channel_w) * PAIRS if CHANNELS_LAST else channel_w * (PAIRS * TAPS) + tap
        offs_step = jd * MOVE_D * to_d + jh * MOVE_H * to_h + jw * MOVE_W * to_w
        offs_c = channel_x * GROUP_X * stride_xc
        x_ptrs = lane_pointers(
            x_ptr,
            offs_row + offs_step if CHANNELS_LAST else offs_row + offs_step + offs_c,
            offs_c if CHANNELS_LAST else offs_w0,
            stride_xc,
            CHANNELS_LAST,
            GROUP_X,
            X_CHUNK,
        )
        in_image = ()
        for k in tl.static_range(len(CHUNKS)):
            mask = holds(first_column, CHUNKS[k] * X_CHUNK * MOVES_W, IW, WINDOW and SPACING_W == 0)
            in_image = in_image + (along(mask, CHANNELS_LAST),)
        weights = ()  # taps by pairs
        for i in tl.static_range(len(READ_H)):
            for r in tl.static_range(taps_until(AXIS_H, i) * TAP_COLUMNS, taps_until(AXIS_H, i + 1) * TAP_COLUMNS):
                if CHANNELS_LAST and PAIRS > 1:
                    w_ptrs = w_ptr + (offs_w[None, :, None] + tl.arange(0, PAIRS)[None, None, :]) + r * TO_TAP
                    w = tl.load(w_ptrs, mask=mask_w[None, :, None], other=0.0)
                    weights = weights + unpack(w, PAIRS)
                else:
                    for pair in tl.static_range(PAIRS):
                        w = tl.load(w_ptr + offs_w + r * TO_TAP + pair * TAPS, mask=mask_w, other=0.0).to(ACC)
                        weights = weights + (w[None, :] if CHANNELS_LAST else w[:, None],)
            mask = mask_plane & holds(first_row, READ_H[i] * MOVES_H, IH, WINDOW_H and SPACING_H == 0)
            mask_h = across(mask, mask_c, CHANNELS_LAST)
            row_ptrs = x_ptrs + READ_H[i] * MOVES_H * to_h
            for k in tl.static_range(len(CHUNKS)):
                elements = load_lanes(
                    row_ptrs + CHUNKS[k] * X_CHUNK * MOVES_W * to_w,
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
                    weights,
                    terms(AXIS_H, AXIS_W, READ_H[i], CHUNKS[k], X_CHUNK, GROUP_X, GROUP_Y),
                    True,
                )

    for v in tl.static_range(V):
        of_row = ()
        for o in tl.static_range(GROUP_Y):
            of_row = of_row + acc[(o * V + v) * U : (o * V + v + 1) * U]
        store_row(
            of_row,
            residual_ptr,
            y_ptr,
            offs_y + tl.cast(v * APART_H, tl.int64) * stride_yh,
            mask_row & (oh + v * APART_H < OH),
            ow,
            channel_y,
            mask_c,
            OW,
            stride_yc,
            stride_yw,
            APART_W,
            CHANNELS_LAST,
            GROUP_Y,
            Y_VEC,
            JOIN,
            HAS_RESIDUAL,
            RELU,
            U,
        )
