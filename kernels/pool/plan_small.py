"""What launches of the kernels for small windows are compiled with."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ..lanes import ASSEMBLY
from ..runtime import three
from .config import LANE_BYTES
from .small_config import MOST_ROWS, SMALL, SMALL_STRIDE, choose_config


class Windows(NamedTuple):
    """The windows of a pooling, axis by axis (one to three axes)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def is_small(windows: Windows) -> bool:
    """Whether windows are so small that a lane can hold all of several of them."""
    depth, height, width = three(windows.kernel, 1)
    small = max(depth, height * width) <= SMALL and max(windows.stride) <= SMALL_STRIDE
    return small and max(windows.dilation) == 1


def constants(
    windows: Windows, common: dict[str, Any], result: torch.Tensor, read: torch.Tensor, *, back: bool
) -> tuple[dict[str, Any], int]:
    """Compile-time arguments beside those `common` to all kernels that know windows, and lanes; `back`: of the kernel
    that spreads."""
    *outer, height, width = (1, *result.shape[2:])
    _, *steps = three(windows.stride, 1) if back else (1, 1, 1)
    last = common["CHANNELS_LAST"]
    channels = result.shape[1] if last else 0
    # Indices take twice the registers of offsets, and a loop over depth what it hands on.
    rows = MOST_ROWS >> (not common["OFFSETS"]) >> (common["NDIM"] == 3)
    config = choose_config((height, width), channels, result.element_size(), (steps[0], steps[1]), rows)
    n, c, *spatial = read.stride()
    along, others = (c, spatial) if last else (spatial[-1], [c, *spatial[:-1]])
    reach = config.channels if last else config.u // steps[1] if back else config.u * windows.stride[-1]
    # What is read at once, starting at every multiple of it.
    vector = math.gcd(LANE_BYTES // read.element_size(), reach, n, *others) if along == 1 else 1
    columns = 1 if last else math.gcd(vector, read.shape[-1])
    power_of_two = config.u & (config.u - 1) == 0
    blocks = -(-height // config.v) * -(-width // config.u)
    lanes = result.shape[0] * (result.shape[1] // config.channels) * math.prod(outer) * blocks
    return {
        "PAD_H": three(windows.padding, 0)[1],
        "PAD_W": windows.padding[-1],
        "VEC": vector if last else columns,
        "CHUNK": columns,
        "JOIN": not last and config.u > 1 and power_of_two and width % config.u == 0,
        "ASSEMBLY": ASSEMBLY,
        "V": config.v,
        "U": config.u,
        "CHANNELS": config.channels,
        "LANES": config.lanes,
        "num_warps": config.num_warps,
    }, lanes
