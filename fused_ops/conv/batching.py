"""vmap of the convolution ops: one more batch axis joins the batch, or, with a weight of its own each, the groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import library, registered


def _front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The vmapped axis first, expanded where the tensor has none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _into_batch(tensor: Tensor) -> Tensor:  # (V, N, C, ...) to (V N, C, ...)
    return tensor.flatten(0, 1)


def _into_channels(tensor: Tensor) -> Tensor:  # (V, N, C, ...) to (N, V C, ...)
    return tensor.transpose(0, 1).flatten(1, 2)


def _vmap_forward(op: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Of conv and conv_transpose: X acts on every group of channels by itself."""
    x, weight, bias, residual, output_size, *geometry, groups, relu = arguments
    x_dim, weight_dim, bias_dim, residual_dim, *_ = in_dims
    size = info.batch_size
    x = _front(x, x_dim, size)
    residual = None if residual is None else _front(residual, residual_dim, size)
    if weight_dim is None and bias_dim is None:
        residual = None if residual is None else _into_batch(residual)
        y = op(_into_batch(x), weight, bias, residual, output_size, *geometry, groups, relu)
        return y.unflatten(0, (size, -1)), 0
    weight = _front(weight, weight_dim, size).flatten(0, 1)
    bias = None if bias is None else _front(bias, bias_dim, size).flatten(0, 1)
    residual = None if residual is None else _into_channels(residual)
    y = op(_into_channels(x), weight, bias, residual, output_size, *geometry, groups * size, relu)
    return y.unflatten(1, (size, -1)), 1


def _vmap_conv(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    return _vmap_forward(registered.conv.default, info, in_dims, *arguments)


def _vmap_conv_transpose(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    return _vmap_forward(registered.conv_transpose.default, info, in_dims, *arguments)


def _vmap_weight_grad(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Every entry has a gradient of its own: entries are groups, which share no weight."""
    x, y, kernel_size, *geometry, groups = arguments
    size = info.batch_size
    x, y = (_into_channels(_front(t, dim, size)) for t, dim in zip((x, y), in_dims, strict=False))
    weight = registered.conv_weight_grad.default(x, y, kernel_size, *geometry, groups * size)
    return weight.unflatten(0, (size, -1)), 0


def _vmap_concat(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    x, skip, weight, bias, output_size, *geometry, groups, relu = arguments
    x_dim, skip_dim, weight_dim, bias_dim, *_ = in_dims
    size = info.batch_size
    x, skip = _front(x, x_dim, size), _front(skip, skip_dim, size)
    if weight_dim is None and bias_dim is None:
        op = registered.conv_transpose_concat.default
        y = op(_into_batch(x), _into_batch(skip), weight, bias, output_size, *geometry, groups, relu)
        return y.unflatten(0, (size, -1)), 0
    dims = (0, weight_dim, bias_dim, None)
    up, dim = _vmap_conv_transpose(info, dims, x, weight, bias, None, output_size, *geometry, groups, relu)
    return torch.cat([skip, up.movedim(dim, 0)], dim=2), 0


for name, rule in {
    "conv": _vmap_conv,
    "conv_transpose": _vmap_conv_transpose,
    "conv_weight_grad": _vmap_weight_grad,
    "conv_transpose_concat": _vmap_concat,
}.items():
    torch.library.register_vmap(f"backstride::{name}", rule, lib=library)
