"""The readable definitions of the kernels, in plain PyTorch; differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def _axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _along(values: Tensor, x: Tensor) -> Tensor:
    """One value for each channel, to be broadcast."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, 1 / sqrt(var + eps)) of each channel."""
    var, mean = torch.var_mean(x, _axes(x), correction=0)
    return mean, (var + eps).rsqrt()


def normalise(x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What a residual is then added to, and ReLU taken of."""
    y = (x - _along(mean, x)) * _along(inverse if weight is None else inverse * weight, x)
    return y if bias is None else y + _along(bias, x)


def gradients(
    grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, *, constant: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and bias, from the one before ReLU; `constant` are mean and deviation that don't come
    from x (Ioffe and Szegedy 2015, section 3)."""
    normalised = (x - _along(mean, x)) * _along(inverse, x)
    grad_weight, grad_bias = (grad * normalised).sum(_axes(x)), grad.sum(_axes(x))
    grad_x = grad
    if not constant:
        count = x.numel() // x.shape[1]
        grad_x = grad - _along(grad_bias / count, x) - normalised * _along(grad_weight / count, x)
    return grad_x * _along(inverse if weight is None else inverse * weight, x), grad_weight, grad_bias
