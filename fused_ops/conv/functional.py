"""Convolution and transposed convolution as in torch.nn.functional, with fused epilogues."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import depthwise
from ...kernels.conv import Geometry
from ..dispatch import (
    ATEN,
    BY_AUTOGRAD,
    REFUSED,
    Path,
    autocast,
    autocast_dtype,
    autocasts,
    explained_by,
    is_short,
    kernel_path,
)
from ..epilogue import check_device, check_residual, finish, is_relu
from ..sizes import remembered
from . import aten, dense, ops
from . import out as given

LIBRARY = Path(ATEN, "cuDNN is faster for these products; ReLU and a residual are its own or one kernel's pass")

IntOrTuple = int | Sequence[int]


class _Refused(Exception):
    """Arguments that torch's own function does not take: it is called, and raises its own error."""


class _Call(NamedTuple):
    """Checked arguments in the form that the registered ops take."""

    x: Tensor
    batched: bool
    channels: int  # of the output
    output_size: tuple[int, ...]
    geometry: Geometry

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's."""
        return (*((self.x.shape[0],) if self.batched else ()), self.channels, *self.output_size)


# Whether there is a batch axis, channels of the output, its size, and how to get there.
_Sizes = tuple[bool, int, tuple[int, ...], Geometry]


def _require(condition: Any) -> None:
    if not condition:
        raise _Refused


def _per_axis(value: Any, axes: int, smallest: int) -> tuple[int, ...]:
    """`value` for each axis: from an int, or a sequence of one or `axes` ints, none below `smallest`."""
    if type(value) is int:  # the common case, quickly
        _require(value >= smallest)
        return (value,) * axes
    if isinstance(value, int | torch.SymInt):
        value = [value]
    _require(isinstance(value, Sequence) and not isinstance(value, str) and len(value) in (1, axes))
    values: tuple[Any, ...] = tuple(value) if len(value) == axes else tuple(value) * axes
    _require(all(isinstance(v, int | torch.SymInt) and not isinstance(v, bool) for v in values))
    _require(min(values) >= smallest)
    return values


def _check_tensors(input: Any, weight: Any, bias: Any) -> None:
    """A network's layers meet inputs that autocast has cast, and weights that it has not: what counts is the dtype that
    they will have."""
    _require(isinstance(input, Tensor) and isinstance(weight, Tensor))
    for other in (weight, bias):
        if other is not None and (other.dtype != input.dtype or other.device != input.device):
            _require(other.device == input.device and autocasts(input))
            device = input.device.type
            _require(autocast_dtype(other, device) == autocast_dtype(input, device))


def _is_batched(axes: int, x: Any, weight: Any, groups: Any) -> bool:
    """Whether the input has a batch axis, after what convolution and its transpose ask of shapes alike."""
    _require(len(weight) == axes + 2 and len(x) in (axes + 1, axes + 2))
    _require(isinstance(groups, int | torch.SymInt) and groups >= 1)
    _require(weight[0] > 0 and weight[0] % groups == 0 and min(weight[1:]) > 0)
    _require(min(x[-axes - 1 :]) > 0)
    return len(x) == axes + 2


def _shape(bias: Tensor | None) -> torch.Size | None:
    return None if bias is None else bias.shape


def _bind_conv(
    axes: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> _Call:
    _check_tensors(input, weight, bias)
    found = _conv_sizes(axes, input.shape, weight.shape, _shape(bias), stride, padding, dilation, groups)
    return _Call(input if found[0] else input.unsqueeze(0), *found)


@remembered
def _conv_sizes(
    axes: int, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> _Sizes:
    batched = _is_batched(axes, x, weight, groups)
    _require(x[-axes - 1] == weight[1] * groups and (bias is None or tuple(bias) == (weight[0],)))
    size, kernel = x[-axes:], weight[2:]
    strides, dilations = _per_axis(stride, axes, 1), _per_axis(dilation, axes, 1)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    if padding == "same":
        _require(max(strides) == 1)
        # torch puts the odd element of an even kernel's padding behind the input.
        same = tuple((span - 1) // 2 for span in spans)
        return batched, weight[0], tuple(size), Geometry(strides, same, dilations, groups)
    paddings = _per_axis(0 if padding == "valid" else padding, axes, 0)
    room = [i + 2 * p - span for i, p, span in zip(size, paddings, spans, strict=True)]
    _require(min(room) >= 0)
    output_size = tuple(r // s + 1 for r, s in zip(room, strides, strict=True))
    return batched, weight[0], output_size, Geometry(strides, paddings, dilations, groups)


def _bind_transposed(
    axes: int,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> _Call:
    _check_tensors(input, weight, bias)
    found = _transposed_sizes(
        axes, input.shape, weight.shape, _shape(bias), stride, padding, output_padding, groups, dilation
    )
    return _Call(input if found[0] else input.unsqueeze(0), *found)


@remembered
def _transposed_sizes(
    axes: int,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
) -> _Sizes:
    batched = _is_batched(axes, x, weight, groups)
    channels = weight[1] * groups
    _require(x[-axes - 1] == weight[0] and (bias is None or tuple(bias) == (channels,)))
    size, kernel = x[-axes:], weight[2:]
    strides, dilations = _per_axis(stride, axes, 1), _per_axis(dilation, axes, 1)
    paddings, extras = _per_axis(padding, axes, 0), _per_axis(output_padding, axes, 0)
    _require(all(e < max(s, d) for e, s, d in zip(extras, strides, dilations, strict=True)))
    output_size = tuple(
        (i - 1) * s - 2 * p + d * (k - 1) + e + 1
        for i, s, p, d, k, e in zip(size, strides, paddings, dilations, kernel, extras, strict=True)
    )
    _require(min(output_size) >= 1)
    return batched, channels, output_size, Geometry(strides, paddings, dilations, groups)


def _plan(bind: Callable[..., _Call], *arguments: Any) -> tuple[_Call | None, Path]:
    """The checked call for the kernels, or None where the call goes to ATen; and the reason."""
    try:
        call = bind(*arguments)
    except _Refused:
        return None, REFUSED
    path = kernel_path(call.x)
    if path.name == ATEN:
        return None, path
    if ops.kernels_for(arguments[2].shape, call.geometry.groups) is depthwise:
        kernel = "depthwise" if arguments[2].shape[1] == 1 else "small-group"
        path = Path(path.name, f"{kernel} kernel for {path.reason}")
    return call, path


def _call(bind: Callable[..., _Call], axes: int, arguments: tuple[Any, ...]) -> _Call | None:
    """As `_plan`, for the call itself: where ATen runs anyway, it checks the arguments too."""
    input = arguments[0]
    if isinstance(input, Tensor) and kernel_path(input).name == ATEN:
        return None
    try:
        return bind(axes, *arguments)
    except _Refused:
        return None


def _planner(bind: Callable[..., _Call], axes: int) -> Callable[..., Path]:
    """What `explain` asks about a public op, whose epilogue has no say in the path."""
    names = tuple(inspect.signature(bind).parameters)[1:]

    def plan(**arguments: Any) -> Path:
        call, path = _plan(bind, axes, *(arguments[name] for name in names))
        if call is None:
            return path
        device, out, skip = call.x.device.type, arguments.get("out"), arguments.get("skip")
        if skip is not None and _is_short_concat(call, skip, arguments["weight"], arguments["bias"]):
            return BY_AUTOGRAD
        x, weight = autocast(call.x, device), autocast(arguments["weight"], device)
        if out is not None:
            given.check_shape(out, call.shape)
            out = out if call.batched else out.unsqueeze(0)
        elif aten.is_better_forward(bind is _bind_transposed, x, weight.shape[2:], call.geometry):
            return LIBRARY
        note = ops.launch_note(bind is _bind_transposed, x, weight, call.output_size, *call.geometry, out=out)
        return Path(path.name, f"{path.reason}; {note}") if note else path

    return plan


def _finish_aten(y: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
    return finish(y, relu, None if residual is None else autocast(residual, y.device.type))


def _run(
    bind: Callable[..., _Call],
    op: Callable[..., Tensor],
    into: Callable[..., None],
    axes: int,
    function: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    activation: str | None,
    residual: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """`op`, or `into` for an `out`, with the checked arguments where kernels run, else torch's `function` with the
    arguments as they are."""
    relu = is_relu(activation)
    if out is not None:
        given.check_mode(function.__name__, (*arguments[:3], residual, out))
    call = _call(bind, axes, arguments)
    if call is None:
        y = _finish_aten(function(*arguments), relu, residual)
        return y if out is None else given.copy_into(out, y, *arguments[:3], residual=residual)
    x, (weight, bias) = call.x, arguments[1:3]
    geometry, device, casting = call.geometry, x.device.type, autocasts(x)
    dtype = autocast_dtype(x, device) if casting else x.dtype
    plain = residual is None and out is None
    by_library = plain and aten.is_better_forward(bind is _bind_transposed, x, weight.shape[2:], geometry, dtype)
    if by_library and (not relu or is_short(math.prod(call.shape), x, weight, bias)):
        y = function(*arguments)  # which casts, too
        return y.relu_() if relu else y
    if casting:
        x, weight = autocast(x, device), autocast(weight, device)
        bias, residual = autocast(bias, device), autocast(residual, device)
    if by_library and bind is _bind_conv and dense.takes(x, weight, bias, call.output_size, geometry):
        y = dense.conv_relu(x, weight, bias, call.output_size, geometry)
        return y if call.batched else y.squeeze(0)
    if residual is not None:
        check_residual(residual, call.shape, x.dtype, x.device)
        residual = residual if call.batched else residual.unsqueeze(0)
    if out is not None:
        given.check(out, call.shape, x.dtype, x.device)
        # What stands for its negative can't be written as it lies.
        if torch.compiler.is_compiling() or not out.is_neg():
            into(x, weight, bias, residual, *geometry, relu, out if call.batched else out.unsqueeze(0))
            return out
    y = op(x, weight, bias, residual, call.output_size, *geometry, relu)
    y = y if call.batched else y.squeeze(0)
    return y if out is None else out.copy_(y)


_conv = partial(_run, _bind_conv, ops.conv, given.conv_out)
_conv_transpose = partial(_run, _bind_transposed, ops.conv_transpose, given.conv_transpose_out)


@explained_by(_planner(_bind_conv, 1))
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple | str = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """1-D convolution: `conv2d` with one axis. Input (N, C, L) or (C, L), weight (K, C / groups, kernel)."""
    arguments = (input, weight, bias, stride, padding, dilation, groups)
    return _conv(1, F.conv1d, arguments, activation, residual, out)


@explained_by(_planner(_bind_conv, 2))
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple | str = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """2-D convolution, as `torch.nn.functional.conv2d`, with an epilogue.

    y = act(x * w + bias + residual); reference: ``relu(F.conv2d(input, weight, bias, ...) + residual)``.

    Shapes: input (N, C, H, W) or (C, H, W), weight (K, C / groups, kH, kW), bias (K,), residual and output
    (N, K, oH, oW) with o = floor((i + 2 padding - dilation (k - 1) - 1) / stride) + 1. The output is channels_last
    where the input or the weight is.

    Args:
        activation: None or "relu".
        residual: tensor of the output's shape and dtype, added before the activation.
        out: tensor of the output's shape, dtype and device that the result is written into, and that is returned. It
            may be any slice, such as ``buffer[:, :64]``; the rest of the buffer stays as it is. It may be the residual
            too, but share no memory with what else is read. Without gradients, as torch's out= is.

    Errors: torch's own for torch's arguments; ValueError or TypeError for a wrong activation, residual or out;
    RuntimeError for an out that is also read, and, as torch's, for one with gradients or under vmap.
    """
    arguments = (input, weight, bias, stride, padding, dilation, groups)
    return _conv(2, F.conv2d, arguments, activation, residual, out)


@explained_by(_planner(_bind_conv, 3))
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple | str = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """3-D convolution: `conv2d` with three axes. Input (N, C, D, H, W), weight (K, C / groups, kD, kH, kW)."""
    arguments = (input, weight, bias, stride, padding, dilation, groups)
    return _conv(3, F.conv3d, arguments, activation, residual, out)


@explained_by(_planner(_bind_transposed, 1))
def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """1-D transposed convolution: `conv_transpose2d` with one axis. Input (N, C, L), weight (C, K / groups, kernel)."""
    arguments = (input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv_transpose(1, F.conv_transpose1d, arguments, activation, residual, out)


@explained_by(_planner(_bind_transposed, 2))
def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """2-D transposed convolution, as `torch.nn.functional.conv_transpose2d`, with an epilogue.

    y = act(X^T x + bias + residual), X being the matrix of the convolution with the same arguments (Dumoulin and
    Visin 2016, arXiv 1603.07285, section 4); reference:
    ``relu(F.conv_transpose2d(input, weight, bias, ...) + residual)``.

    Shapes: input (N, C, H, W) or (C, H, W), weight (C, K / groups, kH, kW), bias (K,), residual and output
    (N, K, oH, oW) with o = (i - 1) stride - 2 padding + dilation (k - 1) + output_padding + 1. So the lecture's
    picture, 3x3 with stride 2 and padding 1 from 2x2 to 4x4, needs output_padding=1: without it, o is 3.

    Args:
        output_padding: rows and columns added at the end only, below max(stride, dilation).
        activation: None or "relu".
        residual: tensor of the output's shape and dtype, added before the activation.
        out: tensor of the output's shape, dtype and device that the result is written into, and that is returned. It
            may be any slice, such as ``buffer[:, :64]``; the rest of the buffer stays as it is. It may be the residual
            too, but share no memory with what else is read. Without gradients, as torch's out= is.

    Errors: torch's own for torch's arguments; ValueError or TypeError for a wrong activation, residual or out;
    RuntimeError for an out that is also read, and, as torch's, for one with gradients or under vmap.
    """
    arguments = (input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv_transpose(2, F.conv_transpose2d, arguments, activation, residual, out)


@explained_by(_planner(_bind_transposed, 3))
def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """3-D transposed convolution: `conv_transpose2d` with three axes. Weight (C, K / groups, kD, kH, kW)."""
    arguments = (input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv_transpose(3, F.conv_transpose3d, arguments, activation, residual, out)


@explained_by(_planner(_bind_transposed, 2))
def conv_transpose2d_concat(
    input: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """Up-convolution written beside a skip connection (U-Net's "copy and crop", Ronneberger et al. 2015, figure 1).

    y = [skip, act(X^T x + bias)] along the channels; reference:
    ``torch.cat([skip, relu(F.conv_transpose2d(input, weight, bias, ...))], dim=1)``. The transposed convolution
    stores into its slice of the result, and the backward reads its slice of the gradient in place: neither half
    is copied by a concatenation.

    Shapes: input (N, C, H, W), skip (N, S, oH, oW), weight (C, K / groups, kH, kW), bias (K,), output
    (N, S + K, oH, oW); oH, oW as in `conv_transpose2d`. The input may be unbatched if the skip is too.

    Errors: torch's own for torch's arguments; ValueError or TypeError for a skip that does not fit, naming its shape
    and the one that does.
    """
    relu = is_relu(activation)
    if not isinstance(skip, Tensor):
        raise TypeError(f"skip must be a tensor to stand beside the up-convolution, got {type(skip).__name__}")
    arguments = (input, weight, bias, stride, padding, output_padding, groups, dilation)
    call = _call(_bind_transposed, 2, arguments)
    if call is None or _is_short_concat(call, skip, weight, bias):
        up = _finish_aten(F.conv_transpose2d(*arguments), relu, None)
        skip = autocast(skip, up.device.type)
        _check_skip(skip, up.shape, up.dtype, up.device)
        return torch.cat([skip, up], dim=-3)
    x = call.x
    if autocasts(x):
        device = x.device.type
        x, skip = autocast(x, device), autocast(skip, device)
        weight, bias = autocast(weight, device), autocast(bias, device)
    _check_skip(skip, call.shape, x.dtype, x.device)
    skip = skip if call.batched else skip.unsqueeze(0)
    y = ops.conv_transpose_concat(x, skip, weight, bias, call.output_size, *call.geometry, relu)
    return y if call.batched else y.squeeze(0)


def _is_short_concat(call: _Call, skip: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and is_short(math.prod(call.shape) + skip.numel(), call.x, skip, weight, bias)


def _check_skip(skip: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """`shape` is the up-convolution's."""
    if skip.dim() != len(shape) or skip.shape != (*shape[:-3], skip.shape[-3], *shape[-2:]):
        wanted = ", ".join(map(str, [*shape[:-3], "channels", *shape[-2:]]))
        raise ValueError(
            f"skip must have shape ({wanted}) to stand beside the up-convolution, got {tuple(skip.shape)}; crop it"
        )
    if skip.dtype != dtype:
        raise TypeError(f"skip must have the output's dtype {dtype}, got {skip.dtype}; convert it")
    check_device("skip", skip, device)
