"""Host side of the convolution kernels: geometry, tile choice and launch. No autograd, no allocation of results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime import INTERPRETED, Device, device_guard, device_of, three
from . import zones
from .apply import conv_apply_kernel
from .apply_transposed import conv_apply_transposed_kernel, conv_scatter_kernel
from .apply_zones import conv_zones_kernel
from .config import ConvConfig, choose_config, choose_splits
from .weight_grad import conv_weight_grad_kernel, reduce_splits_kernel

REDUCE_BLOCK = 1024


class Geometry(NamedTuple):
    """How a convolution moves over its input, axis by axis (one to three axes)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]  # before the first element; what is needed after the last follows from the sizes
    dilation: tuple[int, ...]
    groups: int


class Layout(NamedTuple):
    """Shape and strides of a tensor (N, C, *spatial): all that a launch depends on but the values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Plan(NamedTuple):
    """A launch without its pointers."""

    kernel: Any
    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    table: zones.Table | None = None  # of the zones, where the launch goes over zones
    note: str = ""  # for people


def layout_of(tensor: torch.Tensor) -> Layout:
    return Layout(tuple(tensor.shape), tensor.stride())


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """(A, B, *kernel) with channels B innermost in memory: free where the weight is channels_last already."""
    return weight.movedim(1, -1).contiguous()


def _power_of_two_divisor(*values: int) -> int:
    """Largest power of two, at most 16, that divides all values."""
    return math.gcd(16, *values)


def _strides(layout: Layout) -> tuple[int, ...]:
    """Strides n, c, d, h, w; 0 along axes of size 1, where a tensor's stride says nothing."""
    strides = [stride if size > 1 else 0 for size, stride in zip(layout.shape, layout.strides, strict=True)]
    channel = strides[1] if layout.shape[1] > 1 else 1
    return (strides[0], channel, *three(strides[2:], 0))


def _vector(strides: tuple[int, ...]) -> int:
    """Elements that can be read or written at once along the channels of every pixel."""
    n, c, *spatial = strides
    return _power_of_two_divisor(n, *spatial) if c == 1 else 1


def _is_wide(sx: tuple[int, ...], sy: tuple[int, ...], *channels: int) -> bool:
    """Whether all loads and stores move at least four neighbouring channels."""
    return min(_vector(sx), _vector(sy), _power_of_two_divisor(*channels)) >= 4


def _dtype_constants(dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 and dtype == torch.float32 else "ieee",
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
    }


def _uses_tensor_cores(dtype: torch.dtype, tf32: bool) -> bool:
    return dtype.itemsize == 2 or (dtype == torch.float32 and tf32)


def _block_constants(config: ConvConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _index_dtype(pixels: int) -> tl.dtype:
    # A tile's pixel indices run past the last pixel, by less than any tile: stay clear of the limit by 2^16.
    return tl.int64 if pixels > 2**31 - 2**16 else tl.int32


def _layer_constants(
    kernel: Sequence[int],
    geometry: Geometry,
    in_channels: int,
    out_channels: int,
    sx: tuple[int, ...],
    sy: tuple[int, ...],
) -> dict[str, Any]:
    """What is compiled in for a layer; channels are those of one group."""
    names = ("D", "H", "W")
    constants = {f"K{a}": size for a, size in zip(names, three(kernel, 1), strict=True)}
    constants |= {f"S{a}": size for a, size in zip(names, three(geometry.stride, 1), strict=True)}
    constants |= {f"D{a}": size for a, size in zip(names, three(geometry.dilation, 1), strict=True)}
    return constants | {
        "NDIM": len(kernel),
        "IN_VEC": _power_of_two_divisor(in_channels),
        "OUT_VEC": _power_of_two_divisor(out_channels),
        "X_VEC": _vector(sx),
        "Y_VEC": _vector(sy),
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


def _zones_note(branch: zones.Branch, geometry: Geometry, transposed: bool) -> str:
    share = zones.met_share(branch.zones, branch.kernel, geometry.stride, transposed)
    return f"validity zones: {share:.0%} of the taps meet pixels"


def _zones_plan(
    branches: Sequence[zones.Branch],
    x: Layout,
    y: Layout,
    groups: int,
    constants: dict[str, Any],
    transposed: bool,
    note: str,
) -> Plan:
    """Launch over the zones of the branches, with the constants of the launch over tiles that it replaces."""
    in_vec, out_vec = constants["IN_VEC"], constants["OUT_VEC"]
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
    constants |= {"ROWS": len(table.rows), "TRANSPOSED": transposed}
    sizes = (x.shape[0], groups, x.shape[1] // groups // in_vec, *_strides(x), *_strides(y))
    return Plan(conv_zones_kernel, (table.programs,), sizes, constants, table, note)


@lru_cache(maxsize=4096)
def plan_apply(
    x: Layout,
    weight: tuple[int, ...],
    y: Layout,
    geometry: Geometry,
    dtype: torch.dtype,
    tf32: bool,
    device: Device,
) -> Plan:
    """Launch of y = X x, for a weight of shape (A total, B, *kernel)."""
    a, b, kernel = weight[0] // geometry.groups, weight[1], weight[2:]
    taps = math.prod(kernel)
    pixels = y.shape[0] * math.prod(y.shape[2:])
    flatten = taps > 1 and b < 16
    sx, sy = _strides(x), _strides(y)
    wide = not flatten and _is_wide(sx, sy, a, b)
    config = choose_config(
        pixels, a, taps * b if flatten else b, dtype.itemsize, _uses_tensor_cores(dtype, tf32), wide, device
    )
    constants = _layer_constants(kernel, geometry, b, a, sx, sy) | {
        "FLATTEN": flatten,
        "INDEX": _index_dtype(pixels),
    }
    constants |= _dtype_constants(dtype, tf32) | _block_constants(config)
    if not flatten and (found := _worthwhile_zones(x, weight, y, geometry, config, False)):
        return _zones_plan([found], x, y, geometry.groups, constants, False, _zones_note(found, geometry, False))
    sizes = _sizes(x, y, geometry, b // constants["IN_VEC"], a // constants["OUT_VEC"], sx, sy)
    grid = (triton.cdiv(pixels, config.block_m) * geometry.groups * triton.cdiv(a, config.block_n),)
    return Plan(conv_apply_kernel, grid, sizes, constants)


@lru_cache(maxsize=4096)
def plan_apply_transposed(
    x: Layout,
    weight: tuple[int, ...],
    y: Layout,
    geometry: Geometry,
    dtype: torch.dtype,
    tf32: bool,
    device: Device,
) -> Plan:
    """Launch of y = X^T x, for a weight of shape (A total, B, *kernel): scattered where the stride is the kernel's
    size and every output pixel is reached, else by residue phases."""
    a, b, kernel = weight[0] // geometry.groups, weight[1], weight[2:]
    taps = math.prod(kernel)
    sx, sy = _strides(x), _strides(y)
    tensor_cores = _uses_tensor_cores(dtype, tf32)
    constants = _layer_constants(kernel, geometry, a, b, sx, sy)
    scatter = all(
        k == s and (d == 1 or k == 1) and size_y + p <= size_x * s
        for k, s, d, p, size_x, size_y in zip(
            kernel,
            geometry.stride,
            geometry.dilation,
            geometry.padding,
            x.shape[2:],
            y.shape[2:],
            strict=True,
        )
    )
    if scatter:
        rows, columns = x.shape[0] * math.prod(x.shape[2:]), taps * b
        launched, phases = conv_scatter_kernel, 1
        for name in ("SD", "SH", "SW", "DD", "DH", "DW"):
            del constants[name]
        vector = min(constants["OUT_VEC"], constants["Y_VEC"]) if sy[1] == 1 else 1
        constants["COLUMN_VEC"] = vector
        constants["CROP"] = any(
            size_y != size_x * s for s, size_x, size_y in zip(geometry.stride, x.shape[2:], y.shape[2:], strict=True)
        )
    else:
        positions = [-(-size // s) for size, s in zip(y.shape[2:], geometry.stride, strict=True)]
        rows, columns = x.shape[0] * math.prod(positions), b
        launched, phases = conv_apply_transposed_kernel, math.prod(geometry.stride)
        for axis in "DHW":
            constants[f"G{axis}"] = math.gcd(constants[f"S{axis}"], constants[f"D{axis}"])
    wide = _is_wide(sx, sy, a, b)
    config = choose_config(rows, columns, a, dtype.itemsize, tensor_cores, wide, device, phases)
    constants["INDEX"] = _index_dtype(rows)
    constants |= _dtype_constants(dtype, tf32) | _block_constants(config)
    if not scatter and (found := _worthwhile_zones(x, weight, y, geometry, config, True)):
        return _zones_plan([found], x, y, geometry.groups, constants, True, _zones_note(found, geometry, True))
    sizes = _sizes(x, y, geometry, a // constants["IN_VEC"], b // constants["OUT_VEC"], sx, sy)
    tiles = triton.cdiv(rows, config.block_m) * geometry.groups * triton.cdiv(columns, config.block_n)
    return Plan(launched, (phases * tiles,), sizes, constants)


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
) -> Plan:
    """Launch of the weight gradient; the grid's second axis counts the partial results."""
    a, b, kernel = weight[0] // geometry.groups, weight[1], weight[2:]
    taps = math.prod(kernel)
    pixels = y.shape[0] * math.prod(y.shape[2:])
    flatten = taps > 1 and b < 16
    sx, sy = _strides(x), _strides(y)
    wide = not flatten and _is_wide(sx, sy, a, b)
    columns = taps * b if flatten else b
    swap = a <= device.matrix_columns < min(columns, 16)
    config = choose_config(
        *((columns, a) if swap else (a, columns)),
        pixels,
        dtype.itemsize,
        _uses_tensor_cores(dtype, tf32),
        wide,
        device,
        parts=device.multiprocessors,
    )
    if swap:
        config = replace(config, block_m=config.block_n, block_n=config.block_m)
    tiles = triton.cdiv(a, config.block_m) * geometry.groups
    tiles *= triton.cdiv(taps * b, config.block_n) if flatten else triton.cdiv(b, config.block_n) * taps
    steps = triton.cdiv(pixels, config.block_k)
    splits = choose_splits(tiles, steps, math.prod(weight), device)
    splits = triton.cdiv(steps, triton.cdiv(steps, splits))  # none without a step
    constants = _layer_constants(kernel, geometry, b, a, sx, sy) | {
        "W_CHANNELS_LAST": channels_last,
        "FLATTEN": flatten,
        "SWAP": swap,
        "INDEX": _index_dtype(pixels),
    }
    constants |= _dtype_constants(dtype, tf32) | _block_constants(config)
    sizes = _sizes(x, y, geometry, b // constants["IN_VEC"], a // constants["OUT_VEC"], sx, sy)
    return Plan(conv_weight_grad_kernel, (tiles, splits), sizes, constants)


def _sizes(
    x: Layout,
    y: Layout,
    geometry: Geometry,
    in_units: int,
    out_units: int,
    sx: tuple[int, ...],
    sy: tuple[int, ...],
) -> tuple[int, ...]:
    return (
        x.shape[0],
        *three(x.shape[2:], 1),
        *three(y.shape[2:], 1),
        geometry.groups,
        in_units,
        out_units,
        *sx,
        *sy,
        *three(geometry.padding, 0),
    )


def is_better_flat(weight: Sequence[int], geometry: Geometry) -> bool:
    """Whether X^T has so few channels to sum over that it runs as the convolution it is at stride 1.

    That sums over flat (tap, channel) indices, where X^T would fill each tap's channels up to a block of 16. It has
    narrow tiles, so only with few output channels too.
    """
    few = weight[0] // geometry.groups < 16 and weight[1] <= 32
    return few and math.prod(weight[2:]) > 1 and max(geometry.stride) == 1


def as_convolution(weight: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, Geometry]:
    """Weight and geometry of the convolution that X^T is at stride 1: channels change sides, the taps run backward."""
    sides = weight.unflatten(0, (geometry.groups, -1)).transpose(1, 2).flatten(0, 1)
    padding = tuple(
        d * (k - 1) - p for k, p, d in zip(weight.shape[2:], geometry.padding, geometry.dilation, strict=True)
    )
    return sides.flip(*range(2, weight.dim())), geometry._replace(padding=padding)


def _launch_forward(
    planner: Callable[..., Plan],
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
    plan = planner(layout_of(x), tuple(weight.shape), layout_of(y), geometry, x.dtype, tf32, device_of(x))
    tables = () if plan.table is None else (zones.on_device(plan.table, x.device),)
    with device_guard(x):
        plan.kernel[plan.grid](
            x,
            pack_weight(weight),
            bias,
            residual,
            y,
            *tables,
            *plan.sizes,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            RELU=relu,
            **plan.constants,
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
    planner = plan_apply_transposed
    if is_better_flat(weight.shape, geometry):
        weight, geometry = as_convolution(weight, geometry)
        planner = plan_apply
    _launch_forward(planner, x, weight, bias, residual, y, geometry, relu, tf32)


def describe(
    transposed: bool, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, geometry: Geometry, *, tf32: bool
) -> str:
    """What is special about the launch of `apply`, or of `apply_transposed`, with these; their values don't matter."""
    if y.numel() == 0:
        return ""
    planner = plan_apply_transposed if transposed else plan_apply
    if transposed and is_better_flat(weight.shape, geometry):
        weight, geometry = as_convolution(weight, geometry)
        planner = plan_apply
    return planner(layout_of(x), tuple(weight.shape), layout_of(y), geometry, x.dtype, tf32, device_of(x)).note


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
        tuple(weight.shape),
        channels_last,
        layout_of(y),
        geometry,
        x.dtype,
        tf32,
        device_of(x),
    )
    splits = plan.grid[1]
    with device_guard(x):
        if splits == 1:
            plan.kernel[plan.grid](x, y, weight, *plan.sizes, **plan.constants)
            return
        partial = torch.empty(
            splits * weight.numel(),
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
            device=x.device,
        )
        plan.kernel[plan.grid](x, y, partial, *plan.sizes, **plan.constants)
        reduce_splits_kernel[(triton.cdiv(weight.numel(), REDUCE_BLOCK),)](
            partial, weight, weight.numel(), splits, BLOCK=REDUCE_BLOCK
        )
