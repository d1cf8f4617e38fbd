"""Every kernel that the cases launch, compiled for an H200 that need not be there, and what the compiler says of it.

Our side of a case runs as on a GPU, up to Triton's launcher (`host.stubbed_launch`), on memory that nothing is written
to, and what torch itself would compute is not (`uncomputed`). Triton keeps the binaries in its cache, under the keys
that they have on a GPU of this kind with the same Triton and Python.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import torch
import triton
from rich.markup import escape
from rich.table import Table

from ..fused_ops import registration
from ..fused_ops.conv import aten
from . import run
from .ahead import PROCESSES
from .case import FORMATS, Case, layouts
from .host import noting_loads, stubbed_launch
from .machine_code import NVIDIA, disassembled, longest_loop, registers_and_spills
from .occupancy import programs_per_multiprocessor
from .report import CaseKey, key_of, name_of, write_table
from .uncomputed import Uncomputed

TARGET = "sm_90"


@dataclass(frozen=True)
class Row:
    """One binary, with the first case that launches it."""

    op: str
    name: str
    shape: str
    dtype: str
    direction: str
    layout: str
    kernel: str
    warps: int
    registers: int  # of a thread
    spills: int  # bytes of a thread
    shared: int  # bytes of a program
    loop: int  # instructions in the longest innermost loop
    programs: int  # that fit on a multiprocessor at once
    binary: str  # start of its SHA-256


@lru_cache
def cases(quick: bool) -> list[Case]:
    return run.all_cases(quick, tiny=False)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within, ops take the way that they take there, cuDNN's share included, and nothing is computed."""
    with ExitStack() as stack:
        stack.enter_context(stubbed_launch())
        stack.enter_context(mock.patch.object(aten, "is_at_hand", lambda x: True))
        stack.enter_context(mock.patch.object(registration, "_transformed", lambda: False))  # by the mode below
        stack.enter_context(Uncomputed())
        yield


def untouched(case: Case, layout: str) -> list[torch.Tensor]:
    """The case's arguments, of which no page is ever used."""
    return [
        torch.empty(
            shape,
            dtype=case.dtype,
            memory_format=FORMATS[len(shape)] if layout == "channels_last" and len(shape) > 1 else None,
        )
        for shape in case.shapes
    ]


def _row(case: Case, layout: str, files: dict[str, Path]) -> Row:
    cubin, about = files[".cubin"].read_bytes(), json.loads(files[".json"].read_text())
    registers, spills = registers_and_spills(cubin)
    warps, shared = about["num_warps"], about["shared"]
    loop = len(longest_loop(disassembled(cubin), NVIDIA))
    programs = programs_per_multiprocessor(TARGET, registers, shared, warps)
    digest = hashlib.sha256(cubin).hexdigest()[:12]
    found = warps, registers, spills, shared, loop, programs, digest
    return Row(case.op, case.name, case.shape, name_of(case.dtype), case.direction, layout, about["name"], *found)


def _compile(quick: bool, key: CaseKey) -> list[Row] | str:
    """What a case launches that no case before it in this process did, or the error that it raised."""
    torch.set_num_threads(1)
    (case,) = (each for each in cases(quick) if key_of(each) == key)
    rows: list[Row] = []
    try:
        for each in (case, *case.checks):
            for layout in layouts(each):
                loaded: list[dict[str, Path]] = []
                arguments = untouched(each, layout)
                with as_on_gpu(), noting_loads(lambda files, _, loaded=loaded: loaded.append(files)):
                    each.ours(*arguments)
                rows += [_row(case, layout, files) for files in loaded]
    except Exception as error:  # one broken case must not hide the others
        return f"{type(error).__name__}: {error}"
    return rows


def compiled(selected: Sequence[Case], quick: bool) -> Iterator[tuple[Case, list[Row] | str]]:
    """Each case with the binaries that no case before it has, or the error that it raised."""
    spawn = multiprocessing.get_context("spawn")
    seen: set[str] = set()
    with ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), spawn) as pool:
        for case, found in zip(selected, pool.map(partial(_compile, quick), map(key_of, selected)), strict=True):
            if isinstance(found, str):
                yield case, found
                continue
            new = {row.binary: row for row in found if row.binary not in seen}
            seen |= set(new)
            yield case, list(new.values())


def table(rows: Sequence[Row]) -> Table:
    """Of each op, kernel and dtype how many binaries there are, and the worst of them."""
    result = Table(title=f"{len(rows)} binaries for {TARGET}, as compiled, not run; Triton {triton.__version__}")
    for column in ("op", "kernel", "dtype"):
        result.add_column(column)
    for column in ("binaries", "most registers", "spilling", "most shared", "longest loop", "fewest programs"):
        result.add_column(column, justify="right")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.kernel, row.dtype), []).append(row)
    for key, group in groups.items():
        spilling = sum(row.spills > 0 for row in group)
        worst = (
            str(max(row.registers for row in group)),
            f"[yellow]{spilling}[/]" if spilling else "0",
            str(max(row.shared for row in group)),
            str(max(row.loop for row in group)),
            str(min(row.programs for row in group)),
        )
        result.add_row(*key, str(len(group)), *worst)
    return result


def compiling_run(selected: Sequence[Case], quick: bool, path: Path | None) -> bool:
    """Compile the cases, say what spills, and write a row for each binary; False if a case does not compile."""
    rows: list[Row] = []
    failed = 0
    with run.progress() as bar:
        for case, found in bar.track(compiled(selected, quick), total=len(selected), description="compiling"):
            if isinstance(found, str):
                run.console.print(f"[red]NOT COMPILED[/] {escape(f'{case}: {found}')}", soft_wrap=True)
                failed += 1
                continue
            rows += found
    if rows:
        run.console.print(table(rows))
    for row in rows:
        if row.spills:
            what = f"{row.kernel} spills {row.spills} bytes of a thread"
            run.console.print(
                f"{what}: {row.op} {row.name}, {row.direction}, {row.dtype}, {row.layout}", highlight=False
            )
    run.console.print(f"{len(selected) - failed} of {len(selected)} cases compile.")
    if path and rows:
        write_table(rows, path)
    return not failed
