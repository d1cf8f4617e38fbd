"""Registration of batch normalisation with PyTorch: schema, kernels, fake tensors; and its autograd.

    backstride::batch_norm_forward      the output, and in training the batch's statistics; running ones go on
    backstride::batch_norm_backward     those gradients that are wanted, by x, weight, bias and residual

They have kernels only, and no derivatives: `batch_norm` is an autograd.Function of them, for eager code alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import batch_norm as kernels
from ...kernels.batch_norm import reference
from ..registration import Function, below_autograd, empty, implemented, wants_gradient, with_strides_of

library = torch.library.Library("backstride", "FRAGMENT")
library.define(
    "batch_norm_forward(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias,"
    " Tensor? residual, bool training, float momentum, float eps, bool relu) -> (Tensor, Tensor)"
)
library.define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor? var, Tensor? weight, Tensor? bias, Tensor? y,"
    " float eps, bool relu, bool[] wanted) -> Tensor[]"
)


def _results(x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """Memory for the output and the statistics, which are empty where they are given."""
    channels, dtype = x.shape[1] if training else 0, torch.promote_types(x.dtype, torch.float32)
    return empty(x.shape, x), torch.empty((2, channels), dtype=dtype, device=x.device)


def _forward(x, running_mean, running_var, weight, bias, residual, training, momentum, eps, relu):
    y, statistics = _results(x, training)
    plans = kernels.plan_forward(x, y)
    if plans is None:
        x = with_strides_of(y, x)
        plans = kernels.plan_forward(x, y)
        assert plans, "y is dense"
    residual = None if residual is None else with_strides_of(y, residual)
    own = statistics if training else None
    kernels.forward(plans, x, y, own, running_mean, running_var, weight, bias, residual, momentum, eps, relu=relu)
    return y, statistics


def _backward(grad, x, mean, var, weight, bias, y, eps, relu, wanted):
    dense = empty(x.shape, x)
    plans = kernels.plan_backward(x, dense, grad)
    if plans is None:
        x, grad = with_strides_of(dense, x), with_strides_of(dense, grad)
        plans = kernels.plan_backward(x, dense, grad)
        assert plans, "all are dense"
    by_x, by_weight, by_bias, by_residual = results = _wanted(dense, weight, bias, wanted)
    vectors = mean, var, weight, bias
    kernels.backward(plans, grad, x, *vectors, y, by_x, by_weight, by_bias, by_residual, eps, relu=relu)
    return [result for result in results if result is not None]


def _wanted(
    dense: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Memory for the gradients by x, which is `dense`, weight, bias and residual."""
    by_x, by_weight, by_bias, by_residual = wanted
    return (
        dense if by_x else None,
        torch.empty_like(weight) if weight is not None and by_weight else None,
        torch.empty_like(bias) if bias is not None and by_bias else None,
        torch.empty_like(dense) if by_residual else None,
    )


@torch.library.register_fake("backstride::batch_norm_forward", lib=library)
def _(x, running_mean, running_var, weight, bias, residual, training, momentum, eps, relu):
    return _results(x, training)


@torch.library.register_fake("backstride::batch_norm_backward", lib=library)
def _(grad, x, mean, var, weight, bias, y, eps, relu, wanted):
    return [result for result in _wanted(empty(x.shape, x), weight, bias, wanted) if result is not None]


forward = below_autograd(implemented(library, "batch_norm_forward", _forward), _forward)
backward = below_autograd(implemented(library, "batch_norm_backward", _backward), _backward)


class _Settings(NamedTuple):
    training: bool
    momentum: float
    eps: float
    relu: bool


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, residual, input_bias, running_mean, running_var, settings) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, own = forward(x, running_mean, running_var, weight, bias, residual, *settings)
        mean, var = (own, None) if settings.training else (running_mean, running_var)
        # Without a residual, what ReLU let through follows from what is read anyway.
        ctx.save_for_backward(x, mean, var, weight, bias, y if settings.relu and residual is not None else None)
        ctx.settings = settings
        ctx.input_bias = input_bias
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, mean, var, weight, bias, y = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        relu = ctx.settings.relu
        if torch.is_grad_enabled():
            found = _differentiable_gradients(grads[0], x, mean, var, weight, bias, y, ctx.settings)
            results = [grad if need else None for grad, need in zip(found, needs, strict=True)]
        else:
            wanted = [*needs[:3], needs[3] and relu]
            found = iter(backward(grads[0], x, mean, var, weight, bias, y, ctx.settings.eps, relu, wanted))
            results = [next(found) if want else None for want in wanted]
            if needs[3] and not relu:
                results[3] = grads[0]
        # In training each channel's mean takes it away again.
        by_input_bias = torch.zeros_like(ctx.input_bias) if ctx.needs_input_grad[4] else None
        return (*results, by_input_bias, None, None, None)


def _differentiable_gradients(grad, x, mean, var, weight, bias, y, settings: _Settings):
    """By x, weight, bias and residual, in torch's ops."""
    training, _, eps, relu = settings
    given, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, grad = x.to(dtype), grad.to(dtype)
    scale, shift = (None if vector is None else vector.to(dtype) for vector in (weight, bias))
    mean, inverse = reference.moments(x, eps) if training else (mean.to(dtype), (var.to(dtype) + eps).rsqrt())
    if relu:
        with torch.no_grad():
            y = reference.normalise(x, mean, inverse, scale, shift).to(given) if y is None else y
        grad = torch.where(y <= 0, 0, grad)
    by_x, *others = reference.gradients(grad, x, mean, inverse, scale, constant=not training)
    others = [by if vector is None else by.to(vector.dtype) for by, vector in zip(others, (weight, bias), strict=True)]
    return by_x.to(given), *others, grad.to(given)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    """The kernels', with gradients of any order, for checked arguments that `is_followed` by an autograd.Function.

    An `input_bias` is for training alone, and only to have a gradient.
    """
    settings = _Settings(training, momentum, eps, relu)
    if wants_gradient((x, weight, bias, residual, input_bias)):
        return _BatchNorm.apply(x, weight, bias, residual, input_bias, running_mean, running_var, settings)
    return forward(x, running_mean, running_var, weight, bias, residual, *settings)[0]
