"""The readable definitions of the pooling kernels, in plain PyTorch; differentiable by autograd where that is meant."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import Windows


def max_pool(x: Tensor, out: Sequence[int], windows: Windows) -> tuple[Tensor, Tensor]:
    """Maxima of the windows of `out`, and the pixels where they are: the first of equals, and NaN above all."""
    best = x.new_full((*x.shape[:2], *out), -math.inf)
    where = torch.full(best.shape, -1, dtype=torch.int64, device=x.device)
    pixels = torch.arange(math.prod(x.shape[2:]), device=x.device).view(1, 1, *x.shape[2:])
    ends = [
        max(0, (o - 1) * s - p + d * (k - 1) + 1 - i)
        for o, s, p, d, k, i in zip(
            out, windows.stride, windows.padding, windows.dilation, windows.kernel, x.shape[2:], strict=True
        )
    ]
    pads = [n for p, end in zip(reversed(windows.padding), reversed(ends), strict=True) for n in (p, end)]
    padded, places = F.pad(x, pads, value=-math.inf), F.pad(pixels, pads, value=-1)
    for tap in itertools.product(*(range(k) for k in windows.kernel)):
        reach = tuple(
            slice(r * d, r * d + (o - 1) * s + 1, s)
            for r, d, s, o in zip(tap, windows.dilation, windows.stride, out, strict=True)
        )
        value, place = padded[(..., *reach)], places[(..., *reach)]
        better = (place >= 0) & ((where < 0) | (value > best) | value.isnan())
        best, where = torch.where(better, value, best), torch.where(better, place, where)
    return best, where


def indices_of_offsets(offsets: Tensor, size: Sequence[int], windows: Windows) -> Tensor:
    """Pixels (int64, flat in `size`) from offsets in the window (uint8); -1 for one outside of image or window."""
    flat, rest = torch.zeros_like(offsets, dtype=torch.int64), offsets.long()
    inside = offsets < math.prod(windows.kernel)
    scale = 1
    for axis in reversed(range(len(size))):
        k, s, p, d = (values[axis] for values in windows)
        shape = [-1 if i == axis + 2 else 1 for i in range(offsets.dim())]
        pixel = torch.arange(offsets.shape[axis + 2], device=offsets.device).view(shape) * s - p + rest % k * d
        inside &= (pixel >= 0) & (pixel < size[axis])
        flat += pixel * scale
        rest, scale = rest // k, scale * size[axis]
    return torch.where(inside, flat, -1)


def offsets_of_indices(indices: Tensor, size: Sequence[int], windows: Windows) -> Tensor:
    """Offsets in the window (uint8) from pixels, which have to be of their windows; undoes `indices_of_offsets`."""
    offsets, rest = torch.zeros_like(indices), indices
    scale = 1
    for axis in reversed(range(len(size))):
        k, s, p, d = (values[axis] for values in windows)
        shape = [-1 if i == axis + 2 else 1 for i in range(indices.dim())]
        start = torch.arange(indices.shape[axis + 2], device=indices.device).view(shape) * s - p
        offsets += (rest % size[axis] - start) // d * scale
        rest, scale = rest // size[axis], scale * k
    return offsets.to(torch.uint8)


def pick(x: Tensor, indices: Tensor) -> Tensor:
    """x at the pixels in indices, and 0 where they are outside of it."""
    inside = (indices >= 0) & (indices < math.prod(x.shape[2:]))
    picked = x.flatten(2).gather(2, torch.where(inside, indices, 0).flatten(2)).view(indices.shape)
    return torch.where(inside, picked, 0)


def spread(y: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """x (N, C, *size) with x[indices[o]] the sum of those y[o]; the adjoint of `pick`."""
    inside = (indices >= 0) & (indices < math.prod(size))
    x = y.new_zeros(*y.shape[:2], math.prod(size))
    return x.scatter_add(2, torch.where(inside, indices, 0).flatten(2), torch.where(inside, y, 0).flatten(2)).view(
        *y.shape[:2], *size
    )


def max_unpool(y: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """x (N, C, *size) with x[indices[o]] = y[o], the last o where several name one pixel, and 0 elsewhere."""
    inside = (indices >= 0) & (indices < math.prod(size))
    order = torch.arange(math.prod(y.shape[2:]), device=y.device).expand(*y.shape[:2], -1)
    order = torch.where(inside.flatten(2), order, -1)
    owner = torch.full((*y.shape[:2], math.prod(size)), -1, device=y.device)
    owner = owner.scatter_reduce(2, torch.where(inside, indices, 0).flatten(2), order, "amax")
    if y.numel() == 0:
        return y.new_zeros(*y.shape[:2], *size)
    x = y.flatten(2).gather(2, owner.clamp(min=0))
    return torch.where(owner >= 0, x, 0).view(*y.shape[:2], *size)
