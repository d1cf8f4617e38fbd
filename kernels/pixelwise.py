"""How kernels that take every number of a tensor (N, C, *size) by itself walk it: tiles of channels and pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .runtime import Layout, block_of, power_of_two_divisor

# Lanes lie side by side in memory: channels, or else pixels. So many are in a tile at most.
CHANNELS = 64
PIXELS = 1024


@triton.jit
def tile_of(unit, pid_c, C, P, LAST: tl.constexpr, VEC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Image, rows and lanes of a tile, and which of them exist; lanes are channels with LAST, else pixels. `unit`
    counts blocks of pixels through all images."""
    blocks = tl.cdiv(P, BLOCK_P)
    n = (unit // blocks).to(tl.int64)
    pixels = unit % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    if LAST:
        rows, lanes, mask = pixels, channels, (pixels[:, None] < P) & tl.max_constancy(channels < C, VEC)[None, :]
    else:
        rows, lanes, mask = channels, pixels, (channels[:, None] < C) & tl.max_constancy(pixels < P, VEC)[None, :]
    return n, rows, lanes, mask


@triton.jit
def offsets(n, rows, lanes, stride_n, stride_r, VEC: tl.constexpr):
    starts = tl.multiple_of(n * stride_n + rows.to(tl.int64) * stride_r, VEC)
    return starts[:, None] + lanes[None, :]


@triton.jit
def relu(y):
    # Not tl.maximum: NaN has to come through, as it does in torch.
    return tl.where(y < 0, 0.0, y).to(y.dtype)


@triton.jit
def through_relu(grad, y):
    """The gradient before ReLU from that of its result y. As torch's: where y is NaN it passes."""
    return tl.where(y <= 0, 0.0, grad).to(grad.dtype)


def strides_of(layout: Layout, last: bool) -> tuple[int, int] | None:
    """Of an image and a row, where the channels, or else the pixels, lie side by side and the other axis has one
    stride; None where they don't."""
    (batch, channels, *size), (stride_n, stride_c, *steps) = layout
    axes = [(length, stride) for length, stride in zip(size, steps, strict=True) if length > 1]
    pixel = axes[-1][1] if axes else channels if last else 1
    run = pixel
    for length, stride in reversed(axes):
        if stride != run:
            return None
        run *= length
    lane, row = (stride_c, pixel) if last else (pixel, stride_c)
    lanes = channels if last else math.prod(size)
    return (stride_n if batch > 1 else 0, row) if lane == 1 or lanes == 1 else None


@lru_cache(maxsize=4096)
def channels_are_lanes(*layouts: Layout) -> bool | None:
    """Whether tensors of one shape are walked with the channels, or else the pixels, as lanes; None where the kernels
    can walk them neither way."""
    channels, pixels = layouts[0].shape[1], math.prod(layouts[0].shape[2:])
    for last in (True, False) if channels > pixels else (False, True):
        if all(strides_of(layout, last) is not None for layout in layouts):
            return last
    return None


def tile_constants(
    layouts: Sequence[Layout], last: bool, tile: int, dtype: torch.dtype, pixels: int = PIXELS
) -> dict[str, Any]:
    """Compile-time arguments for tiles of so many elements, with so many pixels in a row where those are the lanes."""
    sizes = layouts[0].shape[1], math.prod(layouts[0].shape[2:])
    lanes, rows = sizes if last else reversed(sizes)
    strides = [stride for layout in layouts for stride in strides_of(layout, last) or ()]
    vector = power_of_two_divisor(lanes, *strides)
    # Elements that are read one by one have an address each, in registers.
    elements = tile if vector >= 4 else tile // 4
    lanes_block = block_of(lanes, 1, min(CHANNELS if last else pixels, elements))
    rows_block = block_of(rows, 1, elements // lanes_block)
    return {
        "LAST": last,
        "VEC": vector,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK_C": lanes_block if last else rows_block,
        "BLOCK_P": rows_block if last else lanes_block,
        "num_warps": 4,
    }
