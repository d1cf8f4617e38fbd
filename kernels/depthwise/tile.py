"""What the depthwise kernels share: which products a lane adds up, and how it reads what it multiplies.

A tile has ROWS x COLS lanes, and a lane holds V rows by U columns of the output (`..lanes`). An input element is loaded
and converted once for all taps that read it, and where columns are contiguous (NCHW) they are loaded CHUNK at a time.
"""

# A static_range and arithmetic on constexpr are fine for Triton and wrong for a type checker.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false

import triton
import triton.language as tl

from ..lanes import LaneAxis, joined, positions, unpack, whole, widen

RUNTIME = ["N", "ID", "IH", "IW", "OD", "OH", "OW", "UNITS", "PAD_D"]
RUNTIME += [f"stride_{tensor}{axis}" for tensor in "xy" for axis in "ndh"]
# Told apart where they are 1: contiguous columns or channels are what wide loads need.
UNIT_STRIDES = ["stride_xc", "stride_xw", "stride_yc", "stride_yw"]


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
def along(mask, CHANNELS_LAST: tl.constexpr):
    """[ROWS, 1] or [1, COLS]: in a column that exists."""
    return mask[:, None] if CHANNELS_LAST else mask[None, :]


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
