"""Launch configurations of batch normalisation: data, and a pure function that chooses."""

from dataclasses import dataclass

MOST_PARTS = 512  # of a channel's sum: the program that adds them up holds them all at once


@dataclass(frozen=True)
class BatchNormConfig:
    """Elements of a tile, warps that run a program, and programs on a multiprocessor."""

    tile: int
    num_warps: int
    programs: int


# In bf16 a tile is two loads of 16 bytes for each thread, in fp32 four, added up in one set of sums: so the registers
# have room for 4 programs that read one tensor, or 3 that read two (64 and 80: bench/results/cross_compile_*.csv).
# These have at least 32 and 48 KiB on their way to a multiprocessor, and an H200's memory is busy with 29 (4.8 TB/s
# times some 0.8 us, over 132). Reckoned, not measured.
MOMENTS = BatchNormConfig(tile=4096, num_warps=8, programs=4)
GRADIENTS = BatchNormConfig(tile=4096, num_warps=8, programs=3)


def choose_config(tensors: int) -> BatchNormConfig:
    """For sums over one tensor, or over a gradient and what it belongs to."""
    return MOMENTS if tensors == 1 else GRADIENTS
