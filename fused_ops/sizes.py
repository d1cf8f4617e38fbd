"""What follows from sizes alone, found once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_EXACT = frozenset({int, str, torch.Size, type(None)})
_INT = frozenset({int})


def _are_exact(values: Sequence[Any]) -> bool:
    """Whether no other arguments than the same are equal to them, as 1.0 and True are to 1."""
    for value in values:
        kind = type(value)
        if kind not in _EXACT and not (kind is tuple and _INT.issuperset(map(type, value))):
            return False
    return True


def remembered(find: Callable[..., T]) -> Callable[..., T]:
    """`find`, whose answers are kept, but for symbolic sizes and what is no int, tuple of ints, string or None."""
    known = lru_cache(maxsize=4096)(find)

    def look_up(*arguments: Any) -> T:
        if torch.compiler.is_compiling() or not _are_exact(arguments):
            return find(*arguments)
        try:
            return known(*arguments)
        except TypeError:  # a symbolic size can't be looked up
            return find(*arguments)

    return look_up
