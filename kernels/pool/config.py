"""Launch configurations of the pooling kernels: data, and a pure function that chooses. Not measured on a GPU yet."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolConfig:
    """Elements of the result that one program computes, and warps that do it."""

    block: int
    num_warps: int


def choose_config(taps: int) -> PoolConfig:
    """For windows of `taps` pixels: enough lanes to cover the latency of the loads, whatever the windows."""
    return PoolConfig(256, 4)
