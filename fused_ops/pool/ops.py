"""Registration of max-pooling and unpooling with PyTorch: schema, kernels, fake tensors, autograd, vmap.

    backstride::max_pool           maxima of windows, and their places
    backstride::max_pool_spread    pooled values back at their places, summed or the last: windows known
    backstride::max_pool_pick      values at the places
    backstride::max_unpool         values at any indices, the last where several meet

A place is a pixel (int64, flat in its plane, as torch's) or an offset in the window (uint8). The gradient of max_pool
is a spread, that of a spread or an unpooling is a pick, and that of a pick a spread.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import pool as kernels
from ...kernels.pool import Windows, reference
from ..dispatch import ATEN, kernel_path
from ..registration import Function, below_autograd, differentiable, empty, memory_format, with_strides_of

_WINDOWS = "SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation"

library = torch.library.Library("backstride", "FRAGMENT")
library.define(f"max_pool(Tensor x, {_WINDOWS}, SymInt[] output_size, bool offsets) -> (Tensor, Tensor)")
library.define(f"max_pool_spread(Tensor y, Tensor index, {_WINDOWS}, SymInt[] input_size, bool total) -> Tensor")
library.define(f"max_pool_pick(Tensor x, Tensor index, {_WINDOWS}) -> Tensor")
library.define("max_unpool(Tensor y, Tensor index, SymInt[] output_size) -> Tensor")

registered = torch.ops.backstride
ATEN_POOLS: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _empty(like: Tensor, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Of shape (N, C, *size), channels_last where `like` is."""
    return empty((*like.shape[:2], *size), like, dtype=dtype)


def _windows(kernel, stride, padding, dilation) -> Windows:
    return Windows(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))


def _max_pool(x, kernel, stride, padding, dilation, output_size, offsets):
    windows = _windows(kernel, stride, padding, dilation)
    y = _empty(x, output_size)
    index = torch.empty_like(y, dtype=torch.uint8 if offsets else torch.int64)
    if kernel_path(x).name != ATEN:
        kernels.max_pool(x, y, index, windows)
        return y, index
    values, places = _aten_max_pool(x, output_size, windows)
    places = reference.offsets_of_indices(places, x.shape[2:], windows) if offsets else places
    return with_strides_of(y, values), with_strides_of(index, places)


def _aten_max_pool(x: Tensor, size: Sequence[int], windows: Windows) -> tuple[Tensor, Tensor]:
    floor = [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in zip(x.shape[2:], *windows, strict=True)]
    return ATEN_POOLS[len(size)](x, *windows, ceil_mode=list(size) != floor, return_indices=True)


def _max_pool_spread(y, index, kernel, stride, padding, dilation, input_size, total):
    windows = _windows(kernel, stride, padding, dilation)
    x = _empty(index, input_size, y.dtype)
    aten = kernel_path(y).name == ATEN
    checked = not total and _checked(index)
    pixels = _pixels(index, input_size, windows) if aten or checked else index
    if checked:
        _check(pixels, index, input_size)
    if aten:
        return with_strides_of(x, (reference.spread if total else _aten_max_unpool)(y, pixels, input_size))
    index = index.contiguous(memory_format=memory_format(index))  # the kernel has one set of strides for both
    kernels.spread(with_strides_of(index, y), index, x, windows, total=total)
    return x


def _max_pool_pick(x, index, kernel, stride, padding, dilation):
    windows = _windows(kernel, stride, padding, dilation)
    y = _empty(index, index.shape[2:], x.dtype)
    if kernel_path(x).name != ATEN:
        kernels.pick(x, with_strides_of(y, index), y, windows)
        return y
    return with_strides_of(y, reference.pick(x, _pixels(index, x.shape[2:], windows)))


def _max_unpool(y, index, output_size):
    x = _empty(y, output_size)
    if _checked(index):
        _check(index, index, output_size)
    if kernel_path(y).name == ATEN:
        return with_strides_of(x, _aten_max_unpool(y, index, output_size))
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels.max_unpool(y.contiguous(), index.contiguous(), result)
    return with_strides_of(x, result)


def _aten_max_unpool(y: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    """torch's own on the CPU, whose threads may meet at one pixel; where they did, the last in order has to stand."""
    if not y.is_cuda and y.numel():
        axes = len(size)
        y2, index2, size2 = (y.unsqueeze(2), index.unsqueeze(2), [1, *size]) if axes == 1 else (y, index, size)
        unpool = torch.ops.aten.max_unpool3d if axes == 3 else torch.ops.aten.max_unpool2d
        x = unpool(y2, index2, size2, *([[1] * 3, [0] * 3] if axes == 3 else [])).view(*y.shape[:2], *size)
        if torch.equal(x.flatten(2).gather(2, index.flatten(2)).view_as(y), y):
            return x
    return reference.max_unpool(y, index, size)


def _pixels(index: Tensor, size: Sequence[int], windows: Windows) -> Tensor:
    return reference.indices_of_offsets(index, size, windows) if index.dtype == torch.uint8 else index


def _checked(index: Tensor) -> bool:
    """On the CPU always, as torch; on a GPU, where it has to wait for it, with BACKSTRIDE_CHECK_INDICES=1."""
    return not index.is_cuda or os.environ.get("BACKSTRIDE_CHECK_INDICES") == "1"


def _check(pixels: Tensor, index: Tensor, size: Sequence[int]) -> None:
    wrong = index[(pixels < 0) | (pixels >= math.prod(size))]
    if wrong.numel():
        raise RuntimeError(
            f"Found an invalid max index: {wrong[0].item()} (output volumes are of size {'x'.join(map(str, size))}); "
            "indices and offsets must come from a pooling of an image of that size, with the same windows"
        )


@torch.library.register_fake("backstride::max_pool", lib=library)
def _(x, kernel, stride, padding, dilation, output_size, offsets):
    return _empty(x, output_size), _empty(x, output_size, torch.uint8 if offsets else torch.int64)


@torch.library.register_fake("backstride::max_pool_spread", lib=library)
def _(y, index, kernel, stride, padding, dilation, input_size, total):
    return _empty(index, input_size, y.dtype)


@torch.library.register_fake("backstride::max_pool_pick", lib=library)
def _(x, index, kernel, stride, padding, dilation):
    return _empty(index, index.shape[2:], x.dtype)


@torch.library.register_fake("backstride::max_unpool", lib=library)
def _(y, index, output_size):
    return _empty(y, output_size)


_pool_below = below_autograd(registered.max_pool.default, _max_pool)
_spread_below = below_autograd(registered.max_pool_spread.default, _max_pool_spread)
_pick_below = below_autograd(registered.max_pool_pick.default, _max_pool_pick)
_unpool_below = below_autograd(registered.max_unpool.default, _max_unpool)


@dataclass(slots=True)
class _Settings:
    """All that is no tensor, in one object: torch.func takes a list for one argument a number."""

    windows: tuple[Sequence[int], ...]
    size: Sequence[int]  # of the result
    flag: bool = False  # offsets, or total


class _MaxPool(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, settings):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _pool_below(x, *settings.windows, settings.size, settings.flag)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.settings = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])
        ctx.size = x.shape[2:]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (index,) = ctx.saved_tensors
        return max_pool_spread(grads[0], index, *ctx.settings.windows, ctx.size, True), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (index,) = ctx.saved_tensors
        return max_pool_pick(tangents[0], index, *ctx.settings.windows), None


class _Spread(Function):
    """With flag the adjoint of a pick, without it an unpooling. Of both, torch lets every y have the gradient where
    it went, also one that a later window overwrote."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y, index, settings):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _spread_below(y, index, *settings.windows, settings.size, settings.flag)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, index, ctx.settings = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (index,) = ctx.saved_tensors
        return max_pool_pick(grads[0], index, *ctx.settings.windows), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (index,) = ctx.saved_tensors
        return max_pool_spread(tangents[0], index, *ctx.settings.windows, ctx.settings.size, ctx.settings.flag)


class _Pick(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, index, settings):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _pick_below(x, index, *settings.windows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, index, ctx.settings = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)
        ctx.size = x.shape[2:]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (index,) = ctx.saved_tensors
        if not any(ctx.settings.windows[0]):  # the indices are anybody's
            return reference.spread(grads[0], index, ctx.size), None, None
        return max_pool_spread(grads[0], index, *ctx.settings.windows, ctx.size, True), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (index,) = ctx.saved_tensors
        return max_pool_pick(tangents[0], index, *ctx.settings.windows)


class _MaxUnpool(Function):
    """As torch, every y has the gradient where it went, also one that a later y overwrote."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y, index, settings):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _unpool_below(y, index, settings.size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, index, ctx.settings = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (index,) = ctx.saved_tensors
        none = [0] * (index.dim() - 2)
        return max_pool_pick(grads[0], index, none, none, none, none), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (index,) = ctx.saved_tensors
        return max_unpool(tangents[0], index, ctx.settings.size)


def _max_pool_autograd(x, kernel, stride, padding, dilation, output_size, offsets):
    return _MaxPool.apply(x, _Settings((kernel, stride, padding, dilation), output_size, offsets))


def _spread_autograd(y, index, kernel, stride, padding, dilation, input_size, total):
    return _Spread.apply(y, index, _Settings((kernel, stride, padding, dilation), input_size, total))


def _pick_autograd(x, index, kernel, stride, padding, dilation):
    return _Pick.apply(x, index, _Settings((kernel, stride, padding, dilation), index.shape[2:]))


def _max_unpool_autograd(y, index, output_size):
    return _MaxUnpool.apply(y, index, _Settings((), output_size))


max_pool = differentiable(library, "max_pool", _max_pool_autograd, _max_pool)
max_pool_spread = differentiable(library, "max_pool_spread", _spread_autograd, _max_pool_spread)
max_pool_pick = differentiable(library, "max_pool_pick", _pick_autograd, _max_pool_pick)
max_unpool = differentiable(library, "max_unpool", _max_unpool_autograd, _max_unpool)


def _vmap(name: str, tensors: int) -> None:
    """One more batch axis of the op's first arguments, its tensors, joins the batch."""
    op = getattr(registered, name).default

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        folded = [
            (t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)
            for t, dim in zip(arguments[:tensors], in_dims, strict=False)
        ]
        result = op(*folded, *arguments[tensors:])
        if isinstance(result, Tensor):
            return result.unflatten(0, (info.batch_size, -1)), 0
        return tuple(t.unflatten(0, (info.batch_size, -1)) for t in result), (0, 0)

    torch.library.register_vmap(f"backstride::{name}", rule, lib=library)


_vmap("max_pool", 1)
_vmap("max_pool_spread", 2)
_vmap("max_pool_pick", 2)
_vmap("max_unpool", 2)
