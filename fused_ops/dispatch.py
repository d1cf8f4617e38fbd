"""Which code a call runs, decided in one place and shown by `explain`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kernels.runtime import INTERPRETED

KERNEL = "kernel"
INTERPRETED_KERNEL = "interpreted kernel"
ATEN = "aten"

GPU_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
INTERPRETER_DTYPES = GPU_DTYPES | {torch.float64}


@dataclass(frozen=True)
class Path:
    """What a call runs (`name`) and why (`reason`)."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


# Looked up and not made in every call.
ON_GPU = {dtype: Path(KERNEL, f"{dtype} on cuda") for dtype in GPU_DTYPES}
ON_INTERPRETER = {
    dtype: Path(INTERPRETED_KERNEL, f"{dtype} on the CPU with TRITON_INTERPRET=1") for dtype in INTERPRETER_DTYPES
}
ON_CPU = Path(ATEN, "CPU tensors run on ATen; set TRITON_INTERPRET=1 before importing to interpret the kernels")
SHORT = 8 << 20  # bytes
BY_AUTOGRAD = Path(ATEN, "gradients through so little data are the host's work, of which torch's own have less")
REFUSED = Path(ATEN, "arguments that torch's own function refuses: it is called, and says why")


def kernel_path(tensor: torch.Tensor) -> Path:
    """Path of an op whose kernels take fp16, bf16 and fp32 on a GPU, and fp64 too under the interpreter."""
    dtype = tensor.dtype  # not the device's type, which takes as long as all else here
    if tensor.is_cuda:
        return ON_GPU.get(dtype) or Path(ATEN, f"no kernel for {dtype} on a GPU")
    if not tensor.is_cpu:
        return Path(ATEN, f"no kernels for device {tensor.device.type}")
    if not INTERPRETED:
        return ON_CPU
    return ON_INTERPRETER.get(dtype) or Path(ATEN, f"no kernel for {dtype}")


def is_short(numbers: int, *tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted through an op on a GPU that moves no more than `numbers` of the first tensor's.

    Up to `SHORT` bytes a GPU passes over them in a few microseconds, while an autograd.Function in Python keeps the
    host busy for a hundred: eager networks of such layers wait for it.
    """
    first: Any = tensors[0]
    if numbers * first.dtype.itemsize > SHORT or not first.is_cuda or torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


T = TypeVar("T", Tensor, Tensor | None)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; there is none for meta, and torch's own question raises."""
    if not torch._C._is_any_autocast_enabled():  # the common case, quickly
        return False
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def autocast_dtype(tensor: Tensor, device_type: str) -> torch.dtype:
    """The device's autocast dtype where autocast is on and the tensor, as in torch, a floating one but fp64; else its
    own."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensor.dtype
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)


def autocast(tensor: T, device_type: str) -> T:
    """The tensor in its `autocast_dtype`."""
    return tensor if tensor is None else tensor.to(autocast_dtype(tensor, device_type))


_PLANNERS: dict[Callable[..., Any], Callable[..., Path]] = {}


def explained_by(planner: Callable[..., Path]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a public op: `planner`, called with the op's bound arguments, tells its path."""

    def register(op: Callable[..., Any]) -> Callable[..., Any]:
        _PLANNERS[op] = planner
        return op

    return register


def public_ops() -> list[Callable[..., Any]]:
    """Every op that `explain` knows, in the order of definition."""
    return list(_PLANNERS)


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Path:
    """Say which path the call `op(*args, **kwargs)` takes here, and why, without running it.

    Returns a `Path` whose `name` is "kernel", "interpreted kernel" or "aten". Raises ValueError for a function that
    is not one of this package's ops, TypeError for arguments that the op does not take.
    """
    planner = _PLANNERS.get(op)
    if planner is None:
        names = ", ".join(known.__name__ for known in _PLANNERS)
        raise ValueError(f"explain knows the ops of backstride.fused_ops ({names}), not {op!r}")
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    return planner(**bound.arguments)
