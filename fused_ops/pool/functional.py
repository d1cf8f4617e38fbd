"""Max-pooling and unpooling as in torch.nn.functional, and by offsets in the window in place of indices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.pool import Windows, reference
from ..dispatch import ATEN, BY_AUTOGRAD, REFUSED, Path, explained_by, is_short, kernel_path
from ..epilogue import check_device
from ..sizes import remembered
from . import ops

IntOrTuple = int | Sequence[int]
UNPOOLS: dict[int, Callable[..., Any]] = {1: F.max_unpool1d, 2: F.max_unpool2d, 3: F.max_unpool3d}


class _Call(NamedTuple):
    """Checked arguments in the form that the registered ops take."""

    x: Tensor
    batched: bool
    windows: Windows
    size: tuple[int, ...]  # of the result


def _per_axis(value: Any, axes: int, smallest: int) -> tuple[int, ...] | None:
    """`value` for each axis, or None where torch would not take it."""
    values = (value,) * axes if isinstance(value, int | torch.SymInt) else value
    if not isinstance(values, Sequence) or len(values) not in (1, axes) or isinstance(values, str):
        return None
    every: tuple[Any, ...] = tuple(values) if len(values) == axes else tuple(values) * axes
    return every if all(isinstance(v, int | torch.SymInt) and v >= smallest for v in every) else None


@remembered
def _windows(
    axes: int, shape: Sequence[int], kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> Windows | None:
    """Of an image of this shape, with or without a batch axis; None where torch would not take them."""
    if len(shape) not in (axes + 1, axes + 2) or min(shape[-axes - 1 :]) < 1:
        return None
    kernel = _per_axis(kernel_size, axes, 1)
    strides = kernel if stride is None or stride == [] else _per_axis(stride, axes, 1)
    paddings, dilations = _per_axis(padding, axes, 0), _per_axis(dilation, axes, 1)
    if kernel is None or strides is None or paddings is None or dilations is None:
        return None
    return Windows(kernel, strides, paddings, dilations)


def _call(axes: int, input: Tensor, windows: Windows, size: tuple[int, ...]) -> _Call:
    batched = input.dim() == axes + 2
    return _Call(input if batched else input.unsqueeze(0), batched, windows, size)


@remembered
def _pooled(
    axes: int, shape: Sequence[int], kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: int
) -> tuple[Windows, tuple[int, ...]] | None:
    """The windows, and the size that the image has after them."""
    windows = _windows(axes, shape, kernel_size, stride, padding, dilation)
    if windows is None:
        return None
    size = []
    for i, k, s, p, d in zip(shape[-axes:], *windows, strict=True):
        span = d * (k - 1) + 1
        if p > k // 2:  # torch's limit, dilated or not
            return None
        room = i + 2 * p - span
        o = -(-room // s) + 1 if ceil_mode else room // s + 1
        # A last window has to begin inside the image or its front padding.
        size.append(o - 1 if ceil_mode and (o - 1) * s >= i + p else o)
    return (windows, tuple(size)) if min(size) >= 1 else None


def _plan_pool(axes: int, input, kernel_size, stride, padding, dilation, ceil_mode) -> tuple[_Call | None, Path]:
    if not isinstance(input, Tensor):
        return None, REFUSED
    found = _pooled(axes, input.shape, kernel_size, stride, padding, dilation, 1 if ceil_mode else 0)
    return (None, REFUSED) if found is None else (_call(axes, input, *found), kernel_path(input))


def _pool(axes: int, arguments: tuple[Any, ...], return_indices: bool) -> Any:
    call, path = _plan_pool(axes, *arguments)
    if call is None or (path.name == ATEN and not torch.compiler.is_compiling()) or is_short(call.x.numel(), call.x):
        return ops.ATEN_POOLS[axes](*arguments, return_indices)
    result = ops.max_pool(call.x, *call.windows, call.size, False)
    values, indices = result if call.batched else (t.squeeze(0) for t in result)
    return (values, indices) if return_indices else values


@remembered
def _unpooled(axes: int, shape: Sequence[int], kernel_size, stride, padding, output_size) -> tuple[int, ...] | None:
    """The size that torch takes, or None where it refuses."""
    windows = _windows(axes, shape, kernel_size, stride, padding, 1)
    if windows is None:
        return None
    natural = [(i - 1) * s - 2 * p + k for i, k, s, p in zip(shape[-axes:], *windows[:3], strict=True)]
    if output_size is None:
        return tuple(natural) if min(natural) >= 1 else None
    size = tuple(output_size)[-axes:]
    if len(output_size) not in (axes, axes + 2):
        return None
    fits = all(n - s < o < n + s for o, n, s in zip(size, natural, windows.stride, strict=True))
    return size if fits and min(size) >= 1 else None


def _plan_unpool(axes: int, input, indices, kernel_size, stride, padding, output_size):
    if not isinstance(input, Tensor) or not isinstance(indices, Tensor):
        return None, REFUSED
    size = _unpooled(axes, input.shape, kernel_size, stride, padding, output_size)
    fits = indices.dtype == torch.int64 and indices.shape == input.shape and indices.device == input.device
    return (size, kernel_path(input)) if size is not None and fits else (None, REFUSED)


def _unpool(axes: int, input, indices, kernel_size, stride, padding, output_size) -> Tensor:
    size, _ = _plan_unpool(axes, input, indices, kernel_size, stride, padding, output_size)
    if size is None:
        return UNPOOLS[axes](input, indices, kernel_size, stride, padding, output_size)
    if input.dim() == axes + 1:
        return ops.max_unpool(input.unsqueeze(0), indices.unsqueeze(0), size).squeeze(0)
    return ops.max_unpool(input, indices, size)


def _pool_planner(axes: int, offsets: bool = False) -> Callable[..., Path]:
    def plan(input, kernel_size, stride, padding, dilation, ceil_mode=False, **_: Any) -> Path:
        call, path = _plan_pool(axes, input, kernel_size, stride, padding, dilation, ceil_mode)
        return BY_AUTOGRAD if call and not offsets and is_short(call.x.numel(), call.x) else path

    return plan


def _unpool_planner(axes: int) -> Callable[..., Path]:
    def plan(input, indices, kernel_size, stride, padding, output_size) -> Path:
        return _plan_unpool(axes, input, indices, kernel_size, stride, padding, output_size)[1]

    return plan


def _offsets_planner(axes: int) -> Callable[..., Path]:
    def plan(input, offsets, output_size, kernel_size, stride, padding, dilation) -> Path:
        windows = _windows(axes, input.shape, kernel_size, stride, padding, dilation)
        return REFUSED if windows is None else kernel_path(input)

    return plan


def _with_offsets(axes: int, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    call, _ = _plan_pool(axes, *arguments)
    if call is None:
        ops.ATEN_POOLS[axes](*arguments)  # raises, and says why
        raise ValueError(f"max_pool{axes}d_with_offsets takes what max_pool{axes}d takes")
    _check_taps(call.windows.kernel)
    if not call.x.is_floating_point():
        raise TypeError(f"max_pool{axes}d_with_offsets takes floating numbers, got {call.x.dtype}; convert them")
    result = ops.max_pool(call.x, *call.windows, call.size, True)
    return result if call.batched else (result[0].squeeze(0), result[1].squeeze(0))


def _check_taps(kernel: Sequence[int]) -> None:
    taps = math.prod(kernel)
    if taps > 255:
        raise ValueError(f"a window of {taps} pixels has no offset in 8 bits: take indices, or at most 255 pixels")


def _from_offsets(axes: int, input, offsets, output_size, kernel_size, stride, padding, dilation) -> Tensor:
    windows = _windows(axes, input.shape, kernel_size, stride, padding, dilation)
    if windows is None:
        raise ValueError(f"input of shape {tuple(input.shape)} and these windows do not fit {axes} axes")
    if len(output_size) not in (axes, input.dim()):
        raise ValueError(
            f"output_size must have {axes} numbers, or {input.dim()} as the input has axes, got {tuple(output_size)}"
        )
    call = _call(axes, input, windows, tuple(output_size)[-axes:])
    if offsets.dtype != torch.uint8 or offsets.shape != input.shape:
        raise ValueError(
            f"offsets must be uint8 of the input's shape {tuple(input.shape)}, as max_pool{axes}d_with_offsets gives "
            f"them; got {offsets.dtype} of {tuple(offsets.shape)}"
        )
    check_device("offsets", offsets, input.device)
    index = offsets if call.batched else offsets.unsqueeze(0)
    x = ops.max_pool_spread(call.x, index, *call.windows, call.size, False)
    return x if call.batched else x.squeeze(0)


@explained_by(_pool_planner(1))
def max_pool1d(
    input: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    dilation: IntOrTuple = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """1-D max-pooling: `max_pool2d` with one axis. Input (N, C, L) or (C, L)."""
    return _pool(1, (input, kernel_size, stride, padding, dilation, ceil_mode), return_indices)


@explained_by(_pool_planner(2))
def max_pool2d(
    input: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    dilation: IntOrTuple = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """2-D max-pooling, as `torch.nn.functional.max_pool2d`, indices (int64) included.

    y[o] = max over the window of o; of equal values the first counts, and NaN above all.

    Shapes: input (N, C, H, W) or (C, H, W), output and indices (N, C, oH, oW) with
    o = floor((i + 2 padding - dilation (k - 1) - 1) / stride) + 1, or ceil with ceil_mode, channels_last where the
    input is. Errors: torch's own.
    """
    return _pool(2, (input, kernel_size, stride, padding, dilation, ceil_mode), return_indices)


@explained_by(_pool_planner(3))
def max_pool3d(
    input: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    dilation: IntOrTuple = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """3-D max-pooling: `max_pool2d` with three axes. Input (N, C, D, H, W) or (C, D, H, W)."""
    return _pool(3, (input, kernel_size, stride, padding, dilation, ceil_mode), return_indices)


@explained_by(_unpool_planner(1))
def max_unpool1d(
    input: Tensor,
    indices: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """1-D unpooling: `max_unpool2d` with one axis."""
    return _unpool(1, input, indices, kernel_size, stride, padding, output_size)


@explained_by(_unpool_planner(2))
def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """2-D unpooling, as `torch.nn.functional.max_unpool2d`: x[indices[o]] = input[o], and 0 elsewhere.

    Where several o name one pixel, the last in row-major order stands, on the CPU and on a GPU alike; as in torch, the
    gradient goes to all of them.

    Shapes: input and indices (int64) (N, C, H, W) or (C, H, W), output (N, C, *output_size).

    Errors: torch's own. An index outside of the output is an error on the CPU; on a GPU it is left out, without a
    stray write, and an error with BACKSTRIDE_CHECK_INDICES=1 in the environment, which waits for the GPU.
    """
    return _unpool(2, input, indices, kernel_size, stride, padding, output_size)


@explained_by(_unpool_planner(3))
def max_unpool3d(
    input: Tensor,
    indices: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """3-D unpooling: `max_unpool2d` with three axes."""
    return _unpool(3, input, indices, kernel_size, stride, padding, output_size)


@explained_by(_pool_planner(1, offsets=True))
def max_pool1d_with_offsets(
    input: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    dilation: IntOrTuple = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """1-D: `max_pool2d_with_offsets` with one axis."""
    return _with_offsets(1, (input, kernel_size, stride, padding, dilation, ceil_mode))


@explained_by(_pool_planner(2, offsets=True))
def max_pool2d_with_offsets(
    input: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    dilation: IntOrTuple = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """`max_pool2d` with the place of each maximum as its offset in the window (uint8): r = r_h k_w + r_w.

    An eighth of the memory of indices. Reference: `max_pool2d(..., return_indices=True)`; `offsets_to_indices` and
    `indices_to_offsets` convert.

    Errors: torch's own; ValueError for a window of more than 255 pixels, TypeError for whole numbers.
    """
    return _with_offsets(2, (input, kernel_size, stride, padding, dilation, ceil_mode))


@explained_by(_pool_planner(3, offsets=True))
def max_pool3d_with_offsets(
    input: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    dilation: IntOrTuple = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """3-D: `max_pool2d_with_offsets` with three axes."""
    return _with_offsets(3, (input, kernel_size, stride, padding, dilation, ceil_mode))


@explained_by(_offsets_planner(1))
def max_unpool1d_with_offsets(
    input: Tensor,
    offsets: Tensor,
    output_size: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    dilation: IntOrTuple = 1,
) -> Tensor:
    """1-D: `max_unpool2d_with_offsets` with one axis."""
    return _from_offsets(1, input, offsets, output_size, kernel_size, stride, padding, dilation)


@explained_by(_offsets_planner(2))
def max_unpool2d_with_offsets(
    input: Tensor,
    offsets: Tensor,
    output_size: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    dilation: IntOrTuple = 1,
) -> Tensor:
    """Unpooling by the offsets of `max_pool2d_with_offsets`, given the same windows (Zeiler and Fergus 2014,
    arXiv 1311.2901, section 2.1; Badrinarayanan et al. 2017, arXiv 1511.00561).

    Each pixel looks at the windows that reach it and is written once; of several that name it, the last stands.
    Reference: `max_unpool2d(input, offsets_to_indices(offsets, ...), ..., output_size)`.

    Shapes: input and offsets (N, C, H, W) or (C, H, W), output (N, C, *output_size).

    Errors: ValueError for offsets of another dtype or shape. An offset outside of its window or the output is treated
    as `max_unpool2d` treats a wrong index: an error on the CPU, left out on a GPU.
    """
    return _from_offsets(2, input, offsets, output_size, kernel_size, stride, padding, dilation)


@explained_by(_offsets_planner(3))
def max_unpool3d_with_offsets(
    input: Tensor,
    offsets: Tensor,
    output_size: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    dilation: IntOrTuple = 1,
) -> Tensor:
    """3-D: `max_unpool2d_with_offsets` with three axes."""
    return _from_offsets(3, input, offsets, output_size, kernel_size, stride, padding, dilation)


def _unpool2d_planner(input: Tensor, **_: Any) -> Path:
    return kernel_path(input)


@explained_by(lambda input, kernel_size: Path(ATEN, "a copy of each pixel: torch's own nearest upsampling"))
def unpool_nearest2d(input: Tensor, kernel_size: IntOrTuple = 2) -> Tensor:
    """Every pixel repeated over its window: 1 2 / 3 4 becomes 1122 / 1122 / 3344 / 3344 with windows of 2x2.

    Reference: ``input.repeat_interleave(kH, -2).repeat_interleave(kW, -1)``; its adjoint sums over windows.

    Shapes: input (N, C, H, W) or (C, H, W), output (..., kH H, kW W). Errors: ValueError for other shapes or windows.
    """
    x, batched, kernel = _image(input, kernel_size)
    y = F.interpolate(x, scale_factor=[float(k) for k in kernel], mode="nearest")
    return y if batched else y.squeeze(0)


@explained_by(_unpool2d_planner)
def unpool_nails2d(input: Tensor, kernel_size: IntOrTuple = 2) -> Tensor:
    """Every pixel in its window's first place ("bed of nails"): 1 2 / 3 4 becomes 1020 / 0000 / 3040 / 0000.

    Reference: zeros, with ``y[..., ::kH, ::kW] = input``; its adjoint reads these places.

    Shapes: input (N, C, H, W) or (C, H, W), output (..., kH H, kW W). Errors: ValueError for other shapes or windows.
    """
    x, batched, kernel = _image(input, kernel_size)
    size = [i * k for i, k in zip(x.shape[2:], kernel, strict=True)]
    first = torch.zeros_like(x, dtype=torch.uint8)
    y = ops.max_pool_spread(x, first, kernel, kernel, [0, 0], [1, 1], size, False)
    return y if batched else y.squeeze(0)


def _image(input: Tensor, kernel_size: Any) -> tuple[Tensor, bool, tuple[int, ...]]:
    kernel = _per_axis(kernel_size, 2, 1)
    if input.dim() not in (3, 4) or kernel is None:
        raise ValueError(
            f"unpooling takes an image (N, C, H, W) or (C, H, W) and a kernel_size of one or two positive numbers; got "
            f"shape {tuple(input.shape)} and kernel_size {kernel_size!r}"
        )
    return (input if input.dim() == 4 else input.unsqueeze(0)), input.dim() == 4, kernel


def offsets_to_indices(
    offsets: Tensor,
    input_size: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    dilation: IntOrTuple = 1,
) -> Tensor:
    """torch's indices (int64) of a pooling of an image of `input_size` (its last axes), from our offsets.

    Shapes: offsets (N, C, *out) or (C, *out). Errors: ValueError for windows that do not fit the axes.
    """
    size, windows = _conversion(offsets, input_size, kernel_size, stride, padding, dilation)
    indices = reference.indices_of_offsets(_with_batch(offsets, size), size, windows)
    return indices if indices.dim() == offsets.dim() else indices.squeeze(0)


def indices_to_offsets(
    indices: Tensor,
    input_size: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    dilation: IntOrTuple = 1,
) -> Tensor:
    """Our offsets (uint8), from torch's indices; the inverse of `offsets_to_indices`.

    Shapes: indices (N, C, *out) or (C, *out). Errors: ValueError for windows that do not fit the axes or have more than
    255 pixels, and, for indices on the CPU, for one that is not in its window.
    """
    size, windows = _conversion(indices, input_size, kernel_size, stride, padding, dilation)
    _check_taps(windows.kernel)
    shape, indices = indices.shape, _with_batch(indices, size)
    offsets = reference.offsets_of_indices(indices, size, windows)
    if not indices.is_cuda:  # a GPU would have to be waited for
        wrong = indices[reference.indices_of_offsets(offsets, size, windows) != indices]
        if wrong.numel():
            raise ValueError(
                f"index {wrong[0].item()} is not in its window: indices must come from a pooling of an image of size "
                f"{'x'.join(map(str, size))} with the same windows"
            )
    return offsets if len(shape) == offsets.dim() else offsets.squeeze(0)


def _with_batch(places: Tensor, size: Sequence[int]) -> Tensor:
    return places if places.dim() == len(size) + 2 else places.unsqueeze(0)


def _conversion(places: Tensor, input_size, kernel_size, stride, padding, dilation) -> tuple[list[int], Windows]:
    # Of the image's size, all axes may be given; then it has a batch.
    axes = len(input_size) if places.dim() - len(input_size) in (1, 2) else places.dim() - 2
    windows = _windows(axes, places.shape, kernel_size, stride, padding, dilation) if axes in (1, 2, 3) else None
    if windows is None or len(input_size) < axes:
        raise ValueError(
            f"places of shape {tuple(places.shape)} need (N, C, *out) or (C, *out) with one to three axes, and windows "
            f"and an input_size that fit them; got kernel_size {kernel_size} and input_size {tuple(input_size)}"
        )
    return list(input_size)[-axes:], windows
