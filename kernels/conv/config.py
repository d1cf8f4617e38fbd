"""Launch configurations of the convolution kernels: data, and pure functions that choose.

Stages and splits follow a model whose constants were read off an H200 in bf16: bench/results/tune_conv_nvidia-h200.csv.
Tiles follow from the sizes: they fill the multiprocessors, and compile without spills for every target.
"""

from dataclasses import dataclass
from functools import lru_cache

from ..runtime import Device, block_of

# What a multiprocessor does with several programs, against one: the others multiply while one loads or stores.
GAIN = {1: 1.0, 2: 1.25, 3: 1.35}
FLOPS = 4.8e12  # of one multiprocessor in a main loop
BANDWIDTH = 4.3e12  # bytes/s
REDUCTION = 2.5e-6  # seconds of a launch that adds up partial results


@dataclass(frozen=True)
class ConvConfig:
    """Tile of one program, in rows (pixels), columns (channels) and reduction steps, and how it is compiled."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def _thrifty_block(size: int, smallest: int, largest: int) -> int:
    """Largest power of two within limits that pads `size` to at most 5/4 of what the smallest pads it to."""
    block = block_of(size, smallest, largest)
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
    uneven: bool = False,
) -> ConvConfig:
    """Tile for `parts` products in one launch, each of m × k by k × n, of `itemsize` bytes an element.

    `tensor_cores` is False for IEEE fp32, which multiplies on the plain units from registers and so wants
    small tiles. `wide` is False where the operands can't be read several elements at once (odd channel counts, few
    channels in NCHW): then every element has an address of its own in registers, and the largest tiles spill. So does
    a large tile of few warps that is not `channels_last` on all sides. `uneven`: some programs have several times as
    much to do as others, as in zones, and the launch lasts as long as they do.
    """
    if itemsize == 8:
        # Only the interpreter runs fp64, and its time goes by steps, not by their size.
        return ConvConfig(block_of(m, 16, 128), block_of(n, 16, 128), block_of(k, 16, 128), 4, 1)
    least = device.matrix_columns
    if not tensor_cores:
        return ConvConfig(block_of(m, 16, 64 if wide else 32), block_of(n, least, 32), 16, 4, 3)
    block_n = block_of(n, least, 128 if wide else 64)
    if not wide and block_n == 8:
        # As few columns leave registers for more rows; a warp's instruction has 16 of them.
        block_m = _thrifty_block(m, 16, 128)
        return ConvConfig(block_m, 8, 16, block_m // 16, 3)
    block_m = block_of(m, 16, 128)
    # Fewer tiles than multiprocessors leave some idle: halve the tile while it stays a full tensor-core shape.
    enough = (2 if uneven else 1) * device.multiprocessors
    while block_m > 64 and -(-m // block_m) * -(-n // block_n) * parts < enough:
        block_m //= 2
    if not wide:
        # In TF32 operands are rounded in registers, for which the largest tile leaves none on Ampere.
        return ConvConfig(min(block_m, 64) if itemsize == 4 else block_m, block_n, 16, 8, 3)
    block_k = _thrifty_block(k, 16, 128 // itemsize)
    num_warps = 8 if block_m * block_n >= (128 * 128 if channels_last else 64 * 128) else 4
    tiles = -(-m // block_m) * -(-n // block_n) * parts
    num_stages = choose_stages((block_m, block_n, block_k), tiles, itemsize, device)
    return ConvConfig(block_m, block_n, block_k, num_warps, num_stages)


def _rounds(programs: int, resident: int, device: Device) -> float:
    """Time of so many programs, `resident` of them on a multiprocessor at once, in times of one that is alone there."""
    together = min(resident, -(-programs // device.multiprocessors))
    return -(-programs // (device.multiprocessors * resident)) * together / GAIN[together]


def _resident(stage: int, num_stages: int, device: Device) -> int:
    """Programs that fit on a multiprocessor by their shared memory."""
    return max(min(device.shared_memory // (stage * num_stages), max(GAIN)), 1)


def choose_stages(block: tuple[int, int, int], tiles: int, itemsize: int, device: Device) -> int:
    """How many blocks of the sum are in flight: three, which lets more programs share a multiprocessor, or in 16 bits
    four where that many tiles are not slower for it. Large launches all have three: a new size compiles nothing."""
    stage = (block[0] + block[1]) * block[2] * itemsize
    if itemsize == 4 or tiles > 4 * device.multiprocessors:
        return max(min(3, device.shared_memory // stage), 1)
    most = max(min(4, device.shared_memory // stage), 1)
    return min(range(most, min(3, most) - 1, -1), key=lambda n: _rounds(tiles, _resident(stage, n, device), device))


def choose_splits(tiles: int, steps: int, elements: int, config: ConvConfig, itemsize: int, device: Device) -> int:
    """Into how many parts the weight gradient's sum over pixels is cut: what should take the least time.

    That is the programs' steps, by `_rounds`, and from two parts on writing and reading the fp32 partial results. At
    least eight steps a part, and at most 256 MiB of partial results.
    """
    stage = (config.block_m + config.block_n) * config.block_k * itemsize
    resident = _resident(stage, config.num_stages, device)
    product = 2 * config.block_m * config.block_n * config.block_k / FLOPS

    def seconds(splits: int) -> float:
        products = _rounds(tiles * splits, resident, device) * -(-steps // splits) * product
        return products + (REDUCTION + 8 * splits * elements / BANDWIDTH if splits > 1 else 0)

    most = max(min(-(-resident * device.multiprocessors // tiles), steps // 8, (256 << 20) // (4 * elements)), 1)
    return min(range(1, most + 1), key=seconds)
