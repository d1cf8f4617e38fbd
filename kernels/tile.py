"""What the kernels of all ops share: pixel indices, addresses, bounds, residue phases and the product."""

import triton
import triton.language as tl


@triton.jit
def divide(value, by):
    """Quotient and remainder of a value of at least 0: without signs, a division takes half the instructions."""
    unsigned = tl.uint64 if value.dtype == tl.int64 else tl.uint32
    by = tl.cast(by, unsigned)
    quotient = value.to(unsigned) // by
    return quotient.to(value.dtype), (value.to(unsigned) - quotient * by).to(value.dtype)


@triton.jit
def unravel(pixel, D, H, W, NDIM: tl.constexpr):
    """Flat pixel index over (n, d, h, w), w fastest, to its four coordinates."""
    n, w = divide(pixel, W)  # pyright: ignore[reportGeneralTypeIssues]
    h = w * 0
    d = w * 0
    if NDIM >= 2:
        n, h = divide(n, H)  # pyright: ignore[reportGeneralTypeIssues]
    if NDIM == 3:
        n, d = divide(n, D)  # pyright: ignore[reportGeneralTypeIssues]
    return n, d, h, w


@triton.jit
def reciprocal(size):
    """(factor, shift) such that `quotient` divides by a size from 1 to 2^31 - 1, here in full once and for all.

    With l = ceil(log2(size)): factor = ceil(2^(31 + l) / size), a number of 32 bits. floor(pixel * factor / 2^(31 + l))
    is then exact for every pixel of 31 bits (Granlund and Montgomery, "Division by invariant integers using
    multiplication", 1994, theorem 4.2).
    """
    # The bits of size - 1, from the exponent of a float: with the second highest bit off it is never rounded up.
    last = size - 1
    shift = tl.maximum(((last & ~(last >> 1)).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)
    # A division of 64 bits would be a call. A float's is off by some hundreds, and then, of what is left, by a half.
    power = tl.full((), 1, tl.int64) << (31 + shift)
    divisor = size.to(tl.float32)
    factor = (power.to(tl.float32) / divisor).to(tl.int64)
    factor += tl.floor((power - factor * size).to(tl.float32) / divisor + 0.5).to(tl.int64)
    factor += (power > factor * size).to(tl.int64)
    return factor.to(tl.uint32), shift.to(tl.uint32)


@triton.jit
def quotient(pixel, factor, shift):
    """pixel // size by two instructions, for pixels from 0 to 2^31 - 1."""
    return (tl.umulhi(pixel.to(tl.uint32) * 2, factor) >> shift).to(tl.int32)


@triton.jit
def divisor(size):
    """What `divide_by` takes to divide by a size: few tensors have pixels past 31 bits, so only those pay for it."""
    return (size, size) if size.dtype == tl.int64 else reciprocal(size)


@triton.jit
def divide_by(pixel, by):
    """pixel // size, for the `divisor` of a size of the pixels' type."""
    return pixel // by[0] if pixel.dtype == tl.int64 else quotient(pixel, by[0], by[1])


@triton.jit
def element_offset(
    n, d, h, w, stride_n, stride_d, stride_h, stride_w, NDIM: tl.constexpr, VEC: tl.constexpr, RUN: tl.constexpr = 1
):
    """Element offset of a pixel, in 64 bits: tensors may pass 2^31 elements.

    All offsets are multiples of VEC; with RUN > 1 (which VEC is then) each RUN of them are consecutive.
    """
    offset = n.to(tl.int64) * stride_n + w.to(tl.int64) * stride_w
    if NDIM >= 2:
        offset += h.to(tl.int64) * stride_h
    if NDIM == 3:
        offset += d.to(tl.int64) * stride_d
    # Said here and not by the caller: on the result of a call the hint would be lost when the call is inlined.
    offset = tl.multiple_of(offset, VEC)
    if RUN > 1:
        offset = tl.max_contiguous(offset, RUN)
    return offset


@triton.jit
def inside(index, SIZE):
    """0 <= index < SIZE, in one comparison."""
    return index.to(tl.uint32) < tl.cast(SIZE, tl.uint32)


@triton.jit
def in_bounds(d, h, w, D, H, W, NDIM: tl.constexpr):
    mask = inside(w, W)
    if NDIM >= 2:
        mask = mask & inside(h, H)
    if NDIM == 3:
        mask = mask & inside(d, D)
    return mask


@triton.jit
def outer_sum(rows, columns, COLUMNS_INNER: tl.constexpr):
    """rows + columns as a tile whose innermost axis is the columns, or else the rows: along it, lanes lie."""
    return rows[:, None] + columns[None, :] if COLUMNS_INNER else columns[:, None] + rows[None, :]


@triton.jit
def outer_row(rows, COLUMNS_INNER: tl.constexpr):
    """What only depends on the row, as a tile to be broadcast."""
    return rows[:, None] if COLUMNS_INNER else rows[None, :]


@triton.jit
def outer_column(columns, COLUMNS_INNER: tl.constexpr):
    return columns[None, :] if COLUMNS_INNER else columns[:, None]


@triton.jit
def outer_and(rows, columns, COLUMNS_INNER: tl.constexpr):
    return rows[:, None] & columns[None, :] if COLUMNS_INNER else columns[:, None] & rows[None, :]


@triton.jit
def rows_by_columns(tile, COLUMNS_INNER: tl.constexpr):
    """The tile of `outer_sum` with the rows as its first axis."""
    return tile if COLUMNS_INNER else tl.trans(tile)


@triton.jit
def residue_phase(index, PAD, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """One axis of a residue phase of X^T, with G = gcd(S, D).

    Output pixels i = residue + S q are reached by the taps r = first + (S / G) j, j < taps, and by no others, from
    the input pixels q + base - (D / G) j. Counting phases by `first` needs no modular inverse and puts the phases
    with the most taps in front; index % G > 0 stands for the residues that no tap reaches.
    """
    first = index // G
    rest = index % G
    residue = ((first * D + rest - PAD) % S + S) % S
    taps = tl.where((rest == 0) & (first < K), (K - first + S // G - 1) // (S // G), 0)
    base = (residue + PAD - first * D) // S
    return first, taps, residue, base


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    # Triton's interpreter multiplies bf16 bit patterns, not values: there (UPCAST) the product is taken in fp32.
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
