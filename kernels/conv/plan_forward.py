"""Launches of X and X^T: which kernel, with which tiles, on which copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import triton

from ..runtime import Device, Layout
from . import access, zones
from .access import Access
from .apply import conv_apply_kernel
from .apply_transposed import conv_apply_transposed_kernel, conv_scatter_kernel
from .apply_zones import conv_zones_kernel
from .config import ConvConfig, choose_config
from .plan import (
    ConvPlan,
    Geometry,
    block_constants,
    channels_innermost,
    dtype_constants,
    in_order,
    index_dtype,
    is_padded,
    layer_constants,
    reach,
    sizes_of,
    uses_tensor_cores,
)

NARROW = 32  # results of a pixel
# Results for each number of x from which on x is copied with whole vectors of channels: 2 bytes can't be copied to
# shared memory without passing through registers, so every step of a sum over odd channels waits for its loads.
PADDED = 8
ACROSS = (2, 4, 8, 16, 32)  # strides along W whose residues may be columns: a tile has a multiple of them


def is_better_flat(weight: Sequence[int], geometry: Geometry) -> bool:
    """Whether X^T has so few channels to sum over that it runs as the convolution it is at stride 1.

    That sums over flat (tap, channel) indices, where X^T would fill each tap's channels up to a block of 16. It has
    narrow tiles, so only with few output channels too.
    """
    few = weight[0] // geometry.groups < 16 and weight[1] <= 32
    return few and math.prod(weight[2:]) > 1 and max(geometry.stride) == 1


def mirror(kernel: Sequence[int], geometry: Geometry) -> Geometry:
    """Geometry of the convolution that X^T is at stride 1, where channels change sides and the taps run backward."""
    padding = tuple(d * (k - 1) - p for k, p, d in zip(kernel, geometry.padding, geometry.dilation, strict=True))
    return geometry._replace(padding=padding)


def _worthwhile_zones(
    x: Layout, weight: tuple[int, ...], y: Layout, geometry: Geometry, config: ConvConfig, transposed: bool
) -> zones.Branch | None:
    """The layer with its zones, where these are few and spare enough taps; decided by sizes and tile alone."""
    kernel, (stride, padding, dilation, groups) = weight[2:], geometry
    found = zones.find_zones(kernel, stride, padding, dilation, x.shape[2:], y.shape[2:], transposed)
    if found is None or math.prod(weight) >= 2**31:
        return None
    plain = zones.plain_tile_taps(kernel, stride, y.shape[2:], transposed, y.shape[0], config.block_m)
    zoned = zones.tile_taps(found, y.shape[0], config.block_m)
    if zoned > zones.WORTH * plain:
        return None
    channels = weight[1] if transposed else weight[0] // groups
    return zones.Branch(found, kernel, channels, weight[1], 0, 0)


def _zones_note(branch: zones.Branch, geometry: Geometry, out: Sequence[int], transposed: bool) -> str:
    share = zones.met_share(branch.zones, branch.kernel, *geometry[:3], out, transposed)
    return f"validity zones: {share:.0%} of the taps meet pixels"


def zones_plan(
    branches: Sequence[zones.Branch],
    y: Layout,
    groups: int,
    access_x: Access,
    access_y: Access,
    constants: dict[str, Any],
    transposed: bool,
    axes: tuple[int, ...],
    note: str,
) -> ConvPlan:
    """Launch over the zones of the branches, with the constants of the launch over tiles that it replaces."""
    in_vec, out_vec = constants["IN_VEC"], constants["OUT_VEC"]
    if not access_y.last:
        # Every pixel that is stored has an address of its own in registers, beside the zone's sizes: no large tiles.
        block_m, block_n = (min(constants[block], 64) for block in ("BLOCK_M", "BLOCK_N"))
        constants = constants | {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4}
    table = zones.make_table(
        branches,
        y.shape[0],
        groups,
        constants["BLOCK_M"],
        constants["BLOCK_N"],
        out_vec,
        out_vec if transposed else in_vec,
    )
    names = set(conv_zones_kernel.arg_names) | {"num_warps", "num_stages"}
    constants = {name: value for name, value in constants.items() if name in names}
    # X's weights always lie along the sum.
    constants = {"SUM_LAST": True} | constants | {"TABLE_ROWS": len(table.rows), "TRANSPOSED": transposed}
    # A zone's rows have gaps between them, so along the pixels nothing is aligned.
    constants |= {f"{name}_VEC": 1 for name, side in (("X", access_x), ("Y", access_y)) if not side.last}
    sizes = (y.shape[0], groups, access_x.channels // groups // in_vec, *access_x.strides, *access_y.strides)
    return ConvPlan(
        conv_zones_kernel,
        (table.programs,),
        sizes,
        constants,
        copies=(access_x.copied,),
        axes=axes,
        table=table,
        note=note,
    )


def _is_wide(x: Access, a: int, b: int, tensor_cores: bool) -> bool:
    """Whether all operands of X are read several elements at once: along b. The a results may be stored one by one
    then: registers hold their addresses where they are few, if they don't hold the operands too."""
    return access.is_wide([x], b) and (access.is_wide([x], a) or (tensor_cores and a <= NARROW))


@lru_cache(maxsize=4096)
def plan_apply(
    x: Layout,
    weight: tuple[int, ...],
    y: Layout,
    geometry: Geometry,
    dtype: torch.dtype,
    tf32: bool,
    device: Device,
) -> ConvPlan:
    """Launch of y = X x, for a weight of shape (A total, B, *kernel)."""
    a, b, kernel = weight[0] // geometry.groups, weight[1], weight[2:]
    taps = math.prod(kernel)
    pixels = y.shape[0] * math.prod(y.shape[2:])
    flatten = taps > 1 and b < 16
    axes = channels_innermost(weight)
    access_x = access.read(x, in_order(kernel, geometry, x, y), b, a)
    access_y = access.write(y, True)
    tensor_cores = uses_tensor_cores(dtype, tf32)
    if tensor_cores and access.is_better_staged(access_y, a):
        return replace(plan_apply(x, weight, access.channels_last(y), geometry, dtype, tf32, device), staged=True)
    choose = partial(
        choose_config,
        pixels,
        a,
        taps * b if flatten else b,
        dtype.itemsize,
        tensor_cores,
        not flatten and _is_wide(access_x, a, b, tensor_cores),
        device,
        channels_last=access.is_channels_last(access_x, access_y),
    )
    config = choose()
    constants = layer_constants(kernel, geometry, b, a, access_x, access_y) | {
        "FLATTEN": flatten,
        "PADDED": is_padded(kernel, geometry, x, y),
        "EVEN": b % config.block_k == 0,
        "INDEX": index_dtype(pixels, reach(access_x, kernel, geometry.dilation), math.prod(weight)),
    }
    constants |= dtype_constants(dtype, tf32) | block_constants(config)
    if not flatten and (found := _worthwhile_zones(x, weight, y, geometry, config, False)):
        if tensor_cores and access.is_better_staged(access_y._replace(vector=1), a):
            return replace(plan_apply(x, weight, access.channels_last(y), geometry, dtype, tf32, device), staged=True)
        note = _zones_note(found, geometry, y.shape[2:], False)
        constants |= block_constants(choose(uneven=True))
        return zones_plan([found], y, geometry.groups, access_x, access_y, constants, False, axes, note)
    sizes = sizes_of(x, y, geometry, b // constants["IN_VEC"], a // constants["OUT_VEC"], access_x, access_y)
    grid = (triton.cdiv(pixels, config.block_m) * geometry.groups * triton.cdiv(a, config.block_n),)
    return ConvPlan(conv_apply_kernel, grid, sizes, constants, copies=(access_x.copied,), axes=axes)


def _positions(kernel: Sequence[int], geometry: Geometry, x: Layout, y: Layout) -> tuple[int, ...] | None:
    """Positions along each axis where X^T is one product with the residues as columns; None where it is not.

    That takes a stride that divides the kernel size. With one tap each input pixel is a position, if every output pixel
    is reached. With several, padding may shift the result against the positions, which are more than a phase's pixels
    then: for small images phases are less work. So they are where channels are innermost, which they write together.
    """
    stride, padding, dilation, _ = geometry
    size_x, size_y = x.shape[2:], y.shape[2:]
    if any(k % s or (d > 1 and k > 1) for k, s, d in zip(kernel, stride, dilation, strict=True)):
        return None
    if tuple(kernel) == stride:
        reached = all(o + p <= i * s for i, o, s, p in zip(size_x, size_y, stride, padding, strict=True))
        return size_x if reached else None
    if stride[-1] not in ACROSS or access.write(y, False).last:
        return None
    positions = tuple(-(-(o + p) // s) - p // s for o, p, s in zip(size_y, padding, stride, strict=True))
    in_phases = math.prod(-(-o // s) for o, s in zip(size_y, stride, strict=True))
    return positions if 8 * math.prod(positions) <= 9 * in_phases else None


@lru_cache(maxsize=4096)
def plan_apply_transposed(
    x: Layout,
    weight: tuple[int, ...],
    y: Layout,
    geometry: Geometry,
    dtype: torch.dtype,
    tf32: bool,
    device: Device,
) -> ConvPlan:
    """Launch of y = X^T x, for a weight of shape (A total, B, *kernel): as one product that is scattered, where
    `_positions` says so, else by residue phases."""
    a, b, kernel = weight[0] // geometry.groups, weight[1], weight[2:]
    if is_better_flat(weight, geometry):
        sides = b * geometry.groups, a, *kernel
        return replace(plan_apply(x, sides, y, mirror(kernel, geometry), dtype, tf32, device), mirrored=True)
    tensor_cores = uses_tensor_cores(dtype, tf32)
    if dtype.itemsize == 2 and geometry.groups == 1 and a % 8 and math.prod(y.shape) >= PADDED * math.prod(x.shape):
        channels = -(-a // 8) * 8
        padded = access.channels_last(Layout((x.shape[0], channels, *x.shape[2:]), x.strides))
        plan = plan_apply_transposed(padded, (channels, *weight[1:]), y, geometry, dtype, tf32, device)
        return replace(plan, padded=channels)
    positions = _positions(kernel, geometry, x, y)
    scatter, one_tap = positions is not None, tuple(kernel) == geometry.stride
    access_x = access.read(x, scatter and one_tap, a, b)
    access_y = access.write(y, math.prod(geometry.stride) == 1)
    first = access.channels_first(y)
    odd_rows = access_y.last and access_y.vector < 4 and geometry.stride[-1] in ACROSS[2:]
    if tensor_cores and odd_rows and _positions(kernel, geometry, x, first) is not None:
        return replace(plan_apply_transposed(x, weight, first, geometry, dtype, tf32, device), rowwise=True)
    across, cropped = 1, False
    residues, axes = (), channels_innermost(weight)
    if scatter:
        cropped = any(size != q * s for size, q, s in zip(y.shape[2:], positions, geometry.stride, strict=True))
        if geometry.stride[-1] in ACROSS and not access_y.last:
            # Padding shifts the positions along a row: what starts at one then is aligned to nothing.
            whole = not (cropped or geometry.padding[-1])
            across, access_y = geometry.stride[-1], access.write_rows(y) if whole else access_y
    if tensor_cores and across < 8 and access.is_better_staged(access_y, b):
        innermost = access.channels_last(y)
        return replace(plan_apply_transposed(x, weight, innermost, geometry, dtype, tf32, device), staged=True)
    if scatter:
        if not one_tap:
            residues, end = geometry.stride, 2 + 2 * len(kernel)
            axes = (0, *range(2, end, 2), 1, *range(3, end, 2))
        elif across > 1:
            axes = tuple(range(len(weight)))
    # Hopper's matrix units take 32-bit operands only with neighbouring terms of the sum side by side.
    sum_last = tf32 and dtype == torch.float32 and geometry.groups == 1
    if sum_last:
        axes = (*axes[1:], 0)
    constants = layer_constants(kernel, geometry, a, b, access_x, access_y) | {"SUM_LAST": sum_last}
    if scatter:
        rows, columns = x.shape[0] * math.prod(positions), math.prod(geometry.stride) * b
        launched, phases = conv_scatter_kernel, 1
        for name in ("DD", "DH", "DW"):
            del constants[name]
        constants["W_VEC"] = access.power_of_two_divisor(columns)
        constants["COLUMN_VEC"] = min(constants["OUT_VEC"], access_y.vector) if access_y.last else 1
        constants |= {"ACROSS": across, "CROP": cropped}
    else:
        in_phase = [-(-size // s) for size, s in zip(y.shape[2:], geometry.stride, strict=True)]
        rows, columns = x.shape[0] * math.prod(in_phase), b
        launched, phases = conv_apply_transposed_kernel, math.prod(geometry.stride)
        for axis in "DHW":
            constants[f"G{axis}"] = math.gcd(constants[f"S{axis}"], constants[f"D{axis}"])
    choose = partial(
        choose_config,
        rows,
        columns,
        a,
        dtype.itemsize,
        tensor_cores,
        # Where residues lie across, all of a position's columns are read and written side by side.
        access.is_wide([access_x], a, columns if across >= 8 else b),
        device,
        phases,
        access.is_channels_last(access_x, access_y),
    )
    config = choose()
    steps = triton.cdiv(a * math.prod(kernel) // math.prod(geometry.stride), config.block_k)
    if scatter and dtype.itemsize == 2 and config.num_warps == 8 and config.block_k > 16 and steps <= 4:
        # Short sums, large results: smaller programs, of which one stores while others multiply. On an H200 up to a
        # seventh faster for up-convolutions of 128 channels, and slower by as much for those of 1024.
        config = replace(config, block_m=64, num_warps=4, num_stages=max(2, min(3, steps)))
    constants["EVEN"] = a % config.block_k == 0
    constants["INDEX"] = index_dtype(rows * across, reach(access_x, kernel, geometry.dilation), math.prod(weight))
    constants |= dtype_constants(dtype, tf32) | block_constants(config)
    if not scatter and (found := _worthwhile_zones(x, weight, y, geometry, config, True)):
        if tensor_cores and access.is_better_staged(access_y._replace(vector=1), b):
            innermost = access.channels_last(y)
            return replace(plan_apply_transposed(x, weight, innermost, geometry, dtype, tf32, device), staged=True)
        note = _zones_note(found, geometry, y.shape[2:], True)
        constants |= block_constants(choose(uneven=True))
        return zones_plan([found], y, geometry.groups, access_x, access_y, constants, True, axes, note)
    sizes = sizes_of(x, y, geometry, a // constants["IN_VEC"], b // constants["OUT_VEC"], access_x, access_y)
    tiles = triton.cdiv(rows, config.block_m) * geometry.groups * triton.cdiv(columns, config.block_n)
    copies = (access_x.copied,)
    return ConvPlan(launched, (phases * tiles,), sizes, constants, copies=copies, residues=residues, axes=axes)
