"""Results written into a given tensor, as torch's `out=`: what it must be, and the ops behind it.

    backstride::conv_out              out = X x      (+ bias, residual, ReLU)
    backstride::conv_transpose_out    out = X^T x    (+ bias, residual, ReLU)

`out` may be any slice of a tensor, such as the channels beside a skip connection. Neither op is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd import forward_ad

from ...kernels.conv import Geometry
from ..dispatch import ATEN, kernel_path
from ..registration import mutating
from . import ops
from .ops import library

for name in ("conv_out", "conv_transpose_out"):
    library.define(
        f"{name}(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, {ops._GEOMETRY}, bool relu, Tensor(a!) out)"
        " -> ()"
    )

OVERLAP_WORK = 100_000  # steps of numpy's exact search, some milliseconds; slices of one tensor take a few


def check_mode(function: str, tensors: Sequence[Any]) -> None:
    """RuntimeError, as torch's, where a gradient or vmap would have to see through what is written."""
    given = [t for t in tensors if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise RuntimeError(
            f"{function}(): functions with out=... arguments don't support automatic differentiation, but one of the"
            " arguments requires grad. Call it under torch.no_grad(), or without out="
        )
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        raise RuntimeError(
            f"{function}(): functions with out=... arguments don't support forward mode differentiation, but one of"
            " the arguments has a tangent. Call it without out="
        )
    if torch._C._are_functorch_transforms_active() and any(map(is_batchedtensor, given)):
        raise RuntimeError(f"{function}(): vmap does not support out=. Call it without out=")


def check_shape(out: Any, shape: Sequence[int]) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.shape != torch.Size(shape):
        raise ValueError(f"out must have the result's shape {tuple(shape)}, got {tuple(out.shape)}; allocate it so")


def check(out: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """TypeError or ValueError where `out` is not what the result has to be; nothing is resized or cast."""
    check_shape(out, shape)
    if out.dtype != dtype or out.device != device:
        raise TypeError(
            f"out must have the result's dtype and device ({dtype}, {device}), got {out.dtype}, {out.device};"
            " allocate it so"
        )


@lru_cache(maxsize=4096)
def _reach(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, bool]:
    """Elements from the first in memory to behind the last, and whether each has a place of its own.

    That is so where every axis steps over all that the finer axes reach, as in every slice and permutation of an
    ordinary tensor.
    """
    reach, apart = 1, True
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length > 1:
            apart = apart and stride >= reach
            reach += (length - 1) * stride
    return reach, apart


class _Memory:
    """Where a tensor's elements are, in the form that numpy reads; the memory itself is not looked at."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), True),
            "typestr": f"|V{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(size * stride for stride in tensor.stride()),
        }


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the tensors have an element in common, or might have where an exact answer takes too long."""
    if a.device != b.device or not a.numel() or not b.numel():
        return False
    memory: list[Any] = [np.asarray(_Memory(t)) for t in (a, b)]
    work: Any = OVERLAP_WORK
    try:
        return np.shares_memory(*memory, max_work=work)
    except RuntimeError:  # numpy's TooHardError
        return True


def check_memory(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """RuntimeError where an element of `out` is written twice, or is one that is read.

    The residual may be `out` itself: each of its elements is read where the result's is made, just before it is
    written.
    """
    reach, apart = _reach(out.shape, out.stride())
    if not apart:
        raise RuntimeError(
            "unsupported operation: more than one element of out may refer to a single memory location"
            f" (shape {tuple(out.shape)}, strides {out.stride()}); give a tensor that is not expanded"
        )
    if residual is not None and residual.data_ptr() == out.data_ptr() and residual.stride() == out.stride():
        residual = None
    start = out.data_ptr()
    end = start + out.element_size() * reach
    for name, tensor in (("input", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is None or (first := tensor.data_ptr()) >= end:
            continue
        behind = first + tensor.element_size() * _reach(tensor.shape, tensor.stride())[0]
        if behind > start and overlap(tensor, out):
            remedy = "give out itself as the residual, or clone it" if name == "residual" else "clone it"
            raise RuntimeError(
                f"unsupported operation: some elements of {name} and out refer to a single memory location, which"
                f" would be written before it is read; {remedy}"
            )


def copy_into(out: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Any, residual: Any) -> Tensor:
    """`out` with the result that torch's own function gave; refused where the kernels would refuse it."""
    check(out, y.shape, y.dtype, y.device)
    if not torch.compiler.is_compiling() and all(_has_memory(t) for t in (out, x, weight, bias, residual)):
        check_memory(out, x, weight, bias, residual)
    return out.copy_(y)


def _has_memory(tensor: Tensor | None) -> bool:
    """Whether it is None or an ordinary tensor: no meta or fake tensor, no wrapper around another."""
    return tensor is None or (
        type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta and torch._C._has_storage(tensor)
    )


def _forward(
    transposed: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    out: Tensor,
) -> None:
    check_memory(out, x, weight, bias, residual)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    if kernel_path(x).name == ATEN:
        size = out.shape[2:]
        out.copy_(ops._forward(transposed, x, weight, bias, residual, size, stride, padding, dilation, groups, relu))
        return
    if residual is not None and residual.stride() != out.stride():
        # The kernels want the residual's elements where the result's will be, and there they may as well lie.
        residual = out.copy_(residual)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    ops._launch(transposed, x, weight, bias, residual, out, geometry, relu)


for name in ("conv_out", "conv_transpose_out"):

    @torch.library.register_fake(f"backstride::{name}", lib=library)
    def _(x, weight, bias, residual, stride, padding, dilation, groups, relu, out):
        return None


conv_out = mutating(library, "conv_out", partial(_forward, False))
conv_transpose_out = mutating(library, "conv_transpose_out", partial(_forward, True))
