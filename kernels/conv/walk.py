"""The sum of X and X^T, walked by blocks of channels within a tap and from tap to tap.

Beside each product of a tile a multiprocessor has time for few other instructions. So nothing is divided and little is
multiplied on the way: addresses grow by jumps known before the first step, a bit says whether a tap meets an input
pixel, and rows and columns that are not stored read what is anywhere near instead of being masked.
"""

import triton
import triton.language as tl

from ..tf32 import rounded
from ..tile import dot, in_bounds, inside, outer_and, outer_column, outer_row, outer_sum, rows_by_columns


@triton.jit
def within(offs, SIZE, VEC: tl.constexpr):
    """The offsets, those from SIZE on turned back to the first VEC. Both offs and SIZE come in runs of VEC."""
    return tl.max_contiguous(tl.multiple_of(tl.where(offs < SIZE, offs, offs % VEC), VEC), VEC)


@triton.jit
def make_jumps(channels, stride_c, hops, strides, taps, blocks, INDEX: tl.constexpr):
    """By what an offset grows from a block of channels to the next, and from the last block of a tap to the first of
    the next one along w, of the next row and of the next plane of taps; where the next tap lies `hops` of `strides`
    away along each axis."""
    inner = channels * tl.cast(stride_c, INDEX)
    hop_d = hops[0] * tl.cast(strides[0], INDEX)
    hop_h = hops[1] * tl.cast(strides[1], INDEX)
    hop_w = hops[2] * tl.cast(strides[2], INDEX)
    to_w = hop_w - inner * (blocks - 1)
    to_h = to_w + hop_h - hop_w * taps[2]
    return inner, to_w, to_h, to_h + hop_d - hop_h * taps[1]


@triton.jit
def _jump(jumps, ends, NDIM: tl.constexpr, VEC: tl.constexpr):
    """The one to take where these end: a tap, a row of taps, a plane. A multiple of VEC."""
    step = tl.where(ends[0], jumps[1], jumps[0])
    if NDIM >= 2:
        step = tl.where(ends[1], jumps[2], step)
    if NDIM == 3:
        step = tl.where(ends[2], jumps[3], step)
    return tl.multiple_of(step, VEC)


@triton.jit
def _advance(c, tap, C, taps, NDIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """The next step's first channel and tap (index along d, h and w, and count), and what ends before it."""
    jd, jh, jw, count = tap
    c += BLOCK_K
    tap_ends = c >= C
    c = tl.where(tap_ends, 0, c)
    count += tap_ends.to(tl.int32)
    jw += tap_ends.to(tl.int32)
    row_ends = jw == taps[2]
    plane_ends = row_ends
    if NDIM >= 2:
        jw = tl.where(row_ends, 0, jw)
        jh += row_ends.to(tl.int32)
        plane_ends = jh == taps[1]
    if NDIM == 3:
        jh = tl.where(plane_ends, 0, jh)
        jd += plane_ends.to(tl.int32)
    return c, (jd, jh, jw, count), (tap_ends, row_ends, plane_ends)


@triton.jit
def _meeting_along(start, hop, SIZE, taps, run, MOST: tl.constexpr):
    """Bit j run for every tap j < taps of one axis for which start + hop j is a pixel."""
    bits = (start * 0).to(tl.int32)
    for j in tl.static_range(MOST):  # pyright: ignore[reportGeneralTypeIssues]
        meets = inside(start + j * hop, SIZE) & (j < taps)
        bits |= meets.to(tl.int32) << (j * run)
    return bits


@triton.jit
def _meeting_taps(pixel, hops, sizes, taps, NDIM: tl.constexpr, MOST: tl.constexpr):
    """A bit of every tap, in the order of the walk: whether it meets an input pixel. The 32nd is the sign."""
    bits = _meeting_along(pixel[2], hops[2], sizes[2], taps[2], 1, MOST[2])
    if NDIM >= 2:
        rows = _meeting_along(pixel[1], hops[1], sizes[1], taps[1], taps[2], MOST[1])
        bits = tl.mul(bits, rows, sanitize_overflow=False)
    if NDIM == 3:
        planes = _meeting_along(pixel[0], hops[0], sizes[0], taps[0], taps[1] * taps[2], MOST[0])
        bits = tl.mul(bits, planes, sanitize_overflow=False)
    return bits


@triton.jit
def _meets(bits, count, pixel, tap, hops, sizes, NDIM: tl.constexpr, BITS: tl.constexpr):
    """Whether a tap, given by its count and along each axis, meets an input pixel."""
    if BITS:
        return (bits >> count) & 1 != 0
    d, h, w = pixel[0] + tap[0] * hops[0], pixel[1] + tap[1] * hops[1], pixel[2] + tap[2] * hops[2]
    return in_bounds(d, h, w, sizes[0], sizes[1], sizes[2], NDIM)


@triton.jit
def walk(
    acc,  # [BLOCK_M, BLOCK_N]
    x_ptrs,  # [BLOCK_M, BLOCK_K], without X_LAST [BLOCK_K, BLOCK_M]: first channels of the first tap
    w_ptrs,  # [BLOCK_K, BLOCK_N]
    x_jumps,
    w_jumps,
    pixel,  # [BLOCK_M] along d, h and w: the input pixel of the first tap
    hops,  # how far from it the next tap's lies, along each axis
    sizes,  # of the input
    taps,
    C,
    NDIM: tl.constexpr,
    W_NDIM: tl.constexpr,
    SEVERAL: tl.constexpr,
    PADDED: tl.constexpr,
    MOST: tl.constexpr,
    EVEN: tl.constexpr,
    X_LAST: tl.constexpr,
    X_VEC: tl.constexpr,
    W_VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + sum over taps and channels c < C of x w. Taps, hops, sizes and pixels are triples, one for each axis.

    Without SEVERAL there is one tap; without PADDED every tap meets a pixel, else at most MOST do along each axis;
    with EVEN the blocks of BLOCK_K channels have none left over.
    """
    offs_k = tl.arange(0, BLOCK_K)
    BITS: tl.constexpr = MOST[0] * MOST[1] * MOST[2] <= 32
    bits = pixel[2]
    if PADDED and BITS:
        bits = _meeting_taps(pixel, hops, sizes, taps, NDIM, MOST)
    c = 0
    tap = (0, 0, 0, 0)
    x_offset = x_jumps[0] * 0
    w_offset = w_jumps[0] * 0
    for _ in range(0, taps[0] * taps[1] * taps[2] * tl.cdiv(C, BLOCK_K)):
        mask_k = offs_k < (BLOCK_K if EVEN else C - c)
        meets = tl.full(pixel[2].shape, True, tl.int1)
        if PADDED:
            meets = _meets(bits, tap[3], pixel, tap, hops, sizes, NDIM, BITS)
        x = tl.load(x_ptrs + x_offset, mask=outer_and(meets, mask_k, X_LAST), other=0.0)
        w = tl.load(w_ptrs + w_offset, mask=mask_k[:, None], other=0.0)
        acc = dot(rounded(rows_by_columns(x, X_LAST), PRECISION), w, acc, PRECISION, UPCAST)
        if SEVERAL:
            c, tap, ends = _advance(c, tap, C, taps, NDIM, BLOCK_K)
            x_offset += _jump(x_jumps, ends, NDIM, X_VEC)
            w_offset += _jump(w_jumps, ends, W_NDIM, W_VEC)
        else:
            c += BLOCK_K
            x_offset += tl.multiple_of(x_jumps[0], X_VEC)
            w_offset += tl.multiple_of(w_jumps[0], W_VEC)
    return acc


@triton.jit
def walk_flat(
    acc,  # [BLOCK_M, BLOCK_N]
    x_ptrs,  # [BLOCK_M]: first channel of the first tap
    w_ptrs,  # [BLOCK_N]
    stride_c,
    strides,  # of the input, along each axis
    pixel,
    hops,
    sizes,
    C,
    NDIM: tl.constexpr,
    PADDED: tl.constexpr,
    TAPS: tl.constexpr,
    X_LAST: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same by blocks of the flat (tap, channel) index, for fewer channels than BLOCK_K: no term is wasted."""
    COUNT: tl.constexpr = TAPS[0] * TAPS[1] * TAPS[2]
    bits = pixel[2]
    if PADDED and COUNT <= 32:
        bits = _meeting_taps(pixel, hops, sizes, TAPS, NDIM, TAPS)
    for k0 in range(0, COUNT * C, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask_k = k < COUNT * C
        count = k // C
        jd, jh, jw = count // (TAPS[1] * TAPS[2]), count // TAPS[2] % TAPS[1], count % TAPS[2]
        offs = k % C * tl.cast(stride_c, INDEX) + jw * hops[2] * tl.cast(strides[2], INDEX)
        if NDIM >= 2:
            offs += jh * hops[1] * tl.cast(strides[1], INDEX)
        if NDIM == 3:
            offs += jd * hops[0] * tl.cast(strides[0], INDEX)
        mask_x = outer_and(tl.full(x_ptrs.shape, True, tl.int1), mask_k, X_LAST)
        if PADDED:
            mask_x &= _meets(
                outer_row(bits, X_LAST),
                outer_column(count, X_LAST),
                (outer_row(pixel[0], X_LAST), outer_row(pixel[1], X_LAST), outer_row(pixel[2], X_LAST)),
                (outer_column(jd, X_LAST), outer_column(jh, X_LAST), outer_column(jw, X_LAST)),
                hops,
                sizes,
                NDIM,
                COUNT <= 32,
            )
        x = tl.load(outer_sum(x_ptrs, offs, X_LAST), mask=mask_x, other=0.0)
        w = tl.load(w_ptrs[None, :] + k[:, None], mask=mask_k[:, None], other=0.0)
        acc = dot(rounded(rows_by_columns(x, X_LAST), PRECISION), w, acc, PRECISION, UPCAST)
    return acc
