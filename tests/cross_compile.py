"""Compile a Triton kernel for a GPU that isn't there, and read what the compiler reports about it.

`Compilation.run` needs no GPU: it gives the registers, spills, shared memory and tensor-core instructions of one
kernel, configuration and target, and the length of its main loop. Triton interprets or compiles as TRITON_INTERPRET
says when it is imported, so this module runs in a process of its own. For the shipped kernels and the Triton that is
installed:

    TRITON_INTERPRET=0 python -m tests.cross_compile sm_90            the table of one target as CSV
    TRITON_INTERPRET=0 python -m tests.cross_compile --write          the committed table of all targets, written anew
    ... --all                                                         trusting no row of the committed table

A thousand compilations take many minutes, and what Triton makes of the same source, constants and target does not
change. So a row of the committed table is taken over where its `key`, a hash of exactly these, is still right. Of each
kernel one row is compiled all the same, for one of the targets: the one with the most registers there.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from backstride.bench.machine_code import AMD, NVIDIA, disassembled, longest_loop, registers_and_spills


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

OPTIONS = ("num_warps", "num_stages", "launch_cooperative_grid", "maxnreg")
BLOCKS = ("BLOCK_M", "BLOCK_B", "BLOCK_N", "BLOCK_K", "BLOCK", "BLOCK_C", "BLOCK_P", "LANES", "ROWS", "COLS", "U")
# fp16 compiles to the same code as bf16 but for the instructions' types.
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
POINTER = {"bf16": "*bf16", "tf32": "*fp32", "fp32": "*fp32"}
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync", "mfma")
RESULTS = Path(__file__).parents[1] / "bench" / "results"


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
    loop: int  # instructions in the longest innermost loop
    key: str  # of all that the compilation depends on


def _registers_and_spills(compiled: Any, backend: str) -> tuple[int, int]:
    if backend != "hip":
        return registers_and_spills(compiled.asm["cubin"])
    text = compiled.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    assert registers and spills, "no register count in the AMD assembly"
    return int(registers.group(1)), int(spills.group(1))


def _loop_length(compiled: Any, backend: str) -> int:
    """Instructions in the longest innermost loop."""
    if backend == "hip":
        return len(longest_loop(compiled.asm["amdgcn"], AMD))
    return len(longest_loop(disassembled(compiled.asm["cubin"]), NVIDIA))


def _matrix_instruction(compiled: Any) -> str:
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return next((name for name in MATRIX_INSTRUCTIONS if name in text), "")


class Compilation:
    """One case for one target (a key of TARGETS). Pointers are 16-byte aligned, as torch's allocator makes them."""

    def __init__(self, case: Case, target: str) -> None:
        import triton
        from triton.compiler import ASTSource

        self.case, self.target = case, target
        kernel, constants = case.kernel, dict(case.constants)
        self.options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        types = {name: "constexpr" if name in constants else case.signature[name] for name in kernel.arg_names}
        attributes = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(kernel.arg_names)
            if types[name].startswith("*")
        }
        self.source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
        depends = (triton.__version__, TARGETS[target], self.source.hash(), sorted(self.options.items()))
        self.key = hashlib.sha256(repr(depends).encode()).hexdigest()[:12]

    def compile(self) -> Any:
        """Triton's compiled kernel."""
        import triton
        from triton.backends.compiler import GPUTarget

        backend, arch, warp, *_ = TARGETS[self.target]
        return triton.compile(self.source, target=GPUTarget(backend, arch, warp), options=self.options)

    def run(self) -> Compiled:
        """Compile, and read the report."""
        case, compiled = self.case, self.compile()
        backend = TARGETS[self.target].backend
        registers, spills = _registers_and_spills(compiled, backend)
        blocks = [str(case.constants[name]) for name in BLOCKS if name in case.constants]
        return Compiled(
            self.target,
            case.kernel.__name__,
            case.name,
            case.dtype,
            f"{'x'.join(blocks)} w{self.options['num_warps']} s{self.options['num_stages']}",
            registers,
            spills,
            compiled.metadata.shared,
            _matrix_instruction(compiled),
            _loop_length(compiled, backend),
            self.key,
        )


def write_table(rows: list[Compiled], file: TextIO) -> None:
    writer = csv.DictWriter(file, [field.name for field in fields(Compiled)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)


def read_table(path: Path) -> list[Compiled]:
    numbers = {"registers", "spills", "shared", "loop"}
    with path.open(newline="") as file:
        return [
            Compiled(**{name: int(value) if name in numbers else value for name, value in line.items()})  # pyright: ignore[reportArgumentType]
            for line in csv.DictReader(file)
        ]


def table_path() -> Path:
    """The committed table of the installed Triton."""
    import triton

    return RESULTS / f"cross_compile_triton-{triton.__version__}.csv"


def trusted_rows(committed: list[Compiled]) -> dict[tuple[str, str], Compiled]:
    """By target and key, all rows but one of each kernel: of one target, as the kernels take turns with them, that with
    the most registers."""
    kernels, targets = sorted({row.kernel for row in committed}), sorted({row.target for row in committed})
    sample = set()
    for turn, kernel in enumerate(kernels):
        rows = [row for row in committed if (row.kernel, row.target) == (kernel, targets[turn % len(targets)])]
        sample |= {(row.target, row.key) for row in sorted(rows, key=lambda row: -row.registers)[:1]}
    return {(row.target, row.key): row for row in committed if (row.target, row.key) not in sample}


def compile_all(targets: list[str], trusted: dict[tuple[str, str], Compiled]) -> list[Compiled]:
    """One row for every distinct compilation, per target."""
    from . import (
        cross_compile_batch_norm,
        cross_compile_conv,
        cross_compile_depthwise,
        cross_compile_pool,
        cross_compile_rnn,
    )

    rows: dict[tuple[str, ...], Compiled] = {}
    for target in targets:
        for family in (
            cross_compile_batch_norm,
            cross_compile_conv,
            cross_compile_depthwise,
            cross_compile_pool,
            cross_compile_rnn,
        ):
            for case in family.cases(TARGETS[target]):
                compilation = Compilation(case, target)
                known = trusted.get((target, compilation.key))
                row = replace(known, case=case.name) if known else compilation.run()
                rows[target, row.kernel, row.case, row.dtype] = row
    return list(rows.values())


def printed_by(code: str) -> list[str]:
    """The lines that this code prints in a process of its own, where Triton compiles."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every shipped kernel for GPUs that need not be present.")
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--write", action="store_true", help="write the committed table instead of printing rows")
    parser.add_argument("--all", action="store_true", help="compile what did not change, too")
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(TARGETS)
    if unknown or (arguments.write and arguments.targets):
        parser.error(f"no such target: {', '.join(unknown)}" if unknown else "--write writes all targets; name none")
    path = table_path()
    committed = [] if arguments.all or not path.exists() else read_table(path)
    rows = compile_all(arguments.targets or list(TARGETS), trusted_rows(committed))
    if not arguments.write:
        write_table(rows, sys.stdout)
        return
    with path.open("w", newline="") as file:
        write_table(rows, file)


if __name__ == "__main__":
    main()
