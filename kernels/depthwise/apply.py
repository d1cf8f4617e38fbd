"""X and X^T where every few channels are convolved by themselves: forward, and the input gradients of each other."""

# A static_range and arithmetic on constexpr are fine for Triton and wrong for a type checker.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false

import triton
import triton.language as tl

from ..tile import residue_phase, unravel
from .tile import (
    RUNTIME,
    UNIT_STRIDES,
    add_at,
    first_chunk,
    is_read,
    last_chunk,
    load_chunk,
    pack,
    pair_of,
    tap_between,
)


@triton.jit
def _axis(q, phase, PAD, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, G: tl.constexpr, TRANSPOSED: tl.constexpr):
    """At positions q of one axis: output index, input index through the first tap, first tap, number of taps."""
    if TRANSPOSED:
        first, taps, residue, base = residue_phase(phase, PAD, K, S, D, G)
        return q * S + residue, q + base, first, taps
    else:
        return q, q * S - PAD, phase * 0, phase * 0 + K


@triton.jit
def _finish(
    acc,
    bias,
    residual_ptr,
    y_ptr,
    offs,
    mask,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):
    """y = relu(acc + bias + residual), each part optional. The residual has y's strides."""
    if HAS_BIAS:
        acc += bias
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(acc.dtype)
    if RELU:
        # Not tl.maximum: NaN has to come through, as it does in torch.
        acc = tl.where(acc < 0, 0.0, acc).to(acc.dtype)
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNIT_STRIDES)
def depthwise_apply_kernel(
    x_ptr,  # (N, C * GROUP_X, ID, IH, IW), or with TRANSPOSED (N, C * MULTIPLIER * GROUP_X, ID, IH, IW)
    w_ptr,  # (C * MULTIPLIER, PAIRS, KD * KH * KW), or with CHANNELS_LAST (KD * KH * KW, C / COLS, PAIRS, COLS)
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
    PAD_H,
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
    U: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y = relu(X x + bias + residual), or with TRANSPOSED X^T: ROWS x COLS lanes of U output columns each.

    Rows are image rows (n, c, d, h) and lanes go along W; with CHANNELS_LAST rows are pixels (n, d, h, U columns) and
    lanes go over channels. X^T is taken by residue phases along D and H, one a program, and along W all phases in a
    lane, whose U columns are a multiple of the stride: whole rows are written. Without WINDOW (many taps, or a large
    stride) U is 1, the taps along W are looped over, and W has phases of its own.

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
    STEPS_H: tl.constexpr = (KH + TAP_H - 1) // TAP_H
    STEPS_W: tl.constexpr = (KW + TAP_W - 1) // TAP_W
    PHASES_H: tl.constexpr = SH if TRANSPOSED else 1
    PHASES_W: tl.constexpr = SW if TRANSPOSED and not WINDOW else 1
    PHASES: tl.constexpr = (SD if TRANSPOSED else 1) * PHASES_H * PHASES_W
    FIRST: tl.constexpr = first_chunk(X_CHUNK, PAD_W, KW, SW, DW, TRANSPOSED)
    LAST: tl.constexpr = last_chunk(X_CHUNK, U, PAD_W, KW, SW, DW, TRANSPOSED)

    QD = tl.cdiv(OD, SD) if TRANSPOSED else OD
    QH = tl.cdiv(OH, SH) if TRANSPOSED else OH
    QW = tl.cdiv(OW, U * PHASES_W)
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

    phase_h = phase // PHASES_W % PHASES_H
    od, id0, first_d, taps_d = _axis(qd, phase // (PHASES_W * PHASES_H), PAD_D, KD, SD, DD, GD, TRANSPOSED)
    oh, ih0, first_h, taps_h = _axis(qh, phase_h, PAD_H, KH, SH, DH, GH, TRANSPOSED)
    mask_row = mask_row & (od < OD) & (oh < OH)
    offs_x = n.to(tl.int64) * stride_xn
    offs_y = n.to(tl.int64) * stride_yn + od.to(tl.int64) * stride_yd + oh.to(tl.int64) * stride_yh
    if not CHANNELS_LAST:
        offs_y += channel * GROUP_Y * stride_yc
    if WINDOW:
        ow = qw * U
        iw = qw * (U // SW if TRANSPOSED else U * SW)
    else:
        ow, iw, first_w, taps_w = _axis(qw, phase % PHASES_W, PAD_W, KW, SW, DW, GW, TRANSPOSED)

    acc = ()  # output channels by columns
    for _ in tl.static_range(GROUP_Y * U):
        acc = acc + (tl.zeros((ROWS, COLS), dtype=ACC),)
    REPEATS: tl.constexpr = MULTIPLIER if TRANSPOSED else 1
    for step in tl.range(0, REPEATS * STEPS_D * STEPS_H, loop_unroll_factor=UNROLL):
        jd = step // STEPS_H % STEPS_D
        jh = step % STEPS_H
        i_d = id0 + jd * MOVE_D
        i_h = ih0 + jh * MOVE_H
        mask_x = mask_row & (jd < taps_d) & (jh < taps_h) & (i_d >= 0) & (i_d < ID) & (i_h >= 0) & (i_h < IH)
        if MULTIPLIER == 1:
            channel_x = channel
        elif TRANSPOSED:
            channel_x = channel * MULTIPLIER + step // (STEPS_D * STEPS_H)
        else:
            channel_x = channel // MULTIPLIER
        channel_w = channel_x if TRANSPOSED else channel
        tap = ((first_d + jd * TAP_D) * KH + first_h + jh * TAP_H) * KW
        offs_row = offs_x + i_d.to(tl.int64) * stride_xd + i_h.to(tl.int64) * stride_xh
        offs_c = channel_x * GROUP_X * stride_xc
        if not CHANNELS_LAST:
            offs_row += offs_c
            offs_w = channel_w * (PAIRS * TAPS) + tap
        elif PAIRS == 1:
            offs_w = tap * WEIGHTS + channel_w
        else:
            offs_w = (tap * tiles + tile).to(tl.int64) * (PAIRS * COLS) + tl.arange(0, COLS)
        mask_w = mask_c & (jd < taps_d) & (jh < taps_h)
        TO_TAP = 1 if not CHANNELS_LAST else WEIGHTS if PAIRS == 1 else tiles * PAIRS * COLS
        TO_PAIR: tl.constexpr = COLS if CHANNELS_LAST else TAPS
        if WINDOW:
            weights = ()  # taps by pairs
            for r in tl.static_range(KW):
                for pair in tl.static_range(PAIRS):
                    w = tl.load(w_ptr + offs_w + r * TO_TAP + pair * TO_PAIR, mask=mask_w, other=0.0).to(ACC)
                    weights = weights + (w[None, :] if CHANNELS_LAST else w[:, None],)
            for chunk in tl.static_range(FIRST, LAST + 1):
                if is_read(chunk, X_CHUNK, U, PAD_W, KW, SW, DW, TRANSPOSED):
                    columns = load_chunk(
                        x_ptr,
                        offs_row,
                        offs_c,
                        mask_x,
                        mask_c,
                        iw + chunk * X_CHUNK,
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
                            if tap_between(chunk * X_CHUNK + i % X_CHUNK, j, PAD_W, KW, SW, DW, TRANSPOSED) >= 0:
                                for o in tl.static_range(GROUP_Y):
                                    w = weights[
                                        tap_between(chunk * X_CHUNK + i % X_CHUNK, j, PAD_W, KW, SW, DW, TRANSPOSED)
                                        * PAIRS
                                        + pair_of(i // X_CHUNK, o, GROUP_X, GROUP_Y, TRANSPOSED)
                                    ]
                                    acc = add_at(acc, o * U + j, x * w)
        else:
            for jw in range(0, STEPS_W):
                r = first_w + jw * TAP_W
                columns = load_chunk(
                    x_ptr,
                    offs_row,
                    offs_c,
                    mask_x & (jw < taps_w),
                    mask_c,
                    iw + jw * MOVE_W,
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
                        offs_pair = r * TO_TAP + pair_of(i, o, GROUP_X, GROUP_Y, TRANSPOSED) * TO_PAIR
                        w = tl.load(w_ptr + offs_w + offs_pair, mask=mask_w & (jw < taps_w), other=0.0).to(ACC)
                        acc = add_at(acc, o, x * (w[None, :] if CHANNELS_LAST else w[:, None]))

    channel_y = channel * GROUP_Y
    bias = 0.0
    if JOIN:
        # Contiguous columns, written together. The width's divisor is said again for the mask's sake.
        ow = ow[None, :, None] + tl.arange(0, U)[None, None, :]
        mask = mask_row[:, None, None] & (ow < OW // Y_VEC * Y_VEC)
        offs_y = tl.multiple_of(offs_y, Y_VEC)  # for the first channel, to which nothing is added
        for o in tl.static_range(GROUP_Y):
            if HAS_BIAS:
                bias = tl.load(bias_ptr + channel_y + o, mask=mask_c, other=0.0).to(ACC)[:, None, None]
            offs = tl.multiple_of(offs_y + o * stride_yc, Y_VEC)[:, None, None] + ow.to(tl.int64) * stride_yw
            y = pack(acc[o * U : (o + 1) * U], U)
            _finish(y, bias, residual_ptr, y_ptr, offs, mask, HAS_BIAS, HAS_RESIDUAL, RELU)
    elif CHANNELS_LAST and GROUP_Y > 1:
        # So are the channels of a group.
        of_group = tl.arange(0, GROUP_Y)[None, None, :]
        channel_y = channel_y[None, :, None] + of_group
        if HAS_BIAS:
            bias = tl.load(bias_ptr + channel_y, mask=mask_c[None, :, None], other=0.0).to(ACC)
        for j in tl.static_range(U):
            parts = ()
            for o in tl.static_range(GROUP_Y):
                parts = parts + (acc[o * U + j],)
            offs_w = (ow + j).to(tl.int64) * stride_yw
            offs = tl.multiple_of(offs_y + offs_w, Y_VEC)[:, None, None] + channel_y * stride_yc
            mask = (mask_row & (ow + j < OW))[:, None, None] & mask_c[None, :, None]
            y = pack(parts, GROUP_Y)
            _finish(y, bias, residual_ptr, y_ptr, offs, mask, HAS_BIAS, HAS_RESIDUAL, RELU)
    else:
        for o in tl.static_range(GROUP_Y):
            if HAS_BIAS:
                bias = tl.load(bias_ptr + channel_y + o, mask=mask_c, other=0.0).to(ACC)
                bias = bias[None, :] if CHANNELS_LAST else bias[:, None]
            for j in tl.static_range(U):
                offs_w = (ow + j).to(tl.int64) * stride_yw
                if CHANNELS_LAST:
                    offs = tl.multiple_of(offs_y + offs_w, Y_VEC)[:, None] + (channel_y * stride_yc)[None, :]
                    mask = (mask_row & (ow + j < OW))[:, None] & mask_c[None, :]
                else:
                    offs = (offs_y + o * stride_yc)[:, None] + offs_w[None, :]
                    mask = mask_row[:, None] & (ow + j < OW)[None, :]
                _finish(acc[o * U + j], bias, residual_ptr, y_ptr, offs, mask, HAS_BIAS, HAS_RESIDUAL, RELU)
