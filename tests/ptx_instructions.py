"""What each PTX instruction does to the registers of some lanes (PTX ISA 8.7, chapter 9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ptx_matrix
from .ptx import DTYPES, Address, Immediate, Operand, Statement, Vector

if TYPE_CHECKING:
    from .ptx_machine import Lanes, Machine

Execute = Callable[["Machine", Statement, "Lanes"], None]
WARP = 32


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to the bits of the nearest bf16, of two the even one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    # A product of two fp32 is exact in fp64; the sum is rounded twice, which seldom shows.
    return (np.asarray(a, np.float64) * b + c).astype(np.asarray(a).dtype)


def _divide(a: Any, b: Any) -> Any:
    """Towards zero; by zero anything."""
    a, b = np.broadcast_arrays(a, b)
    wide = np.abs(a.astype(object if a.dtype.itemsize == 8 else np.int64))
    by = np.abs(np.where(b == 0, 1, b).astype(wide.dtype))
    return (wide // by * np.where((a < 0) != (b < 0), -1, 1)).astype(a.dtype)


def _shift_left(a: Any, by: Any) -> Any:
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(a: Any, by: Any) -> Any:
    bits = 8 * a.dtype.itemsize
    filled = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return np.where(by < bits, filled, a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" else 0).astype(a.dtype)


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "max": np.fmax,
    "min": np.fmin,
    "rem": lambda a, b: a - _divide(a, b) * b,
}
UNARY: dict[str, Callable[[Any], Any]] = {
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": np.abs,
    "ex2": np.exp2,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
}
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & ~_unordered(a, b),
    "neu": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: _unordered(a, b),
    "num": lambda a, b: ~_unordered(a, b),
}


def _unordered(a: Any, b: Any) -> Any:
    return (a != a) | (b != b)


def _to_16_bits(values: Any, kind: str) -> np.ndarray:
    """The bits of the nearest bf16 or fp16."""
    return round_to_bf16(values) if kind == "bf16" else np.asarray(values, np.float16).view(np.uint16)


def _elementwise(
    machine: Machine, to: Operand, operands: Sequence[Operand], kind: str, function: Callable[..., Any], lanes: Lanes
) -> None:
    """to = function of the operands; of 16-bit numbers in pairs, each of them."""
    if kind in ("f16x2", "bf16x2"):
        registers = [machine.read(o, "u32", lanes) for o in operands]
        result = np.uint32(0)
        for shift in (np.uint32(0), np.uint32(16)):
            halves = (ptx_matrix.halves((each >> shift).astype(np.uint16), kind[:-2]) for each in registers)
            result = result | _to_16_bits(function(*halves), kind[:-2]).astype(np.uint32) << shift
        machine.write(to, result, lanes)
        return
    values = function(*(machine.read(o, kind, lanes) for o in operands))
    machine.write(to, round_to_bf16(values) if kind == "bf16" else values, lanes)


def _binary(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    operation, kind = statement.opcode[0], statement.opcode[-1]
    to, *operands = statement.operands
    if kind in ("s16x2", "u16x2"):
        halves = (np.broadcast_to(machine.read(o, "u32", lanes), len(machine.every(lanes))) for o in operands)
        views = (np.ascontiguousarray(each).view(DTYPES[kind[:-2]]) for each in halves)
        machine.write(to, BINARY[operation](*views).view(np.uint32), lanes)
        return
    execute = {"max": np.maximum, "min": np.minimum}[operation] if "NaN" in statement.opcode else BINARY[operation]
    _elementwise(machine, to, operands, kind, execute, lanes)


def _unary(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    to, *operands = statement.operands
    _elementwise(machine, to, operands, statement.opcode[-1], UNARY[statement.opcode[0]], lanes)


def _move(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    """Also two halves into one register, and out of it."""
    to, value = statement.operands
    bits = int(statement.opcode[-1][1:]) if statement.opcode[-1] != "pred" else 0
    if isinstance(value, Vector):
        part = bits // len(value.parts)
        whole = DTYPES[f"u{bits}"].type(0)
        for i, operand in enumerate(value.parts):
            whole = whole | machine.read(operand, f"u{bits}", lanes) << whole.dtype.type(part * i)
        machine.write(to, whole, lanes)
    elif isinstance(to, Vector):
        part = bits // len(to.parts)
        whole = machine.read(value, f"u{bits}", lanes)
        for i, name in enumerate(to.parts):
            machine.write(name, (whole >> whole.dtype.type(part * i)).astype(DTYPES[f"u{part}"]), lanes)
    else:
        machine.write(to, machine.read(value, statement.opcode[-1], lanes), lanes)


def _shift(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    to, value, by = statement.operands
    shifted = _shift_left if statement.opcode[0] == "shl" else _shift_right
    a, b = np.broadcast_arrays(machine.read(value, statement.opcode[-1], lanes), machine.read(by, "u32", lanes))
    machine.write(to, shifted(a, b), lanes)


def _funnel(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    """shf: 32 of the 64 bits of two registers, shifted."""
    to, low, high, by = statement.operands
    assert "wrap" in statement.opcode
    both = machine.read(high, "u32", lanes).astype(np.uint64) << np.uint64(32) | machine.read(low, "u32", lanes)
    amount = machine.read(by, "u32", lanes).astype(np.uint64) & np.uint64(31)
    shifted = both << amount >> np.uint64(32) if statement.opcode[1] == "l" else both >> amount
    machine.write(to, np.asarray(shifted).astype(np.uint32), lanes)


def _multiply(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    """mul and mad of integers: the low half, the high half, or the wide product."""
    operation, part, kind = statement.opcode[0], statement.opcode[1], statement.opcode[-1]
    if kind[0] == "f" or kind.startswith("bf16"):
        _binary(machine, statement, lanes)
        return
    to, a, b, *c = statement.operands
    a, b = machine.read(a, kind, lanes), machine.read(b, kind, lanes)
    bits = 8 * a.dtype.itemsize
    if part == "lo":
        product = a * b
    elif bits == 64:
        exact = a.astype(object) * b.astype(object)
        product = np.array(exact >> 64, dtype=object).astype(a.dtype)
    else:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        product = a.astype(wide) * b.astype(wide)
        product = (product >> wide.type(bits)).astype(a.dtype) if part == "hi" else product
    if operation == "mad":
        product = product + machine.read(c[0], f"{kind[0]}{8 * product.dtype.itemsize}", lanes)
    machine.write(to, product, lanes)


def _fused(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    to, *operands = statement.operands
    _elementwise(machine, to, operands, statement.opcode[-1], _fma, lanes)


def _div(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    to, *operands = statement.operands
    kind = statement.opcode[-1]
    a, b = (machine.read(o, kind, lanes) for o in operands)
    machine.write(to, a / b if kind[0] == "f" else _divide(a, b), lanes)


def _extract(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    """bfe: some bits of a number."""
    to, value, start, length = statement.operands
    kind = statement.opcode[-1]
    a = machine.read(value, kind, lanes)
    bits = 8 * a.dtype.itemsize
    assert isinstance(start, Immediate) and isinstance(length, Immediate) and start.bits + length.bits <= bits
    up = a.dtype.type(bits - start.bits - length.bits)
    machine.write(to, (a << up) >> a.dtype.type(bits - length.bits), lanes)


def _permute(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    """prmt: four of the eight bytes of two registers."""
    to, low, high, selector = statement.operands
    choices = machine.read(selector, "u32", lanes).astype(np.uint64)
    both = machine.read(high, "u32", lanes).astype(np.uint64) << np.uint64(32) | machine.read(low, "u32", lanes)
    result = np.uint64(0)
    for i in range(4):
        choice = choices >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> np.uint64(8) * (choice & np.uint64(7)) & np.uint64(255)
        byte = np.where(choice & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
        result = result | byte << np.uint64(8 * i)
    machine.write(to, np.asarray(result).astype(np.uint32), lanes)


def _select(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    to, a, b, chooser = statement.operands
    kind = statement.opcode[-1]
    values = machine.read(a, kind, lanes), machine.read(b, kind, lanes)
    machine.write(to, np.where(machine.read(chooser, "pred", lanes), *values), lanes)


def _compare(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    comparison, kind = statement.opcode[1], statement.opcode[-1]
    to, a, b, *combined = statement.operands
    assert isinstance(to, str)
    if kind.endswith("x2"):
        for name, shift in zip(to.split("|"), (0, 16), strict=True):
            both = ((machine.read(o, "u32", lanes) >> np.uint32(shift)).astype(np.uint16) for o in (a, b))
            machine.write(name, COMPARE[comparison](*(ptx_matrix.halves(bits, kind[:-2]) for bits in both)), lanes)
        return
    result = COMPARE[comparison](machine.read(a, kind, lanes), machine.read(b, kind, lanes))
    if combined:
        result = BINARY[statement.opcode[2]](result, machine.read(combined[0], "pred", lanes))
    machine.write(to, result, lanes)


def _convert(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    modes, (target, source) = statement.opcode[1:-2], statement.opcode[-2:]
    to, *operands = statement.operands
    values = [machine.read(o, source, lanes) for o in operands]
    if target in ("f16x2", "bf16x2"):
        high, low = (_to_16_bits(v, target[:-2]).astype(np.uint32) for v in values)
        machine.write(to, high << np.uint32(16) | low, lanes)
        return
    (value,) = values
    if target == "bf16":
        value = round_to_bf16(value)
    elif source[0] == "f" or source == "bf16":
        value = _rounded(value, modes, target)
    else:
        value = value.astype(DTYPES[target])
    machine.write(to, value, lanes)


def _rounded(value: Any, modes: tuple[str, ...], target: str) -> Any:
    for mode, rounding in {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}.items():
        if mode in modes:
            value = rounding(value)
    if target[0] == "f":
        return value.astype(DTYPES[target])
    limits = np.iinfo(DTYPES[target])
    inside = np.clip(np.nan_to_num(value.astype(np.float64)), float(limits.min), np.nextafter(float(limits.max), 0))
    return inside.astype(DTYPES[target])


def _load(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    to, address = statement.operands
    assert isinstance(address, Address)
    where = next(part for part in statement.opcode if part in ("param", "global", "shared"))
    names = to.parts if isinstance(to, Vector) else (to,)
    kind = statement.opcode[-1]
    for name, values in zip(names, machine.load(where, address, kind, len(names), lanes), strict=True):
        machine.write(name, values.view(DTYPES[kind]) if kind[0] == "s" else values, lanes)


def _store(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    address, value = statement.operands
    assert isinstance(address, Address)
    where = next(part for part in statement.opcode if part in ("global", "shared"))
    kind = statement.opcode[-1].replace("f", "b")
    parts = value.parts if isinstance(value, Vector) else (value,)
    machine.store(where, address, kind, [machine.read(part, kind, lanes) for part in parts], lanes)


def _atomic(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    """One lane after the other."""
    to, address, *operands = statement.operands
    assert isinstance(address, Address)
    operation, kind = statement.opcode[-2], statement.opcode[-1]
    for lane in machine.every(lanes):
        one = np.array([lane])
        old = machine.load("global", address, kind.replace("s", "u"), 1, one)[0].view(DTYPES[kind.replace("b", "u")])
        values = [machine.read(o, kind, one) for o in operands]
        if operation == "cas":
            new = np.where(old == values[0], values[1], old)
        else:
            new = values[0] if operation == "exch" else BINARY[operation](old, values[0])
        machine.store("global", address, kind, [np.broadcast_to(new, 1)], one)
        machine.write(to, old, one)


def _copy_async(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    """cp.async: bytes from global to shared memory, and zeros behind those that are wanted."""
    if statement.opcode[2] not in ("ca", "cg"):
        return
    to, source, size, *wanted = statement.operands
    assert isinstance(to, Address) and isinstance(source, Address) and isinstance(size, Immediate)
    every = machine.every(lanes)
    amount = np.broadcast_to(machine.read(wanted[0], "u32", lanes) if wanted else size.bits, every.shape)
    assert np.isin(amount, (0, size.bits)).all(), "part of a copy"
    words = size.bits // 4
    full, none = every[amount == size.bits], every[amount == 0]
    if len(full):
        machine.store("shared", to, "b32", machine.load("global", source, "b32", words, full), full)
    if len(none):
        machine.store("shared", to, "b32", [np.zeros(len(none), np.uint32)] * words, none)


def _warps(machine: Machine, lanes: Lanes) -> np.ndarray:
    """The lanes by warps; all of a warp have to take part."""
    warps = machine.every(lanes).reshape(-1, WARP)
    assert (warps == warps[:, :1] + np.arange(WARP)).all() and not (warps[:, 0] % WARP).any(), "part of a warp"
    return warps


def _shuffle(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    to, value, by, *_ = statement.operands
    assert isinstance(to, str)
    warps = _warps(machine, lanes)
    values = machine.read(value, "u32", warps.ravel()).reshape(warps.shape)
    by = np.broadcast_to(machine.read(by, "u32", warps.ravel()), warps.size).reshape(warps.shape)
    me = np.arange(WARP, dtype=np.uint32)
    source = {"bfly": lambda: me ^ by, "idx": lambda: by % WARP, "up": lambda: me - by, "down": lambda: me + by}
    chosen = source[statement.opcode[2]]()
    outside = chosen >= WARP
    taken = np.take_along_axis(values, np.where(outside, me, chosen).astype(np.int64), 1)
    machine.write(to.split("|")[0], taken.ravel(), warps.ravel())


def _reduce(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    """redux: over a warp."""
    to, value, _ = statement.operands
    warps = _warps(machine, lanes)
    kind = statement.opcode[-1]
    values = machine.read(value, kind, warps.ravel()).reshape(warps.shape)
    operation = {"add": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or, "and": np.bitwise_and}
    total = operation[statement.opcode[2]].reduce(values, axis=1, keepdims=True, dtype=values.dtype)
    machine.write(to, np.broadcast_to(total, warps.shape).ravel(), warps.ravel())


def _matrix(execute: Callable[[Machine, Statement, np.ndarray], None]) -> Execute:
    return lambda machine, statement, lanes: execute(machine, statement, _warps(machine, lanes))


def _wgmma(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    if statement.opcode[1] == "mma_async":
        ptx_matrix.multiply_group(machine, statement, _warps(machine, lanes))


def _nothing(machine: Machine, statement: Statement, lanes: Lanes) -> None:
    """Order and waiting, where everything happens in order."""


INSTRUCTIONS: dict[str, Execute] = {
    **dict.fromkeys(BINARY, _binary),
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("mul", "mad"), _multiply),
    **dict.fromkeys(("bar", "membar", "fence"), _nothing),
    "mov": _move,
    "fma": _fused,
    "div": _div,
    "shf": _funnel,
    "bfe": _extract,
    "prmt": _permute,
    "selp": _select,
    "setp": _compare,
    "cvt": _convert,
    "ld": _load,
    "st": _store,
    "atom": _atomic,
    "cp": _copy_async,
    "shfl": _shuffle,
    "redux": _reduce,
    "ldmatrix": _matrix(ptx_matrix.load),
    "stmatrix": _matrix(ptx_matrix.store),
    "mma": _matrix(ptx_matrix.multiply),
    "wgmma": _wgmma,
}
