"""What may follow an op before its result is written: a residual that is added, and an activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def is_relu(activation: str | None) -> bool:
    """Raises ValueError unless `activation` is "relu" or None."""
    if activation not in (None, "relu"):
        raise ValueError(f'activation must be None or "relu", got {activation!r}')
    return activation == "relu"


def check_residual(residual: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError or TypeError unless the residual has the output's shape and dtype, and lies on its device."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a tensor of the output's shape, got {type(residual).__name__}")
    if residual.shape != torch.Size(shape):
        raise ValueError(
            f"residual must have the output's shape {tuple(shape)}, got {tuple(residual.shape)}; expand or crop it"
        )
    if residual.dtype != dtype:
        raise TypeError(f"residual must have the output's dtype {dtype}, got {residual.dtype}; convert it")
    check_device("residual", residual, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError unless a tensor lies where the output does: a kernel would take its address for one there."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on the output's device {device}, got {tensor.device}; move it")


def finish(y: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
    """relu(y + residual), each part optional, by torch's own ops."""
    if residual is not None:
        check_residual(residual, y.shape, y.dtype, y.device)
        y = y + residual
    return F.relu(y) if relu else y
