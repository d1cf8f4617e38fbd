"""The readable definition of the three convolution kernels, in plain PyTorch, tap by tap.

For every tap r, the input pixels that it reads are one strided slice of the padded input. `apply` gathers through
these slices, `apply_transposed` adds into them, `weight_grad` correlates them with the output's gradient: the last
two are the hand-written backward of the first, and each one's backward is the other two.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch

from .plan import Geometry


def _tap_slices(
    kernel: Sequence[int], out: Sequence[int], geometry: Geometry
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """For each tap, its index and the slice of the padded input that output pixel 0, 1, ... reads through it."""
    for tap in itertools.product(*(range(k) for k in kernel)):
        yield (
            tap,
            tuple(
                slice(r * d, r * d + (o - 1) * s + 1, s)
                for r, d, s, o in zip(tap, geometry.dilation, geometry.stride, out, strict=True)
            ),
        )


def _padded_size(size: Sequence[int], kernel: Sequence[int], out: Sequence[int], geometry: Geometry) -> list[int]:
    """Length of each padded axis: enough for the input behind its padding, and for the last tap's last pixel."""
    return [
        max(p + i, (o - 1) * s + (k - 1) * d + 1)
        for i, k, o, s, p, d in zip(
            size, kernel, out, geometry.stride, geometry.padding, geometry.dilation, strict=True
        )
    ]


def _pad(x: torch.Tensor, size: Sequence[int], geometry: Geometry) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """x in a zero tensor of spatial size `size`, and where in it x lies."""
    where = tuple(slice(p, p + i) for p, i in zip(geometry.padding, x.shape[2:], strict=True))
    padded = x.new_zeros(*x.shape[:2], *size)
    padded[(..., *where)] = x
    return padded, where


def _grouped(tensor: torch.Tensor, axis: int, groups: int) -> torch.Tensor:
    return tensor.unflatten(axis, (groups, -1))


def apply(x: torch.Tensor, weight: torch.Tensor, out: Sequence[int], geometry: Geometry) -> torch.Tensor:
    """X x: (N, groups B, *in) and (groups A, B, *kernel) to (N, groups A, *out)."""
    kernel = weight.shape[2:]
    padded, _ = _pad(x, _padded_size(x.shape[2:], kernel, out, geometry), geometry)
    w = _grouped(weight, 0, geometry.groups)
    y = x.new_zeros(x.shape[0], geometry.groups, w.shape[1], *out)
    for tap, where in _tap_slices(kernel, out, geometry):
        pixels = _grouped(padded[(..., *where)], 1, geometry.groups)
        y += torch.einsum("ngb...,gab->nga...", pixels, w[(..., *tap)])
    return y.flatten(1, 2)


def apply_transposed(y: torch.Tensor, weight: torch.Tensor, size: Sequence[int], geometry: Geometry) -> torch.Tensor:
    """X^T y: (N, groups A, *out) and (groups A, B, *kernel) to (N, groups B, *size)."""
    kernel, out = weight.shape[2:], y.shape[2:]
    w = _grouped(weight, 0, geometry.groups)
    x = y.new_zeros(y.shape[0], geometry.groups * w.shape[2], *size)
    padded, inside = _pad(x, _padded_size(size, kernel, out, geometry), geometry)
    pixels = _grouped(y, 1, geometry.groups)
    for tap, where in _tap_slices(kernel, out, geometry):
        padded[(..., *where)] += torch.einsum("nga...,gab->ngb...", pixels, w[(..., *tap)]).flatten(1, 2)
    return padded[(..., *inside)].contiguous()


def weight_grad(x: torch.Tensor, y: torch.Tensor, kernel: Sequence[int], geometry: Geometry) -> torch.Tensor:
    """Gradient of <y, X x> by the weight: (N, groups B, *in) and (N, groups A, *out) to (groups A, B, *kernel)."""
    out = y.shape[2:]
    padded, _ = _pad(x, _padded_size(x.shape[2:], kernel, out, geometry), geometry)
    pixels_y = _grouped(y, 1, geometry.groups).flatten(3)
    w = x.new_zeros(geometry.groups, pixels_y.shape[2], x.shape[1] // geometry.groups, *kernel)
    for tap, where in _tap_slices(kernel, out, geometry):
        pixels_x = _grouped(padded[(..., *where)], 1, geometry.groups).flatten(3)
        w[(..., *tap)] = torch.einsum("ngap,ngbp->gab", pixels_y, pixels_x)
    return w.flatten(0, 1)
