"""Kernels of max-pooling and unpooling, for windows of any size. A lane has U elements of the result that lie side by
side in memory.

They are channels of one pixel where channels come last, else pixels of one row (U divides the row): where they are is
found once for all, and they are written in one store. READ_VEC divides all strides of the tensor that is read but that
of 1 along which lanes lie.
"""

import triton
import triton.language as tl

from ..tile import divide, in_bounds, inside, unravel

RUNTIME = ["TOTAL", "C", "ID", "IH", "IW", "OD", "OH", "OW", "PAD_D", "PAD_H", "PAD_W"]
RUNTIME += [f"stride_{axis}" for axis in "ncdhw"]


@triton.jit
def locate(
    TOTAL,
    C,
    D,
    H,
    W,
    NDIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
    U: tl.constexpr,
    LANES: tl.constexpr,
):
    """The elements [LANES, U] of this program's lanes; of each lane [LANES, 1] whether it exists, and its first element
    as (n, c, d, h, w). INDEX: an integer that holds TOTAL U."""
    lane = tl.program_id(0).to(INDEX) * LANES + tl.arange(0, LANES)
    element = lane[:, None] * U + tl.arange(0, U)[None, :]
    if CHANNELS_LAST:
        pixel, c = divide(lane, C // U)  # pyright: ignore[reportGeneralTypeIssues]
        n, d, h, w = unravel(pixel, D, H, W, NDIM)  # pyright: ignore[reportGeneralTypeIssues]
        c = c * U
    else:
        plane, d, h, w = unravel(lane, D, H, W // U, NDIM)  # pyright: ignore[reportGeneralTypeIssues]
        n, c = divide(plane, C)  # pyright: ignore[reportGeneralTypeIssues]
        w = w * U
    return element, (lane < TOTAL)[:, None], n[:, None], c[:, None], d[:, None], h[:, None], w[:, None]


@triton.jit
def spread_out(c, w, CHANNELS_LAST: tl.constexpr, U: tl.constexpr):
    """Channel and column of every element of a lane, from the first's."""
    along = tl.arange(0, U)[None, :]
    return (c + along, w) if CHANNELS_LAST else (c, w + along)


@triton.jit
def row_offset(
    n,
    c,
    d,
    h,
    stride_n,
    stride_c,
    stride_d,
    stride_h,
    NDIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    READ_VEC: tl.constexpr,
):
    """Offset in 64 bits of what lies before w, and before the channel where channels come last."""
    offset = n.to(tl.int64) * stride_n
    if not CHANNELS_LAST:
        offset += c.to(tl.int64) * stride_c
    if NDIM >= 2:
        offset += h.to(tl.int64) * stride_h
    if NDIM == 3:
        offset += d.to(tl.int64) * stride_d
    return tl.multiple_of(offset, (READ_VEC, READ_VEC))


@triton.jit
def column_offset(
    c,
    w,
    stride_c,
    stride_w,
    CHANNELS_LAST: tl.constexpr,
    READ_VEC: tl.constexpr,
):
    """And of what is left."""
    offset = w.to(tl.int64) * stride_w
    if CHANNELS_LAST:
        # A stride of 1 is said, so that the compiler sees neighbours.
        offset = tl.multiple_of(offset, (READ_VEC, READ_VEC))
        offset += c if READ_VEC > 1 else c.to(tl.int64) * stride_c
    return offset


@triton.jit
def first_tap(start, SIZE, K: tl.constexpr, D: tl.constexpr):
    """The first tap of a window along one axis that is inside of the image, and whether there is one."""
    tap = (tl.maximum(-start, 0) + D - 1) // D
    return tap, (tap < K) & (start + tap * D < SIZE)


@triton.jit
def larger(best, where, x, place):
    """The maximum so far and its place, after one more: the first of equals, and NaN above all, as torch."""
    better = (x > best) | (x != x)
    return tl.where(better, x, best), tl.where(better, place, where)


@triton.jit(do_not_specialize=RUNTIME)
def max_pool_kernel(
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
    PAD_H,
    PAD_W,
    stride_n,
    stride_c,
    stride_d,
    stride_h,
    stride_w,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DD: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    NDIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    READ_VEC: tl.constexpr,
    PADDED: tl.constexpr,
    INDEX: tl.constexpr,
    OFFSETS: tl.constexpr,
    UNROLL: tl.constexpr,
    ACC: tl.constexpr,
    U: tl.constexpr,
    LANES: tl.constexpr,
):
    """y[o] = max over the window of o, and its place. Without PADDED no window reaches over an edge."""
    element, mask, n, c, d, h, first = locate(TOTAL, C, OD, OH, OW, NDIM, CHANNELS_LAST, INDEX, U, LANES)  # pyright: ignore[reportGeneralTypeIssues]
    c, w = spread_out(c, first, CHANNELS_LAST, U)  # pyright: ignore[reportGeneralTypeIssues]
    d = d * SD - PAD_D
    h = h * SH - PAD_H
    w = w * SW - PAD_W
    best = tl.full([LANES, U], float("-inf"), ACC)
    # Nothing is larger than the first tap that is inside, if all are -inf; and what is outside is -inf.
    tap_d, tap_h, tap_w = 0, 0, 0
    there = mask
    if PADDED:
        tap_w, there = first_tap(w, IW, KW, DW)  # pyright: ignore[reportGeneralTypeIssues]
        if NDIM >= 2:
            tap_h, hit = first_tap(h, IH, KH, DH)  # pyright: ignore[reportGeneralTypeIssues]
            there = there & hit
        if NDIM == 3:
            tap_d, hit = first_tap(d, ID, KD, DD)  # pyright: ignore[reportGeneralTypeIssues]
            there = there & hit
    if OFFSETS:
        where = tl.where(there, (tap_d * KH + tap_h) * KW + tap_w, -1)
    else:
        where = tl.where(there, ((d + tap_d * DD) * IH + h + tap_h * DH) * IW + w + tap_w * DW, -1)
    where = tl.broadcast_to(where, [LANES, U]).to(INDEX)
    for step in tl.range(KD * KH * KW, loop_unroll_factor=UNROLL):
        i_d = d + step // (KH * KW) * DD
        i_h = h + step // KW % KH * DH
        i_w = w + step % KW * DW
        row = x_ptr + row_offset(n, c, i_d, i_h, stride_n, stride_c, stride_d, stride_h, NDIM, CHANNELS_LAST, READ_VEC)
        there = mask
        if PADDED:
            there = mask & in_bounds(i_d, i_h, i_w, ID, IH, IW, NDIM)
        offs = column_offset(c, i_w, stride_c, stride_w, CHANNELS_LAST, READ_VEC)
        x = tl.load(row + offs, mask=there, other=float("-inf")).to(ACC)
        best, where = larger(best, where, x, step if OFFSETS else (i_d * IH + i_h) * IW + i_w)
    tl.store(y_ptr + element, best.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(index_ptr + element, where.to(index_ptr.dtype.element_ty), mask=mask)


@triton.jit
def window_of(step, i, PAD, WINDOWS, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    """The step-th window, from the last to the first, that pixel i of an axis is in: its number, as which tap it has
    the pixel, and whether it is there. Windows of `steps_of` steps are all that can be."""
    if D == 1:
        o = (i + PAD) // S - step
        tap = i + PAD - o * S
        there = (tap < K) & inside(o, WINDOWS)
    else:
        tap = step
        start = i + PAD - step * D
        o = start // S
        there = (start == o * S) & inside(o, WINDOWS) & (start >= 0)
    return o, tap, there


@triton.constexpr_function
def steps_of(K, S, D):
    return -(-K // S) if D == 1 else K


@triton.jit(do_not_specialize=RUNTIME)
def spread_kernel(
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
    PAD_H,
    PAD_W,
    stride_n,
    stride_c,
    stride_d,
    stride_h,
    stride_w,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DD: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    NDIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    READ_VEC: tl.constexpr,
    INDEX: tl.constexpr,
    OFFSETS: tl.constexpr,
    UNROLL: tl.constexpr,
    SUM: tl.constexpr,
    ACC: tl.constexpr,
    U: tl.constexpr,
    LANES: tl.constexpr,
):
    """x[i] = sum, or last, of y[o] over the windows o that have their maximum at i; each x[i] is written once."""
    element, mask, n, c, d, h, first = locate(TOTAL, C, ID, IH, IW, NDIM, CHANNELS_LAST, INDEX, U, LANES)  # pyright: ignore[reportGeneralTypeIssues]
    c, w = spread_out(c, first, CHANNELS_LAST, U)  # pyright: ignore[reportGeneralTypeIssues]
    STEPS_H: tl.constexpr = steps_of(KH, SH, DH)
    STEPS_W: tl.constexpr = steps_of(KW, SW, DW)
    STEPS: tl.constexpr = steps_of(KD, SD, DD) * STEPS_H * STEPS_W
    x = tl.zeros([LANES, U], dtype=ACC)
    for step in tl.range(STEPS, loop_unroll_factor=UNROLL):
        back = STEPS - 1 - step  # so that the windows come in row-major order, the last one last
        o_d, tap_d, there = window_of(back // (STEPS_H * STEPS_W), d, PAD_D, OD, KD, SD, DD)  # pyright: ignore[reportGeneralTypeIssues]
        o_h, tap_h, hit = window_of(back // STEPS_W % STEPS_H, h, PAD_H, OH, KH, SH, DH)  # pyright: ignore[reportGeneralTypeIssues]
        there = there & hit & mask
        row = row_offset(n, c, o_d, o_h, stride_n, stride_c, stride_d, stride_h, NDIM, CHANNELS_LAST, READ_VEC)
        o_w, tap_w, hit = window_of(back % STEPS_W, w, PAD_W, OW, KW, SW, DW)  # pyright: ignore[reportGeneralTypeIssues]
        there = there & hit
        offs = row + column_offset(c, o_w, stride_c, stride_w, CHANNELS_LAST, READ_VEC)
        place = tl.load(index_ptr + offs, mask=there, other=0)
        # Not only where the place is here: then this load would wait for the other, lane by lane.
        y = tl.load(y_ptr + offs, mask=there, other=0.0)
        here = (tap_d * KH + tap_h) * KW + tap_w if OFFSETS else (d * IH + h) * IW + w
        hit = there & (place == here)
        y = y.to(ACC)
        x = tl.where(hit, x + y if SUM else y, x)
    tl.store(x_ptr + element, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def pick_kernel(
    x_ptr,
    index_ptr,
    y_ptr,
    TOTAL,
    C,
    ID,
    IH,
    IW,
    OD,
    OH,
    OW,
    PAD_D,
    PAD_H,
    PAD_W,
    stride_n,
    stride_c,
    stride_d,
    stride_h,
    stride_w,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DD: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    NDIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
    OFFSETS: tl.constexpr,
    U: tl.constexpr,
    LANES: tl.constexpr,
):
    """y[o] = x at the place that index[o] names, or 0 where that is outside of x, in 64 bits."""
    element, mask, n, c, d, h, first = locate(TOTAL, C, OD, OH, OW, NDIM, CHANNELS_LAST, INDEX, U, LANES)  # pyright: ignore[reportGeneralTypeIssues]
    c, w = spread_out(c, first, CHANNELS_LAST, U)  # pyright: ignore[reportGeneralTypeIssues]
    place = tl.load(index_ptr + element, mask=mask, other=0).to(tl.int64)
    if OFFSETS:
        named = mask & (place < KD * KH * KW)
        place = place.to(INDEX)
        i_d = d * SD - PAD_D + place // (KH * KW) * DD
        i_h = h * SH - PAD_H + place // KW % KH * DH
        i_w = w * SW - PAD_W + place % KW * DW
        named = named & in_bounds(i_d, i_h, i_w, ID, IH, IW, NDIM)
    else:
        named = mask & (place >= 0) & (place < tl.cast(ID, tl.int64) * IH * IW)
        _, i_d, i_h, i_w = unravel(tl.where(named, place, 0).to(INDEX), ID, IH, IW, NDIM)  # pyright: ignore[reportGeneralTypeIssues]
    # Neighbours look anywhere: nothing is known of these addresses.
    offs = row_offset(n, c, i_d, i_h, stride_n, stride_c, stride_d, stride_h, NDIM, CHANNELS_LAST, 1)
    offs += column_offset(c, i_w, stride_c, stride_w, CHANNELS_LAST, 1)
    x = tl.load(x_ptr + offs, mask=named, other=0.0)
    tl.store(y_ptr + element, x, mask=mask)


@triton.jit
def in_plane(SIZE, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """This program's plane of SIZE elements, in 64 bits, its elements of it, as INDEX, and which of them exist."""
    tiles = tl.cdiv(SIZE, BLOCK)
    element = (tl.program_id(0) % tiles).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // tiles).to(tl.int64), element, element < SIZE


@triton.jit
def claim_kernel(index_ptr, owner_ptr, OUT, IN, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """owner[plane, index[o]] = the largest o that names it; contiguous planes of OUT pooled values, IN pixels.

    Compared in 64 bits: an index outside of the plane claims nothing. The maximum is the same in any order.
    """
    plane, element, mask = in_plane(OUT, INDEX, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    index = tl.load(index_ptr + plane * OUT + element, mask=mask, other=-1)
    mask = mask & (index >= 0) & (index < IN)
    tl.atomic_max(owner_ptr + plane * IN + index, element, mask=mask, sem="relaxed")


@triton.jit
def fill_kernel(y_ptr, owner_ptr, x_ptr, OUT, IN, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """x[plane, i] = y[plane, owner[plane, i]], or 0 where nobody owns i."""
    plane, element, mask = in_plane(IN, INDEX, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    owner = tl.load(owner_ptr + plane * IN + element, mask=mask, other=-1)
    y = tl.load(y_ptr + plane * OUT + owner, mask=mask & (owner >= 0), other=0.0)
    tl.store(x_ptr + plane * IN + element, y, mask=mask)
