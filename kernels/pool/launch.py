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
from . import config, plan_small
from .plan_small import Windows
from .pool import claim_kernel, fill_kernel, max_pool_kernel, pick_kernel, spread_kernel
from .small import max_pool_small_kernel, spread_small_kernel


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


def _common(windows: Windows, result: torch.Tensor, read: torch.Tensor, index: torch.Tensor) -> dict[str, Any]:
    """Compile-time arguments of the kernels that know windows; `result` is what they write, `read` what they read."""
    constants: dict[str, Any] = {}
    for letter, values in zip("KS", (windows.kernel, windows.stride), strict=True):
        constants |= {letter + axis: value for axis, value in zip("DHW", three(values, 1), strict=True)}
    return constants | {
        "NDIM": len(windows.kernel),
        "CHANNELS_LAST": result.stride(1) == 1 and result.shape[1] > 1,
        "INDEX": tl.int32 if max(result.numel(), read.numel()) < 2**31 - 2**16 else tl.int64,
        "OFFSETS": index.dtype == torch.uint8,
    }


def _any_size(
    kernel: Any, windows: Windows, common: dict[str, Any], result: torch.Tensor, read: torch.Tensor
) -> dict[str, Any]:
    """Compile-time arguments beside the `common` ones of the kernels for windows of any size."""
    last = common["CHANNELS_LAST"]
    constants: dict[str, Any] = {f"D{axis}": d for axis, d in zip("DHW", three(windows.dilation, 1), strict=True)}
    constants["U"] = math.gcd(config.LANE_BYTES // result.element_size(), result.shape[1 if last else -1])
    steps = 1
    if kernel is max_pool_kernel:
        constants["PADDED"] = _is_padded(windows, read.shape[2:], result.shape[2:])
        steps = math.prod(windows.kernel)
    elif kernel is spread_kernel:
        axes = zip(windows.kernel, windows.stride, windows.dilation, strict=True)
        steps = math.prod(-(-k // s) if d == 1 else k for k, s, d in axes)
    lanes = config.choose_config(steps, constants["U"])
    if kernel is not pick_kernel:
        constants |= {"READ_VEC": _read_vector(read, last), "UNROLL": lanes.unroll}
    return constants | {"LANES": lanes.lanes, "num_warps": lanes.num_warps}


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


SMALL = {max_pool_kernel: max_pool_small_kernel, spread_kernel: spread_small_kernel}


def chosen(
    kernel: Any, windows: Windows, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, total: bool
) -> tuple[Any, dict[str, Any], int]:
    """The kernel that does what this one is asked for, its compile-time arguments, and its lanes."""
    back = kernel is spread_kernel
    result, read = (x, y) if back else (y, x)
    constants = _common(windows, result, read, index)
    if kernel is not pick_kernel:
        constants["ACC"] = tl.float64 if result.dtype == torch.float64 else tl.float32
    if back:
        constants["SUM"] = total
    if kernel in SMALL and plan_small.is_small(windows):
        own, lanes = plan_small.constants(windows, constants, result, read, back=back)
        return SMALL[kernel], constants | own, lanes
    own = _any_size(kernel, windows, constants, result, read)
    return kernel, constants | own, result.numel() // own["U"]


@lru_cache(maxsize=4096)
def _plan(kernel: Any, windows: Windows, x_layout: Layout, y_layout: Layout, index: torch.dtype, total: bool) -> Plan:
    """Of the kernels that know windows; `total` is the spread's."""
    x, y = x_layout.tensor(), y_layout.tensor()
    n, c, *spatial = (y if kernel is spread_kernel else x).stride()
    kernel, constants, lanes = chosen(kernel, windows, x, y, torch.empty(0, dtype=index, device="meta"), total)
    axes = zip("DHW", three(windows.padding, 0), strict=True)
    padding = [pad for axis, pad in axes if f"PAD_{axis}" not in constants]
    sizes = (lanes, x.shape[1], *three(x.shape[2:], 1), *three(y.shape[2:], 1), *padding, n, c, *three(spatial, 0))
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
    block = config.PLANE_BLOCK * (8 if INTERPRETED else 1)
    constants = {"INDEX": tl.int64 if large else tl.int32, "BLOCK": block, "num_warps": 4}
    with device_guard(x):
        if y.numel():
            claim_kernel[(planes * triton.cdiv(outside, block),)](index, owner, outside, inside, **constants)
        fill_kernel[(planes * triton.cdiv(inside, block),)](y, owner, x, outside, inside, **constants)
