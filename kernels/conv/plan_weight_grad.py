"""Launch of the weight gradient: how its sum over pixels is walked, and into how many parts it is cut."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
import triton

from ..runtime import Device, Layout, three
from . import access
from .access import Access
from .config import choose_config, choose_splits, choose_stages
from .plan import (
    ConvPlan,
    Geometry,
    block_constants,
    dtype_constants,
    in_order,
    index_dtype,
    is_padded,
    layer_constants,
    sizes_of,
    uses_tensor_cores,
)
from .weight_grad import conv_weight_grad_kernel


def _reach(layout: Layout, walk: Access, pixels: int, step: int) -> int:
    """Elements from the first to the last of a tensor, or along so many steps of its last axis if they go further."""
    lengths = layout.shape[0], walk.channels, *three(layout.shape[2:], 1)
    extent = 1 + sum((length - 1) * stride for length, stride in zip(lengths, walk.strides, strict=True))
    return max(extent, pixels * step * walk.strides[-1])


@lru_cache(maxsize=4096)
def plan_weight_grad(
    x: Layout,
    weight: tuple[int, ...],
    channels_last: bool,
    y: Layout,
    geometry: Geometry,
    dtype: torch.dtype,
    tf32: bool,
    device: Device,
) -> ConvPlan:
    """Launch of the weight gradient; the grid's second axis counts the partial results."""
    a, b, kernel = weight[0] // geometry.groups, weight[1], weight[2:]
    taps = math.prod(kernel)
    pixels = y.shape[0] * math.prod(y.shape[2:])
    flatten = taps > 1 and b < 16
    padded = is_padded(kernel, geometry, x, y)
    # The sum runs over pixels; operands of 16 bits can lie either way. In TF32 matrix units want neighbouring pixels
    # side by side, as they lie channels-first. With padding each tap has a box of pixels, with gaps between its rows.
    x_in_order, y_in_order = in_order(kernel, geometry, x, y), flatten or not padded
    tf32 = tf32 and dtype == torch.float32
    if tf32:
        access_x, access_y = access.write(x, x_in_order), access.write(y, y_in_order)
    else:
        either_way = dtype.itemsize == 2
        access_x = access.read(x, either_way and x_in_order, b, a)
        access_y = access.read(y, either_way and y_in_order, a, b)
    along_channels = [operand for operand in (access_x, access_y) if operand.last or not tf32]
    columns = taps * b if flatten else b
    # Matrix instructions have 16 rows or more, or Hopper's wide ones 64, but 8 columns do.
    swap = a <= device.matrix_columns < min(columns, 16) or (a <= 32 and columns >= 64 and not flatten)
    wide = not flatten and (not along_channels or access.is_wide(along_channels, a, b))
    config = choose_config(
        *((columns, a) if swap else (a, columns)),
        pixels,
        dtype.itemsize,
        uses_tensor_cores(dtype, tf32),
        wide,
        device,
        device.multiprocessors,
    )
    if swap:
        config = replace(config, block_m=config.block_n, block_n=config.block_m)
    if not channels_last and config.block_m <= 64:
        # Neighbouring columns of the weight lie apart, each with an address of its own: 64 by 128 spill on Blackwell.
        config = replace(config, block_n=min(config.block_n, 64))
    tiles = triton.cdiv(a, config.block_m) * geometry.groups
    tiles *= triton.cdiv(taps * b, config.block_n) if flatten else triton.cdiv(b, config.block_n) * taps
    steps = triton.cdiv(pixels, config.block_k)
    splits = choose_splits(tiles, steps, math.prod(weight), config, dtype.itemsize, device)
    splits = triton.cdiv(steps, triton.cdiv(steps, splits))  # none without a step
    if splits == 1 and wide and dtype.itemsize == 2:
        block = config.block_m, config.block_n, config.block_k
        config = replace(config, num_stages=choose_stages(block, tiles, dtype.itemsize, device))
    constants = layer_constants(kernel, geometry, b, a, access_x, access_y) | {
        "W_CHANNELS_LAST": channels_last,
        "FLATTEN": flatten,
        "PADDED": padded,
        "SWAP": swap,
        "INDEX": index_dtype(pixels),
        "OFFSET": index_dtype(max(_reach(x, access_x, pixels, geometry.stride[-1]), _reach(y, access_y, pixels, 1))),
    }
    constants |= dtype_constants(dtype, tf32) | block_constants(config)
    if tf32 and device.matrix_columns == 8:
        # Channels-last operands are turned on their way to shared memory, so 4 bytes at a time. Lanes 4 channels apart
        # would all write to two of its 32 banks; side by side they write to eight (counted, not measured).
        constants |= {f"{name}_VEC": 1 for name, side in (("X", access_x), ("Y", access_y)) if side.last}
    sizes = sizes_of(x, y, geometry, b // constants["IN_VEC"], a // constants["OUT_VEC"], access_x, access_y)
    copies = access_x.copied, access_y.copied
    return ConvPlan(conv_weight_grad_kernel, (tiles, splits), sizes, constants, copies=copies)
