"""Launch configurations of the pooling kernels: data, and a pure function that chooses. Not measured on a GPU yet."""

from dataclasses import dataclass
from functools import lru_cache

from ..runtime import INTERPRETED

BLOCK = 512
INTERPRETED_BLOCK = 4096  # the interpreter's time goes by programs, not by their size
UNROLLED_TAPS = 27  # that unroll without too much code


@dataclass(frozen=True)
class PoolConfig:
    """Elements of the result that one program computes, warps that do it, and taps in a loop's body."""

    block: int
    num_warps: int
    unroll: int


@lru_cache(maxsize=4096)
def choose_config(taps: int) -> PoolConfig:
    """For windows of `taps` pixels: four elements a lane, so that on NVIDIA 8-bit offsets are stored as 32 bits and
    bf16 as 64; a window's taps without a loop, where they are few."""
    return PoolConfig(INTERPRETED_BLOCK if INTERPRETED else BLOCK, 4, taps if taps <= UNROLLED_TAPS else 1)
