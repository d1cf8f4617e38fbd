"""Host side of the depthwise kernels: plan and launch, with the signatures of `kernels.conv`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from ..conv.launch import launch_split
from ..conv.plan import Geometry, index_dtype
from ..lanes import ASSEMBLY
from ..runtime import Device, Layout, Plan, device_guard, device_of, layout_of, three
from .apply import depthwise_apply_kernel
from .config import (
    GROUP_TERMS,
    GROUP_WEIGHTS,
    LARGEST_GROUP,
    Axis,
    DepthwiseConfig,
    choose_config,
    choose_splits,
    columns_of_a_lane,
)
from .weight_grad import depthwise_weight_grad_kernel

# Compiled for NVIDIA: elsewhere, and interpreted, there is none of its assembly.


def takes(weight: Sequence[int], groups: int) -> bool:
    """Whether a convolution with this weight (groups A, B, *kernel) is for these kernels.

    It is depthwise, of one input channel in every group, or its groups have one, two or four channels on either side
    and a kernel of few taps.
    """
    a, b, *kernel = weight[0] // groups, *weight[1:]
    if groups == 1 or b == 1:
        return groups > 1
    few = a * b * math.prod(kernel) <= GROUP_TERMS and a * b * kernel[-1] <= GROUP_WEIGHTS
    return few and max(a, b) <= LARGEST_GROUP and a & (a - 1) == b & (b - 1) == 0


def _groups(weight: Sequence[int], groups: int) -> tuple[int, int, int]:
    """Channels of a group of X's input and output that a lane has, and how often it takes the former (multiplier)."""
    a, b = weight[0] // groups, weight[1]
    return (1, 1, a) if b == 1 else (b, a, 1)


def _strides(layout: Layout) -> tuple[int, ...]:
    """Strides n, c, d, h, w; along axes of size 1, where a tensor's stride says nothing, 0, or 1 for c and w."""
    n, c, *spatial = [s if size > 1 else 0 for size, s in zip(layout.shape, layout.strides, strict=True)]
    spatial[-1] = spatial[-1] if layout.shape[-1] > 1 else 1
    return (n, c if layout.shape[1] > 1 else 1, *three(spatial, 0))


def _divisor(itemsize: int, *values: int) -> int:
    """Largest power of two that divides all values and fits one load of 16 bytes."""
    return math.gcd(16 // itemsize, *values)


def _channel_vector(strides: tuple[int, ...], channels: int, itemsize: int) -> int:
    """Channels that one load can take of every pixel."""
    n, c, *spatial = strides
    return _divisor(itemsize, channels, n, *spatial) if c == 1 else 1


def _column_vector(strides: tuple[int, ...], width: int, itemsize: int) -> int:
    """Columns that one load can take, starting at every multiple of it."""
    *others, w = strides
    return _divisor(itemsize, width, *others) if w == 1 else 1


def _constants(
    kernel: tuple[int, ...],
    geometry: Geometry,
    channels_last: bool,
    multiplier: int,
    group: tuple[int, int],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What is compiled in for a layer, in every kernel."""
    constants: dict[str, Any] = {}
    for letter, values in zip("KSD", (kernel, geometry.stride, geometry.dilation), strict=True):
        constants |= {letter + axis: value for axis, value in zip("DHW", three(values, 1), strict=True)}
    return constants | {
        "PAD_H": three(geometry.padding, 0)[1],
        "PAD_W": geometry.padding[-1],
        "NDIM": len(kernel),
        "MULTIPLIER": multiplier,
        "GROUP_X": group[0],
        "GROUP_Y": group[1],
        "CHANNELS_LAST": channels_last,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "ASSEMBLY": ASSEMBLY,
    }


def _sizes(x: Layout, y: Layout, geometry: Geometry, units: int, strides: tuple[int, ...]) -> tuple[int, ...]:
    pad_d = three(geometry.padding, 0)[0]
    return (x.shape[0], *three(x.shape[2:], 1), *three(y.shape[2:], 1), units, *strides, pad_d)


def _axes(kernel: tuple[int, ...], y: Layout, geometry: Geometry, transposed: bool) -> list[Axis]:
    """D, H and W of what a launch makes (or sums over), with its taps."""
    of_kernel = [three(values, 1) for values in (y.shape[2:], kernel, geometry.stride, geometry.dilation)]
    padding = three(geometry.padding, 0)
    return [
        Axis(size, taps, pad, stride, dilation, transposed)
        for size, taps, stride, dilation, pad in zip(*of_kernel, padding, strict=True)
    ]


def _lanes(axis: Axis, outputs: int, spacing: int) -> int:
    """How many of so many outputs cover an axis."""
    apart = max(spacing, 1)
    return -(-axis.size // (outputs * apart)) * apart


def _block_constants(config: DepthwiseConfig) -> dict[str, Any]:
    return {
        "WINDOW": config.window,
        "SPACING_H": config.spacing_h,
        "SPACING_W": config.spacing_w,
        "V": config.v,
        "U": config.u,
        "ROWS": config.rows,
        "COLS": config.cols,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


@lru_cache(maxsize=4096)
def plan_apply(
    x: Layout,
    weight: tuple[int, ...],
    y: Layout,
    geometry: Geometry,
    dtype: torch.dtype,
    transposed: bool,
) -> Plan:
    """Launch of y = X x, or with `transposed` y = X^T x, for a weight of shape (groups A, B, *kernel)."""
    kernel, (*group, multiplier) = weight[2:], _groups(weight, geometry.groups)
    group_x, group_y = group[::-1] if transposed else group
    channels, (depth, height, width) = y.shape[1] // group_y, _axes(kernel, y, geometry, transposed)
    sx, sy = _strides(x), _strides(y)
    channels_last = sy[1] == 1
    x_vector = _column_vector(sx, x.shape[-1], dtype.itemsize)
    u = columns_of_a_lane(channels_last, transposed, width.size, width.stride, x_vector, dtype.itemsize)
    vector = min(_channel_vector(s, channels, dtype.itemsize) for s in (sx, sy)) if channels_last else x_vector
    config = choose_config(channels, height, width, u, vector, channels_last, dtype.itemsize, group=(group_x, group_y))
    u = config.u
    step = u // width.stride if transposed else u * width.stride  # input columns from one lane to the next
    unit = _divisor(dtype.itemsize, channels)
    chunk = 1 if channels_last or not config.window else math.gcd(step, x_vector)
    constants = _constants(kernel, geometry, channels_last, multiplier, (group_x, group_y), dtype)
    constants |= _block_constants(config)
    for axis in "DHW":
        constants[f"G{axis}"] = math.gcd(constants[f"S{axis}"], constants[f"D{axis}"])
    join = config.window and not channels_last and u > 1 and u & (u - 1) == 0
    constants |= {
        "TRANSPOSED": transposed,
        "WINDOW_H": config.window_h,
        "UNIT": unit,
        "X_VEC": _channel_vector(sx, 16, dtype.itemsize) if channels_last else chunk,
        "Y_VEC": _column_vector(sy, width.size, dtype.itemsize) if join else _channel_vector(sy, 16, dtype.itemsize),
        "X_CHUNK": chunk,
        "JOIN": join,
    }
    down = _lanes(height, config.v if config.window_h else height.step, config.spacing_h)
    across = _lanes(width, u if config.window else width.step, config.spacing_w)
    phases = depth.step * (1 if config.window_h else height.step) * (1 if config.window else width.step)
    rows = x.shape[0] * _lanes(depth, depth.step, 0) * down * (across if channels_last else channels)
    constants["INDEX"] = index_dtype(rows * u * config.v)
    tiles = triton.cdiv(channels if channels_last else across, config.cols)
    grid = (triton.cdiv(rows, config.rows) * phases * tiles,)
    return Plan(depthwise_apply_kernel, grid, _sizes(x, y, geometry, channels // unit, (*sx, *sy)), constants)


@lru_cache(maxsize=4096)
def plan_weight_grad(
    x: Layout,
    weight: tuple[int, ...],
    weight_channels_last: bool,
    y: Layout,
    geometry: Geometry,
    dtype: torch.dtype,
    device: Device,
) -> Plan:
    """Launch of the weight gradient; the grid's second axis counts the partial results."""
    kernel, (group_x, group_y, multiplier) = weight[2:], _groups(weight, geometry.groups)
    channels, (depth, height, width) = y.shape[1] // group_y, _axes(kernel, y, geometry, False)
    sx, sy = _strides(x), _strides(y)
    channels_last = sx[1] == 1 and sy[1] == 1
    x_vector = _column_vector(sx, x.shape[-1], dtype.itemsize)
    u = columns_of_a_lane(channels_last, False, width.size, 1, x_vector, dtype.itemsize)
    vector = min(_channel_vector(s, channels, dtype.itemsize) for s in (sx, sy)) if channels_last else x_vector
    config = choose_config(
        channels,
        height,
        width,
        u,
        vector,
        channels_last,
        dtype.itemsize,
        weight_grad=True,
        group=(group_x, group_y),
    )
    unit = _divisor(dtype.itemsize, channels)
    wide = config.window and not channels_last
    x_chunk = math.gcd(config.u * width.stride, x_vector) if wide else 1
    y_chunk = math.gcd(config.u, _column_vector(sy, width.size, dtype.itemsize)) if wide else 1
    constants = _constants(kernel, geometry, channels_last, multiplier, (group_x, group_y), dtype)
    constants |= _block_constants(config) | {
        "W_CHANNELS_LAST": weight_channels_last,
        "UNIT": unit,
        "X_VEC": _channel_vector(sx, 16, dtype.itemsize) if channels_last else x_chunk,
        "Y_VEC": _channel_vector(sy, 16, dtype.itemsize) if channels_last else y_chunk,
        "X_CHUNK": x_chunk,
        "Y_CHUNK": y_chunk,
        "TAP_ROWS": config.tap_rows,
    }
    lines = y.shape[0] * depth.size * _lanes(height, config.v, config.spacing_h)
    across = _lanes(width, config.u, config.spacing_w)
    constants["INDEX"] = index_dtype(lines * across * config.u * config.v)
    parts = depth.taps * triton.cdiv(height.taps, config.tap_rows) * (1 if config.window else width.taps)
    if channels_last:
        tiles = triton.cdiv(channels, config.cols) * parts
        steps = triton.cdiv(lines * across, config.rows)
    else:
        tiles = channels * parts
        steps = triton.cdiv(lines, config.rows) * triton.cdiv(across, config.cols)
    split_steps = triton.cdiv(steps, choose_splits(tiles, steps, math.prod(weight), device))
    sizes = (*_sizes(x, y, geometry, channels // unit, (*sx, *sy)), split_steps)
    return Plan(depthwise_weight_grad_kernel, (tiles, triton.cdiv(steps, split_steps)), sizes, constants)


def _pack_weight(weight: torch.Tensor, group: int, constants: dict[str, Any]) -> torch.Tensor:
    """The weight as the kernel reads it: what neighbouring lanes read, taps of a channel or channels of a tap, lies
    side by side, the latter in the type of the sums."""
    weight = weight.unflatten(0, (-1, group)).flatten(3)
    if not constants["CHANNELS_LAST"]:
        return weight.contiguous()
    weight = weight.permute(3, 0, 1, 2).flatten(2)  # taps, channels, pairs
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.empty(weight.shape, dtype=dtype, device=weight.device).copy_(weight)


def _launch_forward(
    transposed: bool,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    geometry: Geometry,
    relu: bool,
) -> None:
    if y.numel() == 0:
        return
    plan = plan_apply(layout_of(x), weight.shape, layout_of(y), geometry, x.dtype, transposed)
    packed = _pack_weight(weight, _groups(weight.shape, geometry.groups)[1], plan.constants)
    bias = None if bias is None else bias.contiguous()
    with device_guard(x):
        plan.launch(
            x,
            packed,
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

    Shapes: x (N, C B, *in), weight (C A, B, *kernel), bias (C A,), y and residual (N, C A, *out), C being the groups;
    residual has y's strides. All products are taken in fp32, whatever `tf32` allows.
    """
    _launch_forward(False, x, weight, bias, residual, y, geometry, relu)


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

    Shapes: x (N, C A, *in), weight (C A, B, *kernel), bias (C B,), y and residual (N, C B, *out), C being the groups;
    residual has y's strides. All products are taken in fp32, whatever `tf32` allows.
    """
    _launch_forward(True, x, weight, bias, residual, y, geometry, relu)


def weight_grad(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, geometry: Geometry, *, tf32: bool = False
) -> None:
    """Write the weight gradient into `weight` (C A, B, *kernel), contiguous or channels_last.

    Shapes: x (N, C B, *in) and y (N, C A, *out), the two sides of X, C being the groups.
    """
    if y.numel() == 0 or x.numel() == 0:
        weight.zero_()
        return
    channels_last = not weight.is_contiguous()
    plan = plan_weight_grad(layout_of(x), weight.shape, channels_last, layout_of(y), geometry, x.dtype, device_of(x))
    launch_split(plan, x, y, weight)
