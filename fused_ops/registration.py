"""What the ops' registrations with PyTorch share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad
from torch.nn import Parameter


class Function(torch.autograd.Function):
    """An autograd.Function whose arguments are all positional, which spares `apply` looking up its signature."""

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        base: Any = super(torch.autograd.Function, cls)
        return base.apply(*[unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in arguments])


def _rewritten() -> bool:
    """Whether a trace or torch.func makes something else of every op."""
    c: Any = torch._C
    return c._are_functorch_transforms_active() or c._get_tracing_state() is not None


def _transformed() -> bool:
    """Whether these or a mode do."""
    c: Any = torch._C
    return c._len_torch_dispatch_stack() > 0 or _rewritten()


# What ops are called with besides tensors: to ask any other object whether it is one takes three times as long.
_NO_TENSORS = frozenset({type(None), bool, int, tuple, list, torch.Size})


def _are_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether no argument has a forward gradient, and none is more than a tensor in memory.

    A tensor may stand for its negative (`conj().imag` does), or for zeros that lie nowhere: the dispatcher makes
    ordinary ones of them.
    """
    if forward_ad._current_level >= 0:
        return False
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is Parameter:
            if argument.is_neg() or argument._is_zerotensor():
                return False
        elif kind not in _NO_TENSORS and isinstance(argument, Tensor):
            return False
    return True


def wants_gradient(arguments: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def is_eager(arguments: tuple[Any, ...]) -> bool:
    """Whether an autograd.Function may be applied to these outside of any op: nobody would miss one."""
    return not torch.compiler.is_compiling() and _are_plain(arguments) and not _transformed()


def is_followed(arguments: tuple[Any, ...]) -> bool:
    """Whether an autograd.Function that itself calls ops, which modes see, may be applied to these in an op's place."""
    return not torch.compiler.is_compiling() and _are_plain(arguments) and not _rewritten()


def launches(arguments: tuple[Any, ...]) -> bool:
    """Whether kernels may be launched on these outside of any op: there is no gradient either."""
    return not wants_gradient(arguments) and is_eager(arguments)


def goes_direct(arguments: tuple[Any, ...]) -> bool:
    """Whether an implementation may be called at once, which spares the dispatcher: no profiler looks at the op."""
    return launches(arguments) and not torch.autograd.profiler._is_profiler_enabled


def implemented(library: torch.library.Library, name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Register `implementation` as backstride::<name> for the CPU and CUDA, and return the op."""
    for key in ("CPU", "CUDA"):
        library.impl(name, implementation, key)
    return getattr(torch.ops.backstride, name).default


def differentiable(
    library: torch.library.Library, name: str, function: Callable[..., Any], implementation: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `function`, which applies an autograd.Function, as the autograd of backstride::<name>, and
    `implementation` for the CPU and CUDA.

    Returns what this package calls: torch.compile is to see the op itself, and torch.func, which can't look below an
    op, the autograd.Function.
    """
    op = implemented(library, name, implementation)
    library.impl(name, function, "Autograd")

    def call(*arguments: Any) -> Any:
        if goes_direct(arguments):
            return implementation(*arguments)
        return (op if torch.compiler.is_compiling() else function)(*arguments)

    return call


def below_autograd(op: Callable[..., Any], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """What an autograd.Function's forward calls: the op without its autograd, past the dispatcher where what
    `differentiable` gives goes past it."""

    def call(*arguments: Any) -> Any:
        if goes_direct(arguments):
            return implementation(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return call


def mutating(library: torch.library.Library, name: str, implementation: Callable[..., None]) -> Callable[..., None]:
    """Register `implementation`, which writes into one of its arguments, as backstride::<name> for the CPU and CUDA.

    Returns what this package calls, which goes past the dispatcher where `differentiable` does.
    """
    op = implemented(library, name, implementation)

    def call(*arguments: Any) -> None:
        (implementation if goes_direct(arguments) else op)(*arguments)

    return call


def uses_tf32(x: Tensor, switch: str) -> bool:
    """Whether torch's own op would round fp32 operands to TF32 here; `switch` is its part of torch.backends.cudnn."""
    return x.dtype == torch.float32 and x.is_cuda and getattr(torch.backends.cudnn, switch).fp32_precision == "tf32"


@contextmanager
def full_precision() -> Iterator[None]:
    """Within, fp32 is multiplied in full on a GPU: torch rounds to TF32 in large layers only, which is no measure."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


@lru_cache(maxsize=4096)
def _suggested(shape: torch.Size, strides: tuple[int, ...]) -> torch.memory_format:
    return suggest_memory_format(torch.empty_strided(shape, strides, device="meta"))


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """channels_last where any tensor is, as torch's own ops choose it; 3-D tensors have no such format."""
    if tensors[0].dim() == 3:
        return torch.contiguous_format
    for tensor in tensors:
        # Sizes of fake tensors may be symbols, which can't be looked up.
        known = type(tensor) is Tensor or type(tensor) is Parameter
        found = _suggested(tensor.shape, tensor.stride()) if known else suggest_memory_format(tensor)
        if found != torch.contiguous_format:
            return found
    return torch.contiguous_format


@lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...], form: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape, device="meta", memory_format=form).stride()


def empty(shape: tuple[int, ...], like: Tensor, *others: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor in the `memory_format` of these, of `like`'s device and, without `dtype`, of its dtype."""
    form = memory_format(like, *others)
    if type(like) is Tensor or type(like) is Parameter:  # else sizes may be symbols
        return like.new_empty_strided(shape, _strides(shape, form), dtype=dtype)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=form)


def with_strides_of(other: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with the strides of the other, which has its shape."""
    return tensor if tensor.stride() == other.stride() else torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


class _Cast(Function):
    """Tensors in another dtype, all by one launch. Its derivatives are casts, too."""

    @staticmethod
    def forward(ctx: Any, dtype, *tensors) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.dtype = tensors[0].dtype
        results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(results, tensors)  # pyright: ignore[reportPrivateImportUsage]
        wanted = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(r for r, want in zip(results, wanted, strict=True) if not want))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cast = iter(cast_all([grad for grad in grads if grad is not None], ctx.dtype))
        return (None, *(None if grad is None else next(cast) for grad in grads))


def cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """`tensor.to(dtype)` of each; where they have one dtype themselves, by one launch, as their gradients come back."""
    given = {tensor.dtype for tensor in tensors}
    if given == {dtype}:
        return tensors
    if len(given) == 1 and is_eager(tuple(tensors)):
        return _Cast.apply(dtype, *tensors)
    return [tensor.to(dtype) for tensor in tensors]
