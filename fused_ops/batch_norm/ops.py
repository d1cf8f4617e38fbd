"""Registration of batch normalisation with PyTorch: schema, kernels, fake tensors; and its autograd.

    backstride::batch_norm_moments      the batch's mean and deviation, and the running ones brought up to date
    backstride::batch_norm_normalise    normalised by given ones, a residual added, ReLU
    backstride::batch_norm_gradients    of both together

They have kernels only, and no derivatives: `batch_norm` is an autograd.Function of them, for eager code alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import batch_norm as kernels
from ...kernels.batch_norm import reference
from ..registration import Function, below_autograd, memory_format

library = torch.library.Library("backstride", "FRAGMENT")
library.define(
    "batch_norm_moments(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps)"
    " -> Tensor"
)
library.define(
    "batch_norm_normalise(Tensor x, Tensor mean, Tensor spread, Tensor? weight, Tensor? bias, Tensor? residual,"
    " float eps, bool is_var, bool relu) -> Tensor"
)
library.define(
    "batch_norm_gradients(Tensor grad, Tensor x, Tensor mean, Tensor spread, Tensor? weight, Tensor? bias, Tensor? y,"
    " float eps, bool is_var, bool relu, bool[] wanted) -> Tensor[]"
)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _moments(x, running_mean, running_var, momentum, eps):
    statistics = torch.empty((2, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    x = x if kernels.is_walked(x) else x.contiguous()
    kernels.moments(x, statistics, running_mean, running_var, momentum, eps)
    return statistics


def _normalise(x, mean, spread, weight, bias, residual, eps, is_var, relu):
    y = _like(x)
    x = x if kernels.is_walked(x, y) else torch.empty_like(y).copy_(x)
    if residual is not None and residual.stride() != y.stride():
        residual = torch.empty_like(y).copy_(residual)
    kernels.normalise(x, mean, spread, weight, bias, residual, y, eps, is_var=is_var, relu=relu)
    return y


def _gradients(grad, x, mean, spread, weight, bias, y, eps, is_var, relu, wanted):
    dense = _like(x)
    if not kernels.is_walked(x, dense):
        x = torch.empty_like(dense).copy_(x)
    if not kernels.is_walked(x, dense, grad):
        grad = torch.empty_like(dense).copy_(grad)
    results = _wanted(dense, weight, bias, wanted)
    kernels.gradients(grad, x, mean, spread, weight, bias, y, *results, eps, is_var=is_var, relu=relu)
    return [result for result in results if result is not None]


def _wanted(dense: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: list[bool]) -> list[Tensor | None]:
    """Memory for the gradients by x, weight, bias and residual."""
    like = dense, weight, bias, dense
    return [torch.empty_like(t) if t is not None and want else None for t, want in zip(like, wanted, strict=True)]


@torch.library.register_fake("backstride::batch_norm_moments", lib=library)
def _(x, running_mean, running_var, momentum, eps):
    return x.new_empty((2, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.register_fake("backstride::batch_norm_normalise", lib=library)
def _(x, mean, spread, weight, bias, residual, eps, is_var, relu):
    return _like(x)


@torch.library.register_fake("backstride::batch_norm_gradients", lib=library)
def _(grad, x, mean, spread, weight, bias, y, eps, is_var, relu, wanted):
    return [result for result in _wanted(_like(x), weight, bias, wanted) if result is not None]


def _register(name: str, implementation: Any) -> Any:
    """Returns what the Function calls: the op, and where nobody would miss it the implementation at once."""
    for key in ("CPU", "CUDA"):
        library.impl(name, implementation, key)
    return below_autograd(getattr(torch.ops.backstride, name).default, implementation)


moments = _register("batch_norm_moments", _moments)
normalise = _register("batch_norm_normalise", _normalise)
gradients = _register("batch_norm_gradients", _gradients)


class _Settings(NamedTuple):
    training: bool
    momentum: float
    eps: float
    relu: bool


def _forward(x, running_mean, running_var, weight, bias, residual, settings: _Settings):
    """The output, mean, and 1 / deviation or the running variance."""
    training, momentum, eps, relu = settings
    mean, spread = running_mean, running_var
    if training:
        mean, spread = moments(x, running_mean, running_var, momentum, eps).unbind()
    return normalise(x, mean, spread, weight, bias, residual, eps, not training, relu), mean, spread


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, residual, running_mean, running_var, settings) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, mean, spread = _forward(x, running_mean, running_var, weight, bias, residual, settings)
        # Without a residual, what ReLU let through follows from what is read anyway.
        ctx.save_for_backward(x, mean, spread, weight, bias, y if settings.relu and residual is not None else None)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, mean, spread, weight, bias, y = ctx.saved_tensors
        training, _, eps, relu = ctx.settings
        to_x, to_weight, to_bias, to_residual = needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            found = _differentiable_gradients(grads[0], x, mean, spread, weight, bias, y, ctx.settings)
            results = [grad if need else None for grad, need in zip(found, needs, strict=True)]
        else:
            wanted = [to_x, to_weight, to_bias, to_residual and relu]
            found = iter(gradients(grads[0], x, mean, spread, weight, bias, y, eps, not training, relu, wanted))
            results = [next(found) if want else None for want in wanted]
            if to_residual and not relu:
                results[3] = grads[0]
        return (*results, None, None, None)


def _differentiable_gradients(grad, x, mean, spread, weight, bias, y, settings: _Settings):
    """By x, weight, bias and residual, in torch's ops."""
    training, _, eps, relu = settings
    given, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, grad = x.to(dtype), grad.to(dtype)
    vectors = [None if vector is None else vector.to(dtype) for vector in (weight, bias)]
    mean, inverse = reference.moments(x, eps) if training else (mean.to(dtype), (spread.to(dtype) + eps).rsqrt())
    if relu:
        with torch.no_grad():
            y = reference.normalise(x, mean, inverse, *vectors, None).to(given) if y is None else y
        grad = torch.where(y <= 0, 0, grad)
    by_x, *others = reference.gradients(grad, x, mean, inverse, vectors[0], constant=not training)
    others = [by if vector is None else by.to(vector.dtype) for by, vector in zip(others, (weight, bias), strict=True)]
    return by_x.to(given), *others, grad.to(given)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    """The kernels', with gradients of any order, for checked arguments that `is_followed` by an autograd.Function."""
    settings = _Settings(training, momentum, eps, relu)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        return _BatchNorm.apply(x, weight, bias, residual, running_mean, running_var, settings)
    return _forward(x, running_mean, running_var, weight, bias, residual, settings)[0]
