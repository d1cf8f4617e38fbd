"""What all launches of the convolution kernels share: geometry, the plan, and what is compiled in for a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl

from ..runtime import INTERPRETED, Layout, Plan, power_of_two_divisor, three
from . import zones
from .access import Access
from .config import ConvConfig


class Geometry(NamedTuple):
    """How a convolution moves over its input, axis by axis (one to three axes)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]  # before the first element; what is needed after the last follows from the sizes
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class ConvPlan(Plan):
    """A launch of a convolution."""

    copies: tuple[bool, ...] = ()  # for each tensor that is read, whether from a channels-last copy
    staged: bool = False  # whether the result is made in channels-last memory, and then brought where it belongs
    rowwise: bool = False  # the same in channels-first memory
    residues: tuple[int, ...] = ()  # into which each of the weight's axes of taps is split first: to (taps, residues)
    axes: tuple[int, ...] = ()  # of the weight, as they lie in memory when it is read
    mirrored: bool = False  # whether the weight is mirrored first
    padded: int = 0  # channels that x and the weight are brought to first, by zeros; 0: as they are
    table: zones.Table | None = None  # of the zones, where the launch goes over zones
    note: str = ""  # for people

    @property
    def rounds(self) -> bool:
        """Whether the operand that the kernel reads from shared memory is rounded to TF32 first."""
        return self.constants["PRECISION"] == "tf32"


def channels_innermost(weight: Sequence[int]) -> tuple[int, ...]:
    """The axes (A, *kernel, B): a weight in channels_last lies so already, and one of a single tap any way."""
    return (0, *range(2, len(weight)), 1) if math.prod(weight[2:]) > 1 else tuple(range(len(weight)))


def dtype_constants(dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 and dtype == torch.float32 else "ieee",
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
    }


def uses_tensor_cores(dtype: torch.dtype, tf32: bool) -> bool:
    return dtype.itemsize == 2 or (dtype == torch.float32 and tf32)


def block_constants(config: ConvConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def index_dtype(*numbers: int) -> tl.dtype:
    """Of what counts pixels, or elements from one step to the next, as many as `numbers`."""
    # A tile's pixel indices run past the last pixel, by less than any tile: stay clear of the limit by 2^16.
    return tl.int64 if max(numbers) > 2**31 - 2**16 else tl.int32


def reach(access: Access, kernel: Sequence[int], dilation: Sequence[int]) -> int:
    """No two elements that one output pixel sums up lie further apart."""
    _, stride_c, *strides = access.strides
    taps = zip(three(kernel, 1), three(dilation, 1), strides, strict=True)
    return access.channels * stride_c + sum(k * d * stride for k, d, stride in taps)


def in_order(kernel: Sequence[int], geometry: Geometry, x: Layout, y: Layout) -> bool:
    """Whether neighbouring pixels of y read neighbouring pixels of x, row ends included."""
    return (
        math.prod(kernel) == math.prod(geometry.stride) == 1
        and not any(geometry.padding)
        and x.shape[2:] == y.shape[2:]
    )


def is_padded(kernel: Sequence[int], geometry: Geometry, x: Layout, y: Layout) -> bool:
    """Whether some tap of X falls outside of x."""
    stride, padding, dilation, _ = geometry
    return any(padding) or any(
        (o - 1) * s + (k - 1) * d >= i
        for k, s, d, i, o in zip(kernel, stride, dilation, x.shape[2:], y.shape[2:], strict=True)
    )


def layer_constants(
    kernel: Sequence[int],
    geometry: Geometry,
    in_channels: int,
    out_channels: int,
    x: Access,
    y: Access,
) -> dict[str, Any]:
    """What is compiled in for a layer; channels are those of one group."""
    names = ("D", "H", "W")
    constants = {f"K{a}": size for a, size in zip(names, three(kernel, 1), strict=True)}
    constants |= {f"S{a}": size for a, size in zip(names, three(geometry.stride, 1), strict=True)}
    constants |= {f"D{a}": size for a, size in zip(names, three(geometry.dilation, 1), strict=True)}
    return constants | {
        "NDIM": len(kernel),
        "IN_VEC": power_of_two_divisor(in_channels),
        "OUT_VEC": power_of_two_divisor(out_channels),
        "X_LAST": x.last,
        "Y_LAST": y.last,
        "X_VEC": x.vector,
        "Y_VEC": y.vector,
    }


def sizes_of(
    x: Layout,
    y: Layout,
    geometry: Geometry,
    in_units: int,
    out_units: int,
    access_x: Access,
    access_y: Access,
) -> tuple[int, ...]:
    return (
        x.shape[0],
        *three(x.shape[2:], 1),
        *three(y.shape[2:], 1),
        geometry.groups,
        in_units,
        out_units,
        *access_x.strides,
        *access_y.strides,
        *three(geometry.padding, 0),
    )
