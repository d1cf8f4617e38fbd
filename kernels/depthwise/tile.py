"""What the depthwise kernels share: lanes of several neighbouring columns, and which tap joins which two columns.

A tile has ROWS x COLS lanes, and a lane holds U neighbouring columns (along W) of the output, each in a tensor of its
own. So every tap of a row is known when the kernel is compiled, an input column is loaded once for all taps that read
it, and where columns are contiguous (NCHW) they are loaded and stored CHUNK at a time.
"""

# A static_range and arithmetic on constexpr are fine for Triton and wrong for a type checker.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false

import triton
import triton.language as tl

RUNTIME = ["N", "ID", "IH", "IW", "OD", "OH", "OW", "UNITS", "PAD_D", "PAD_H"]
RUNTIME += [f"stride_{tensor}{axis}" for tensor in "xy" for axis in "ndh"]
# Told apart where they are 1: contiguous columns or channels are what wide loads need.
UNIT_STRIDES = ["stride_xc", "stride_xw", "stride_yc", "stride_yw"]


@triton.constexpr_function
def tap_between(column, j, PAD, K, S, D, TRANSPOSED):
    """The tap through which a lane's output j reads input column `column`, or -1."""
    tap, rest = divmod(j + PAD - S * column if TRANSPOSED else column + PAD - S * j, D)
    return tap if rest == 0 and 0 <= tap < K else -1


@triton.constexpr_function
def pair_of(read, made, READ, MADE, TRANSPOSED):
    """Where a group's weight of a channel that is read and one that is made stands among all its pairs (A, B)."""
    return read * MADE + made if TRANSPOSED else made * READ + read


@triton.constexpr_function
def first_chunk(CHUNK, PAD, K, S, D, TRANSPOSED):
    return ((PAD - D * (K - 1)) // S if TRANSPOSED else -PAD) // CHUNK


@triton.constexpr_function
def last_chunk(CHUNK, U, PAD, K, S, D, TRANSPOSED):
    return ((U - 1 + PAD) // S if TRANSPOSED else S * (U - 1) + D * (K - 1) - PAD) // CHUNK


@triton.constexpr_function
def is_read(chunk, CHUNK, U, PAD, K, S, D, TRANSPOSED):
    """Whether any output of a lane reads this chunk: a large dilation leaves gaps."""
    columns = range(chunk * CHUNK, (chunk + 1) * CHUNK)
    return any(tap_between(column, j, PAD, K, S, D, TRANSPOSED) >= 0 for column in columns for j in range(U))


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
def add_at(sums, index: tl.constexpr, term):
    """The tuple with `term` added to one of its tensors."""
    return sums[:index] + (sums[index] + term,) + sums[index + 1 :]


@triton.jit
def load_chunk(
    x_ptr,
    offs_row,  # [ROWS] without the column
    offs_c,  # [COLS], with CHANNELS_LAST
    mask_row,  # [ROWS]
    mask_c,  # [COLS], with CHANNELS_LAST
    column,  # first of the chunk: [ROWS] with CHANNELS_LAST, else [COLS]
    WIDTH,
    stride_w,
    stride_c,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    VEC: tl.constexpr,
):
    """GROUP channels by CHUNK neighbouring columns of every lane, each [ROWS, COLS].

    A chunk lies inside of the image or outside; with CHANNELS_LAST it is one column.
    """
    inside = (column >= 0) & (column < WIDTH)
    offs_w = column.to(tl.int64) * stride_w
    if CHANNELS_LAST:
        # The hints stand here: on the arguments they would be lost when the call is inlined.
        offs_pixel = tl.multiple_of(offs_row + offs_w, VEC)
        mask = (mask_row & inside)[:, None] & mask_c[None, :]
        if GROUP == 1:
            columns = (tl.load(x_ptr + offs_pixel[:, None] + offs_c[None, :], mask=mask, other=0.0),)
        else:
            offs = offs_c[None, :, None] + tl.arange(0, GROUP)[None, None, :] * stride_c
            x = tl.load(x_ptr + offs_pixel[:, None, None] + offs, mask=mask[:, :, None], other=0.0)
            columns = unpack(x, GROUP)
    else:
        columns = ()
        for c in tl.static_range(GROUP):
            offs_channel = offs_row + c * stride_c
            if CHUNK == 1:
                mask = mask_row[:, None] & inside[None, :]
                x = tl.load(x_ptr + offs_channel[:, None] + offs_w[None, :], mask=mask, other=0.0)
                columns = columns + (x,)
            else:
                offs = offs_channel[:, None, None] + (offs_w[None, :, None] + tl.arange(0, CHUNK)[None, None, :])
                offs = tl.multiple_of(offs, (1, 1, CHUNK))
                mask = mask_row[:, None, None] & inside[None, :, None]
                columns = columns + unpack(tl.load(x_ptr + offs, mask=mask, other=0.0), CHUNK)
    return columns
