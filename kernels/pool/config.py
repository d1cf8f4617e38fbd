"""Launch configurations of the pooling kernels: data, and a pure function that chooses. Not measured on a GPU yet."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolConfig:
    """Elements of the result that one program computes, and warps that do it."""

    block: int
    num_warps: int


def choose_config(taps: int) -> PoolConfig:
    """For windows of `taps` pixels, whatever they are: four elements a lane, so that on NVIDIA 8-bit offsets are stored
    as 32 bits and bf16 as 64."""
    return PoolConfig(512, 4)
