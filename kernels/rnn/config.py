"""How a recurrence is run, and with which tiles: data, and a pure function that chooses.

No threshold here was measured on a GPU yet. They follow from what fits into the registers of a multiprocessor without
spills on any target (see the cross-compilation table in bench/results) and from how many programs can run at once.
"""

from dataclasses import dataclass
from functools import lru_cache

from ..runtime import Device

RESIDENT = "resident"
SHARDED = "sharded"
STEPWISE = "stepwise"


@dataclass(frozen=True)
class RnnConfig:
    """Regime and tile of one program: rows of the batch, hidden units, and units summed over at once."""

    regime: str
    block_b: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def _power_of_two(size: int) -> int:
    """The smallest one, at least 16, that is no smaller than size."""
    return max(16, 1 << (size - 1).bit_length())


@lru_cache(maxsize=4096)
def choose_config(
    batch: int, hidden: int, directions: int, itemsize: int, tensor_cores: bool, device: Device
) -> RnnConfig:
    """Regime for one layer, by how much of its matrix one multiprocessor can hold in registers.

    A step waits for the one before it, so that the fewest and nearest exchanges win: none (resident), one between
    programs of one launch (sharded), one between launches (stepwise). `tensor_cores` is False for IEEE fp32.
    """
    block_n = _power_of_two(hidden)
    whole = (block_n + 16) * block_n * itemsize <= device.shared_memory
    if hidden <= (256 if itemsize == 2 else 128) and whole:
        block_b = 32 if directions * -(-batch // 16) > device.multiprocessors and block_n <= 128 else 16
        num_warps = block_n // (32 if tensor_cores else 16)
        return RnnConfig(RESIDENT, block_b, block_n, block_n, min(max(num_warps, 1), 8), 1)
    columns, num_warps = 32, 8
    shards, chunk = -(-hidden // columns), num_warps * 64 // itemsize
    for block_b in (16, 32):
        # The columns in shared memory, if it has to be, and the parts of the sum.
        shared = -(-hidden // chunk) * chunk * columns * itemsize + num_warps * block_b * columns * 4
        fits = shared <= device.shared_memory and _registers(hidden * block_b * itemsize, num_warps) <= 160
        together = directions * -(-batch // block_b) * shards <= device.multiprocessors
        if tensor_cores and together and fits:
            return RnnConfig(SHARDED, block_b, columns, chunk, num_warps, 1)
    block_b = min(_power_of_two(batch), 64 if itemsize == 2 else 32)
    return RnnConfig(STEPWISE, block_b, columns, 128 // itemsize if tensor_cores else 16, 4, 3)


def _registers(size: int, num_warps: int) -> int:
    """Of each thread, for this many bytes."""
    return size // (4 * 32 * num_warps)


def columns_in_registers(hidden: int, itemsize: int, config: RnnConfig) -> bool:
    """Whether the threads of `sharded` have registers for the matrix's columns beside y_{t-1}: 192 of 255."""
    return _registers(hidden * (config.block_n + config.block_b) * itemsize, config.num_warps) <= 192
