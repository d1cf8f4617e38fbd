"""Host side of the convolution kernels: geometry, tile choice and launch. No autograd, no allocation of results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime import INTERPRETED, Device, Plan, device_guard, device_of, three
from .apply import conv_apply_kernel
from .apply_transposed import conv_apply_transposed_kernel, conv_scatter_kernel
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


def layout_of(tensor: torch.Tensor) -> Layout:
    return Layout(tensor.shape, tensor.stride())


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
    config = choose_config(
        a,
        taps * b if flatten else b,
        pixels,
        dtype.itemsize,
        _uses_tensor_cores(dtype, tf32),
        wide,
        device,
        parts=device.multiprocessors,
    )
    tiles = triton.cdiv(a, config.block_m) * geometry.groups
    tiles *= triton.cdiv(taps * b, config.block_n) if flatten else triton.cdiv(b, config.block_n) * taps
    steps = triton.cdiv(pixels, config.block_k)
    split_steps = triton.cdiv(steps, choose_splits(tiles, steps, math.prod(weight), device))
    constants = _layer_constants(kernel, geometry, b, a, sx, sy) | {
        "W_CHANNELS_LAST": channels_last,
        "FLATTEN": flatten,
        "INDEX": _index_dtype(pixels),
    }
    constants |= _dtype_constants(dtype, tf32) | _block_constants(config)
    sizes = _sizes(x, y, geometry, b // constants["IN_VEC"], a // constants["OUT_VEC"], sx, sy)
    return Plan(conv_weight_grad_kernel, (tiles, triton.cdiv(steps, split_steps)), (*sizes, split_steps), constants)


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
    plan = planner(layout_of(x), weight.shape, layout_of(y), geometry, x.dtype, tf32, device_of(x))
    with device_guard(x):
        plan.launch(
            x,
            pack_weight(weight),
            bias,
            residual,
            y,
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
