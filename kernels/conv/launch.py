"""Host side of the convolution kernels: geometry, tile choice and launch. No autograd, no allocation of results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime import INTERPRETED, Device, Plan, device_guard, device_of, three
from . import access, zones
from .access import Access, Layout, layout_of, power_of_two_divisor
from .apply import conv_apply_kernel
from .apply_transposed import conv_apply_transposed_kernel, conv_scatter_kernel
from .apply_zones import conv_zones_kernel
from .config import ConvConfig, choose_config, choose_splits
from .transpose import to_channels_last
from .weight_grad import conv_weight_grad_kernel, reduce_splits_kernel

REDUCE_BLOCK = 1024
IN_ORDER = tuple(tuple(range(axes)) for axes in (3, 4, 5))  # the axes of a weight that is read as it lies
ACROSS = (2, 4, 8, 16, 32)  # strides along W whose residues may be columns: a tile has a multiple of them


class Geometry(NamedTuple):
    """How a convolution moves over its input, axis by axis (one to three axes)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]  # before the first element; what is needed after the last follows from the sizes
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class ConvPlan(Plan):
    """A launch of a convolution."""

    copies: tuple[bool, ...] = ()  # for each tensor that is read, whether from a channels-last copy
    residues: tuple[int, ...] = ()  # into which each of the weight's axes of taps is split first: to (taps, residues)
    axes: tuple[int, ...] = ()  # of the weight, as they lie in memory when it is read
    mirrored: bool = False  # whether the weight is mirrored first
    table: zones.Table | None = None  # of the zones, where the launch goes over zones
    note: str = ""  # for people


def channels_innermost(weight: Sequence[int]) -> tuple[int, ...]:
    """The axes (A, *kernel, B): a weight in channels_last lies so already, and one of a single tap any way."""
    return (0, *range(2, len(weight)), 1) if math.prod(weight[2:]) > 1 else tuple(range(len(weight)))


def dtype_constants(dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 and dtype == torch.float32 else "ieee",
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
    }


def uses_tensor_cores(dtype: torch.dtype, tf32: bool) -> bool:
    return dtype.itemsize == 2 or (dtype == torch.float32 and tf32)


def block_constants(config: ConvConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def index_dtype(*numbers: int) -> tl.dtype:
    """Of what counts pixels, or elements from one step to the next, as many as `numbers`."""
    # A tile's pixel indices run past the last pixel, by less than any tile: stay clear of the limit by 2^16.
    return tl.int64 if max(numbers) > 2**31 - 2**16 else tl.int32


def reach(access: Access, kernel: Sequence[int], dilation: Sequence[int]) -> int:
    """No two elements that one output pixel sums up lie further apart."""
    _, stride_c, *strides = access.strides
    taps = zip(three(kernel, 1), three(dilation, 1), strides, strict=True)
    return access.channels * stride_c + sum(k * d * stride for k, d, stride in taps)


def _in_order(kernel: Sequence[int], geometry: Geometry, x: Layout, y: Layout) -> bool:
    """Whether neighbouring pixels of y read neighbouring pixels of x, row ends included."""
    return (
        math.prod(kernel) == math.prod(geometry.stride) == 1
        and not any(geometry.padding)
        and x.shape[2:] == y.shape[2:]
    )


def _padded(kernel: Sequence[int], geometry: Geometry, x: Layout, y: Layout) -> bool:
    """Whether some tap of X falls outside of x."""
    stride, padding, dilation, _ = geometry
    return any(padding) or any(
        (o - 1) * s + (k - 1) * d >= i
        for k, s, d, i, o in zip(kernel, stride, dilation, x.shape[2:], y.shape[2:], strict=True)
    )


def layer_constants(
    kernel: Sequence[int],
    geometry: Geometry,
    in_channels: int,
    out_channels: int,
    x: Access,
    y: Access,
) -> dict[str, Any]:
    """What is compiled in for a layer; channels are those of one group."""
    names = ("D", "H", "W")
    constants = {f"K{a}": size for a, size in zip(names, three(kernel, 1), strict=True)}
    constants |= {f"S{a}": size for a, size in zip(names, three(geometry.stride, 1), strict=True)}
    constants |= {f"D{a}": size for a, size in zip(names, three(geometry.dilation, 1), strict=True)}
    return constants | {
        "NDIM": len(kernel),
        "IN_VEC": power_of_two_divisor(in_channels),
        "OUT_VEC": power_of_two_divisor(out_channels),
        "X_LAST": x.last,
        "Y_LAST": y.last,
        "X_VEC": x.vector,
        "Y_VEC": y.vector,
    }


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
    access_x = access.read(x, _in_order(kernel, geometry, x, y), b, a)
    access_y = access.write(y, True)
    config = choose_config(
        pixels,
        a,
        taps * b if flatten else b,
        dtype.itemsize,
        uses_tensor_cores(dtype, tf32),
        not flatten and access.is_wide([access_x], a, b),
        device,
        channels_last=access.is_channels_last(access_x, access_y),
    )
    constants = layer_constants(kernel, geometry, b, a, access_x, access_y) | {
        "FLATTEN": flatten,
        "PADDED": _padded(kernel, geometry, x, y),
        "EVEN": b % config.block_k == 0,
        "INDEX": index_dtype(pixels, reach(access_x, kernel, geometry.dilation), math.prod(weight)),
    }
    constants |= dtype_constants(dtype, tf32) | block_constants(config)
    if not flatten and (found := _worthwhile_zones(x, weight, y, geometry, config, False)):
        note = _zones_note(found, geometry, y.shape[2:], False)
        return zones_plan([found], y, geometry.groups, access_x, access_y, constants, False, axes, note)
    sizes = _sizes(x, y, geometry, b // constants["IN_VEC"], a // constants["OUT_VEC"], access_x, access_y)
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
    positions = _positions(kernel, geometry, x, y)
    scatter = positions is not None
    access_x = access.read(x, positions == x.shape[2:], a, b)
    access_y = access.write(y, math.prod(geometry.stride) == 1)
    across, cropped = 1, False
    residues, axes = (), channels_innermost(weight)
    if scatter:
        cropped = any(size != q * s for size, q, s in zip(y.shape[2:], positions, geometry.stride, strict=True))
        if geometry.stride[-1] in ACROSS and not access_y.last:
            across, access_y = geometry.stride[-1], access_y if cropped else access.write_rows(y)
        if geometry.stride != tuple(kernel):
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
        constants["COLUMN_VEC"] = min(constants["OUT_VEC"], access_y.vector) if access_y.last else 1
        constants |= {"ACROSS": across, "CROP": cropped}
    else:
        in_phase = [-(-size // s) for size, s in zip(y.shape[2:], geometry.stride, strict=True)]
        rows, columns = x.shape[0] * math.prod(in_phase), b
        launched, phases = conv_apply_transposed_kernel, math.prod(geometry.stride)
        for axis in "DHW":
            constants[f"G{axis}"] = math.gcd(constants[f"S{axis}"], constants[f"D{axis}"])
    config = choose_config(
        rows,
        columns,
        a,
        dtype.itemsize,
        tensor_cores,
        access.is_wide([access_x], a, b),
        device,
        phases,
        access.is_channels_last(access_x, access_y),
    )
    if across > 1 and cropped and config.block_m == 128:
        # Whether it is stored is asked of each element, in registers: 128 by 128 spill.
        config = replace(config, block_n=min(config.block_n, 64))
    constants["EVEN"] = a % config.block_k == 0
    constants["INDEX"] = index_dtype(rows * across, reach(access_x, kernel, geometry.dilation), math.prod(weight))
    constants |= dtype_constants(dtype, tf32) | block_constants(config)
    if not scatter and (found := _worthwhile_zones(x, weight, y, geometry, config, True)):
        note = _zones_note(found, geometry, y.shape[2:], True)
        return zones_plan([found], y, geometry.groups, access_x, access_y, constants, True, axes, note)
    sizes = _sizes(x, y, geometry, a // constants["IN_VEC"], b // constants["OUT_VEC"], access_x, access_y)
    tiles = triton.cdiv(rows, config.block_m) * geometry.groups * triton.cdiv(columns, config.block_n)
    copies = (access_x.copied,)
    return ConvPlan(launched, (phases * tiles,), sizes, constants, copies=copies, residues=residues, axes=axes)


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
    padded = _padded(kernel, geometry, x, y)
    # The sum runs over pixels; operands of 16 bits can lie either way. In TF32 matrix units want neighbouring pixels
    # side by side, as they lie channels-first. With padding each tap has a box of pixels, with gaps between its rows.
    x_in_order, y_in_order = _in_order(kernel, geometry, x, y), flatten or not padded
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
    config = choose_config(
        *((columns, a) if swap else (a, columns)),
        pixels,
        dtype.itemsize,
        uses_tensor_cores(dtype, tf32),
        not flatten and (not along_channels or access.is_wide(along_channels, a, b)),
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
    splits = choose_splits(tiles, steps, math.prod(weight), device)
    splits = triton.cdiv(steps, triton.cdiv(steps, splits))  # none without a step
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
    sizes = _sizes(x, y, geometry, b // constants["IN_VEC"], a // constants["OUT_VEC"], access_x, access_y)
    copies = access_x.copied, access_y.copied
    return ConvPlan(conv_weight_grad_kernel, (tiles, splits), sizes, constants, copies=copies)


def _sizes(
    x: Layout,
    y: Layout,
    geometry: Geometry,
    in_units: int,
    out_units: int,
    access_x: Access,
    access_y: Access,
) -> tuple[int, ...]:
    return (
        x.shape[0],
        *three(x.shape[2:], 1),
        *three(y.shape[2:], 1),
        geometry.groups,
        in_units,
        out_units,
        *access_x.strides,
        *access_y.strides,
        *three(geometry.padding, 0),
    )


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


def mirror_weight(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The weight of the convolution that X^T is at stride 1, from X's."""
    sides = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return sides.flip(*range(2, weight.dim()))


def _launch_forward(
    planner: Callable[..., ConvPlan],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    geometry: Geometry,
    relu: bool,
    tf32: bool,
) -> None:
    if y.numel() == 0:
        return
    plan = planner(layout_of(x), weight.shape, layout_of(y), geometry, x.dtype, tf32, device_of(x))
    if plan.copies[0]:
        x = to_channels_last(x)
    if plan.mirrored:
        weight = mirror_weight(weight, geometry.groups)
    for axis, residues in enumerate(plan.residues):
        weight = weight.unflatten(2 + 2 * axis, (-1, residues))
    if plan.axes not in IN_ORDER:
        weight = weight.permute(plan.axes)
    tables = () if plan.table is None else (zones.on_device(plan.table, x.device),)
    with device_guard(x):
        plan.launch(
            x,
            weight.contiguous(),
            bias,
            residual,
            y,
            *tables,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            RELU=relu,
        )


def apply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    geometry: Geometry,
    *,
    relu: bool = False,
    tf32: bool = False,
) -> None:
    """Write y = relu(X x + bias + residual) into `y`, which may be any slice of a tensor.

    Shapes: x (N, groups B, *in), weight (groups A, B, *kernel), bias (groups A,), y and residual (N, groups A, *out);
    residual has y's strides.
    """
    _launch_forward(plan_apply, x, weight, bias, residual, y, geometry, relu, tf32)


def apply_transposed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    geometry: Geometry,
    *,
    relu: bool = False,
    tf32: bool = False,
) -> None:
    """Write y = relu(X^T x + bias + residual) into `y`, which may be any slice of a tensor.

    Shapes: x (N, groups A, *in), weight (groups A, B, *kernel), bias (groups B,), y and residual (N, groups B, *out);
    residual has y's strides.
    """
    _launch_forward(plan_apply_transposed, x, weight, bias, residual, y, geometry, relu, tf32)


def describe(
    transposed: bool, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, geometry: Geometry, *, tf32: bool
) -> str:
    """What is special about the launch of `apply`, or of `apply_transposed`, with these; their values don't matter."""
    if y.numel() == 0:
        return ""
    planner = plan_apply_transposed if transposed else plan_apply
    return planner(layout_of(x), weight.shape, layout_of(y), geometry, x.dtype, tf32, device_of(x)).note


def launch_split(plan: Plan, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
    """Launch a weight gradient into as many partial results as the grid's second axis counts, and add them up."""
    splits = plan.grid[1]
    with device_guard(x):
        if splits == 1:
            plan.launch(x, y, weight)
            return
        partial = torch.empty(
            splits * weight.numel(),
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
            device=x.device,
        )
        plan.launch(x, y, partial)
        reduce_splits_kernel[(triton.cdiv(weight.numel(), REDUCE_BLOCK),)](
            partial, weight, weight.numel(), splits, BLOCK=REDUCE_BLOCK
        )


def weight_grad(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, geometry: Geometry, *, tf32: bool = False
) -> None:
    """Write the weight gradient into `weight` (groups A, B, *kernel), contiguous or channels_last.

    Shapes: x (N, groups B, *in) and y (N, groups A, *out), the two sides of X.
    """
    if y.numel() == 0 or x.numel() == 0:
        weight.zero_()
        return
    channels_last = not weight.is_contiguous()
    plan = plan_weight_grad(
        layout_of(x),
        weight.shape,
        channels_last,
        layout_of(y),
        geometry,
        x.dtype,
        tf32,
        device_of(x),
    )
    x, y = (to_channels_last(tensor) if copy else tensor for tensor, copy in zip((x, y), plan.copies, strict=True))
    launch_split(plan, x, y, weight)
