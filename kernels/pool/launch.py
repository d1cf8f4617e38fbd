"""Host side of the pooling kernels: launch. No autograd, no allocation of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime import INTERPRETED, Plan, device_guard, three
from .config import LANE_BYTES, PLANE_BLOCK, SPREAD_BYTES, PoolConfig, choose_config
from .pool import claim_kernel, fill_kernel, max_pool_kernel, pick_kernel, spread_kernel


class Windows(NamedTuple):
    """The windows of a pooling, axis by axis (one to three axes)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def _is_padded(windows: Windows, size: Sequence[int], out: Sequence[int]) -> bool:
    """Whether some window reaches over an edge of an image of `size`."""
    return any(windows.padding) or any(
        (o - 1) * s + (k - 1) * d >= i
        for i, o, k, s, d in zip(size, out, windows.kernel, windows.stride, windows.dilation, strict=True)
    )


def _read_vector(read: torch.Tensor, channels_last: bool) -> int:
    """Elements that can be read at once, starting at every multiple of them, along channels or along W."""
    n, c, *spatial = read.stride()
    along, others = (c, spatial) if channels_last else (spatial[-1], [c, *spatial[:-1]])
    return math.gcd(16, n, *others) if along == 1 else 1


def _constants(
    windows: Windows,
    result: torch.Tensor,
    read: torch.Tensor,
    index: torch.Tensor,
    lane_bytes: int = LANE_BYTES,
) -> dict[str, Any]:
    """Compile-time arguments of the kernels that know windows; `result` is what they write, `read` what they read."""
    constants: dict[str, Any] = {}
    for letter, values in zip("KSD", (windows.kernel, windows.stride, windows.dilation), strict=True):
        constants |= {letter + axis: value for axis, value in zip("DHW", three(values, 1), strict=True)}
    channels_last = result.stride(1) == 1 and result.shape[1] > 1
    return constants | {
        "NDIM": len(windows.kernel),
        "CHANNELS_LAST": channels_last,
        "INDEX": tl.int32 if max(result.numel(), read.numel()) < 2**31 - 2**16 else tl.int64,
        "OFFSETS": index.dtype == torch.uint8,
        "U": math.gcd(lane_bytes // result.element_size(), result.shape[1 if channels_last else -1]),
    }


def _block(config: PoolConfig) -> dict[str, Any]:
    return {"LANES": config.lanes, "num_warps": config.num_warps}


def _stands_side_by_side(windows: Windows, read: torch.Tensor, constants: dict[str, Any]) -> bool:
    """Whether along W neither overlap nor gap is between the windows, and memory is contiguous."""
    return (
        not constants["CHANNELS_LAST"]
        and windows.kernel[-1] == windows.stride[-1]
        and windows.dilation[-1] == 1
        and windows.padding[-1] == 0
        and read.stride(-1) == 1
    )


def pool_constants(windows: Windows, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> dict[str, Any]:
    """Those of `max_pool_kernel`."""
    constants = _constants(windows, y, x, index)
    padded = _is_padded(windows, x.shape[2:], y.shape[2:])
    tiled = _stands_side_by_side(windows, x, constants) and windows.kernel[-1] == 2 and not padded
    steps = math.prod(windows.kernel[:-1] if tiled else windows.kernel)
    config = choose_config(steps, constants["U"] * (2 if tiled else 1))
    return (
        constants
        | _block(config)
        | {
            "READ_VEC": _read_vector(x, constants["CHANNELS_LAST"]),
            "TILED": tiled,
            "PADDED": padded,
            "UNROLL": config.unroll,
            "ACC": tl.float64 if y.dtype == torch.float64 else tl.float32,
        }
    )


def spread_constants(
    windows: Windows, y: torch.Tensor, x: torch.Tensor, index: torch.Tensor, total: bool
) -> dict[str, Any]:
    """Those of `spread_kernel`."""
    constants = _constants(windows, x, y, index, SPREAD_BYTES)
    stride = windows.stride[-1]
    tiled = (
        _stands_side_by_side(windows, y, constants)
        and constants["U"] % stride == 0
        and y.shape[-1] * stride == x.shape[-1]
    )
    axes = zip(windows.kernel, windows.stride, windows.dilation, strict=True)
    config = choose_config(math.prod(-(-k // s) if d == 1 else k for k, s, d in axes), constants["U"])
    return (
        constants
        | _block(config)
        | {
            "READ_VEC": _read_vector(y, constants["CHANNELS_LAST"]),
            "TILED": tiled,
            "UNROLL": config.unroll,
            "SUM": total,
            "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        }
    )


def pick_constants(windows: Windows, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> dict[str, Any]:
    """Those of `pick_kernel`."""
    constants = _constants(windows, y, x, index)
    return constants | _block(choose_config(1, constants["U"]))


class Layout(NamedTuple):
    """All of a tensor that a launch depends on but the values."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        """One like it, without values."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


def _layout_of(tensor: torch.Tensor) -> Layout:
    return Layout(tensor.shape, tensor.stride(), tensor.dtype)


@lru_cache(maxsize=4096)
def _plan(kernel: Any, windows: Windows, x_layout: Layout, y_layout: Layout, index: torch.dtype, total: bool) -> Plan:
    """Of the kernels that know windows; `total` is the spread's."""
    x, y = x_layout.tensor(), y_layout.tensor()
    place = torch.empty(0, dtype=index, device="meta")
    result, read = (x, y) if kernel is spread_kernel else (y, x)
    if kernel is max_pool_kernel:
        constants = pool_constants(windows, x, y, place)
    elif kernel is spread_kernel:
        constants = spread_constants(windows, y, x, place, total)
    else:
        constants = pick_constants(windows, x, y, place)
    lanes = result.numel() // constants["U"]
    n, c, *spatial = read.stride()
    sizes = (
        lanes,
        result.shape[1],
        *three(x.shape[2:], 1),
        *three(y.shape[2:], 1),
        *three(windows.padding, 0),
        n,
        c,
        *three(spatial, 0),
    )
    return Plan(kernel, (triton.cdiv(lanes, constants["LANES"]),), sizes, constants)


def _launch(
    kernel: Any,
    pointers: Sequence[torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    index: torch.Tensor,
    windows: Windows,
    total: bool = False,
) -> None:
    if (x if kernel is spread_kernel else y).numel():
        with device_guard(x):
            _plan(kernel, windows, _layout_of(x), _layout_of(y), index.dtype, total).launch(*pointers)


def max_pool(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, windows: Windows) -> None:
    """Write the maxima into y and their places into index: offsets in the window (uint8) or pixels (int64).

    Shapes: x (N, C, *in), y and index (N, C, *out), both contiguous or both channels_last.
    """
    _launch(max_pool_kernel, (x, y, index), x, y, index, windows)


def spread(y: torch.Tensor, index: torch.Tensor, x: torch.Tensor, windows: Windows, *, total: bool) -> None:
    """Write into x what `max_pool`'s index says of y: with `total` the sum, else the last, where windows overlap.

    Shapes: y and index (N, C, *out), of equal strides; x (N, C, *in), contiguous or channels_last.
    """
    _launch(spread_kernel, (y, index, x), x, y, index, windows, total)


def pick(x: torch.Tensor, index: torch.Tensor, y: torch.Tensor, windows: Windows) -> None:
    """Write into y what x has at the places in index, and 0 where they are outside of it.

    Shapes: x (N, C, *in), index and y (N, C, *out), both contiguous or both channels_last.
    """
    _launch(pick_kernel, (x, index, y), x, y, index, windows)


def max_unpool(y: torch.Tensor, index: torch.Tensor, x: torch.Tensor) -> None:
    """Write x[index[o]] = y[o] and zeros elsewhere; an index outside of the plane is left out.

    Shapes: y and index (N, C, *out), x (N, C, *in), all contiguous. Index: int64, any.
    """
    if x.numel() == 0:
        return
    planes, outside, inside = x.shape[0] * x.shape[1], math.prod(y.shape[2:]), math.prod(x.shape[2:])
    large = max(outside, inside) >= 2**31 - 2**16
    owner = torch.full(x.shape, -1, dtype=torch.int64 if large else torch.int32, device=x.device)
    block = PLANE_BLOCK * (8 if INTERPRETED else 1)
    constants = {"INDEX": tl.int64 if large else tl.int32, "BLOCK": block, "num_warps": 4}
    with device_guard(x):
        if y.numel():
            claim_kernel[(planes * triton.cdiv(outside, block),)](index, owner, outside, inside, **constants)
        fill_kernel[(planes * triton.cdiv(inside, block),)](y, owner, x, outside, inside, **constants)
