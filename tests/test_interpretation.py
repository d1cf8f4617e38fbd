"""What the tests' interpreter adds to Triton's."""

import pytest
import torch
import triton
import triton.language as tl
from backstride.kernels.runtime import INTERPRETED
from triton.runtime.errors import InterpreterError


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, OPERATION: tl.constexpr, WRAPS: tl.constexpr):
    x, y = tl.load(x_ptr), tl.load(y_ptr)
    if WRAPS:
        tl.store(x_ptr, tl.add(x, y, sanitize_overflow=False))
    elif OPERATION == "sum":
        tl.store(x_ptr, x + y)
    elif OPERATION == "difference":
        tl.store(x_ptr, x - y)
    else:
        tl.store(x_ptr, x * y)


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
@pytest.mark.parametrize(
    ("operation", "x", "y"),
    [("sum", 2**31 - 5, 4), ("difference", -(2**31) + 4, 4), ("product", -(2**16), 2**15)],
    ids=["sum", "difference", "product"],
)
def test_overflow_is_an_error(operation, x, y):
    """A GPU would go on with a wrong number, which as an address may lie in somebody else's memory."""
    a, b = torch.tensor([x], dtype=torch.int32), torch.tensor([y], dtype=torch.int32)
    arithmetic_kernel[(1,)](a, b, OPERATION=operation, WRAPS=False)
    assert a.item() == {"sum": x + y, "difference": x - y, "product": x * y}[operation]
    a.fill_(x)
    with pytest.raises(InterpreterError, match="int32 overflow"):
        arithmetic_kernel[(1,)](a, b + 1, OPERATION=operation, WRAPS=False)
    wide = [t.long() for t in (a, b + 1)]
    arithmetic_kernel[(1,)](*wide, OPERATION=operation, WRAPS=False)
    assert abs(wide[0].item()) >= 2**31
    a.fill_(2**31 - 1)
    arithmetic_kernel[(1,)](a, b * 0 + 1, OPERATION=operation, WRAPS=True)
    assert a.item() == -(2**31)
