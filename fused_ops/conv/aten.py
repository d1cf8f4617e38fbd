"""The three computations by torch's own convolution, and where that is the better choice on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.conv import Geometry

FEW_CHANNELS = 16
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def is_at_hand(x: Tensor) -> bool:
    """Whether cuDNN could multiply x."""
    return x.is_cuda


def is_better(
    x: Tensor,
    kernel_size: Sequence[int],
    geometry: Geometry,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether cuDNN computes these products, of the weight gradient or of X^T x: where they are dense, with one group,
    no gaps between taps, no zeros between pixels and, along one axis, 32 bits.

    There its main loops are faster than the kernels here, on an H200 up to 2.2 times in bf16 and 7.5 in TF32
    (bench/results/library_or_kernel_nvidia-h200.csv), and elsewhere mostly not. `dtype`: that of the products, where x
    is still to be cast.
    """
    if not is_at_hand(x) or geometry.groups > 1 or (transposed and max(geometry.stride) > 1):
        return False
    if x.dim() == 3 and (dtype or x.dtype).itemsize < 4:
        return False
    return all(d == 1 or k == 1 for d, k in zip(geometry.dilation, kernel_size, strict=True))


def is_better_forward(
    transposed: bool, x: Tensor, kernel_size: Sequence[int], geometry: Geometry, dtype: torch.dtype | None = None
) -> bool:
    """Whether cuDNN computes X x, or X^T x. X of few channels it does not: of an image's three 0.74 ms, here 0.56."""
    return (transposed or x.shape[1] >= FEW_CHANNELS) and is_better(x, kernel_size, geometry, transposed, dtype)


def is_better_channels_last(x: Tensor, channels: int, tf32: bool) -> bool:
    """Whether a channels-first x is brought into channels-last memory for cuDNN, and its result of so many channels
    back: tensor cores want it so, and cuDNN's own passes take four times as long as those here."""
    sixteen_bits = x.dtype.itemsize == 2 or tf32
    return x.dim() > 3 and sixteen_bits and all(c >= 16 and c % 8 == 0 for c in (x.shape[1], channels))


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
