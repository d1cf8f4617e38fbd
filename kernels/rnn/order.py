"""The order in which tiles are loaded and multiplied, so that a thread loads the very numbers that it multiplies.

Tensor cores take their operands from registers. In mma.sync's order (PTX ISA, "Matrix fragments for mma.m16n8k16") the
32 threads of a warp lie over 8 rows and 4 columns, and each has 4 bytes of every 16 in a row. Loaded as they stand,
these are many small loads; and of 16 bytes loaded at once, 12 belong to other threads and go there through shared
memory, with a barrier before and one behind. But a sum over k may be taken in any order, and hidden units may be
numbered in any. So tiles are loaded as [... 8, 4 V], V neighbours to a thread, and the functions here only rename the
axes: a thread's V neighbours become those that are its own among the 4 V. Where the hardware has another order (MFMA,
FMA) Triton moves the numbers, and the product is the same.
"""

import triton
import triton.language as tl


@triton.jit
def order_k(tile, E: tl.constexpr):
    """[A, B, 4 V] in the order of memory to that of a product's operand along k, E numbers to a register."""
    V: tl.constexpr = tile.shape[2] // 4
    shape: tl.constexpr = tile.shape
    split = tl.reshape(tile, [shape[0], shape[1], 4, V // E, E])
    return tl.reshape(tl.permute(split, (0, 1, 3, 2, 4)), shape)


@triton.jit
def product_to_memory(tile, R: tl.constexpr, W: tl.constexpr, V: tl.constexpr):
    """A product [B, N] as [B / 8 R W 8, 4 V], its columns renumbered to the order of memory."""
    B8: tl.constexpr = tile.shape[0] // 8
    split = tl.reshape(tile, [B8, 8, R, V // 2, W, 4, 2])
    return tl.reshape(tl.permute(split, (0, 2, 4, 1, 5, 3, 6)), [B8 * R * W * 8, 4 * V])


@triton.jit
def sum_of_parts(parts, V: tl.constexpr):
    """[S, B, N] to [B, N], the sum over S in a fixed order: every thread gets all parts of V neighbours of a row.

    `split` is what brings the parts into one thread; a sum over an axis that is spread over warps would leave each
    warp with all of the result, and all of the work that follows.
    """
    S: tl.constexpr = parts.shape[0]
    B: tl.constexpr = parts.shape[1]
    N: tl.constexpr = parts.shape[2]
    pairs = tl.reshape(parts, [S // 2, 2, B, N // V, V])
    even, odd = tl.split(tl.permute(pairs, (0, 4, 2, 3, 1)))
    return tl.reshape(tl.permute(tl.sum(even + odd, axis=0), (1, 2, 0)), [B, N])
