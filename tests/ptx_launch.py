"""Within `emulated`, ops on CPU tensors run what Triton compiles for an H100, in `ptx_machine`.

Triton must not interpret, so this is for a process of its own: see test_ptx.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from backstride.bench import host
from backstride.fused_ops import dispatch
from backstride.fused_ops.conv import ops as conv_ops
from backstride.fused_ops.rnn import ops as rnn_ops

from .ptx import Program, parse
from .ptx_machine import Machine, Memory

LANES = 1 << 14  # threads that are executed together
WAITS = ("ld.acquire", "ld.volatile")  # programs that wait for each other have to take turns


@cache
def _program(path: str) -> tuple[Program, bool]:
    text = Path(path).read_text()
    return parse(text), any(word in text for word in WAITS)


class _EmulatingDriver(host._Driver):
    """Launches run in `ptx_machine`."""

    paths: dict[str, str] = {}  # of the PTX, by Triton's hash

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        names = source.fn.arg_names
        at_run_time = [i for i, name in enumerate(names) if source.signature.get(name) != "constexpr"]

        def launch(grid_x: int, grid_y: int, grid_z: int, *rest: Any) -> None:
            arguments = rest[len(rest) - len(names) :]
            grid = (grid_x, grid_y, grid_z)
            path = _EmulatingDriver.paths[metadata.hash]
            run(path, grid, 32 * metadata.num_warps, metadata.shared, [arguments[i] for i in at_run_time])

        return launch


def _bits(argument: Any) -> int:
    """Of a tensor its address; a float is one of 32 bits."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return int(np.float32(argument).view(np.uint32)) if isinstance(argument, float) else argument or 0


def run(path: str, grid: tuple[int, int, int], threads: int, shared: int, arguments: list[Any]) -> None:
    """Execute all programs of a grid."""
    program, waits = _program(path)
    memory = Memory([a for a in arguments if isinstance(a, torch.Tensor)])
    values = [_bits(a) for a in arguments]
    # Behind the kernel's own arguments come Triton's scratch buffers, of which none is used.
    values += [0] * (len(program.parameters) - len(values))
    parameters = {
        name: np.array(value & ((1 << width) - 1), f"u{width // 8}")
        for (name, width), value in zip(program.parameters.items(), values, strict=True)
    }
    programs = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid, order="F"), 1)  # x fastest
    at_once = 1 if waits else max(1, LANES // threads)
    machines = (
        Machine(program, grid, programs[i : i + at_once], threads, shared, parameters, memory)
        for i in range(0, len(programs), at_once)
    )
    with np.errstate(all="ignore"):
        if not waits:
            for machine in machines:
                machine.run()
            return
        running = [machine.steps() for machine in machines]
        while running:
            running = [steps for steps in running if next(steps, StopIteration) is not StopIteration]


@contextmanager
def emulated() -> Iterator[None]:
    """RuntimeError where Triton interprets."""
    paths = _EmulatingDriver.paths
    with ExitStack() as stack:
        stack.enter_context(host.noting_loads(lambda files, hash: paths.update({hash: str(files[".ptx"])})))
        stack.enter_context(mock.patch.object(host, "_Driver", _EmulatingDriver))
        stack.enter_context(host.stubbed_launch())
        for ops in (conv_ops, rnn_ops):  # torch's own results on the CPU, which are compared, have no TF32
            stack.enter_context(mock.patch.object(ops, "uses_tf32", lambda x, switch: False))
        fp64 = dispatch.ON_INTERPRETER.pop(torch.float64)
        stack.callback(dispatch.ON_INTERPRETER.__setitem__, torch.float64, fp64)
        yield
