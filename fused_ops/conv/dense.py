"""relu(X x + bias) for dense products on a GPU, which cuDNN computes: in eager code, past the dispatcher.

What an op of its own costs the host, a small network would feel: there, a layer's products take less time than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels import conv as kernels
from ...kernels.conv import Geometry
from ..registration import Function, is_eager
from . import aten, ops


class _ConvRelu(Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, size, geometry) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = ops._library_forward(False, x, weight, bias, None, size, geometry, True)
        ctx.save_for_backward(x, weight, y)
        ctx.geometry = geometry
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, y = ctx.saved_tensors
        by_x, by_weight, by_bias, *_ = ctx.needs_input_grad
        grad, grad_bias = ops._through_epilogue(grads[0], y, by_bias)
        staged = ops._is_better_staged(x.is_contiguous(), x, weight, weight.shape[0])
        if staged and not torch.is_grad_enabled():
            sides = kernels.to_channels_last(grad), kernels.to_channels_last(x)
            innermost, grad_weight = aten.gradients(*sides, weight, ctx.geometry, (by_x, by_weight))
            grad_x = None
            if innermost is not None:
                grad_x = torch.empty_like(x)
                kernels.from_channels_last(innermost, grad_x)
        else:
            grad_x, grad_weight = aten.gradients(grad, x, weight, ctx.geometry, (by_x, by_weight))
        return grad_x, grad_weight, grad_bias, None, None


def takes(x: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int], geometry: Geometry) -> bool:
    """Whether `conv_relu` may be called: no mode or transform, and torch's own padding, on both sides alike."""
    kernel_size = tuple(weight.shape[2:])
    return is_eager((x, weight, bias)) and aten.is_natural(tuple(x.shape[2:]), kernel_size, tuple(size), geometry)


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int], geometry: Geometry) -> Tensor:
    """relu(X x + bias), of spatial size `size`; with gradients of any order."""
    return _ConvRelu.apply(x, weight, bias, size, geometry)
