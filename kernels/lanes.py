"""Lanes of several rows and columns: which tap joins an output to what is read, and how a thread keeps its elements.

A lane holds some rows by some columns of an output, each element in a tensor of its own. So every tap is known when a
kernel is compiled, what several outputs read is loaded once, and where columns are contiguous (NCHW) they are loaded
and stored several at a time.
"""

# A static_range and arithmetic on constexpr are fine for Triton and wrong for a type checker.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .runtime import INTERPRETED
from .tile import divide, inside

# Of a GPU that reads PTX.
ASSEMBLY = not INTERPRETED and torch.version.hip is None

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
def widen(x, ACC: tl.constexpr, ASSEMBLY: tl.constexpr):
    """To the type that is computed in; ASSEMBLY: of NVIDIA's GPUs."""
    if ASSEMBLY and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(HALVES, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return x.to(ACC)


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
