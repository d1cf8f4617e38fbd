"""Triton's interpreter, in half the time: what it does again and again to the same effect is done once, or shorter.

Most of the tests' time is interpretation. Results stay as they are; an overflow of integers becomes an error.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from backstride.kernels.runtime import INTERPRETED
from triton.language import core, semantic
from triton.runtime import interpreter

EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def prepare_once_a_launch() -> None:
    """Triton's language is prepared for a function that a kernel calls when that is called first in a launch.

    Triton does it in every call.
    """
    prepared: set[int] = set()
    launch, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def launched(self, *arguments, **keywords):
        prepared.clear()
        return launch(self, *arguments, **keywords)

    def called(self, *arguments, **keywords):
        if id(self.fn.__globals__) not in prepared:
            prepared.add(id(self.fn.__globals__))
            prepare(self.fn)
        return self.rewrite()(*arguments, **keywords)

    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = called


def check_overflow_in_numpy() -> None:
    """No sum, difference or product of integers overflows unless it says that it may (`sanitize_overflow=False`).

    Triton computes this too, by nine operations in place of each, but looks at the answer only when it debugs.
    """

    def check(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        exact = EXACT[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
        if exact.size:
            low, high = kind.get_int_min_value(), kind.get_int_max_value()
            assert low <= exact.min() and exact.max() <= high, f"{kind} overflow detected for {operation.__name__}"

    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = check


def look_up_dtypes() -> None:
    """numpy's dtype for Triton's is looked up; Triton makes the table in every call."""
    make, made = interpreter._get_np_dtype, {}

    def dtype_of(kind: Any) -> np.dtype:
        name = kind.scalar.name
        if name not in made:
            made[name] = make(kind)
        return made[name]

    interpreter._get_np_dtype = dtype_of


def share_shapes() -> None:
    """Tensors of one shape share its description, and two of one type need no common one."""
    described: dict[tuple[int, ...], tuple[Any, Any]] = {}
    check = semantic.TritonSemantic.binary_op_type_checking_impl

    def initialise(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in described:
            described[shape] = core.tuple([core.constexpr(s) for s in shape]), core.constexpr(math.prod(shape))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = described[shape]

    def checked(self: Any, lhs: Any, rhs: Any, *options: bool) -> tuple[Any, Any]:
        both = isinstance(lhs, core.tensor) and isinstance(rhs, core.tensor)
        divided = any(options[3:])
        if both and lhs.type == rhs.type and not divided and not lhs.dtype.is_ptr():
            return lhs, rhs
        return check(self, lhs, rhs, *options)

    core.tensor.__init__ = initialise
    semantic.TritonSemantic.binary_op_type_checking_impl = checked


def accelerate() -> None:
    """Where Triton interprets; elsewhere nothing."""
    if not INTERPRETED:
        return
    prepare_once_a_launch()
    check_overflow_in_numpy()
    look_up_dtypes()
    share_shapes()
