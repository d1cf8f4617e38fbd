"""Host side of the convolution kernels: launches on tensors. No autograd, no allocation of results."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton

from ..runtime import Layout, Plan, device_guard, device_of, layout_of
from ..tf32 import plan_rounding, round_contiguous, round_to_tf32
from . import zones
from .plan import ConvPlan, Geometry
from .plan_forward import plan_apply, plan_apply_transposed
from .plan_weight_grad import plan_weight_grad
from .transpose import copy_to_channels_last, empty_channels_last, from_channels_last, to_channels_last
from .weight_grad import reduce_splits_kernel

REDUCE_BLOCK = 1024
# From so many elements on, a weight is brought into another order by a kernel here: on an H200 in 0.12 ms for FCN's
# fc6, where torch took 0.48. Its gradient is made with the channels innermost first: stored tap by tap it took 6.3 ms,
# channels innermost 0.2. Where between small weights and that one is not measured.
LARGE_WEIGHT = 2**20
IN_ORDER = tuple(tuple(range(axes)) for axes in (3, 4, 5))  # the axes of a weight that is read as it lies


def mirror_weight(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The weight of the convolution that X^T is at stride 1, from X's."""
    sides = weight.transpose(0, 1) if groups == 1 else weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return sides.flip(*range(2, weight.dim()))


def _padded(x: torch.Tensor, weight: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """X^T's operands with as many channels to sum over, of which the last are zeros; x channels_last."""
    batch, known, *size = x.shape
    wide = x.new_zeros((batch, *size, channels)).movedim(-1, 1)
    wide[:, :known].copy_(x)
    return wide, torch.cat([weight, weight.new_zeros((channels - known, *weight.shape[1:]))])


@lru_cache(maxsize=4096)
def _plan_rounding(weight: Layout, axes: tuple[int, ...]) -> tuple[Plan | None, Layout]:
    """Launch that rounds a weight into contiguous memory with its axes in this order, and its layout there; None where
    there are too many axes."""
    ordered = torch.empty_strided(*weight, device="meta").permute(axes)
    return plan_rounding(*layout_of(ordered)), layout_of(ordered.contiguous())


def prepare_weight(weight: torch.Tensor, axes: tuple[int, ...], rounds: bool) -> torch.Tensor:
    """The weight in contiguous memory with its axes in this order, rounded to TF32 where asked for."""
    if weight.numel() >= LARGE_WEIGHT and weight.is_contiguous() and axes == (0, *range(2, weight.dim()), 1):
        weight = to_channels_last(weight)  # in new memory, by a kernel that is faster than torch's
    if rounds:
        plan, layout = _plan_rounding(layout_of(weight), axes)
        if plan is not None:
            ordered = weight.new_empty_strided(*layout)
            with device_guard(weight):
                plan.launch(weight, ordered)
            return ordered
    if axes not in IN_ORDER:
        weight = weight.permute(axes)
    return round_contiguous(weight) if rounds else weight.contiguous()


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
    if plan.padded:
        x, weight = _padded(x, weight, plan.padded)
    if plan.copies[0]:
        x = to_channels_last(x)
    target = y
    if plan.staged:
        y, residual = empty_channels_last(y), None if residual is None else to_channels_last(residual)
    elif plan.rowwise:
        y, residual = y.new_empty(y.shape), None if residual is None else residual.contiguous()
    if plan.mirrored:
        weight = mirror_weight(weight, geometry.groups)
    for axis, residues in enumerate(plan.residues):
        weight = weight.unflatten(2 + 2 * axis, (-1, residues))
    weight = prepare_weight(weight, plan.axes, plan.rounds)
    bias = None if bias is None else bias.contiguous()
    tables = () if plan.table is None else (zones.on_device(plan.table, x.device),)
    with device_guard(x):
        plan.launch(
            x,
            weight,
            bias,
            residual,
            y,
            *tables,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            RELU=relu,
        )
    if plan.staged:
        from_channels_last(y, target)
    elif plan.rowwise:
        copy_to_channels_last(y, target)


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


@lru_cache(maxsize=1024)
def _plan_reduction(elements: int, splits: int) -> Plan:
    grid = (triton.cdiv(elements, REDUCE_BLOCK),)
    return Plan(reduce_splits_kernel, grid, (elements, splits), {"BLOCK": REDUCE_BLOCK})


def launch_split(plan: Plan, a: torch.Tensor, b: torch.Tensor, result: torch.Tensor) -> None:
    """Launch a kernel that sums into as many partial results as the grid's second axis counts, and add them up.

    `result` is dense, and each partial result lies as it does.
    """
    splits = plan.grid[1]
    with device_guard(a):
        if splits == 1:
            plan.launch(a, b, result)
            return
        partial = torch.empty(
            splits * result.numel(),
            dtype=torch.float64 if a.dtype == torch.float64 else torch.float32,
            device=a.device,
        )
        plan.launch(a, b, partial)
        _plan_reduction(result.numel(), splits).launch(partial, result)


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
    if not channels_last and weight.numel() >= LARGE_WEIGHT and weight[0, 0].numel() > 1:
        innermost = empty_channels_last(weight)
        weight_grad(x, y, innermost, geometry, tf32=tf32)
        from_channels_last(innermost, weight)
        return
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
    if plan.rounds:  # the second operand
        x, y = (x, round_to_tf32(y)) if plan.constants["SWAP"] else (round_to_tf32(x), y)
    launch_split(plan, x, y, weight)
