"""What the ops' registrations with PyTorch share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
