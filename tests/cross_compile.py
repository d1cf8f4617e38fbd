"""Compile a Triton kernel for a GPU that isn't there, and read what the compiler reports about it.

`compile_case` needs no GPU: it gives the registers, spills, shared memory and tensor-core instructions of one kernel,
configuration and target. Triton interprets or compiles as TRITON_INTERPRET says when it is imported, so this module
runs in a process of its own: `python -m tests.cross_compile` prints the table of all shipped kernels as CSV.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch


class Target(NamedTuple):
    """A GPU to compile for."""

    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int  # bytes that one program can have (CUDA programming guide, compute capabilities; CDNA3's LDS)
    matrix_instruction: str  # what a 16-bit product of full tiles has to use


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, "mma.sync"),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, "wgmma"),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, "tcgen05.mma"),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, "mfma"),
}

OPTIONS = ("num_warps", "num_stages", "launch_cooperative_grid")
BLOCKS = ("BLOCK_M", "BLOCK_B", "BLOCK_N", "BLOCK_K", "BLOCK", "ROWS", "COLS", "U")
# fp16 compiles to the same code as bf16 but for the instructions' types.
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
POINTER = {"bf16": "*bf16", "tf32": "*fp32", "fp32": "*fp32"}
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync", "mfma")


class Case(NamedTuple):
    """A kernel as it would be launched.

    `signature` names the type of every run-time argument ("*fp16", "i32"); `constants` holds the constexpr arguments,
    run-time arguments fixed to a value, and launch options.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    name: str
    dtype: str  # a key of DTYPES


@dataclass(frozen=True)
class Compiled:
    """What one compilation came to."""

    target: str
    kernel: str
    case: str
    dtype: str
    tile: str
    registers: int
    spills: int
    shared: int
    matrix_instruction: str


def _resource_usage(compiled: Any, backend: str) -> tuple[int, int]:
    """Registers of a thread and bytes spilled by it, as the assembler wrote them into the binary."""
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
        spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
        assert registers and spills, "no register count in the AMD assembly"
        return int(registers.group(1)), int(spills.group(1))
    import triton

    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", report.stdout + report.stderr)
    assert found, f"no resource usage in: {report.stdout}{report.stderr}"
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _matrix_instruction(compiled: Any) -> str:
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return next((name for name in MATRIX_INSTRUCTIONS if name in text), "")


def build(case: Case, target: str) -> Any:
    """Triton's compiled kernel for `target` (a key of TARGETS). Pointers are 16-byte aligned, as torch makes them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp, *_ = TARGETS[target]
    kernel, constants = case.kernel, dict(case.constants)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    types = {name: "constexpr" if name in constants else case.signature[name] for name in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types[name].startswith("*")
    }
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)


def compile_case(case: Case, target: str) -> Compiled:
    """What `build` came to, as a row of the table."""
    compiled, constants = build(case, target), case.constants
    registers, spills = _resource_usage(compiled, TARGETS[target].backend)
    blocks = [str(constants[name]) for name in BLOCKS if name in constants]
    return Compiled(
        target,
        case.kernel.__name__,
        case.name,
        case.dtype,
        f"{'x'.join(blocks)} w{constants['num_warps']} s{constants['num_stages']}",
        registers,
        spills,
        compiled.metadata.shared,
        _matrix_instruction(compiled),
    )


def write_table(rows: list[Compiled], file: TextIO) -> None:
    writer = csv.DictWriter(file, [field.name for field in fields(Compiled)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def compile_all(targets: list[str]) -> list[Compiled]:
    """One row for every distinct compilation, per target."""
    from . import cross_compile_conv, cross_compile_depthwise, cross_compile_pool, cross_compile_rnn

    rows: dict[tuple[str, ...], Compiled] = {}
    for target in targets:
        for family in (cross_compile_conv, cross_compile_depthwise, cross_compile_pool, cross_compile_rnn):
            for case in family.cases(TARGETS[target]):
                row = compile_case(case, target)
                rows[(target, row.kernel, row.case, row.dtype)] = row
    return list(rows.values())


if __name__ == "__main__":
    write_table(compile_all(sys.argv[1:] or list(TARGETS)), sys.stdout)
