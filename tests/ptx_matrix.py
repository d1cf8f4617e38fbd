"""Instructions on matrices that the threads of a warp, or of four, hold together (PTX ISA 8.7, 9.7.14 and 9.7.15)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .ptx import DTYPES, Address, Immediate, Operand, Statement, Vector

if TYPE_CHECKING:
    from .ptx_machine import Machine

LANE = np.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4  # of a lane in an 8x4 arrangement
TF32 = np.uint32(0xFFFFE000)  # the bits that count


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _registers(machine: Machine, operand: Operand, warps: np.ndarray, kind: str = "u32") -> np.ndarray:
    """[registers, warps, 32]"""
    return np.stack([machine.read(part, kind, warps.ravel()).reshape(warps.shape) for part in _parts(operand)])


def _fragments(machine: Machine, operand: Operand, warps: np.ndarray, kind: str) -> np.ndarray:
    """[registers, warps, 32, elements of a register], in fp64."""
    if kind == "f64":
        return _registers(machine, operand, warps, "f64")[..., None]
    return _elements(_registers(machine, operand, warps), kind)


def _elements(registers: np.ndarray, kind: str) -> np.ndarray:
    """[..., elements of a register], in fp64."""
    if kind == "tf32":
        return (registers & TF32).view(np.float32).astype(np.float64)[..., None]
    both = np.stack([registers & np.uint32(0xFFFF), registers >> np.uint32(16)], -1).astype(np.uint16)
    return halves(both, kind)


def halves(bits: np.ndarray, kind: str) -> np.ndarray:
    """bf16 or fp16 of 16 bits each, in fp64."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    assert kind == "f16", kind
    return bits.view(np.float16).astype(np.float64)


def _left(elements: np.ndarray) -> np.ndarray:
    """A [warps, 16, k] from its fragments: registers go over both halves of the rows, then along the columns."""
    count, warps, _, each = elements.shape
    matrix = np.empty((warps, 16, 4 * each * count // 2))
    for i in range(count):
        for e in range(each):
            matrix[:, ROW + 8 * (i % 2), 4 * each * (i // 2) + COLUMN * each + e] = elements[i, :, :, e]
    return matrix


def multiply(machine: Machine, statement: Statement, warps: np.ndarray) -> None:
    """mma.m16n8k*: D = A B + C."""
    kind = statement.opcode[-2]
    to, a, b, c = statement.operands
    left = _left(_fragments(machine, a, warps, kind))
    elements = _fragments(machine, b, warps, kind)
    count, _, _, each = elements.shape
    right = np.empty((len(warps), left.shape[2], 8))
    for i in range(count):
        for e in range(each):
            right[:, 4 * each * i + COLUMN * each + e, ROW] = elements[i, :, :, e]
    _accumulate(machine, to, c, left @ right, warps, statement.opcode[-1])


def _accumulate(
    machine: Machine, to: Operand, sums: Operand | None, product: np.ndarray, warps: np.ndarray, kind: str = "f32"
) -> None:
    """Registers of `to` = product [warps, 16, n] + those of `sums`: four for every eight columns."""
    old = _registers(machine, sums, warps, kind) if sums is not None else None
    for i, name in enumerate(_parts(to)):
        values = product[:, ROW + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * COLUMN + i % 2]
        values = values if old is None else values + old[i]
        machine.write(name, values.astype(DTYPES[kind]).ravel(), warps.ravel())


def _rows(machine: Machine, address: Operand, warps: np.ndarray, matrices: int) -> np.ndarray:
    """Places in the shared memory of the rows, 16 bytes each: [matrices, warps, 8]. Eight lanes name those of one."""
    assert isinstance(address, Address)
    addresses = machine.addresses(address, warps.ravel(), "u32").reshape(warps.shape)[:, : 8 * matrices]
    if (addresses % 16).any():
        raise ValueError("a row is not aligned to 16 bytes")
    if (addresses.astype(np.int64) + 16 > machine.shared_bytes).any():
        raise IndexError("outside of the shared memory")
    places = addresses.astype(np.int64) + machine.shared_base[warps[:, : 8 * matrices]]
    return places.reshape(len(warps), matrices, 8).swapaxes(0, 1)


def _matrices(statement: Statement) -> int:
    return next(int(part[1:]) for part in statement.opcode if re.fullmatch(r"x\d", part))


def load(machine: Machine, statement: Statement, warps: np.ndarray) -> None:
    """ldmatrix: 8x8 matrices of 16 bits, two elements of a row (with `trans` of a column) to a lane."""
    to, address = statement.operands
    rows = _rows(machine, address, warps, _matrices(statement))
    memory = machine.shared.view(np.uint16)
    for name, starts in zip(_parts(to), rows, strict=True):
        matrix = memory[(starts // 2)[..., None] + np.arange(8)]  # [warps, 8, 8]
        matrix = matrix.swapaxes(1, 2) if "trans" in statement.opcode else matrix
        low, high = (matrix[:, ROW, 2 * COLUMN + e].astype(np.uint32) for e in range(2))
        machine.write(name, (low | high << np.uint32(16)).ravel(), warps.ravel())


def store(machine: Machine, statement: Statement, warps: np.ndarray) -> None:
    """stmatrix: the way back."""
    address, value = statement.operands
    rows = _rows(machine, address, warps, _matrices(statement))
    memory = machine.shared.view(np.uint16)
    for registers, starts in zip(_registers(machine, value, warps), rows, strict=True):
        matrix = np.empty((len(warps), 8, 8), np.uint16)
        for e in range(2):
            matrix[:, ROW, 2 * COLUMN + e] = registers >> np.uint32(16 * e) & np.uint32(0xFFFF)
        matrix = matrix.swapaxes(1, 2) if "trans" in statement.opcode else matrix
        memory[(starts // 2)[..., None] + np.arange(8)] = matrix


def multiply_group(machine: Machine, statement: Statement, warps: np.ndarray) -> None:
    """wgmma.m64n*k*: D = A B + D of four warps, B and maybe A in shared memory."""
    shape = re.search(r"\.m64n(\d+)k(\d+)\.", statement.text)
    assert shape, statement.text
    columns, depth = int(shape[1]), int(shape[2])
    kind = statement.opcode[-1]
    to, a, b, kept, *rest = statement.operands
    scales = [each.bits for each in rest if isinstance(each, Immediate)]
    assert len(scales) == len(rest) and scales[:2] == [1, 1], "scaled operands"
    turned = scales[2:]
    groups = warps.reshape(-1, 4, 32)
    assert (groups[:, 1:, 0] == groups[:, :1, 0] + 32 * np.arange(1, 4)).all(), "part of a group of warps"
    if isinstance(a, Vector):
        left = _left(_fragments(machine, a, warps, kind)).reshape(len(groups), 64, depth)
        turned = [0, *turned]
    else:
        left = _described(machine, a, groups, 64, depth, kind, bool(turned[0]) if turned else False)
    right = _described(machine, b, groups, columns, depth, kind, bool(turned[1]) if len(turned) > 1 else False)
    product = (left @ right.swapaxes(1, 2)).reshape(len(warps), 16, columns)
    keeps = np.asarray(machine.read(kept, "pred", warps.ravel()))
    assert keeps.all() or not keeps.any()
    _accumulate(machine, to, to if keeps.all() else None, product, warps)


def _described(
    machine: Machine, operand: Operand, groups: np.ndarray, rows: int, depth: int, kind: str, turned: bool
) -> np.ndarray:
    """[groups, rows, depth] as a matrix descriptor says: its start, both strides, and how 16-byte parts are swapped.

    The sum runs along a line of the memory (of 128, 64 or 32 bytes), or if `turned` across lines.
    """
    descriptors = np.broadcast_to(machine.read(operand, "u64", groups[:, 0, 0]), len(groups))
    size = 4 if kind == "tf32" else 2
    matrices = []
    for descriptor, base in zip(descriptors, machine.shared_base[groups[:, 0, 0]], strict=True):
        bits = int(descriptor)
        start, leading, stride = ((bits >> at & 0x3FFF) * 16 for at in (0, 16, 32))
        assert bits >> 49 & 7 == 0, "a base offset"
        swizzle = {1: 3, 2: 2, 3: 1}[bits >> 62 & 3]  # bits of an address that are swapped
        line = 16 << swizzle  # bytes
        row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
        if turned:
            each = line // size
            linear = row // each * leading + row % each * size + k // 8 * stride + k % 8 * line
        else:
            linear = row // 8 * stride + row % 8 * line + k * size
        linear = linear + start
        places = linear ^ (linear >> 7 & (1 << swizzle) - 1) << 4
        if (places + size > machine.shared_bytes).any():
            raise IndexError("a matrix outside of the shared memory")
        places = (places + base) // size
        if size == 4:
            found: Any = (machine.shared.view(np.uint32)[places] & TF32).view(np.float32).astype(np.float64)
        else:
            found = halves(machine.shared.view(np.uint16)[places], kind)
        matrices.append(found)
    return np.stack(matrices)
