"""Kernels of max-pooling and unpooling. One lane per element of the result, in the order in which it lies in memory."""

import triton
import triton.language as tl

from ..tile import element_offset, unravel

RUNTIME = ["NUMEL", "C", "ID", "IH", "IW", "OD", "OH", "OW", "PAD_D", "PAD_H", "PAD_W"]
RUNTIME += [f"stride_{tensor}{axis}" for tensor in "xy" for axis in "ncdhw"]


@triton.jit
def locate(
    NUMEL, C, D, H, W, NDIM: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr
):
    """This program's elements as (n, c, d, h, w), and which of them exist. INDEX: an integer that holds them all."""
    element = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = element < NUMEL
    if CHANNELS_LAST:
        n, d, h, w = unravel(element // C, D, H, W, NDIM)  # pyright: ignore[reportGeneralTypeIssues]
        c = element % C
    else:
        plane, d, h, w = unravel(element, D, H, W, NDIM)  # pyright: ignore[reportGeneralTypeIssues]
        n = plane // C
        c = plane % C
    return n, c, d, h, w, mask


@triton.jit
def compare(
    x_ptr,
    best,
    where,
    tap,
    n,
    c,
    d,
    h,
    w,
    mask,
    ID,
    IH,
    IW,
    PAD_D,
    PAD_H,
    PAD_W,
    stride_xn,
    stride_xc,
    stride_xd,
    stride_xh,
    stride_xw,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DD: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    NDIM: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """The larger of `best` and one tap, and its place; the first of equals, and NaN above all, as torch."""
    i_d = d * SD - PAD_D + tap // (KH * KW) * DD
    i_h = h * SH - PAD_H + tap // KW % KH * DH
    i_w = w * SW - PAD_W + tap % KW * DW
    inside = mask & (i_w >= 0) & (i_w < IW) & (i_h >= 0) & (i_h < IH) & (i_d >= 0) & (i_d < ID)
    offs = element_offset(n, i_d, i_h, i_w, stride_xn, stride_xd, stride_xh, stride_xw, NDIM, 1)
    x = tl.load(x_ptr + offs + c.to(tl.int64) * stride_xc, mask=inside, other=float("-inf")).to(best.dtype)
    better = inside & ((where < 0) | (x > best) | (x != x))
    place = tap if OFFSETS else (i_d * IH + i_h) * IW + i_w
    return tl.where(better, x, best), tl.where(better, place, where)


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
    UNROLL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[o] = max over the window of o, and its place. x is the image, y and index the pooled side."""
    n, c, d, h, w, mask = locate(NUMEL, C, OD, OH, OW, NDIM, CHANNELS_LAST, INDEX, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    best = tl.full([BLOCK], float("-inf"), ACC)
    where = tl.full([BLOCK], -1, INDEX)
    TAPS: tl.constexpr = KD * KH * KW
    if UNROLL:
        for tap in tl.static_range(TAPS):  # pyright: ignore[reportGeneralTypeIssues]
            best, where = compare(  # pyright: ignore[reportGeneralTypeIssues]
                x_ptr,
                best,
                where,
                tap,
                n,
                c,
                d,
                h,
                w,
                mask,
                ID,
                IH,
                IW,
                PAD_D,
                PAD_H,
                PAD_W,
                stride_xn,
                stride_xc,
                stride_xd,
                stride_xh,
                stride_xw,
                KH,
                KW,
                SD,
                SH,
                SW,
                DD,
                DH,
                DW,
                NDIM,
                OFFSETS,
            )
    else:
        for tap in range(TAPS):
            best, where = compare(  # pyright: ignore[reportGeneralTypeIssues]
                x_ptr,
                best,
                where,
                tap,
                n,
                c,
                d,
                h,
                w,
                mask,
                ID,
                IH,
                IW,
                PAD_D,
                PAD_H,
                PAD_W,
                stride_xn,
                stride_xc,
                stride_xd,
                stride_xh,
                stride_xw,
                KH,
                KW,
                SD,
                SH,
                SW,
                DD,
                DH,
                DW,
                NDIM,
                OFFSETS,
            )
    offs = element_offset(n, d, h, w, stride_yn, stride_yd, stride_yh, stride_yw, NDIM, 1)
    offs += c.to(tl.int64) * stride_yc
    tl.store(y_ptr + offs, best.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(index_ptr + offs, where.to(index_ptr.dtype.element_ty), mask=mask)


@triton.jit
def receive(
    y_ptr,
    index_ptr,
    x,
    tap,
    n,
    c,
    d,
    h,
    w,
    mask,
    IH,
    IW,
    OD,
    OH,
    OW,
    PAD_D,
    PAD_H,
    PAD_W,
    stride_yn,
    stride_yc,
    stride_yd,
    stride_yh,
    stride_yw,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DD: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    NDIM: tl.constexpr,
    OFFSETS: tl.constexpr,
    SUM: tl.constexpr,
):
    """x with what the window that reaches this pixel through one tap gives it, if its maximum was here."""
    t_d = d + PAD_D - tap // (KH * KW) * DD
    t_h = h + PAD_H - tap // KW % KH * DH
    t_w = w + PAD_W - tap % KW * DW
    reached = mask & (t_d >= 0) & (t_h >= 0) & (t_w >= 0) & (t_d % SD == 0) & (t_h % SH == 0) & (t_w % SW == 0)
    o_d, o_h, o_w = t_d // SD, t_h // SH, t_w // SW
    reached = reached & (o_d < OD) & (o_h < OH) & (o_w < OW)
    offs = element_offset(n, o_d, o_h, o_w, stride_yn, stride_yd, stride_yh, stride_yw, NDIM, 1)
    offs += c.to(tl.int64) * stride_yc
    place = tl.load(index_ptr + offs, mask=reached, other=0)
    here = tap if OFFSETS else (d * IH + h) * IW + w
    hit = reached & (place.to(tl.int64) == here)
    y = tl.load(y_ptr + offs, mask=hit, other=0.0).to(x.dtype)
    return x + y if SUM else tl.where(hit, y, x)


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
    UNROLL: tl.constexpr,
    SUM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x[i] = sum, or last, of y[o] over the windows o that have their maximum at i; each x[i] is written once."""
    n, c, d, h, w, mask = locate(NUMEL, C, ID, IH, IW, NDIM, CHANNELS_LAST, INDEX, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    x = tl.zeros([BLOCK], dtype=ACC)
    TAPS: tl.constexpr = KD * KH * KW
    # From the last tap to the first: the windows in row-major order, the last one last.
    if UNROLL:
        for step in tl.static_range(TAPS):  # pyright: ignore[reportGeneralTypeIssues]
            x = receive(
                y_ptr,
                index_ptr,
                x,
                TAPS - 1 - step,
                n,
                c,
                d,
                h,
                w,
                mask,
                IH,
                IW,
                OD,
                OH,
                OW,
                PAD_D,
                PAD_H,
                PAD_W,
                stride_yn,
                stride_yc,
                stride_yd,
                stride_yh,
                stride_yw,
                KH,
                KW,
                SD,
                SH,
                SW,
                DD,
                DH,
                DW,
                NDIM,
                OFFSETS,
                SUM,
            )
    else:
        for step in range(TAPS):
            x = receive(
                y_ptr,
                index_ptr,
                x,
                TAPS - 1 - step,
                n,
                c,
                d,
                h,
                w,
                mask,
                IH,
                IW,
                OD,
                OH,
                OW,
                PAD_D,
                PAD_H,
                PAD_W,
                stride_yn,
                stride_yc,
                stride_yd,
                stride_yh,
                stride_yw,
                KH,
                KW,
                SD,
                SH,
                SW,
                DD,
                DH,
                DW,
                NDIM,
                OFFSETS,
                SUM,
            )
    offs = element_offset(n, d, h, w, stride_xn, stride_xd, stride_xh, stride_xw, NDIM, 1)
    tl.store(x_ptr + offs + c.to(tl.int64) * stride_xc, x.to(x_ptr.dtype.element_ty), mask=mask)


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
    BLOCK: tl.constexpr,
):
    """y[o] = x at the place that index[o] names, or 0 where that is outside of x, in 64 bits."""
    n, c, d, h, w, mask = locate(NUMEL, C, OD, OH, OW, NDIM, CHANNELS_LAST, INDEX, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    offs_y = element_offset(n, d, h, w, stride_yn, stride_yd, stride_yh, stride_yw, NDIM, 1)
    offs_y += c.to(tl.int64) * stride_yc
    place = tl.load(index_ptr + offs_y, mask=mask, other=0).to(tl.int64)
    mask_x = mask & (place >= 0) & (place < tl.cast(ID, tl.int64) * IH * IW)
    place = tl.where(mask_x, place, 0).to(INDEX)
    if OFFSETS:
        i_d = d * SD - PAD_D + place // (KH * KW) * DD
        i_h = h * SH - PAD_H + place // KW % KH * DH
        i_w = w * SW - PAD_W + place % KW * DW
    else:
        i_d = place // IW // IH
        i_h = place // IW % IH
        i_w = place % IW
    mask_x = mask_x & (i_w >= 0) & (i_w < IW) & (i_h >= 0) & (i_h < IH) & (i_d >= 0) & (i_d < ID)
    offs_x = element_offset(n, i_d, i_h, i_w, stride_xn, stride_xd, stride_xh, stride_xw, NDIM, 1)
    x = tl.load(x_ptr + offs_x + c.to(tl.int64) * stride_xc, mask=mask_x, other=0.0)
    tl.store(y_ptr + offs_y, x, mask=mask)


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
