"""Host side of the pooling kernels: launch. No autograd, no allocation of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime import Plan, device_guard, three
from .config import choose_config
from .pool import claim_kernel, fill_kernel, max_pool_kernel, pick_kernel, spread_kernel

ALIGNED = 16  # elements


class Windows(NamedTuple):
    """The windows of a pooling, axis by axis (one to three axes)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def constants_of(windows: Windows, result: torch.Tensor, read: torch.Tensor, index: torch.Tensor) -> dict[str, Any]:
    """Compile-time arguments of the kernels that know windows; `result` is what they write, `read` what they read."""
    constants: dict[str, Any] = {}
    for letter, values in zip("KSD", (windows.kernel, windows.stride, windows.dilation), strict=True):
        constants |= {letter + axis: value for axis, value in zip("DHW", three(values, 1), strict=True)}
    channels_last = result.stride(1) == 1 and result.shape[1] > 1
    vec = ALIGNED if (result.shape[1] if channels_last else result.numel()) % ALIGNED == 0 else 1
    n, c, *spatial = read.stride()
    side_by_side = channels_last and c == 1 and not any(stride % ALIGNED for stride in (n, *spatial))
    constants |= {
        "NDIM": len(windows.kernel),
        "CHANNELS_LAST": channels_last,
        "VEC": vec,
        "READ_VEC": vec if side_by_side else 1,
        "INDEX": tl.int32 if max(result.numel(), read.numel()) < 2**31 - 2**16 else tl.int64,
        "OFFSETS": index.dtype == torch.uint8,
    }
    return constants | block_constants(math.prod(windows.kernel))


def block_constants(taps: int) -> dict[str, Any]:
    """The configuration's."""
    config = choose_config(taps)
    return {"BLOCK": config.block, "num_warps": config.num_warps}


def reduction_constants(windows: Windows, result: torch.Tensor) -> dict[str, Any]:
    """Those of the kernels that go over all taps."""
    return {
        "UNROLL": choose_config(math.prod(windows.kernel)).unroll,
        "ACC": tl.float64 if result.dtype == torch.float64 else tl.float32,
    }


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
    result, read = (x, y) if kernel is spread_kernel else (y, x)
    constants = constants_of(windows, result, read, torch.empty(0, dtype=index, device="meta"))
    if kernel is not pick_kernel:
        constants |= reduction_constants(windows, result)
    if kernel is spread_kernel:
        constants["SUM"] = total
    vec, (n, c, *spatial) = constants["VEC"], read.stride()
    sizes = (
        result.numel() // vec,
        result.shape[1] // (vec if constants["CHANNELS_LAST"] else 1),
        *three(x.shape[2:], 1),
        *three(y.shape[2:], 1),
        *three(windows.padding, 0),
        n,
        c,
        *three(spatial, 0),
    )
    return Plan(kernel, (triton.cdiv(result.numel(), constants["BLOCK"]),), sizes, constants)


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
    outside, inside = math.prod(y.shape[2:]), math.prod(x.shape[2:])
    owner = torch.full(x.shape, -1, dtype=torch.int64, device=x.device)
    constants = block_constants(1)
    block = constants["BLOCK"]
    with device_guard(x):
        if y.numel():
            claim_kernel[(triton.cdiv(y.numel(), block),)](index, owner, y.numel(), outside, inside, **constants)
        fill_kernel[(triton.cdiv(x.numel(), block),)](y, owner, x, x.numel(), outside, inside, **constants)
