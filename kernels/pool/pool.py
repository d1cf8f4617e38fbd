"""Kernels of max-pooling and unpooling. One lane per element of the result, in the order in which it lies in memory.

So a result is written as it lies, several elements of a lane in one store. VEC, 16 or 1, is a divisor of NUMEL * VEC
elements, and of C * VEC channels where these come last: the compiler has to see it. READ_VEC is one of every stride of
the tensor that is read, whose channels then lie side by side.
"""

import triton
import triton.language as tl

from ..tile import in_bounds, unravel

RUNTIME = ["NUMEL", "C", "ID", "IH", "IW", "OD", "OH", "OW", "PAD_D", "PAD_H", "PAD_W"]
RUNTIME += [f"stride_{axis}" for axis in "ncdhw"]


@triton.jit
def locate(
    NUMEL,
    C,
    D,
    H,
    W,
    NDIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program's elements, which of them exist, and each as (n, c, d, h, w). INDEX: an integer that holds them."""
    element = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = element < NUMEL * VEC
    if CHANNELS_LAST:
        n, d, h, w = unravel(element // (C * VEC), D, H, W, NDIM)  # pyright: ignore[reportGeneralTypeIssues]
        c = element % (C * VEC)
    else:
        plane, d, h, w = unravel(element, D, H, W, NDIM)  # pyright: ignore[reportGeneralTypeIssues]
        n = plane // C
        c = plane % C
    return element, mask, n, c, d, h, w


@triton.jit
def address(
    plane,
    c,
    d,
    h,
    w,
    stride_c,
    stride_d,
    stride_h,
    stride_w,
    NDIM: tl.constexpr,
    READ_VEC: tl.constexpr,
):
    """Offset of an element in 64 bits, `plane` being that of its image."""
    offset = plane + w.to(tl.int64) * stride_w
    if NDIM >= 2:
        offset += h.to(tl.int64) * stride_h
    if NDIM == 3:
        offset += d.to(tl.int64) * stride_d
    if READ_VEC > 1:
        return tl.multiple_of(offset, READ_VEC) + c
    return offset + c.to(tl.int64) * stride_c


@triton.jit
def reached_by(tap, i, PAD, WINDOWS, S: tl.constexpr, D: tl.constexpr):
    """The window that has pixel i of an axis as its `tap`, and whether there is one."""
    start = i + PAD - tap * D
    o = start // S
    return o, (start >= 0) & (start == o * S) & (o < WINDOWS)


@triton.jit(do_not_specialize=RUNTIME)
def max_pool_kernel(
    x_ptr,
    y_ptr,
    index_ptr,
    NUMEL,
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
    VEC: tl.constexpr,
    READ_VEC: tl.constexpr,
    INDEX: tl.constexpr,
    OFFSETS: tl.constexpr,
    UNROLL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[o] = max over the window of o, and its place: the first of equals, and NaN above all, as torch."""
    element, mask, n, c, d, h, w = locate(NUMEL, C, OD, OH, OW, NDIM, CHANNELS_LAST, VEC, INDEX, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    plane = n.to(tl.int64) * stride_n
    d = d * SD - PAD_D
    h = h * SH - PAD_H
    w = w * SW - PAD_W
    best = tl.full([BLOCK], float("-inf"), ACC)
    where = tl.full([BLOCK], -1, INDEX)
    for tap in tl.range(KD * KH * KW, loop_unroll_factor=UNROLL):
        i_d = d + tap // (KH * KW) * DD
        i_h = h + tap // KW % KH * DH
        i_w = w + tap % KW * DW
        inside = mask & in_bounds(i_d, i_h, i_w, ID, IH, IW, NDIM)
        offs = address(plane, c, i_d, i_h, i_w, stride_c, stride_d, stride_h, stride_w, NDIM, READ_VEC)
        x = tl.load(x_ptr + offs, mask=inside, other=float("-inf")).to(ACC)
        better = inside & ((where < 0) | (x > best) | (x != x))
        best = tl.where(better, x, best)
        where = tl.where(better, tap if OFFSETS else (i_d * IH + i_h) * IW + i_w, where)
    tl.store(y_ptr + element, best.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(index_ptr + element, where.to(index_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def spread_kernel(
    y_ptr,
    index_ptr,
    x_ptr,
    NUMEL,
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
    VEC: tl.constexpr,
    READ_VEC: tl.constexpr,
    INDEX: tl.constexpr,
    OFFSETS: tl.constexpr,
    UNROLL: tl.constexpr,
    SUM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x[i] = sum, or last, of y[o] over the windows o that have their maximum at i; each x[i] is written once."""
    element, mask, n, c, d, h, w = locate(NUMEL, C, ID, IH, IW, NDIM, CHANNELS_LAST, VEC, INDEX, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    plane = n.to(tl.int64) * stride_n
    pixel = (d * IH + h) * IW + w
    x = tl.zeros([BLOCK], dtype=ACC)
    for step in tl.range(KD * KH * KW, loop_unroll_factor=UNROLL):
        tap = KD * KH * KW - 1 - step  # from the last to the first: the windows in row-major order, the last one last
        o_d, o_h = d, h
        o_w, reached = reached_by(tap % KW, w, PAD_W, OW, SW, DW)  # pyright: ignore[reportGeneralTypeIssues]
        reached = mask & reached
        if NDIM >= 2:
            o_h, hit = reached_by(tap // KW % KH, h, PAD_H, OH, SH, DH)  # pyright: ignore[reportGeneralTypeIssues]
            reached = reached & hit
        if NDIM == 3:
            o_d, hit = reached_by(tap // (KH * KW), d, PAD_D, OD, SD, DD)  # pyright: ignore[reportGeneralTypeIssues]
            reached = reached & hit
        offs = address(plane, c, o_d, o_h, o_w, stride_c, stride_d, stride_h, stride_w, NDIM, READ_VEC)
        place = tl.load(index_ptr + offs, mask=reached, other=0)
        # Not only where the place is here: then this load would wait for the other, lane by lane.
        y = tl.load(y_ptr + offs, mask=reached, other=0.0).to(ACC)
        hit = reached & (place == (tap if OFFSETS else pixel))
        x = tl.where(hit, x + y if SUM else y, x)
    tl.store(x_ptr + element, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def pick_kernel(
    x_ptr,
    index_ptr,
    y_ptr,
    NUMEL,
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
    VEC: tl.constexpr,
    READ_VEC: tl.constexpr,
    INDEX: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[o] = x at the place that index[o] names, or 0 where that is outside of x, in 64 bits."""
    element, mask, n, c, d, h, w = locate(NUMEL, C, OD, OH, OW, NDIM, CHANNELS_LAST, VEC, INDEX, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
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
    offs = address(n.to(tl.int64) * stride_n, c, i_d, i_h, i_w, stride_c, stride_d, stride_h, stride_w, NDIM, 1)
    x = tl.load(x_ptr + offs, mask=named, other=0.0)
    tl.store(y_ptr + element, x, mask=mask)


@triton.jit(do_not_specialize=["NUMEL", "OUT", "IN"])
def claim_kernel(index_ptr, owner_ptr, NUMEL, OUT, IN, BLOCK: tl.constexpr):
    """owner[plane, index[o]] = the largest o that names it; contiguous planes of OUT pooled values, IN pixels.

    Compared in 64 bits: an index outside of the plane claims nothing. The maximum is the same in any order.
    """
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < NUMEL
    index = tl.load(index_ptr + element, mask=mask, other=-1)
    mask = mask & (index >= 0) & (index < IN)
    tl.atomic_max(owner_ptr + element // OUT * IN + index, element % OUT, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["NUMEL", "OUT", "IN"])
def fill_kernel(y_ptr, owner_ptr, x_ptr, NUMEL, OUT, IN, BLOCK: tl.constexpr):
    """x[plane, i] = y[plane, owner[plane, i]], or 0 where nobody owns i."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < NUMEL
    owner = tl.load(owner_ptr + element, mask=mask, other=-1)
    y = tl.load(y_ptr + element // IN * OUT + owner, mask=mask & (owner >= 0), other=0.0)
    tl.store(x_ptr + element, y, mask=mask)
