"""atrous_pyramid: parallel dilated convolutions over one input, written side by side (ASPP)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import conv as kernels
from ..dispatch import ATEN, Path, autocast, autocasts, explained_by, kernel_path
from ..epilogue import is_relu
from ..registration import Function, empty, goes_direct
from . import aten, batching, ops
from .ops import library, registered

library.define("atrous_pyramid(Tensor x, Tensor[] weights, Tensor[] biases, SymInt[] dilations, bool relu) -> Tensor")

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _branches(weights: Sequence[Tensor], dilations: Sequence[int]) -> list[kernels.Geometry]:
    """The branches' geometries; `dilations` holds one number for each branch and axis."""
    axes = weights[0].dim() - 2
    return [
        kernels.same_geometry(weight.shape[2:], dilations[axes * i : axes * (i + 1)])
        for i, weight in enumerate(weights)
    ]


def _empty(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return empty((x.shape[0], sum(weight.shape[0] for weight in weights), *x.shape[2:]), x, *weights)


def _forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dilations: Sequence[int], relu: bool
) -> Tensor:
    geometries = _branches(weights, dilations)
    y = _empty(x, weights)
    if kernel_path(x).name == ATEN:
        parts = [
            aten.conv(x, weight, bias, x.shape[2:], geometry)
            for weight, bias, geometry in itertools.zip_longest(weights, biases, geometries)
        ]
        torch.cat(parts, dim=1, out=y)
        return y.relu_() if relu else y
    every = [tuple(geometry.dilation) for geometry in geometries]
    kernels.apply_pyramid(x, weights, biases, y, every, relu=relu, tf32=ops._tf32(x))
    return y


for key in ("CPU", "CUDA"):
    library.impl("atrous_pyramid", _forward, key)


@torch.library.register_fake("backstride::atrous_pyramid", lib=library)
def _(x, weights, biases, dilations, relu):
    return _empty(x, weights)


def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """One input to all entries' weights joins the batch; entries with weights of their own go branch by branch."""
    x, weights, biases, dilations, relu = arguments
    x_dim, weight_dims, bias_dims, *_ = in_dims
    if all(dim is None for dim in (*weight_dims, *bias_dims)):
        x = batching._front(x, x_dim, info.batch_size).flatten(0, 1)
        y = registered.atrous_pyramid.default(x, weights, biases, dilations, relu)
        return y.unflatten(0, (info.batch_size, -1)), 0
    size, parts = (x if x_dim is None else x.movedim(x_dim, 0)[0]).shape[2:], []
    for weight, weight_dim, bias, bias_dim, geometry in itertools.zip_longest(
        weights, weight_dims, biases, bias_dims, _vmapped_geometries(weights, weight_dims, dilations)
    ):
        dims = (x_dim, weight_dim, bias_dim, None)
        part, dim = batching._vmap_conv(info, dims, x, weight, bias, None, size, *geometry, relu)
        parts.append(part.movedim(dim, 0))
    return torch.cat(parts, dim=2), 0


def _vmapped_geometries(weights: Sequence[Tensor], dims: Sequence[int | None], dilations: Sequence[int]) -> Any:
    return _branches([w if d is None else w.select(d, 0) for w, d in zip(weights, dims, strict=True)], dilations)


torch.library.register_vmap("backstride::atrous_pyramid", _vmap, lib=library)


@dataclass(slots=True)
class _Settings:
    """All that is no tensor, in one object: torch.func takes a list for one argument a number."""

    branches: int
    dilations: Sequence[int]
    relu: bool


class _AtrousPyramid(Function):
    """y = relu([X_1 x + bias_1, ...]). Every branch has a convolution's gradients, read from its slice of y's; the
    input's are added up by the residual of one transposed convolution after the other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, settings, *tensors) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        weights, biases = tensors[: settings.branches], tensors[settings.branches :]
        if goes_direct((x, *tensors)):
            return _forward(x, weights, biases, settings.dilations, settings.relu)
        with torch._C._AutoDispatchBelowAutograd():
            return registered.atrous_pyramid.default(x, weights, biases, settings.dilations, settings.relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.settings, *tensors = inputs
        saved = (x, output if ctx.settings.relu else None, *tensors[: ctx.settings.branches])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, y, *weights = ctx.saved_tensors
        need_x, _, *needs = ctx.needs_input_grad
        need_biases = needs[len(weights) :]
        grad, grad_bias = ops._through_epilogue(grads[0], y, any(need_biases))
        channels = [weight.shape[0] for weight in weights]
        parts = grad.split(channels, dim=1)
        grad_x, grad_weights = None, []
        for weight, part, geometry, need_weight in zip(
            weights, parts, _branches(weights, ctx.settings.dilations), needs, strict=False
        ):
            if need_x:
                grad_x = ops.conv_transpose(part, weight, None, grad_x, x.shape[2:], *geometry, False)
            grad_weights.append(ops.conv_weight_grad(x, part, weight.shape[2:], *geometry) if need_weight else None)
        grad_biases = [None] * len(need_biases) if grad_bias is None else grad_bias.split(channels)
        return grad_x, None, *grad_weights, *grad_biases

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, y, *weights = ctx.saved_tensors
        dx, _, *dtensors = tangents
        parts = []
        for weight, dweight, dbias, geometry in itertools.zip_longest(
            weights, dtensors[: len(weights)], dtensors[len(weights) :], _branches(weights, ctx.settings.dilations)
        ):
            part = ops._tangent(ops._Settings(x.shape[2:], tuple(geometry)), x, weight, dx, dweight, dbias)
            parts.append(x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:]) if part is None else part)
        return ops._through_relu(torch.cat(parts, dim=1), y)


def _autograd(x, weights, biases, dilations, relu):
    return _AtrousPyramid.apply(x, _Settings(len(weights), dilations, relu), *weights, *biases)


library.impl("atrous_pyramid", _autograd, "Autograd")


def _pyramid(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *settings: Any) -> Tensor:
    """As `registration.differentiable` does for ops whose tensors are not in lists."""
    arguments = (x, weights, biases, *settings)
    if goes_direct((x, *weights, *biases)):
        return _forward(*arguments)
    return (registered.atrous_pyramid.default if torch.compiler.is_compiling() else _autograd)(*arguments)


def _check(input: Any, weights: Any, biases: Any, dilations: Any) -> list[int]:
    """Raises for what doesn't fit; the dilations for each branch and axis."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    for name, values in (("weights", weights), ("biases", biases), ("dilations", dilations)):
        if isinstance(values, Tensor) or not (isinstance(values, Sequence) or (name == "biases" and values is None)):
            raise TypeError(f"{name} must be a sequence with one entry for each branch, got {type(values).__name__}")
    if not weights:
        raise ValueError("weights must have at least one branch, got none")
    if len(dilations) != len(weights) or (biases is not None and len(biases) != len(weights)):
        given = f"{len(weights)} weights, {len(dilations)} dilations"
        given += "" if biases is None else f", {len(biases)} biases"
        raise ValueError(f"every branch needs a weight, a dilation and, unless biases is None, a bias; got {given}")
    flat: list[int] = []
    axes = weights[0].dim() - 2 if isinstance(weights[0], Tensor) else 0
    for i, (weight, bias, dilation) in enumerate(itertools.zip_longest(weights, biases or (), dilations)):
        for name, tensor in ((f"weights[{i}]", weight), (f"biases[{i}]", bias)):
            if not (isinstance(tensor, Tensor) or (tensor is None and biases is None)):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
            if tensor is not None and (tensor.dtype != input.dtype or tensor.device != input.device):
                raise TypeError(
                    f"{name} must have the input's dtype and device ({input.dtype}, {input.device}), got"
                    f" {tensor.dtype}, {tensor.device}"
                )
        if weight.dim() != axes + 2 or not 1 <= axes <= 3 or min(weight.shape) < 1:
            raise ValueError(
                f"weights[{i}] must have shape (K, C, *kernel) with one to three axes, the same for all branches, and"
                f" none empty; got {tuple(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"biases[{i}] must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        per_axis = (dilation,) * axes if isinstance(dilation, int) else dilation
        if not isinstance(per_axis, Sequence) or len(per_axis) != axes or min(per_axis) < 1:
            raise ValueError(f"dilations[{i}] must be an int of at least 1, or {axes} of them, got {dilation!r}")
        flat += per_axis
        if input.dim() not in (axes + 1, axes + 2) or input.shape[-axes - 1] != weight.shape[1]:
            wanted = ", ".join(["N", str(weight.shape[1]), *"DHW"[3 - axes :]])
            raise ValueError(f"input must have shape ({wanted}) for weights[{i}], got {tuple(input.shape)}")
    if min(input.shape[-axes - 1 :]) < 1:
        raise ValueError(f"input must have no empty axis but the batch, got {tuple(input.shape)}")
    return flat


def _explain(input: Any, weights: Any, biases: Any, dilations: Any, activation: Any) -> Path:
    flat = _check(input, weights, biases, dilations)
    path = kernel_path(input)
    if path.name == ATEN:
        return path
    axes = weights[0].dim() - 2
    x = input if input.dim() == axes + 2 else input.unsqueeze(0)
    y = _empty(x.to("meta"), [weight.to("meta") for weight in weights])
    dilations = [tuple(flat[axes * i : axes * (i + 1)]) for i in range(len(weights))]
    note = kernels.describe_pyramid(x, weights, y, dilations, tf32=ops._tf32(x))
    return Path(path.name, f"{path.reason}; {note}")


@explained_by(_explain)
def atrous_pyramid(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    dilations: Sequence[int | Sequence[int]],
    *,
    activation: str | None = None,
) -> Tensor:
    """Parallel dilated convolutions over one input, side by side in one output: the branches of an ASPP (Chen et al.
    2017, arXiv 1706.05587, figure 5), a 1x1 branch among them being a weight with a 1x1 kernel.

    y = act([x * w_1 + b_1, x * w_2 + b_2, ...]) along the channels, each branch with stride 1, its own dilation and
    the padding that keeps the size, dilation (k - 1) / 2; reference:
    ``relu(torch.cat([F.conv2d(input, w, b, padding="same", dilation=d) for w, b, d in ...], dim=1))``. All branches run
    in one launch that writes each into its slice, and multiplies no padding: the output is taken apart into the zones
    that the same taps reach. The backward reads each branch's gradient where it lies.

    Shapes: input (N, C, H, W) or (C, H, W), weights (K_i, C, kH_i, kW_i), biases (K_i,) each, output
    (N, sum of K_i, H, W). With one or three axes in all weights it is the same in 1-D or 3-D. The output is
    channels_last where the input or a weight is.

    Args:
        biases: one for each branch, or None.
        dilations: for each branch one number, or one for each axis.
        activation: None or "relu".

    Errors: TypeError or ValueError that names the branch and the shape that would fit.
    """
    relu = is_relu(activation)
    if isinstance(input, Tensor) and autocasts(input):
        device = input.device.type
        input, weights = autocast(input, device), [autocast(weight, device) for weight in weights]
        biases = None if biases is None else [autocast(bias, device) for bias in biases]
    flat = _check(input, weights, biases, dilations)
    axes = weights[0].dim() - 2
    if kernel_path(input).name == ATEN:
        parts = [
            _CONV[axes](input, weight, bias, padding="same", dilation=flat[axes * i : axes * (i + 1)])
            for i, (weight, bias) in enumerate(itertools.zip_longest(weights, biases or ()))
        ]
        y = torch.cat(parts, dim=-axes - 1)
        return F.relu(y) if relu else y
    x = input if input.dim() == axes + 2 else input.unsqueeze(0)
    y = _pyramid(x, list(weights), list(biases or ()), flat, relu)
    return y if input.dim() == axes + 2 else y.squeeze(0)
