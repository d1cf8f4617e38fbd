"""What the ops' registrations with PyTorch share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def differentiable(library: torch.library.Library, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Register `function`, which applies an autograd.Function, as the autograd of backstride::<name>.

    Returns what this package calls: torch.compile is to see the op itself, and torch.func, which can't look below an
    op, the autograd.Function.
    """
    library.impl(name, function, "Autograd")
    op = getattr(torch.ops.backstride, name).default

    def call(*arguments: Any) -> Any:
        return (op if torch.compiler.is_compiling() else function)(*arguments)

    return call


def uses_tf32(x: Tensor, switch: Any) -> bool:
    """Whether torch's own op would round fp32 operands to TF32 here; `switch` is its part of torch.backends.cudnn."""
    return x.dtype == torch.float32 and x.is_cuda and switch.fp32_precision == "tf32"


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """channels_last where any tensor is, as torch's own ops choose it; 3-D tensors have no such format."""
    if tensors[0].dim() == 3:
        return torch.contiguous_format
    formats = (suggest_memory_format(t) for t in tensors)
    return next((f for f in formats if f != torch.contiguous_format), torch.contiguous_format)


def with_strides_of(other: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with the strides of the other, which has its shape."""
    return tensor if tensor.stride() == other.stride() else torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)
