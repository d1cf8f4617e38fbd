"""Several dilated convolutions over one input, in one launch over the validity zones of all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from ..runtime import Device, Layout, device_guard, device_of, layout_of
from ..tf32 import round_to_tf32
from . import access, zones
from .config import choose_config
from .launch import apply
from .plan import (
    ConvPlan,
    Geometry,
    block_constants,
    dtype_constants,
    index_dtype,
    layer_constants,
    reach,
    uses_tensor_cores,
)
from .plan_forward import zones_plan
from .transpose import empty_channels_last, from_channels_last, to_channels_last


def same_geometry(kernel: Sequence[int], dilation: Sequence[int]) -> Geometry:
    """Stride 1 and the padding that keeps the size; the odd element of an even kernel's padding goes behind."""
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return Geometry((1,) * len(kernel), padding, tuple(dilation), 1)


@lru_cache(maxsize=1024)
def plan_pyramid(
    x: Layout,
    weights: tuple[tuple[int, ...], ...],
    y: Layout,
    dilations: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    tf32: bool,
    device: Device,
) -> ConvPlan | None:
    """Launch of all branches, for weights of shapes (K_i, C, *kernel_i); None where the zones are too many."""
    size, in_channels = x.shape[2:], x.shape[1]
    branches, channel, element = [], 0, 0
    for weight, dilation in zip(weights, dilations, strict=True):
        kernel = weight[2:]
        stride, padding, *_ = same_geometry(kernel, dilation)
        found = zones.find_zones(kernel, stride, padding, dilation, size, size, False)
        if found is None:
            return None
        branches.append(zones.Branch(found, kernel, weight[0], in_channels, channel, element))
        channel += weight[0]
        element += math.prod(weight)
    if element >= 2**31 or sum(len(branch.zones) for branch in branches) > zones.MOST_ROWS:
        return None
    pixels = x.shape[0] * math.prod(size)
    widths = [weight[0] for weight in weights]
    access_x, access_y = access.read(x, False, in_channels, max(widths)), access.write(y, False)
    tensor_cores = uses_tensor_cores(dtype, tf32)
    if tensor_cores and access.is_better_staged(access_y, math.gcd(*widths)):
        innermost = access.channels_last(y)
        plan = plan_pyramid(x, weights, innermost, dilations, dtype, tf32, device)
        return replace(plan, staged=True) if plan else None
    config = choose_config(
        pixels,
        max(widths),
        in_channels,
        dtype.itemsize,
        tensor_cores,
        # IEEE fp32 multiplies from registers, and with the larger tile a few spill on Blackwell.
        tensor_cores and access.is_wide([access_x], in_channels, *widths),
        device,
        len(weights),
        access.is_channels_last(access_x, access_y),
    )
    one = (1,) * len(size)
    sides = access_x, access_y
    constants = layer_constants(one, Geometry(one, one, one, 1), in_channels, math.gcd(*widths), *sides)
    constants["EVEN"] = in_channels % config.block_k == 0
    furthest = (reach(access_x, weight[2:], dilation) for weight, dilation in zip(weights, dilations, strict=True))
    constants["INDEX"] = index_dtype(pixels, *furthest)
    constants |= dtype_constants(dtype, tf32) | block_constants(config)
    met = sum(zone.taps * zone.pixels for branch in branches for zone in branch.zones)
    share = met / math.prod(size) / sum(math.prod(weight[2:]) for weight in weights)
    note = f"{len(weights)} branches in one launch over validity zones: {share:.0%} of the taps meet pixels"
    return zones_plan(branches, y, 1, *sides, constants, False, (), note)


def describe_pyramid(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    y: torch.Tensor,
    dilations: Sequence[tuple[int, ...]],
    *,
    tf32: bool,
) -> str:
    """How `apply_pyramid` would run, in words; the tensors' values don't matter."""
    shapes = tuple(tuple(weight.shape) for weight in weights)
    plan = plan_pyramid(layout_of(x), shapes, layout_of(y), tuple(dilations), x.dtype, tf32, device_of(x))
    return "one launch for each branch: too many validity zones for one" if plan is None else plan.note


def _pack_weights(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Every weight as [K, taps, C], one after another."""
    packed = weights[0].new_empty(sum(weight.numel() for weight in weights))
    for weight, part in zip(weights, packed.split([weight.numel() for weight in weights]), strict=True):
        source = weight.movedim(1, -1)
        part.view(source.shape).copy_(source)
    return packed


def apply_pyramid(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    y: torch.Tensor,
    dilations: Sequence[tuple[int, ...]],
    *,
    relu: bool = False,
    tf32: bool = False,
) -> None:
    """Write y = relu([X_1 x + bias_1, X_2 x + bias_2, ...]) into `y`, the branches side by side along the channels.

    Shapes: x (N, C, *size), weights (K_i, C, *kernel_i), biases none or (K_i,) each, y (N, sum of K_i, *size). Every
    branch has its own dilation, given for each axis, and the padding that keeps the size. Where the branches have more
    zones than one launch looks up, each is a launch of its own.
    """
    if y.numel() == 0:
        return
    shapes = tuple(tuple(weight.shape) for weight in weights)
    plan = plan_pyramid(layout_of(x), shapes, layout_of(y), tuple(dilations), x.dtype, tf32, device_of(x))
    if plan is None or plan.table is None:
        parts = y.split([weight.shape[0] for weight in weights], dim=1)
        for weight, bias, part, dilation in itertools.zip_longest(weights, biases, parts, dilations):
            geometry = same_geometry(weight.shape[2:], dilation)
            apply(x, weight, bias, None, part, geometry, relu=relu, tf32=tf32)
        return
    if plan.copies[0]:
        x = to_channels_last(x)
    target, y = y, empty_channels_last(y) if plan.staged else y
    table = zones.on_device(plan.table, x.device)
    bias = torch.cat(list(biases)) if biases else None
    weight = _pack_weights(weights)
    if plan.rounds:
        weight = round_to_tf32(weight)
    with device_guard(x):
        plan.launch(
            x,
            weight,
            bias,
            None,
            y,
            table,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=False,
            RELU=relu,
        )
    if plan.staged:
        from_channels_last(y, target)
