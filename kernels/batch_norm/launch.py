"""Launching batch normalisation: how tensors are walked, configurations and workspaces."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

from ..pixelwise import channels_are_lanes, strides_of, tile_constants
from ..runtime import Device, Layout, Plan, block_of, device_guard, device_of, layout_of
from .batch_norm import (
    gradient_kernel,
    moments_finish_kernel,
    moments_kernel,
    normalise_kernel,
    sums_finish_kernel,
    sums_kernel,
)
from .config import MOST_PARTS, BatchNormConfig, choose_config

FINISH_TILE = 4096  # elements


def _as_one_image(layout: Layout) -> Layout:
    """With the images as one more axis of pixels, which they often are in memory."""
    (batch, channels, *size), (stride_n, stride_c, *steps) = layout
    return Layout((1, channels, batch, *size), (0, stride_c, stride_n, *steps))


class Walk(NamedTuple):
    """How launches go through tensors of one shape."""

    config: BatchNormConfig
    sizes: tuple[int, int, int]  # images, channels, pixels
    strides: tuple[int, ...]  # of an image and a row, tensor by tensor
    constants: dict[str, Any]
    tiles: int  # blocks of channels
    parts: int  # that the blocks of pixels are divided into
    share: int  # of a part, in blocks

    def summing(self, kernel: Any) -> Plan:
        """A program for each part."""
        full = self.constants["BLOCK_C"] * self.constants["BLOCK_P"] == self.config.tile
        constants = self.constants | {"FOLD": self.config.fold if full else 1}
        return Plan(kernel, (self.tiles, self.parts), self.sizes + self.strides, constants)

    def finishing(self, kernel: Any, *constants: str) -> Plan:
        """A program for some channels, which adds the parts up."""
        channels = self.sizes[1]
        held = block_of(self.parts, 1, MOST_PARTS)
        block = block_of(channels, 1, max(1, FINISH_TILE // held // 2))
        own = {"BLOCK_S": held, "BLOCK": block, "num_warps": self.config.num_warps}
        shared = {name: self.constants[name] for name in constants}
        return Plan(kernel, (triton.cdiv(channels, block),), (*self.sizes, self.parts), shared | own)

    def writing(self, kernel: Any) -> Plan:
        """A program for each block."""
        grid = (self.tiles * self.parts * self.share,)
        return Plan(kernel, grid, (*self.sizes, self.parts, *self.strides), self.constants)


def _layouts(*layouts: Layout) -> tuple[Layout, ...] | None:
    """As they can be walked, or None."""
    merged = tuple(map(_as_one_image, layouts))
    for each in (merged, layouts):
        if channels_are_lanes(*each) is not None:
            return each
    return None


@lru_cache(maxsize=4096)
def _is_walked(*layouts: Layout) -> bool:
    return _layouts(*layouts) is not None


def is_walked(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can read tensors of one shape together, as they lie."""
    return _is_walked(*map(layout_of, tensors))


def _walk(layouts: tuple[Layout, ...], tensors: int, dtype: torch.dtype, device: Device) -> Walk:
    """`tensors`: of those that are summed."""
    found = _layouts(*layouts)
    assert found, "callers ask is_walked"
    config, last = choose_config(tensors), bool(channels_are_lanes(*found))
    constants = tile_constants(found, last, config.tile, dtype) | {"num_warps": config.num_warps}
    batch, channels, pixels = found[0].shape[0], found[0].shape[1], math.prod(found[0].shape[2:])
    tiles = triton.cdiv(channels, constants["BLOCK_C"])
    units = batch * triton.cdiv(pixels, constants["BLOCK_P"])
    parts = max(min(config.programs * device.multiprocessors // tiles, MOST_PARTS, units), 1)
    share = triton.cdiv(units, parts)
    parts = triton.cdiv(units, share)  # none without a block
    strides = tuple(stride for layout in found for stride in strides_of(layout, last) or ())
    return Walk(config, (batch, channels, pixels), strides, constants, tiles, parts, share)


@lru_cache(maxsize=4096)
def moments_plans(x: Layout, dtype: torch.dtype, device: Device) -> tuple[Plan, Plan]:
    walk = _walk((x,), 1, dtype, device)
    return walk.summing(moments_kernel), walk.finishing(moments_finish_kernel, "ACC", "BLOCK_P")


@lru_cache(maxsize=4096)
def normalise_plan(x: Layout, y: Layout, dtype: torch.dtype, device: Device) -> Plan:
    return _walk((x, y), 1, dtype, device).writing(normalise_kernel)


@lru_cache(maxsize=4096)
def gradient_plans(x: Layout, y: Layout, grad: Layout, dtype: torch.dtype, device: Device) -> tuple[Plan, Plan, Plan]:
    walk = _walk((x, y, grad), 2, dtype, device)
    return walk.summing(sums_kernel), walk.finishing(sums_finish_kernel, "ACC"), walk.writing(gradient_kernel)


def _partial(values: int, plan: Plan, like: torch.Tensor) -> torch.Tensor:
    """Memory for so many values of each part and channel."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty((values, plan.grid[1], plan.sizes[1]), dtype=dtype, device=like.device)


def moments(
    x: torch.Tensor,
    statistics: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
) -> None:
    """Write mean and 1 / sqrt(var + eps) over all axes of x but the channels' into the statistics, (2, C), and go on
    with the running ones, (C,): running + momentum (batch's - running), the variance with one degree of freedom less.

    Shape: x (N, C, *size), not empty, such that `is_walked`.
    """
    first, finish = moments_plans(layout_of(x), x.dtype, device_of(x))
    partial = _partial(3, first, x)
    with device_guard(x):
        first.launch(x, partial)
        tensors = partial, statistics, running_mean, running_var
        finish.launch(*tensors, more=(momentum,), EPS=eps, HAS_RUNNING=running_mean is not None)


def normalise(
    x: torch.Tensor,
    mean: torch.Tensor,
    spread: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    eps: float,
    *,
    is_var: bool,
    relu: bool,
) -> None:
    """y = relu((x - mean) / sqrt(var + eps) weight + bias + residual), each part behind the quotient optional.

    Shapes: x, y and residual (N, C, *size), not empty, the latter two of the same strides, such that x and y
    `is_walked`; all others (C,). `spread` is the variance with `is_var`, else 1 / sqrt(var + eps).
    """
    plan = normalise_plan(layout_of(x), layout_of(y), x.dtype, device_of(x))
    with device_guard(x):
        plan.launch(
            x,
            residual,
            y,
            mean,
            spread,
            weight,
            bias,
            EPS=eps,
            IS_VAR=is_var,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            RELU=relu,
        )


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    spread: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor | None,
    grad_x: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    grad_residual: torch.Tensor | None,
    eps: float,
    *,
    is_var: bool,
    relu: bool,
) -> None:
    """Write those gradients of `normalise` that are given. With `is_var` mean and variance are constants, else x's own.

    Shapes: as there; grad as x; y is needed for a residual behind which ReLU comes. y, grad_x and grad_residual have
    the same strides, and x, grad and these `is_walked`. One of them, or y, is not None.
    """
    dense = layout_of(next(tensor for tensor in (grad_x, grad_residual, y, x) if tensor is not None))
    layout, device = layout_of(x), device_of(x)
    sums, finish, last = gradient_plans(layout, dense, layout_of(grad), x.dtype, device)
    vectors = mean, spread, weight, bias
    flags = {"EPS": eps, "IS_VAR": is_var, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    means = None
    with device_guard(x):
        if grad_weight is not None or grad_bias is not None or (grad_x is not None and not is_var):
            partial = _partial(2, sums, x)
            means = torch.empty((2, x.shape[1]), dtype=partial.dtype, device=x.device)
            to_residual = grad_residual is not None
            behind = {"HAS_Y": y is not None, "RELU": relu, "TO_RESIDUAL": to_residual}
            sums.launch(grad, x, y, grad_residual, partial, *vectors, **flags, **behind)
            wanted = {"HAS_WEIGHT": grad_weight is not None, "HAS_BIAS": grad_bias is not None}
            finish.launch(partial, spread, means, grad_weight, grad_bias, **flags | wanted)
            if to_residual:  # from here on that is the gradient
                grad, y, relu, grad_residual = grad_residual, None, False, None
                *_, last = gradient_plans(layout, dense, dense, x.dtype, device)
        if grad_x is not None or grad_residual is not None:
            behind = {"HAS_Y": y is not None, "RELU": relu, "TO_RESIDUAL": grad_residual is not None}
            tensors = grad, x, y, grad_x, grad_residual, *vectors, means
            last.launch(*tensors, **flags, **behind, TO_X=grad_x is not None)
