"""Host side of the depthwise kernels: plan and launch, with the signatures of `kernels.conv`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..conv.access import Layout, layout_of
from ..conv.config import choose_splits
from ..conv.launch import launch_split
from ..conv.plan import Geometry, index_dtype
from ..runtime import Device, Plan, device_guard, device_of, three
from .apply import depthwise_apply_kernel
from .config import GROUP_TERMS, GROUP_WEIGHTS, LARGEST_GROUP, DepthwiseConfig, choose_config, columns_of_a_lane
from .weight_grad import depthwise_weight_grad_kernel


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
        "PAD_W": geometry.padding[-1],
        "NDIM": len(kernel),
        "MULTIPLIER": multiplier,
        "GROUP_X": group[0],
        "GROUP_Y": group[1],
        "CHANNELS_LAST": channels_last,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def _sizes(x: Layout, y: Layout, geometry: Geometry, units: int, strides: tuple[int, ...]) -> tuple[int, ...]:
    pad_d, pad_h, _ = three(geometry.padding, 0)
    return (x.shape[0], *three(x.shape[2:], 1), *three(y.shape[2:], 1), units, *strides, pad_d, pad_h)


def _block_constants(config: DepthwiseConfig) -> dict[str, Any]:
    return {
        "WINDOW": config.window,
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
    channels, width = y.shape[1] // group_y, y.shape[-1]
    sx, sy = _strides(x), _strides(y)
    channels_last = sy[1] == 1
    x_vector = _column_vector(sx, x.shape[-1], dtype.itemsize)
    stride = geometry.stride[-1] if transposed else 1
    u = columns_of_a_lane(channels_last, transposed, width, stride, x_vector, dtype.itemsize)
    vector = min(_channel_vector(s, channels, dtype.itemsize) for s in (sx, sy))
    repeats = multiplier if transposed else 1
    config = choose_config(
        channels,
        width,
        three(kernel, 1),
        u,
        stride,
        repeats,
        vector,
        channels_last,
        dtype.itemsize,
        group=(group_x, group_y),
    )
    u = config.u
    step = u // stride if transposed else u * geometry.stride[-1]  # input columns from one lane to the next
    unit = _divisor(dtype.itemsize, channels)
    constants = _constants(kernel, geometry, channels_last, multiplier, (group_x, group_y), dtype)
    constants |= _block_constants(config)
    for axis in "DHW":
        constants[f"G{axis}"] = math.gcd(constants[f"S{axis}"], constants[f"D{axis}"])
    join = config.window and not channels_last and u > 1 and u & (u - 1) == 0
    constants |= {
        "TRANSPOSED": transposed,
        "UNIT": unit,
        "X_VEC": _channel_vector(sx, 16, dtype.itemsize),
        "Y_VEC": _column_vector(sy, width, dtype.itemsize) if join else _channel_vector(sy, 16, dtype.itemsize),
        "X_CHUNK": 1 if channels_last or not config.window else math.gcd(step, x_vector),
        "JOIN": join,
        "UNROLL": config.unroll,
    }
    per_axis = three(geometry.stride, 1)
    down = per_axis if transposed else (1, 1, 1)
    positions = [-(-size // s) for size, s in zip(three(y.shape[2:], 1), down, strict=True)]
    across = -(-width // (u if config.window else down[2]))
    phases = math.prod(down[:2]) * (1 if config.window else down[2])
    rows = x.shape[0] * positions[0] * positions[1] * (across if channels_last else channels)
    constants["INDEX"] = index_dtype(rows * u)
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
    channels, width = y.shape[1] // group_y, y.shape[-1]
    sx, sy = _strides(x), _strides(y)
    channels_last = sx[1] == 1 and sy[1] == 1
    x_vector = _column_vector(sx, x.shape[-1], dtype.itemsize)
    u = columns_of_a_lane(channels_last, False, width, 1, x_vector, dtype.itemsize)
    vector = min(_channel_vector(s, channels, dtype.itemsize) for s in (sx, sy))
    config = choose_config(
        channels,
        width,
        three(kernel, 1),
        u,
        1,
        1,
        vector,
        channels_last,
        dtype.itemsize,
        weight_grad=True,
        group=(group_x, group_y),
    )
    across = -(-width // config.u)
    lines = y.shape[0] * math.prod(y.shape[2:-1])
    unit = _divisor(dtype.itemsize, channels)
    wide = config.window and not channels_last
    constants = _constants(kernel, geometry, channels_last, multiplier, (group_x, group_y), dtype)
    constants |= _block_constants(config) | {
        "W_CHANNELS_LAST": weight_channels_last,
        "UNIT": unit,
        "X_VEC": _channel_vector(sx, 16, dtype.itemsize),
        "Y_VEC": _channel_vector(sy, 16, dtype.itemsize),
        "X_CHUNK": math.gcd(config.u * geometry.stride[-1], x_vector) if wide else 1,
        "Y_CHUNK": math.gcd(config.u, _column_vector(sy, width, dtype.itemsize)) if wide else 1,
        "TAP_ROWS": config.tap_rows,
        "INDEX": index_dtype(lines * across * config.u),
    }
    tap_groups = triton.cdiv(math.prod(kernel[:-1]), config.tap_rows) if config.window else math.prod(kernel)
    if channels_last:
        tiles = triton.cdiv(channels, config.cols) * tap_groups
        steps = triton.cdiv(lines * across, config.rows)
    else:
        tiles = channels * tap_groups
        steps = triton.cdiv(lines, config.rows) * triton.cdiv(across, config.cols)
    split_steps = triton.cdiv(steps, choose_splits(tiles, steps, math.prod(weight), device))
    sizes = (*_sizes(x, y, geometry, channels // unit, (*sx, *sy)), split_steps)
    return Plan(depthwise_weight_grad_kernel, (tiles, triton.cdiv(steps, split_steps)), sizes, constants)


def _pack_weight(weight: torch.Tensor, group: int, constants: dict[str, Any]) -> torch.Tensor:
    """The weight as the kernel reads it: what neighbouring lanes read, taps of a channel or channels of a tap, lies
    side by side, and a program's channels in one piece, so that all else is at a fixed distance."""
    weight = weight.unflatten(0, (-1, group)).flatten(3)
    if not constants["CHANNELS_LAST"]:
        return weight.contiguous()
    weight = weight.permute(3, 0, 1, 2).flatten(2)  # taps, channels, pairs
    if weight.shape[2] > 1:
        if missing := -weight.shape[1] % constants["COLS"]:
            weight = F.pad(weight, (0, 0, 0, missing))
        weight = weight.unflatten(1, (-1, constants["COLS"])).transpose(2, 3)
    return weight.contiguous()


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
