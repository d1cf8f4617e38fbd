"""Registration of the convolution ops with PyTorch: schema, kernels, fake tensors, autograd.

    backstride::conv                   X x      (+ bias, residual, ReLU)
    backstride::conv_transpose         X^T x    (+ bias, residual, ReLU)
    backstride::conv_weight_grad       gradient by the weight of either
    backstride::conv_transpose_concat  [skip, X^T x (+ bias, ReLU)] in one tensor

Weights are (A, B, *kernel) with X taking groups * B channels to A, and X^T taking A channels back. Every op names its
output's spatial size, which settles what follows the last input element (asymmetric "same" padding, output_padding,
rows that a stride leaves over), so `padding` is what precedes the first. All are bilinear in their two main arguments,
and each one's derivatives are the other two: gradients of any order run on the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import conv as kernels
from ...kernels import depthwise
from ...kernels.conv import Geometry
from ...kernels.conv.epilogue import LITTLE
from ...kernels.runtime import layout_of
from ..dispatch import ATEN, kernel_path
from ..registration import (
    Function,
    below_autograd,
    differentiable,
    empty,
    launches,
    memory_format,
    uses_tf32,
    with_strides_of,
)
from . import aten

_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"

library = torch.library.Library("backstride", "FRAGMENT")
library.define(
    f"conv(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] output_size, {_GEOMETRY}, bool relu)"
    " -> Tensor"
)
library.define(
    "conv_transpose(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] output_size,"
    f" {_GEOMETRY}, bool relu) -> Tensor"
)
library.define(
    f"conv_weight_grad(Tensor x, Tensor y, SymInt[] kernel_size, {_GEOMETRY}) -> Tensor",
)
library.define(
    "conv_transpose_concat(Tensor x, Tensor skip, Tensor weight, Tensor? bias, SymInt[] output_size,"
    f" {_GEOMETRY}, bool relu) -> Tensor"
)

registered = torch.ops.backstride


def kernels_for(weight: Sequence[int], groups: int) -> Any:
    """The kernel family that takes a weight of this shape: dense and grouped, or depthwise and small groups."""
    return depthwise if depthwise.takes(weight, groups) else kernels


def _tf32(x: Tensor) -> bool:
    return uses_tf32(x, "conv")


def _empty_result(transposed: bool, x: Tensor, weight: Tensor, output_size: Sequence[int], groups: int) -> Tensor:
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return empty((x.shape[0], channels, *output_size), x, weight)


def _forward(
    transposed: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    if kernel_path(x).name == ATEN:
        y = (aten.conv_transpose if transposed else aten.conv)(x, weight, bias, output_size, geometry)
        y = y if residual is None else y + residual
        return (y.relu() if relu else y).contiguous(memory_format=memory_format(x, weight))
    plain = bias is None and residual is None and not relu
    if plain and not transposed and kernels.may_be_runs(weight.shape, geometry):
        y = _empty_result(transposed, x, weight, output_size, groups)
        if kernels.apply_runs(x, weight, y, geometry, tf32=_tf32(x)):
            return y
    if aten.is_better_forward(transposed, x, weight.shape[2:], geometry):
        return _library_forward(transposed, x, weight, bias, residual, output_size, geometry, relu)
    y = _empty_result(transposed, x, weight, output_size, groups)
    residual = None if residual is None else with_strides_of(y, residual)
    _launch(transposed, x, weight, bias, residual, y, geometry, relu)
    return y


def _is_better_staged(channels_first: bool, x: Tensor, weight: Tensor, channels: int) -> bool:
    """Whether cuDNN is handed a copy in channels-last memory of x, and of what has so many channels."""
    return channels_first and aten.is_better_channels_last(x, channels, _tf32(x), weight.numel())


def _library_forward(
    transposed: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    output_size: Sequence[int],
    geometry: Geometry,
    relu: bool,
) -> Tensor:
    """The products by cuDNN, and the epilogue by it too, or in one pass."""
    form = memory_format(x, weight)
    channels = weight.shape[1] * geometry.groups if transposed else weight.shape[0]
    staged = _is_better_staged(form == torch.contiguous_format, x, weight, channels)
    operand = kernels.to_channels_last(x) if staged else x
    finished = None
    if relu and residual is None and not transposed:
        finished = aten.conv_relu(operand, weight, bias, output_size, geometry, _tf32(x))
    product = finished
    if product is None:
        product = (aten.conv_transpose if transposed else aten.conv)(operand, weight, None, output_size, geometry)
    if staged:
        y = _empty_result(transposed, x, weight, output_size, geometry.groups)
        kernels.from_channels_last(product, y)
    else:
        y = product.contiguous(memory_format=form)
    if finished is None and (bias is not None or residual is not None or relu):
        kernels.add_epilogue(y, bias, None if residual is None else with_strides_of(y, residual), relu=relu)
    return y


def _launch(
    transposed: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    geometry: Geometry,
    relu: bool,
) -> None:
    """Write the result into `y`, any slice of a tensor, whose strides the residual has."""
    family = kernels_for(weight.shape, geometry.groups)
    launch = family.apply_transposed if transposed else family.apply
    launch(x, weight, bias, residual, y, geometry, relu=relu, tf32=_tf32(x))


def launch_note(
    transposed: bool,
    x: Tensor,
    weight: Tensor,
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out: Tensor | None = None,
) -> str:
    """What is special about the launch that these arguments get, for `explain`."""
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    y = _empty_result(transposed, x.to("meta"), weight.to("meta"), output_size, groups) if out is None else out
    return kernels.describe(transposed, x, weight, y, geometry, tf32=_tf32(x))


def _empty_weight(x: Tensor, y: Tensor, kernel_size: Sequence[int], groups: int) -> Tensor:
    return empty((y.shape[1], x.shape[1] // groups, *kernel_size), x, y)


def _conv_weight_grad(
    x: Tensor,
    y: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    weight = _empty_weight(x, y, kernel_size, groups)
    possible = kernel_path(x).name != ATEN and kernels.may_be_runs(weight.shape, geometry)
    if possible and kernels.weight_grad_runs(x, y, weight, geometry, tf32=_tf32(x)):
        return weight
    if kernel_path(x).name == ATEN or aten.is_better(x, kernel_size, geometry, y_channels=y.shape[1]):
        form = memory_format(x, y)
        if kernel_path(x).name != ATEN and _is_better_staged(form == torch.contiguous_format, x, weight, y.shape[1]):
            x, y = kernels.to_channels_last(x), kernels.to_channels_last(y)
        return aten.weight_grad(x, y, weight, geometry).contiguous(memory_format=form)
    kernels_for(weight.shape, groups).weight_grad(x, y, weight, geometry, tf32=_tf32(x))
    return weight


def _conv_transpose_concat(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    if kernel_path(x).name == ATEN:
        up = _forward(True, x, weight, bias, None, output_size, stride, padding, dilation, groups, relu)
        y = torch.cat([skip, up], dim=1)
        return y.contiguous(memory_format=memory_format(x, weight, skip))
    channels = skip.shape[1], weight.shape[1] * groups
    y = empty((x.shape[0], sum(channels), *output_size), x, weight, skip)
    left, right = y.split_with_sizes(channels, 1)
    kernels.copy(skip, left)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    _launch(True, x, weight, bias, None, right, geometry, relu)
    return y


@torch.library.register_fake("backstride::conv", lib=library)
def _(x, weight, bias, residual, output_size, stride, padding, dilation, groups, relu):
    return _empty_result(False, x, weight, output_size, groups)


@torch.library.register_fake("backstride::conv_transpose", lib=library)
def _(x, weight, bias, residual, output_size, stride, padding, dilation, groups, relu):
    return _empty_result(True, x, weight, output_size, groups)


@torch.library.register_fake("backstride::conv_weight_grad", lib=library)
def _(x, y, kernel_size, stride, padding, dilation, groups):
    return _empty_weight(x, y, kernel_size, groups)


@torch.library.register_fake("backstride::conv_transpose_concat", lib=library)
def _(x, skip, weight, bias, output_size, stride, padding, dilation, groups, relu):
    return empty((x.shape[0], skip.shape[1] + weight.shape[1] * groups, *output_size), x, weight, skip)


_conv_below = below_autograd(registered.conv.default, partial(_forward, False))
_conv_transpose_below = below_autograd(registered.conv_transpose.default, partial(_forward, True))
_weight_grad_below = below_autograd(registered.conv_weight_grad.default, _conv_weight_grad)
_concat_below = below_autograd(registered.conv_transpose_concat.default, _conv_transpose_concat)


def _through_relu(grad: Tensor, y: Tensor | None) -> Tensor:
    """Gradient in front of the ReLU whose output is y; y is None where there is none."""
    return grad if y is None else torch.ops.aten.threshold_backward(grad, y, 0)


def _through_epilogue(grad: Tensor, y: Tensor | None, bias: bool, dense: bool = False) -> tuple[Tensor, Tensor | None]:
    """The same, and with `bias` the gradient by the bias, in one pass. With `dense` the first has memory of its own."""
    wanted = bias or y is not None or dense
    possible = wanted and kernel_path(grad).name != ATEN and grad.numel() and launches((grad, y))
    # Sums alone of what is little are left to torch: one call, where the kernel's are a launch and a call.
    if possible and (y is not None or dense or grad.numel() > LITTLE):
        before = torch.empty_like(grad if y is None else y) if dense or y is not None else None
        tensors = [tensor for tensor in (grad, y, before) if tensor is not None]
        # An expanded gradient is walked neither way.
        if kernels.channels_are_lanes(*map(layout_of, tensors)) is not None:
            sums = kernels.epilogue_grad(grad, y, before, sums=bias)
            return grad if before is None else before, sums
    grad = _through_relu(grad, y)
    return grad, grad.sum([0, *range(2, grad.dim())]) if bias else None


def _sum(terms: Sequence[Tensor | None]) -> Tensor | None:
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None


@dataclass(slots=True)
class _Settings:
    """All that is no tensor, in one object: torch.func takes a list for one argument a number."""

    size: Sequence[int]  # of the output, or the kernel's
    geometry: tuple[Any, ...]
    relu: bool = False
    transposed: bool = False


def _gradients(
    settings: _Settings, grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of X x, or with `transposed` of X^T x, by x and weight, where needed."""
    wide, narrow = (grad, x) if settings.transposed else (x, grad)
    input_grad = conv if settings.transposed else conv_transpose
    return [
        input_grad(grad, weight, None, None, x.shape[2:], *settings.geometry, False) if needs[0] else None,
        conv_weight_grad(wide, narrow, weight.shape[2:], *settings.geometry) if needs[1] else None,
    ]


def _tangent(settings: _Settings, x: Tensor, weight: Tensor, dx: Any, dweight: Any, dbias: Any) -> Tensor | None:
    """Forward derivative of what `_gradients` differentiates backward."""
    op = conv_transpose if settings.transposed else conv
    tail = (None, None, settings.size, *settings.geometry, False)
    channels = weight.shape[1] * settings.geometry[-1] if settings.transposed else weight.shape[0]
    if dbias is not None:
        dbias = dbias.view(-1, *[1] * len(settings.size)).expand(x.shape[0], channels, *settings.size)
    return _sum(
        [
            None if dx is None else op(dx, weight, *tail),
            None if dweight is None else op(x, dweight, *tail),
            dbias,
        ]
    )


class _Conv(Function):
    """y = relu(X x + bias + residual), or with `transposed` the same of X^T. Each is the other's input gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, residual, settings) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        op = _conv_transpose_below if settings.transposed else _conv_below
        return op(x, weight, bias, residual, settings.size, *settings.geometry, settings.relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, _, ctx.settings = inputs
        saved = (x, weight, output if ctx.settings.relu else None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, y = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad, grad_bias = _through_epilogue(grads[0], y, needs[2])
        gradients = _gradients(ctx.settings, grad, x, weight, needs)
        return (*gradients, grad_bias, grad if needs[3] else None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, weight, y = ctx.saved_tensors
        dx, dweight, dbias, dresidual, _ = tangents
        tangent = _sum([_tangent(ctx.settings, x, weight, dx, dweight, dbias), dresidual])
        return None if tangent is None else _through_relu(tangent, y)


class _ConvTransposeConcat(Function):
    """[skip, relu(X^T x + bias)]; the backward reads each part's gradient where it lies in the whole."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, skip, weight, bias, settings) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _concat_below(x, skip, weight, bias, settings.size, *settings.geometry, settings.relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, skip, weight, _, ctx.settings = inputs
        saved = (x, weight, output if ctx.settings.relu else None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.split = skip.shape[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, y = ctx.saved_tensors
        needs = ctx.needs_input_grad
        y_up, grad_up = None if y is None else y[:, ctx.split :], grads[0][:, ctx.split :]
        # cuDNN does not read slices: for each gradient torch would copy this one.
        dense = memory_format(grad_up) != torch.contiguous_format and aten.is_better(
            grad_up, weight.shape[2:], Geometry(*ctx.settings.geometry)
        )
        grad_up, grad_bias = _through_epilogue(grad_up, y_up, needs[3], dense)
        grad_x, grad_weight = _gradients(ctx.settings, grad_up, x, weight, (needs[0], needs[2]))
        grad_skip = grads[0][:, : ctx.split] if needs[1] else None
        return grad_x, grad_skip, grad_weight, grad_bias, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, weight, y = ctx.saved_tensors
        dx, dskip, dweight, dbias, _ = tangents
        up = _tangent(ctx.settings, x, weight, dx, dweight, dbias)
        size = ctx.settings.size
        if up is None:
            up = x.new_zeros(x.shape[0], weight.shape[1] * ctx.settings.geometry[-1], *size)
        else:
            up = _through_relu(up, None if y is None else y[:, ctx.split :])
        if dskip is None:
            dskip = x.new_zeros(()).expand(x.shape[0], ctx.split, *size)
        return torch.cat([dskip, up], dim=1)


class _ConvWeightGrad(Function):
    """w = sum of y x over pixels: bilinear, with derivatives X^T (by x) and X (by y) of the gradient as weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, settings) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _weight_grad_below(x, y, settings.size, *settings.geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, y, ctx.settings = inputs
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, y = ctx.saved_tensors
        (grad,) = grads
        need_x, need_y, _ = ctx.needs_input_grad
        geometry = ctx.settings.geometry
        return (
            conv_transpose(y, grad, None, None, x.shape[2:], *geometry, False) if need_x else None,
            conv(x, grad, None, None, y.shape[2:], *geometry, False) if need_y else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, y = ctx.saved_tensors
        dx, dy, _ = tangents
        settings = ctx.settings.size, *ctx.settings.geometry
        return _sum(
            [
                None if dx is None else conv_weight_grad(dx, y, *settings),
                None if dy is None else conv_weight_grad(x, dy, *settings),
            ]
        )


def _forward_autograd(transposed, x, weight, bias, residual, output_size, stride, padding, dilation, groups, relu):
    geometry = (stride, padding, dilation, groups)
    return _Conv.apply(x, weight, bias, residual, _Settings(output_size, geometry, relu, transposed))


def _conv_weight_grad_autograd(x, y, kernel_size, stride, padding, dilation, groups):
    return _ConvWeightGrad.apply(x, y, _Settings(kernel_size, (stride, padding, dilation, groups)))


def _conv_transpose_concat_autograd(x, skip, weight, bias, output_size, stride, padding, dilation, groups, relu):
    geometry = (stride, padding, dilation, groups)
    settings = _Settings(output_size, geometry, relu, transposed=True)
    return _ConvTransposeConcat.apply(x, skip, weight, bias, settings)


conv = differentiable(library, "conv", partial(_forward_autograd, False), partial(_forward, False))
conv_transpose = differentiable(library, "conv_transpose", partial(_forward_autograd, True), partial(_forward, True))
conv_weight_grad = differentiable(library, "conv_weight_grad", _conv_weight_grad_autograd, _conv_weight_grad)
conv_transpose_concat = differentiable(
    library, "conv_transpose_concat", _conv_transpose_concat_autograd, _conv_transpose_concat
)
