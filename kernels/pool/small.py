"""Max-pooling with small windows, and the way back: lanes of V rows by U columns (`..lanes`), so that what several
windows share is read once, and a window once for all pixels that it has.

Where channels come last, each element is CHANNELS of them, read at once, else one; then columns that lie side by side
are read CHUNK at a time, and with JOIN a lane's row is written at once. Depth is a loop.
"""

# A static_range and arithmetic on constexpr are fine for Triton and wrong for a type checker.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

from ..lanes import chunks, holds, joined, lane_axis, pack, positions, unpack, whole, widen
from ..tile import divide, inside, unravel
from .pool import first_tap, larger, steps_of, window_of

RUNTIME = ["TOTAL", "C", "ID", "IH", "IW", "OD", "OH", "OW", "PAD_D", *(f"stride_{axis}" for axis in "ncdhw")]


@triton.constexpr_function
def slot(axis, position, CHUNK):
    """Where the column at a position is among those that `row_of` reads."""
    return chunks(axis, CHUNK).index(position // CHUNK) * CHUNK + position % CHUNK


@triton.jit
def lane_of(
    TOTAL,
    C,
    D,
    H,
    W,
    NDIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
    V: tl.constexpr,
    U: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Of every lane, [LANES]: whether it exists, and its first element (n, c, d, h, w) of a result of D x H x W."""
    lane = tl.program_id(0).to(INDEX) * LANES + tl.arange(0, LANES)
    if CHANNELS_LAST:
        pixel, c = divide(lane, C // CHANNELS)
        n, d, h, w = unravel(pixel, D, tl.cdiv(H, V), tl.cdiv(W, U), NDIM)
    else:
        plane, d, h, w = unravel(lane, D, tl.cdiv(H, V), tl.cdiv(W, U), NDIM)
        n, c = divide(plane, C)
    return lane < TOTAL, n, c * CHANNELS, d, h * V, w * U


@triton.jit
def elements_of(offs, c, stride_c, CHANNELS_LAST: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr):
    """[LANES, CHANNELS]: offsets of every lane's first element, of which VEC is a divisor, from those of its pixel."""
    offs = tl.multiple_of(offs + c.to(tl.int64) * stride_c, VEC)[:, None]
    if CHANNELS_LAST and VEC > 1:  # which it is where channels are neighbours
        offs = offs + tl.arange(0, CHANNELS)[None, :]
    elif CHANNELS_LAST:
        offs = offs + tl.arange(0, CHANNELS)[None, :].to(tl.int64) * stride_c
    return offs


@triton.jit
def row_of(
    pointers,  # [LANES, CHANNELS], of position 0
    mask,  # [LANES]
    first,  # [LANES], its column
    W,
    stride_w,
    other,
    AXIS: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """All columns that a lane reads of one row, each [LANES, CHANNELS] in ACC; `other` outside of the image."""
    CHUNKS: tl.constexpr = chunks(AXIS, CHUNK)
    columns = ()
    for k in tl.static_range(len(CHUNKS)):
        there = (mask & holds(first, CHUNKS[k] * CHUNK, W, True))[:, None]
        if CHUNK == 1:
            x = tl.load(pointers + CHUNKS[k] * stride_w, mask=there, other=other)
            columns = columns + (widen(x, ACC, ASSEMBLY),)
        else:
            at = (pointers + CHUNKS[k] * CHUNK)[:, :, None] + tl.arange(0, CHUNK)[None, None, :]
            x = tl.load(at, mask=there[:, :, None], other=other)
            columns = columns + unpack(widen(x, ACC, ASSEMBLY), CHUNK)
    return columns


@triton.jit
def dense(
    n,
    c,
    d,
    h,
    w,
    C,
    D,
    H,
    W,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Offsets [LANES, CHANNELS] in a result that has no gaps, of which VEC is a divisor with channels first; what it is
    from row to row, and from column to column."""
    if CHANNELS_LAST:
        of_column = whole(C, CHANNELS)
        offs = ((n.to(tl.int64) * D + d) * H + h) * W + w
        return elements_of(offs * of_column, c, 1, True, CHANNELS, CHANNELS), W * of_column, of_column
    else:
        offs = (((n.to(tl.int64) * C + c) * D + d) * H + h) * W + w
        of_row = whole(W, VEC)
        return tl.multiple_of(offs, VEC)[:, None], of_row, tl.full((), 1, tl.int64)


@triton.jit
def store_row(
    pointer,
    offs,  # [LANES, CHANNELS], of the first column
    mask,  # [LANES]
    row,
    first,  # [LANES], its column
    W,
    stride_w,
    JOIN: tl.constexpr,
    U: tl.constexpr,
):
    if JOIN:
        at = offs[:, :, None] + tl.arange(0, U)[None, None, :]
        tl.store(pointer + at, pack(row, U).to(pointer.dtype.element_ty), mask=mask[:, None, None])
    else:
        for j in tl.static_range(U):
            there = (mask & (first + j < W))[:, None]
            tl.store(pointer + offs + j * stride_w, row[j].to(pointer.dtype.element_ty), mask=there)


@triton.jit
def compare_row(
    best,  # rows by columns of a lane
    where,
    columns,  # of `row_of`
    place,  # of the row: what its windows' first taps have, or the pixel that the lane's columns are counted from
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW: tl.constexpr,
    CHUNK: tl.constexpr,
    INDEX: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """The maxima so far and their places, after one more row: first the largest along W, once for all that read it."""
    U: tl.constexpr = COLUMNS[0]
    PAD: tl.constexpr = COLUMNS[1]
    TAPS: tl.constexpr = COLUMNS[2]
    STRIDE: tl.constexpr = COLUMNS[3]
    MET: tl.constexpr = joined(ROWS, ROW)
    for j in tl.static_range(U):
        most = columns[slot(COLUMNS, j * STRIDE - PAD, CHUNK)]
        column = tl.full(most.shape, 0 if OFFSETS else j * STRIDE - PAD, INDEX)
        for s in tl.static_range(1, TAPS):
            x = columns[slot(COLUMNS, j * STRIDE - PAD + s, CHUNK)]
            most, column = larger(most, column, x, s if OFFSETS else j * STRIDE - PAD + s)
        for m in tl.static_range(len(MET)):
            at = column + place + (MET[m][1] * TAPS if OFFSETS else 0)
            more, there = larger(best[MET[m][0] * U + j], where[MET[m][0] * U + j], most, at)
            best = best[: MET[m][0] * U + j] + (more,) + best[MET[m][0] * U + j + 1 :]
            where = where[: MET[m][0] * U + j] + (there,) + where[MET[m][0] * U + j + 1 :]
    return best, where


@triton.jit
def give(
    x,  # rows by columns of a lane
    y,
    place,  # a tap along H and W, or counted from the lane's first pixel
    W,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    U: tl.constexpr,
    KW: tl.constexpr,
    OFFSETS: tl.constexpr,
    SUM: tl.constexpr,
):
    """The pixels, after one more window that can have its maximum in these (pixel, tap) of both axes."""
    for h in tl.static_range(len(ROWS)):
        for w in tl.static_range(len(COLUMNS)):
            hit = place == (ROWS[h][1] * KW + COLUMNS[w][1] if OFFSETS else ROWS[h][0] * W + COLUMNS[w][0])
            old = x[ROWS[h][0] * U + COLUMNS[w][0]]
            new = tl.where(hit, old + y if SUM else y, old)
            x = x[: ROWS[h][0] * U + COLUMNS[w][0]] + (new,) + x[ROWS[h][0] * U + COLUMNS[w][0] + 1 :]
    return x


@triton.jit(do_not_specialize=RUNTIME)
def max_pool_small_kernel(
    x_ptr,
    y_ptr,
    index_ptr,
    TOTAL,
    C,
    ID,
    IH,
    IW,
    OD,
    OH,
    OW,
    PAD_D,
    stride_n,
    stride_c,
    stride_d,
    stride_h,
    stride_w,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    NDIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    CHUNK: tl.constexpr,
    JOIN: tl.constexpr,
    INDEX: tl.constexpr,
    OFFSETS: tl.constexpr,
    ACC: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    V: tl.constexpr,
    U: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
):
    """`max_pool_kernel` without dilation. Of a row first the maximum along W, for all windows that it is in."""
    ROWS: tl.constexpr = lane_axis(V, PAD_H, KH, SH, 1, 0, False)
    COLUMNS: tl.constexpr = lane_axis(U, PAD_W, KW, SW, 1, 0, False)
    READ: tl.constexpr = positions(ROWS)
    mask, n, c, od, oh, ow = lane_of(TOTAL, C, OD, OH, OW, NDIM, CHANNELS_LAST, INDEX, V, U, CHANNELS, LANES)
    id0 = od * SD - PAD_D
    ih0 = oh * SH
    iw0 = ow * SW
    tap_d, _ = first_tap(id0, ID, KD, 1)
    best = ()
    where = ()
    # What is outside is -inf; where all is, the first tap that is inside stays. There is one: padding is half a window.
    for v in tl.static_range(V):
        tap_h = tl.maximum(PAD_H - v * SH - ih0, 0)
        for j in tl.static_range(U):
            tap_w = tl.maximum(PAD_W - j * SW - iw0, 0)
            if OFFSETS:
                inside_first = (tap_d * KH + tap_h) * KW + tap_w
            else:
                row = (id0 + tap_d) * IH + ih0 + (v * SH - PAD_H) + tap_h
                inside_first = row * IW + iw0 + (j * SW - PAD_W) + tap_w
            best = best + (tl.full([LANES, CHANNELS], float("-inf"), ACC),)
            where = where + (tl.broadcast_to(inside_first.to(INDEX)[:, None], [LANES, CHANNELS]),)
    offs = n.to(tl.int64) * stride_n + iw0.to(tl.int64) * stride_w
    if NDIM >= 2:
        offs += ih0.to(tl.int64) * stride_h
    if NDIM == 3:
        offs += id0.to(tl.int64) * stride_d
    start = x_ptr + elements_of(offs, c, stride_c, CHANNELS_LAST, CHANNELS, VEC)
    to_d = whole(stride_d, VEC)
    to_h = whole(stride_h, VEC)
    to_w = whole(stride_w, VEC if CHANNELS_LAST else 1)
    for kd in range(0, KD):
        plane = start
        mask_plane = mask
        if NDIM == 3:
            plane = start + kd * to_d
            mask_plane = mask & inside(id0 + kd, ID)
        for i in tl.static_range(len(READ)):
            pointers = plane
            mask_row = mask_plane
            if NDIM >= 2:
                pointers = plane + READ[i] * to_h
                mask_row = mask_plane & holds(ih0, READ[i], IH, True)
            columns = row_of(pointers, mask_row, iw0, IW, to_w, float("-inf"), COLUMNS, CHUNK, ACC, ASSEMBLY)
            place = kd * (KH * KW) if OFFSETS else (((id0 + kd) * IH + ih0 + READ[i]) * IW + iw0).to(INDEX)[:, None]
            best, where = compare_row(best, where, columns, place, ROWS, COLUMNS, READ[i], CHUNK, INDEX, OFFSETS)
    first, of_row, of_column = dense(n, c, od, oh, ow, C, OD, OH, OW, CHANNELS_LAST, CHANNELS, U if JOIN else 1)
    for v in tl.static_range(V):
        there = mask & (oh + v < OH)
        at = first + v * of_row
        store_row(y_ptr, at, there, best[v * U : (v + 1) * U], ow, OW, of_column, JOIN, U)
        store_row(index_ptr, at, there, where[v * U : (v + 1) * U], ow, OW, of_column, JOIN, U)


@triton.jit(do_not_specialize=RUNTIME)
def spread_small_kernel(
    y_ptr,
    index_ptr,
    x_ptr,
    TOTAL,
    C,
    ID,
    IH,
    IW,
    OD,
    OH,
    OW,
    PAD_D,
    stride_n,
    stride_c,
    stride_d,
    stride_h,
    stride_w,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    NDIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    CHUNK: tl.constexpr,
    JOIN: tl.constexpr,
    INDEX: tl.constexpr,
    OFFSETS: tl.constexpr,
    SUM: tl.constexpr,
    ACC: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    V: tl.constexpr,
    U: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
):
    """`spread_kernel` without dilation: V and U are multiples of the strides, so that a pixel's windows are known."""
    ROWS: tl.constexpr = lane_axis(V, PAD_H, KH, SH, 1, 0, True)
    COLUMNS: tl.constexpr = lane_axis(U, PAD_W, KW, SW, 1, 0, True)
    READ_H: tl.constexpr = positions(ROWS)
    READ_W: tl.constexpr = positions(COLUMNS)
    STEPS_D: tl.constexpr = steps_of(KD, SD, 1)
    PLACE: tl.constexpr = tl.int32 if OFFSETS else INDEX
    mask, n, c, d, ih, iw = lane_of(TOTAL, C, ID, IH, IW, NDIM, CHANNELS_LAST, INDEX, V, U, CHANNELS, LANES)
    oh0 = ih // SH
    ow0 = iw // SW
    x = ()
    for _ in tl.static_range(V * U):
        x = x + (tl.zeros([LANES, CHANNELS], dtype=ACC),)
    offs = n.to(tl.int64) * stride_n + ow0.to(tl.int64) * stride_w
    if NDIM >= 2:
        offs += oh0.to(tl.int64) * stride_h
    to_h = whole(stride_h, VEC)
    to_w = whole(stride_w, VEC if CHANNELS_LAST else 1)
    for step in range(0, STEPS_D):
        # Windows come in row-major order, the last one last.
        od, tap_d, mask_plane = window_of(STEPS_D - 1 - step, d, PAD_D, OD, KD, SD, 1)
        mask_plane = mask_plane & mask
        start = offs
        if NDIM == 3:
            start = offs + od.to(tl.int64) * stride_d
        start = elements_of(start, c, stride_c, CHANNELS_LAST, CHANNELS, VEC)
        for i in tl.static_range(len(READ_H)):
            row = start
            mask_row = mask_plane
            if NDIM >= 2:
                row = start + READ_H[len(READ_H) - 1 - i] * to_h
                mask_row = mask_plane & holds(oh0, READ_H[len(READ_H) - 1 - i], OH, True)
            # No small window has 256 taps, and no image a pixel -1.
            nowhere = 255 if OFFSETS else -1
            places = row_of(index_ptr + row, mask_row, ow0, OW, to_w, nowhere, COLUMNS, CHUNK, PLACE, False)
            values = row_of(y_ptr + row, mask_row, ow0, OW, to_w, 0.0, COLUMNS, CHUNK, ACC, ASSEMBLY)
            for k in tl.static_range(len(READ_W)):
                place = places[slot(COLUMNS, READ_W[len(READ_W) - 1 - k], CHUNK)]
                y = values[slot(COLUMNS, READ_W[len(READ_W) - 1 - k], CHUNK)]
                if not OFFSETS:
                    place -= ((d * IH + ih) * IW + iw).to(INDEX)[:, None]
                elif NDIM == 3:
                    place -= (tap_d * (KH * KW)).to(tl.int32)[:, None]
                x = give(
                    x,
                    y,
                    place,
                    IW,
                    joined(ROWS, READ_H[len(READ_H) - 1 - i]),
                    joined(COLUMNS, READ_W[len(READ_W) - 1 - k]),
                    U,
                    KW,
                    OFFSETS,
                    SUM,
                )
    first, of_row, of_column = dense(n, c, d, ih, iw, C, ID, IH, IW, CHANNELS_LAST, CHANNELS, U if JOIN else 1)
    for v in tl.static_range(V):
        there = mask & (ih + v < IH)
        store_row(x_ptr, first + v * of_row, there, x[v * U : (v + 1) * U], iw, IW, of_column, JOIN, U)
