"""Host side of the pooling kernels: launch. No autograd, no allocation of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime import INTERPRETED, device_guard, three
from .pool import claim_kernel, fill_kernel, max_pool_kernel, pick_kernel, spread_kernel

# Unmeasured. Four elements a lane on NVIDIA: 8-bit offsets are stored as 32 bits, bf16 as 64. And taps that unroll
# without too much code.
BLOCK = 512
UNROLLED_TAPS = 27
INTERPRETED_BLOCK = 4096  # the interpreter's time goes by programs, not by their size
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
    return constants | {
        "NDIM": len(windows.kernel),
        "CHANNELS_LAST": channels_last,
        "VEC": vec,
        "READ_VEC": vec if side_by_side else 1,
        "INDEX": tl.int32 if max(result.numel(), read.numel()) < 2**31 - 2**16 else tl.int64,
        "OFFSETS": index.dtype == torch.uint8,
        "BLOCK": INTERPRETED_BLOCK if INTERPRETED else BLOCK,
    }


def reduction_constants(windows: Windows, result: torch.Tensor) -> dict[str, Any]:
    """Those of the kernels that go over all taps."""
    taps = math.prod(windows.kernel)
    return {
        "UNROLL": taps if taps <= UNROLLED_TAPS else 1,
        "ACC": tl.float64 if result.dtype == torch.float64 else tl.float32,
    }


def _launch(
    kernel: Any,
    pointers: Sequence[torch.Tensor],
    sizes: tuple[Sequence[int], Sequence[int]],
    result: torch.Tensor,
    read: torch.Tensor,
    windows: Windows,
    constants: dict[str, Any],
) -> None:
    """`sizes` are the image's and the pooled side's."""
    if result.numel() == 0:
        return
    vec, (n, c, *spatial) = constants["VEC"], read.stride()
    with device_guard(result):
        kernel[(triton.cdiv(result.numel(), constants["BLOCK"]),)](
            *pointers,
            result.numel() // vec,
            result.shape[1] // (vec if constants["CHANNELS_LAST"] else 1),
            *three(sizes[0], 1),
            *three(sizes[1], 1),
            *three(windows.padding, 0),
            n,
            c,
            *three(spatial, 0),
            **constants,
        )


def max_pool(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, windows: Windows) -> None:
    """Write the maxima into y and their places into index: offsets in the window (uint8) or pixels (int64).

    Shapes: x (N, C, *in), y and index (N, C, *out), both contiguous or both channels_last.
    """
    constants = constants_of(windows, y, x, index) | reduction_constants(windows, y)
    _launch(max_pool_kernel, (x, y, index), (x.shape[2:], y.shape[2:]), y, x, windows, constants)


def spread(y: torch.Tensor, index: torch.Tensor, x: torch.Tensor, windows: Windows, *, total: bool) -> None:
    """Write into x what `max_pool`'s index says of y: with `total` the sum, else the last, where windows overlap.

    Shapes: y and index (N, C, *out), of equal strides; x (N, C, *in), contiguous or channels_last.
    """
    constants = constants_of(windows, x, y, index) | reduction_constants(windows, x) | {"SUM": total}
    _launch(spread_kernel, (y, index, x), (x.shape[2:], y.shape[2:]), x, y, windows, constants)


def pick(x: torch.Tensor, index: torch.Tensor, y: torch.Tensor, windows: Windows) -> None:
    """Write into y what x has at the places in index, and 0 where they are outside of it.

    Shapes: x (N, C, *in), index and y (N, C, *out), both contiguous or both channels_last.
    """
    constants = constants_of(windows, y, x, index)
    _launch(pick_kernel, (x, index, y), (x.shape[2:], y.shape[2:]), y, x, windows, constants)


def max_unpool(y: torch.Tensor, index: torch.Tensor, x: torch.Tensor) -> None:
    """Write x[index[o]] = y[o] and zeros elsewhere; an index outside of the plane is left out.

    Shapes: y and index (N, C, *out), x (N, C, *in), all contiguous. Index: int64, any.
    """
    if x.numel() == 0:
        return
    outside, inside = math.prod(y.shape[2:]), math.prod(x.shape[2:])
    owner = torch.full(x.shape, -1, dtype=torch.int64, device=x.device)
    block = INTERPRETED_BLOCK if INTERPRETED else BLOCK
    with device_guard(x):
        if y.numel():
            claim_kernel[(triton.cdiv(y.numel(), block),)](index, owner, y.numel(), outside, inside, BLOCK=block)
        fill_kernel[(triton.cdiv(x.numel(), block),)](y, owner, x, x.numel(), outside, inside, BLOCK=block)
