"""Launch configurations of the convolution kernels: data, and a pure function that chooses.

No threshold here was measured on a GPU yet: they follow from the sizes alone (tiles that fill the multiprocessors,
and that compile without spills for every target: see the cross-compilation table in bench/results).
"""

from dataclasses import dataclass
from functools import lru_cache

from ..runtime import Device


@dataclass(frozen=True)
class ConvConfig:
    """Tile of one program, in rows (pixels), columns (channels) and reduction steps, and how it is compiled."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def _block(size: int, smallest: int, largest: int) -> int:
    """Smallest power of two that holds `size`, within limits."""
    return min(max(1 << (size - 1).bit_length(), smallest), largest)


def _thrifty_block(size: int, smallest: int, largest: int) -> int:
    """Largest power of two within limits that pads `size` to at most 5/4 of what the smallest pads it to."""
    block = _block(size, smallest, largest)
    while 4 * -(-size // block) * block > 5 * -(-size // smallest) * smallest:
        block //= 2
    return block


@lru_cache(maxsize=4096)
def choose_config(
    m: int,
    n: int,
    k: int,
    itemsize: int,
    tensor_cores: bool,
    wide: bool,
    device: Device,
    parts: int = 1,
    channels_last: bool = True,
) -> ConvConfig:
    """Tile for `parts` products in one launch, each of m × k by k × n, of `itemsize` bytes an element.

    `tensor_cores` is False for IEEE fp32, which multiplies on the plain units from registers and so wants
    small tiles. `wide` is False where the operands can't be read several elements at once (odd channel counts, few
    channels in NCHW): then every element has an address of its own in registers, and the largest tiles spill. So does
    a large tile of few warps that is not `channels_last` on all sides.
    """
    if itemsize == 8:
        # Only the interpreter runs fp64, and its time goes by steps, not by their size.
        return ConvConfig(_block(m, 16, 128), _block(n, 16, 128), _block(k, 16, 128), 4, 1)
    least = device.matrix_columns
    if not tensor_cores:
        return ConvConfig(_block(m, 16, 64 if wide else 32), _block(n, least, 32), 16, 4, 3)
    block_n = _block(n, least, 128 if wide else 64)
    if not wide and block_n == 8:
        # As few columns leave registers for more rows; a warp's instruction has 16 of them.
        block_m = _thrifty_block(m, 16, 128)
        return ConvConfig(block_m, 8, 16, block_m // 16, 3)
    block_m = _block(m, 16, 128)
    # Fewer tiles than multiprocessors leave some idle: halve the tile while it stays a full tensor-core shape.
    while block_m > 64 and -(-m // block_m) * -(-n // block_n) * parts < device.multiprocessors:
        block_m //= 2
    if not wide:
        return ConvConfig(block_m, block_n, 16, 8, 3)
    block_k = _thrifty_block(k, 16, 128 // itemsize)
    num_warps = 8 if block_m * block_n >= (128 * 128 if channels_last else 64 * 128) else 4
    stage = (block_m + block_n) * block_k * itemsize
    num_stages = min(4 if itemsize == 2 else 3, device.shared_memory // stage)
    return ConvConfig(block_m, block_n, block_k, num_warps, num_stages)


def choose_splits(tiles: int, steps: int, elements: int, device: Device) -> int:
    """Into how many parts the weight gradient's sum over pixels is cut.

    About three waves of programs over the multiprocessors, at least eight steps a part (below that the partial
    results cost more than they spread), and at most 256 MiB of fp32 partial results.
    """
    splits = min(-(-3 * device.multiprocessors // tiles), steps // 8, (256 << 20) // (4 * elements))
    return max(splits, 1)
