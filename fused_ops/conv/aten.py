"""The three computations by torch's own convolution, and where that is the better choice on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.conv import Geometry
from ...kernels.conv.zones import meetings
from ..registration import memory_format
from ..sizes import remembered

FEW_CHANNELS = 16
LONGEST_SPAN = 12  # pixels between a kernel's outermost taps, up to which cuDNN takes its Hopper kernels
MOST_SKIPPED = 0.25  # share of the taps that lie in the padding, which the kernels here leave out
LARGE_WEIGHT = 16  # times as many numbers as the input: its change of layout costs more than the input's saves
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def is_at_hand(x: Tensor) -> bool:
    """Whether cuDNN could multiply x."""
    return x.is_cuda


def skipped_share(size: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, transposed: int) -> float:
    """Share of X's taps that fall outside of its input, which is x, or with `transposed` X^T's result."""
    met = 1.0
    for i, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True):
        span = d * (k - 1) + 1
        wide, narrow = ((i - 1) * s + span - 2 * p, i) if transposed else (i, (i + 2 * p - span) // s + 1)
        met *= meetings(narrow, wide, k, s, p, d) / (k * narrow)
    return 1 - met


def _is_better_in_groups(x: Tensor, channels: int, geometry: Geometry, weight_grad: bool) -> bool:
    """cuDNN has kernels for groups of 4 to 32 channels. The ones here pad their products to 16 rows, and so waste half
    of them for 8 channels; for 4, on plain units, they are ahead where the pixels lie side by side."""
    if max(geometry.dilation) > 1 or max(geometry.stride) > 1:
        return False
    if channels == 4:
        return memory_format(x) != torch.contiguous_format
    return channels == 8 or (weight_grad and channels in (16, 32))


def is_better(
    x: Tensor,
    kernel_size: Sequence[int],
    geometry: Geometry,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
    y_channels: int | None = None,
) -> bool:
    """Whether cuDNN computes X x or X^T x, or with `y_channels` the weight gradient from x and a y of so many: where
    the products are dense, with one group, no zeros between pixels and, along one axis, 32 bits; with gaps between taps
    where it has a kernel for Hopper and few taps lie in the padding; in some groups; and weight gradients of channels
    that can't be read several at once.

    There its main loops are faster than the kernels here, on an H200 up to 2.2 times in bf16 and 7.5 in TF32
    (bench/results/library_or_kernel_nvidia-h200.csv), and elsewhere mostly not. `dtype`: that of the products, where x
    is still to be cast.
    """
    if not is_at_hand(x) or (transposed and max(geometry.stride) > 1):
        return False
    if x.dim() == 3 and (dtype or x.dtype).itemsize < 4:
        return False
    if geometry.groups > 1:
        return _is_better_in_groups(x, x.shape[1] // geometry.groups, geometry, y_channels is not None)
    if y_channels is not None and (x.shape[1] % 4 or y_channels % 4):
        return True
    return max(geometry.dilation) == 1 or _is_better_dilated(x.shape, kernel_size, *geometry[:3], int(transposed))


@remembered
def _is_better_dilated(x: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, transposed: int) -> bool:
    axes = list(zip(dilation, kernel_size, strict=True))
    if all(d == 1 or k == 1 for d, k in axes):
        return True
    # What torch.compile traces is the op, which decides when it runs: here sizes would become guards.
    if max(d * (k - 1) for d, k in axes) > LONGEST_SPAN or x[1] < FEW_CHANNELS or torch.compiler.is_compiling():
        return False
    return skipped_share(x[2:], kernel_size, stride, padding, dilation, transposed) <= MOST_SKIPPED


def is_better_forward(
    transposed: bool, x: Tensor, kernel_size: Sequence[int], geometry: Geometry, dtype: torch.dtype | None = None
) -> bool:
    """Whether cuDNN computes X x, or X^T x. X of few channels it does not: of an image's three 0.74 ms, here 0.56."""
    enough = transposed or geometry.groups > 1 or x.shape[1] >= FEW_CHANNELS
    return enough and is_better(x, kernel_size, geometry, transposed, dtype)


def is_better_channels_last(x: Tensor, channels: int, tf32: bool, weight: int) -> bool:
    """Whether a channels-first x is brought into channels-last memory for cuDNN, and its result of so many channels
    back: tensor cores want it so, and cuDNN's own passes take four times as long as those here. `weight`: its numbers,
    which cuDNN moves too."""
    sixteen_bits = x.dtype.itemsize == 2 or tf32
    wide = all(c >= 16 and c % 8 == 0 for c in (x.shape[1], channels))
    return x.dim() > 3 and sixteen_bits and wide and weight <= LARGE_WEIGHT * x.numel()


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    padding: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
) -> Tensor:
    stride, _, dilation, groups = geometry
    # What autocast casts was cast before; a gradient's tensors keep their dtype where autocast is on in the backward.
    casting = torch._C._is_any_autocast_enabled()
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST) if casting else nullcontext():
        return torch.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


@lru_cache(maxsize=4096)
def is_natural(size: tuple[int, ...], kernel_size: tuple[int, ...], out: tuple[int, ...], geometry: Geometry) -> bool:
    """Whether the padding, on both sides, gives `out` output pixels, as torch's own convolution has them."""
    axes = zip(size, kernel_size, out, *geometry[:3], strict=True)
    return all((i + 2 * p - d * (k - 1) - 1) // s + 1 == o for i, k, o, s, p, d in axes)


def _fitted(
    x: Tensor, kernel_size: Sequence[int], out: Sequence[int], geometry: Geometry
) -> tuple[Tensor, Sequence[int]]:
    """x, and the padding on both of its sides that gives `out` output pixels: x is padded itself where none does."""
    size, kernel_size, out = tuple(x.shape[2:]), tuple(kernel_size), tuple(out)
    if is_natural(size, kernel_size, out, geometry):
        return x, geometry.padding
    pads: list[int] = []
    for i, k, o, s, p, d in zip(size, kernel_size, out, *geometry[:3], strict=True):
        pads = [p, (o - 1) * s + d * (k - 1) + 1 - p - i, *pads]
    return F.pad(x, pads), [0] * len(size)


def has_cudnn_relu(x: Tensor) -> bool:
    """Whether torch can call cuDNN's convolution with bias and ReLU on x, and may: it has no deterministic mode."""
    return x.is_cuda and torch.version.hip is None and torch._C._get_cudnn_enabled() and not _is_deterministic()


def _is_deterministic() -> bool:
    return torch._C._get_cudnn_deterministic() or torch._C._get_deterministic_algorithms()


def _cudnn_relu(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)


SIGHTINGS = 2  # of a layer before its kernel is looked at: what never comes again would pay for nothing
MOST_LAYERS = 4096
_keeps_nan: dict[tuple[Any, ...], int | bool] = {}  # by layer; an int counts sightings


def conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Sequence[int], geometry: Geometry, tf32: bool
) -> Tensor | None:
    """relu(X x + bias) along two axes by one kernel of cuDNN's, whose epilogue takes no time
    (bench/results/library_or_kernel_nvidia-h200.csv). None where there is none, or it is not known to do what torch
    does: some of its kernels turn NaN into 0. So each layer's is tried once, on nothing but NaN."""
    if x.dim() != 4 or not has_cudnn_relu(x) or (x.data_ptr() | weight.data_ptr()) % 32 or not x.numel():
        return None
    if not is_natural(tuple(x.shape[2:]), tuple(weight.shape[2:]), tuple(out), geometry):
        return None
    # cuDNN's choice of a kernel depends on all of these.
    modes = x.dtype, tf32, bias is None, torch._C._get_cudnn_benchmark(), x.device.index
    layer = (*modes, x.shape, x.stride(), weight.shape, weight.stride(), geometry)
    bias = None if bias is None else bias.contiguous()
    known = _keeps_nan.get(layer, 0)
    if not isinstance(known, bool):
        if known < SIGHTINGS or torch.cuda.is_current_stream_capturing():
            if len(_keeps_nan) >= MOST_LAYERS:
                _keeps_nan.clear()
            _keeps_nan[layer] = known + 1
            return None
        known = _keeps_nan[layer] = _comes_through(x, weight, bias, geometry)
    return _cudnn_relu(x, weight, bias, geometry) if known else None


def _comes_through(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    try:
        return bool(_cudnn_relu(torch.full_like(x, torch.nan), weight, bias, geometry).isnan().all())
    except RuntimeError:  # no kernel for this layer, or no memory for the trial
        return False


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, out: Sequence[int], geometry: Geometry) -> Tensor:
    """X x + bias, of spatial size `out`."""
    x, padding = _fitted(x, weight.shape[2:], out, geometry)
    return _convolution(x, weight, bias, geometry, padding, False, [0] * len(out))


def conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None, out: Sequence[int], geometry: Geometry) -> Tensor:
    """X^T x + bias, of spatial size `out`."""
    stride, padding, dilation, _ = geometry
    natural = [
        (i - 1) * s - 2 * p + d * (k - 1) + 1
        for i, s, p, d, k in zip(x.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
    ]
    extra = [o - size for o, size in zip(out, natural, strict=True)]
    if all(0 <= e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        return _convolution(x, weight, bias, geometry, padding, True, extra)
    zero = [0] * len(out)
    full = _convolution(x, weight, None, geometry, zero, True, zero)
    pads: list[int] = []
    for o, size, p in zip(out, full.shape[2:], padding, strict=True):
        pads = [-p, o + p - size, *pads]
    y = F.pad(full, pads)
    return y if bias is None else y + bias.view(-1, *[1] * len(out))


def weight_grad(x: Tensor, y: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient by a weight like `weight`, whose values don't matter."""
    x, padding = _fitted(x, weight.shape[2:], y.shape[2:], geometry)
    zero = [0] * len(padding)
    stride, _, dilation, groups = geometry
    wanted = (False, True, False)
    return torch.ops.aten.convolution_backward(
        y, x, weight, None, stride, padding, dilation, False, zero, groups, wanted
    )[1]


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Those by x and by the weight of X x, where `is_natural`."""
    stride, padding, dilation, groups = geometry
    zero = [0] * len(padding)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, zero, groups, (*wanted, False)
    )[:2]
