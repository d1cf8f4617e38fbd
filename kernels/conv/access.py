"""How the convolution kernels walk the tensors that they read and write, decided by shapes and strides alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ..runtime import Layout, power_of_two_divisor, three


class Access(NamedTuple):
    """How a kernel walks a tensor (N, C, *spatial)."""

    channels: int
    strides: tuple[int, ...]  # n, c, d, h, w; 0 along axes of size 1, where a tensor's stride says nothing
    last: bool  # lanes lie along the channels, which are each other's neighbours in memory; else along the pixels
    vector: int  # elements along the lanes that can be read or written at once
    copied: bool = False  # into channels-last memory before it is read


def write(layout: Layout, in_order: bool) -> Access:
    """`in_order`: a tile's rows are neighbouring pixels of this tensor, in their order."""
    (batch, channels, *size), (stride_n, stride_c, *steps) = layout
    n, c = stride_n if batch > 1 else 0, stride_c if channels > 1 else 1
    spatial = [stride if length > 1 else 0 for length, stride in zip(size, steps, strict=True)]
    strides = (n, c, *three(spatial, 0))
    if c == 1 and channels > 1:
        return Access(channels, strides, True, power_of_two_divisor(n, *spatial))
    if not in_order:
        return Access(channels, strides, False, 1)
    run, axes = 1, [(length, stride) for length, stride in zip(size, steps, strict=True) if length > 1]
    while axes and axes[-1][1] == run:  # rows that follow each other without a gap are one row
        run *= axes.pop()[0]
    gaps = [n, c if channels > 1 else 0, *(stride for _, stride in axes)]
    return Access(channels, strides, False, power_of_two_divisor(run, *gaps))


def write_rows(layout: Layout) -> Access:
    """The same where a tile's rows are neighbours only within rows of a channels-first image."""
    direct = write(layout, False)
    n, c, *steps, w = direct.strides
    gaps = n, c if direct.channels > 1 else 0, *steps
    return direct._replace(vector=power_of_two_divisor(layout.shape[-1], *gaps) if w == 1 else 1)


def read(layout: Layout, in_order: bool, channels: int, columns: int) -> Access:
    """The same for an operand of a product that takes `channels` of a group to each of its `columns`.

    Channels-first pixels under a moving tap are aligned to nothing, so they come one by one and late. Where there are
    enough channels for the tensor cores, one pass that brings them innermost costs less than that. cuDNN does the same.
    """
    direct = write(layout, in_order)
    if direct.last or direct.vector >= 4 or channels % 4 or min(channels, columns) < 16:
        return direct
    return write(channels_last(layout), in_order)._replace(copied=True)


@lru_cache(maxsize=4096)
def channels_last(layout: Layout) -> Layout:
    """The same shape in memory of its own, channels innermost."""
    channels, *size = layout.shape[1:]
    strides = [channels * math.prod(size[axis + 1 :]) for axis in range(len(size))]
    return Layout(layout.shape, (channels * math.prod(size), 1, *strides))


def channels_first(layout: Layout) -> Layout:
    """The same shape in contiguous memory of its own."""
    return Layout(layout.shape, tuple(math.prod(layout.shape[axis + 1 :]) for axis in range(len(layout.shape))))


def is_better_staged(direct: Access, channels: int) -> bool:
    """Whether a result with so many channels in a group had better be made in channels-last memory first.

    One that is stored pixel by pixel takes several times as long as one that is stored in whole lines, and another
    pass over it (on an H200, transposed 3x3 s2 of CycleGAN in bf16: 0.31 ms against 0.07, and a pass of 0.02).
    """
    return not direct.last and direct.vector < 4 and channels % 8 == 0 and channels >= 16


def is_wide(operands: Sequence[Access], *channels: int) -> bool:
    """Whether all loads move at least four neighbouring elements."""
    return min(*(operand.vector for operand in operands), power_of_two_divisor(*channels)) >= 4


def is_channels_last(*accesses: Access) -> bool:
    """Whether all loads and stores move at least four neighbouring channels."""
    return all(access.last and access.vector >= 4 for access in accesses)
