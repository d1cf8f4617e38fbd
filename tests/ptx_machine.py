"""Executes PTX on the CPU: all threads of some programs at once, an instruction at a time.

What Triton's interpreter can't show is looked at here: the code that a GPU would run, with the layouts, the wide loads
and the inline assembly that the compiler made of a kernel and of its hints. A load or store that is not aligned to its
width, or that leaves the tensors of the launch, is an error. Instructions take effect in order and at once, so what a
GPU could reorder is not found, and `wait` and `fence` have nothing to do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from .ptx import DTYPES, UNSIGNED, Address, Immediate, Operand, Program, Statement
from .ptx_instructions import INSTRUCTIONS

Lanes = np.ndarray | None  # indices of the threads that take part; None for all


class Memory:
    """The bytes of the launch's tensors, at their own addresses."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        spans = []
        for tensor in tensors:
            if tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
        merged: list[list[int]] = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self.starts = np.array([start for start, _ in merged], np.uint64)
        self.ends = np.array([end for _, end in merged], np.uint64)
        self.bases = [start // 16 * 16 for start, _ in merged]
        self.bytes = [
            np.frombuffer((ctypes.c_uint8 * (end - base)).from_address(base), np.uint8)
            for base, (_, end) in zip(self.bases, merged, strict=True)
        ]

    def places(self, addresses: np.ndarray, size: int) -> Iterator[tuple[np.ndarray | slice, int, np.ndarray]]:
        """The lanes whose addresses lie in one span, the span, and where in it."""
        span = np.searchsorted(self.starts, addresses, "right").astype(np.int64) - 1
        if (span < 0).any() or (addresses + np.uint64(size) > self.ends[span]).any():
            raise IndexError("outside of the tensors of this launch")
        for index in np.unique(span):
            lanes = np.flatnonzero(span == index)
            yield lanes, index, (addresses[lanes] - np.uint64(self.bases[index])).astype(np.int64)


class Machine:
    """Some programs of a grid (x, y, z of each), with `threads` threads each."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        programs: np.ndarray,
        threads: int,
        shared: int,
        parameters: dict[str, np.ndarray],
        memory: Memory,
    ) -> None:
        self.program, self.memory, self.parameters, self.threads = program, memory, parameters, threads
        self.lanes = len(programs) * threads
        self.registers = {name: np.zeros(self.lanes, UNSIGNED[width]) for name, width in program.registers.items()}
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(programs))
        self.registers |= {"%tid.x": thread, "%laneid": thread % np.uint32(32)}
        for axis, name in enumerate("xyz"):
            self.registers[f"%ctaid.{name}"] = np.repeat(programs[:, axis].astype(np.uint32), threads)
            self.registers[f"%nctaid.{name}"] = np.full(self.lanes, grid[axis], np.uint32)
        self.shared_bytes = -(-max(shared, 16) // 16) * 16
        # NaN in every type, since nobody has written there.
        self.shared = np.full(len(programs) * self.shared_bytes, 0xFF, np.uint8)
        self.shared_base = np.repeat(np.arange(len(programs)) * self.shared_bytes, threads)
        self.at = np.zeros(self.lanes, np.int64)  # each thread's next statement
        self.waiting = np.zeros(self.lanes, bool)  # at a barrier
        self.joins = set(program.labels.values())
        self.code = [self._bind(statement) for statement in program.statements]

    def run(self) -> None:
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """Execute to the end, with a pause after each jump backwards, when other programs may go on."""
        while (here := self._next()) is not None:
            standing = ~self.waiting & (self.at == here)
            if self._go_on(here, None if standing.all() else np.flatnonzero(standing)):
                yield

    def _next(self) -> int | None:
        """The first statement at which a thread stands, so that those who are behind catch up; None at the end."""
        ready = ~self.waiting & (self.at < len(self.code))
        if not ready.any():
            if not self.waiting.any():
                return None
            # All who have not returned stand at a barrier.
            ready = self.waiting.copy()
            self._pass_barrier(np.flatnonzero(ready))
        return int(self.at[ready].min())

    def _pass_barrier(self, lanes: np.ndarray) -> None:
        self.at[lanes] += 1
        self.waiting[lanes] = False

    def _go_on(self, here: int, lanes: Lanes) -> bool:
        """Execute from here to where the threads may part or meet others; whether that is a jump backwards."""
        movers = self.every(lanes)
        while True:
            statement = self.program.statements[here]
            kind = statement.opcode[0]
            if kind in ("bra", "ret", "exit"):
                target = self.program.labels[str(statement.operands[0])] if kind == "bra" else len(self.code)
                leavers = self._guarded(statement, lanes)
                self.at[movers] = here + 1
                self.at[movers if leavers is None else leavers] = target
                return target <= here
            if statement.opcode[:2] == ("bar", "sync") and lanes is not None:
                self._wait(here, lanes)
                return False
            try:
                self.code[here](lanes)
            except Exception as error:
                raise RuntimeError(f"{self.program.name}: {statement.text}: {error}") from error
            here += 1
            if lanes is not None and here in self.joins:
                self.at[lanes] = here
                return False

    def _wait(self, here: int, lanes: np.ndarray) -> None:
        """At a barrier, until all of a program's threads are there that have not returned."""
        self.at[lanes] = here
        self.waiting[lanes] = True
        there = (self.waiting | (self.at >= len(self.code))).reshape(-1, self.threads).all(axis=1)
        self._pass_barrier(np.flatnonzero(self.waiting & np.repeat(there, self.threads)))

    def every(self, lanes: Lanes) -> np.ndarray:
        """The lanes as indices, all of them too."""
        return np.arange(self.lanes) if lanes is None else lanes

    def _guarded(self, statement: Statement, lanes: Lanes) -> Lanes:
        """Of these lanes those whose predicate lets them."""
        if not statement.guard:
            return lanes
        holds = self.registers[statement.guard]
        holds = holds if lanes is None else holds[lanes]
        holds = ~holds if statement.negated else holds
        if holds.all():
            return lanes
        return np.flatnonzero(holds) if lanes is None else lanes[holds]

    def read(self, operand: Operand, kind: str, lanes: Lanes) -> Any:
        """The operand in each lane, as this type; bf16 as fp32."""
        if kind == "bf16":
            return (self.read(operand, "u16", lanes).astype(np.uint32) << np.uint32(16)).view(np.float32)
        dtype = DTYPES[kind]
        if isinstance(operand, Immediate):
            if kind == "pred":
                return np.bool_(operand.bits & 1)
            bits = operand.bits & ((1 << 8 * dtype.itemsize) - 1)
            return np.array([bits], f"u{dtype.itemsize}").view(dtype)[0]
        assert isinstance(operand, str), operand
        if operand == "global_smem":
            return dtype.type(0)
        values = self.registers[operand]
        values = values if lanes is None else values[lanes]
        if values.dtype == bool:
            return values
        return values.astype(f"u{dtype.itemsize}", copy=False).view(dtype)

    def write(self, operand: Operand, values: Any, lanes: Lanes) -> None:
        """Set a register: signed numbers are extended by their sign, all others by zeros."""
        assert isinstance(operand, str), operand
        if operand == "_":
            return
        register = self.registers[operand]
        values = np.asarray(values)
        if values.dtype.kind == "f" and values.dtype.itemsize != register.dtype.itemsize:
            raise TypeError(f"{values.dtype} for a register of {8 * register.dtype.itemsize} bits")
        if register.dtype != bool and values.dtype.kind not in "iu":
            values = values.view(f"u{values.dtype.itemsize}")
        if register.dtype != bool:
            values = values.astype(register.dtype)
        if lanes is None:
            register[:] = values
        else:
            register[lanes] = values

    def addresses(self, operand: Address, lanes: Lanes, kind: str) -> np.ndarray:
        base = self.read(operand.base, kind, lanes)
        return np.broadcast_to(base + np.array(operand.offset).astype(base.dtype), self.every(lanes).shape)

    def load(self, where: str, operand: Address, kind: str, count: int, lanes: Lanes) -> list[np.ndarray]:
        dtype = np.dtype(f"u{DTYPES[kind].itemsize}")
        if where == "param":
            return [np.broadcast_to(self.parameters[operand.base].astype(dtype), self.every(lanes).shape)]
        size = dtype.itemsize * count
        addresses = self.addresses(operand, lanes, "u64" if where == "global" else "u32")
        self._check_alignment(addresses, size)
        found = [np.empty(len(addresses), dtype) for _ in range(count)]
        for chosen, memory, places in self._places(where, addresses, size, lanes):
            elements = memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)
            for i in range(count):
                found[i][chosen] = elements[places // dtype.itemsize + i]
        return found

    def store(self, where: str, operand: Address, kind: str, values: list[np.ndarray], lanes: Lanes) -> None:
        dtype = np.dtype(f"u{DTYPES[kind].itemsize}")
        size = dtype.itemsize * len(values)
        addresses = self.addresses(operand, lanes, "u64" if where == "global" else "u32")
        self._check_alignment(addresses, size)
        for chosen, memory, places in self._places(where, addresses, size, lanes):
            elements = memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)
            for i, value in enumerate(values):
                elements[places // dtype.itemsize + i] = np.broadcast_to(value, addresses.shape)[chosen].view(dtype)

    @staticmethod
    def _check_alignment(addresses: np.ndarray, size: int) -> None:
        if (addresses % addresses.dtype.type(size)).any():
            raise ValueError(f"an address is no multiple of {size} bytes")

    def _places(self, where: str, addresses: np.ndarray, size: int, lanes: Lanes):
        if where == "global":
            for chosen, span, places in self.memory.places(addresses, size):
                yield chosen, self.memory.bytes[span], places
            return
        places = addresses.astype(np.int64)
        if (places + size > self.shared_bytes).any():
            raise IndexError("outside of the shared memory")
        yield slice(None), self.shared, places + (self.shared_base if lanes is None else self.shared_base[lanes])

    def _bind(self, statement: Statement) -> Callable[[Lanes], None]:
        execute = INSTRUCTIONS.get(statement.opcode[0])
        if execute is None:

            def unknown(lanes: Lanes) -> None:
                raise NotImplementedError("no such instruction here")

            return unknown

        def run(lanes: Lanes) -> None:
            chosen = self._guarded(statement, lanes)
            if chosen is None or len(chosen):
                execute(self, statement, chosen)

        return run
