"""Running whole networks for the launches that they make: torch's own operators compute nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..fused_ops.registration import memory_format

FEW = {True: 2**14, False: 2**20}  # numbers, floating and others, up to which they are computed: sizes follow from some


class Uncomputed(TorchDispatchMode):
    """Within, torch's operators on CPU tensors give results of the right shapes and strides in memory that nothing was
    written to, and change none of their arguments. Only views are what they would be, and what is done with few
    numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        tensors = _tensors((args, kwargs))
        if schema.name.startswith(("backstride::", "aten::empty", "aten::new_empty")) or (
            tensors and _are_few(tensors)
        ):
            return func(*args, **kwargs)
        if schema.is_mutable:
            return kwargs.get("out", args[0])
        if any(returned.alias_info is not None for returned in schema.returns):
            return func(*args, **kwargs)
        shaped = kwargs
        if any(argument.name == "device" for argument in schema.arguments):
            shaped = {key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": "meta"}
        results = func(*tree_map_only(Tensor, _untouched("meta"), args), **shaped)
        if not tensors and _are_few(_tensors(results)):
            return func(*args, **kwargs)
        if schema.name.startswith("aten::convolution"):
            # Without a device to ask about, torch does not say that a convolution's results lie as its operands do.
            form = memory_format(*(tensor for tensor in tensors if tensor.dim() > 2))
            results = tree_map_only(Tensor, lambda t: t.to(memory_format=form) if t.dim() > 2 else t, results)
        return tree_map_only(Tensor, _untouched("cpu"), results)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _are_few(tensors: list[Tensor]) -> bool:
    return all(tensor.numel() <= FEW[tensor.is_floating_point()] for tensor in tensors)


def _untouched(device: str) -> Any:
    return lambda like: torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
