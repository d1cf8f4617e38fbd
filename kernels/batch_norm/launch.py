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
    batch_norm_gradient_kernel,
    batch_norm_kernel,
    batch_norm_moments_finish_kernel,
    batch_norm_moments_kernel,
    batch_norm_sums_finish_kernel,
    batch_norm_sums_kernel,
)
from .config import MOST_PARTS, choose_config

FINISH_TILE = 1024  # elements


def _as_one_image(layout: Layout) -> Layout:
    """With the images as one more axis of pixels, which they often are in memory."""
    (batch, channels, *size), (stride_n, stride_c, *steps) = layout
    return Layout((1, channels, batch, *size), (0, stride_c, stride_n, *steps))


class Walk(NamedTuple):
    """How launches go through tensors of one shape."""

    sizes: tuple[int, int, int]  # images, channels, pixels
    strides: tuple[int, ...]  # of an image and a row, tensor by tensor
    constants: dict[str, Any]
    tiles: int  # blocks of channels
    parts: int  # that the blocks of pixels are divided into
    share: int  # of a part, in blocks
    at_once: int  # elements that a program's threads read by a load of 16 bytes each

    def summing(self, kernel: Any) -> Plan:
        """A program for each part."""
        channels, pixels, last = (self.constants[name] for name in ("BLOCK_C", "BLOCK_P", "LAST"))
        # Where pixels are the lanes, only a row's own can be added up.
        fold = max(pixels * (channels if last else 1) // self.at_once, 1)
        constants = self.constants | {"FOLD": fold}
        return Plan(kernel, (self.tiles, self.parts), self.sizes + self.strides, constants)

    def finishing(self, kernel: Any, *constants: str) -> Plan:
        """A program for some channels, which adds the parts up."""
        channels = self.sizes[1]
        held = block_of(self.parts, 1, MOST_PARTS)
        block = block_of(channels, 1, max(1, FINISH_TILE // held))
        own = {"BLOCK_S": held, "BLOCK": block, "num_warps": 4}
        shared = {name: self.constants[name] for name in constants}
        return Plan(kernel, (triton.cdiv(channels, block),), (*self.sizes, self.parts), shared | own)

    def writing(self, kernel: Any) -> Plan:
        """A program for each block."""
        grid = (self.tiles * self.parts * self.share,)
        return Plan(kernel, grid, (*self.sizes, self.parts, *self.strides), self.constants)


class Forward(NamedTuple):
    """The launches of a forward pass."""

    moments: Plan
    finish: Plan
    normalise: Plan


class Backward(NamedTuple):
    """The launches of a backward pass."""

    sums: Plan
    finish: Plan
    gradient: Plan


def _walk(layouts: tuple[Layout, ...], tensors: int, dtype: torch.dtype, device: Device) -> Walk | None:
    """`tensors`: of those that are summed. None where no walk has one stride for a tensor's pixels."""
    merged = tuple(map(_as_one_image, layouts))
    found = merged if channels_are_lanes(*merged) is not None else layouts
    last = channels_are_lanes(*found)
    if last is None:
        return None
    config = choose_config(tensors)
    constants = tile_constants(found, last, config.tile, dtype, config.tile) | {"num_warps": config.num_warps}
    batch, channels, pixels = found[0].shape[0], found[0].shape[1], math.prod(found[0].shape[2:])
    tiles = triton.cdiv(channels, constants["BLOCK_C"])
    units = batch * triton.cdiv(pixels, constants["BLOCK_P"])
    parts = max(min(config.programs * device.multiprocessors // tiles, MOST_PARTS, units), 1)
    share = triton.cdiv(units, parts)
    parts = triton.cdiv(units, share)  # none without a block
    strides = tuple(stride for layout in found for stride in strides_of(layout, last) or ())
    at_once = 32 * config.num_warps * 16 // dtype.itemsize
    return Walk((batch, channels, pixels), strides, constants, tiles, parts, share, at_once)


@lru_cache(maxsize=4096)
def forward_plans(x: Layout, y: Layout, dtype: torch.dtype, device: Device) -> Forward | None:
    walk = _walk((x, y), 1, dtype, device)
    return walk and Forward(
        walk._replace(strides=walk.strides[:2]).summing(batch_norm_moments_kernel),
        walk.finishing(batch_norm_moments_finish_kernel, "ACC", "BLOCK_P"),
        walk.writing(batch_norm_kernel),
    )


@lru_cache(maxsize=4096)
def backward_plans(x: Layout, y: Layout, grad: Layout, dtype: torch.dtype, device: Device) -> Backward | None:
    walk = _walk((x, y, grad), 2, dtype, device)
    return walk and Backward(
        walk.summing(batch_norm_sums_kernel),
        walk.finishing(batch_norm_sums_finish_kernel, "ACC"),
        walk.writing(batch_norm_gradient_kernel),
    )


def plan_forward(x: torch.Tensor, y: torch.Tensor) -> Forward | None:
    """For tensors (N, C, *size), not empty; None where the kernels can't walk them together as they lie."""
    return forward_plans(layout_of(x), layout_of(y), x.dtype, device_of(x))


def plan_backward(x: torch.Tensor, y: torch.Tensor, grad: torch.Tensor) -> Backward | None:
    """The same."""
    return backward_plans(layout_of(x), layout_of(y), layout_of(grad), x.dtype, device_of(x))


def _partial(values: int, plan: Plan, like: torch.Tensor) -> torch.Tensor:
    """Memory for so many values of each part and channel."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty((values, plan.grid[1], plan.sizes[1]), dtype=dtype, device=like.device)


def forward(
    plans: Forward,
    x: torch.Tensor,
    y: torch.Tensor,
    statistics: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    momentum: float,
    eps: float,
    *,
    relu: bool,
) -> None:
    """y = relu((x - mean) / sqrt(var + eps) weight + bias + residual), each part behind the quotient optional.

    With `statistics` mean and var are x's own, over all axes but the channels': mean and 1 / sqrt(var + eps) are
    written there, and the running ones become running + momentum (batch's - running), the variance with one degree of
    freedom less. Else mean and var are the running ones.

    Shapes: as `plan_forward` was given; residual as y, with its strides; statistics (2, C), all others (C,).
    """
    moments, finish, normalise = plans
    mean, var = running_mean, running_var
    with device_guard(x):
        if statistics is not None:
            partial = _partial(3, moments, x)
            moments.launch(x, partial)
            tensors = partial, statistics, running_mean, running_var
            finish.launch(*tensors, more=(momentum,), EPS=eps, HAS_RUNNING=running_mean is not None)
            mean, var = statistics, None
        normalise.launch(
            x,
            residual,
            y,
            mean,
            var,
            weight,
            bias,
            EPS=eps,
            GIVEN=statistics is None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            RELU=relu,
        )


def backward(
    plans: Backward,
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor | None,
    grad_x: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    grad_residual: torch.Tensor | None,
    eps: float,
    *,
    relu: bool,
) -> None:
    """Write those gradients of `forward` that are given.

    Shapes: as `plan_backward` was given; grad_x and grad_residual as y, with its strides; `mean` is `forward`'s
    statistics, or where `var` is given, and both are constants, (C,). y is needed for ReLU behind a residual.
    """
    sums, finish, gradient = plans
    vectors, to_residual = (mean, var, weight, bias), grad_residual is not None
    flags = {"EPS": eps, "GIVEN": var is not None, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    means = None
    with device_guard(x):
        if grad_weight is not None or grad_bias is not None or (grad_x is not None and var is None):
            partial = _partial(2, sums, x)
            means = torch.empty((2, x.shape[1]), dtype=partial.dtype, device=x.device)
            present = {"HAS_Y": y is not None, "RELU": relu, "TO_RESIDUAL": to_residual}
            sums.launch(grad, x, y, grad_residual, partial, *vectors, **flags, **present)
            wanted = {"HAS_WEIGHT": grad_weight is not None, "HAS_BIAS": grad_bias is not None}
            finish.launch(partial, mean, var, means, grad_weight, grad_bias, **flags | wanted)
            if grad_residual is not None and grad_x is not None:  # from here on the former is the gradient
                after = plan_backward(x, grad_x, grad_residual)
                assert after, "these strides are among those that `plans` walks"
                grad, gradient = grad_residual, after.gradient
                y, relu, to_residual = None, False, False
        if grad_x is not None or (to_residual and means is None):
            present = {"HAS_Y": y is not None, "RELU": relu, "TO_RESIDUAL": to_residual, "TO_X": grad_x is not None}
            gradient.launch(grad, x, y, grad_x, grad_residual, *vectors, means, **flags, **present)
