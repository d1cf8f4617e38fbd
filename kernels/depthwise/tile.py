"""What the depthwise kernels share: lanes of several rows and columns, and which tap joins an output to what is read.

A tile has ROWS x COLS lanes, and a lane holds V rows by U columns of the output, each element in a tensor of its own.
So every tap is known when the kernel is compiled, an input element is loaded and converted once for all taps that read
it, and where columns are contiguous (NCHW) they are loaded and stored CHUNK at a time.
"""

# A static_range and arithmetic on constexpr are fine for Triton and wrong for a type checker.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false

import math
from typing import NamedTuple

import triton
import triton.language as tl

from ..tile import divide, inside

RUNTIME = ["N", "ID", "IH", "IW", "OD", "OH", "OW", "UNITS", "PAD_D"]
RUNTIME += [f"stride_{tensor}{axis}" for tensor in "xy" for axis in "ndh"]
# Told apart where they are 1: contiguous columns or channels are what wide loads need.
UNIT_STRIDES = ["stride_xc", "stride_xw", "stride_yc", "stride_yw"]

# Two bf16 of one register to fp32: an instruction each. Taken apart first, as Triton does it, the second costs two.
HALVES = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


class LaneAxis(NamedTuple):
    """A lane's outputs along one axis: j reads position i through tap (i + pad - stride j) / dilation, or if transposed
    (j + pad - stride i) / dilation, where that is one. Triton 3.6 makes a plain tuple of it on the way."""

    outputs: int
    pad: int
    taps: int
    stride: int
    dilation: int
    transposed: bool


@triton.constexpr_function
def lane_axis(outputs, pad, taps, stride, dilation, spacing, transposed):
    """With a `spacing`, outputs lie that far apart and positions a dilation, so that they share whatever they read."""
    if spacing:
        return LaneAxis(outputs, 0, taps, stride // math.gcd(stride, dilation), 1, transposed)
    return LaneAxis(outputs, pad, taps, stride, dilation, transposed)


@triton.constexpr_function
def joined(axis, position):
    """All (output, tap) that read a position."""
    axis = LaneAxis(*axis)
    found = []
    for j in range(axis.outputs):
        ahead = j + axis.pad - axis.stride * position if axis.transposed else position + axis.pad - axis.stride * j
        if ahead % axis.dilation == 0 and 0 <= ahead // axis.dilation < axis.taps:
            found.append((j, ahead // axis.dilation))
    return tuple(found)


@triton.constexpr_function
def positions(axis):
    """What any output of a lane reads, in the order in which the taps come up: a large dilation leaves gaps."""
    axis = LaneAxis(*axis)
    reach = axis.dilation * (axis.taps - 1)
    if axis.transposed:
        every = range((axis.outputs - 1 + axis.pad) // axis.stride, (axis.pad - reach) // axis.stride - 1, -1)
    else:
        every = range(-axis.pad, axis.stride * (axis.outputs - 1) + reach - axis.pad + 1)
    return tuple(position for position in every if joined(axis, position))


@triton.constexpr_function
def chunks(axis, CHUNK):
    """The chunks that hold them."""
    return tuple(sorted({position // CHUNK for position in positions(axis)}))


@triton.constexpr_function
def taps_until(axis, index):
    """How many taps have come up in the first `index` positions."""
    return 1 + max((tap for p in positions(axis)[:index] for _, tap in joined(axis, p)), default=-1)


@triton.constexpr_function
def terms(rows, columns, row, chunk, CHUNK, READ, MADE):
    """All (element, output, weight) of a lane that meet in one chunk of what it reads: elements counted by channels of
    a group and columns, outputs by channels, rows and columns, weights by taps and pairs of channels (A, B)."""
    rows, columns = LaneAxis(*rows), LaneAxis(*columns)
    outputs, made_first = rows.outputs * columns.outputs, rows.transposed
    return tuple(
        (
            read * CHUNK + i,
            made * outputs + v * columns.outputs + j,
            (r * columns.taps + s) * (READ * MADE) + (read * MADE + made if made_first else made * READ + read),
        )
        for read in range(READ)
        for i in range(CHUNK)
        for v, r in joined(rows, row)
        for j, s in joined(columns, chunk * CHUNK + i)
        for made in range(MADE)
    )


@triton.jit
def lane_start(q, PAD, OUTPUTS: tl.constexpr, S: tl.constexpr, SPACING: tl.constexpr, TRANSPOSED: tl.constexpr):
    """At lanes q of one axis: the first output's index, and the input index of position 0."""
    if SPACING == 0:
        return q * OUTPUTS, q * (OUTPUTS // S if TRANSPOSED else OUTPUTS * S)
    else:
        block, rest = divide(q, SPACING)
        first = block * (OUTPUTS * SPACING) + rest
        return first, first + PAD if TRANSPOSED else first * S - PAD


@triton.jit
def lanes_along(SIZE, OUTPUTS: tl.constexpr, SPACING: tl.constexpr):
    """How many lanes cover an axis."""
    APART: tl.constexpr = SPACING if SPACING > 0 else 1
    return tl.cdiv(SIZE, OUTPUTS * APART) * APART


@triton.jit
def whole(stride, VEC: tl.constexpr):
    """A stride in 64 bits, said to be the multiple of VEC that it is. A hint would be lost with whatever the compiler
    folds into something else: a product with 1, the argument of a call."""
    return tl.cast(stride, tl.int64) // VEC * VEC


@triton.jit
def unpack(x, COUNT: tl.constexpr):
    """[ROWS, COLS, COUNT] to COUNT tensors [ROWS, COLS], without leaving a thread's registers."""
    parts = (x,)
    for level in tl.static_range(COUNT.bit_length() - 1):
        halves = ()
        for i in tl.static_range(2**level):
            part = tl.reshape(parts[i], [x.shape[0], x.shape[1], 2, COUNT // 2 ** (level + 1)])
            low, high = tl.split(tl.permute(part, [0, 1, 3, 2]))
            halves = halves + (low, high)
        parts = halves
    columns = ()
    for i in tl.static_range(COUNT):
        columns = columns + (tl.reshape(parts[i], [x.shape[0], x.shape[1]]),)
    return columns


@triton.jit
def pack(columns, COUNT: tl.constexpr):
    """COUNT tensors [ROWS, COLS] to [ROWS, COLS, COUNT]: the inverse of `unpack`."""
    for level in tl.static_range(COUNT.bit_length() - 1):
        pairs = ()
        for i in tl.static_range(COUNT // 2 ** (level + 1)):
            pair = tl.join(columns[i], columns[i + COUNT // 2 ** (level + 1)])
            pairs = pairs + (tl.reshape(pair, [pair.shape[0], pair.shape[1], 2 ** (level + 1)]),)
        columns = pairs
    return columns[0]


@triton.jit
def add_products(sums, elements, factors, TERMS: tl.constexpr, OF_OUTPUTS: tl.constexpr):
    """The sums of outputs, or of weights, with the products of these elements and the other added.

    One operation each: in some of the compiler's passes time grows by the cube of their number.
    """
    SUM: tl.constexpr = 1 if OF_OUTPUTS else 2
    for t in tl.static_range(len(TERMS)):
        total = tl.fma(elements[TERMS[t][0]], factors[TERMS[t][3 - SUM]], sums[TERMS[t][SUM]])
        sums = sums[: TERMS[t][SUM]] + (total,) + sums[TERMS[t][SUM] + 1 :]
    return sums


@triton.jit
def across(mask_row, mask_c, CHANNELS_LAST: tl.constexpr):
    """[ROWS, 1 or COLS]: in the image, and with CHANNELS_LAST of a channel that exists."""
    return mask_row[:, None] & mask_c[None, :] if CHANNELS_LAST else mask_row[:, None]


@triton.jit
def holds(start, OFFSET: tl.constexpr, SIZE, FROM_ZERO: tl.constexpr):
    """Whether an axis of this size holds start + OFFSET.

    Of a start that is said to be at least 0 only what can be is asked, and the start alone is kept: the sums, one for
    each column that a lane reads, would wait in registers.
    """
    if FROM_ZERO and OFFSET >= 0:
        return start < SIZE - OFFSET
    elif FROM_ZERO:
        # The sum may have 32 bits.
        return (start >= -OFFSET) & (start.to(tl.uint32) < (SIZE - OFFSET).to(tl.uint32))
    else:
        return inside(start + OFFSET, SIZE)


@triton.jit
def along(mask, CHANNELS_LAST: tl.constexpr):
    """[ROWS, 1] or [1, COLS]: in a column that exists."""
    return mask[:, None] if CHANNELS_LAST else mask[None, :]


@triton.jit
def widen(x, ACC: tl.constexpr, ASSEMBLY: tl.constexpr):
    """To the type of the sums."""
    if ASSEMBLY and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(HALVES, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return x.to(ACC)


@triton.jit
def lane_pointers(
    ptr,
    offs_row,  # [ROWS]
    offs_col,  # [COLS]
    stride_c,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of every lane's first element: [ROWS, COLS], behind which the channels of a group or the columns of a chunk."""
    COUNT: tl.constexpr = GROUP if CHANNELS_LAST else CHUNK
    if COUNT == 1:
        offs = offs_row[:, None] + offs_col[None, :]
    elif CHANNELS_LAST:
        offs = offs_row[:, None, None] + offs_col[None, :, None] + tl.arange(0, GROUP)[None, None, :] * stride_c
    else:
        offs = offs_row[:, None, None] + offs_col[None, :, None] + tl.arange(0, CHUNK)[None, None, :]
        offs = tl.multiple_of(offs, (1, 1, CHUNK))
    return ptr + offs


@triton.jit
def load_lanes(
    ptrs,  # of `lane_pointers`, moved
    mask,  # [ROWS, COLS]
    stride_c,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """GROUP channels by CHUNK neighbouring columns of every lane, each [ROWS, COLS] and in the type of the sums.

    A chunk lies inside of the image or outside; with CHANNELS_LAST it is one column.
    """
    COUNT: tl.constexpr = GROUP if CHANNELS_LAST else CHUNK
    elements = ()
    for c in tl.static_range(1 if CHANNELS_LAST else GROUP):
        at = ptrs + c * whole(stride_c, VEC) if c > 0 else ptrs
        if COUNT == 1:
            elements = elements + (widen(tl.load(at, mask=mask, other=0.0), ACC, ASSEMBLY),)
        else:
            x = widen(tl.load(at, mask=mask[:, :, None], other=0.0), ACC, ASSEMBLY)
            elements = elements + unpack(x, COUNT)
    return elements
