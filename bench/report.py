"""Results: rows of a CSV file, and tables in the terminal."""

from __future__ import annotations

import csv
import subprocess
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from rich.table import Table

from ..models.training.checkpoint import atomic_path
from .case import OURS, Case, Result
from .timing import Ceilings


@dataclass(frozen=True)
class Environment:
    """Where a row was measured."""

    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str


@dataclass(frozen=True)
class Row(Environment):
    """One variant of one case. Errors: max |y - fp64| / sqrt(length of the sum). MiB at the peak of a call, inputs
    apart. `percent_of_floor` is 100 floor / ms; `speedup` of ours is the fastest baseline's ms / ms, 0 for baselines.
    """

    op: str
    name: str
    shape: str
    dtype: str
    direction: str
    variant: str
    layout: str
    ms: float
    ms_p20: float
    ms_p80: float
    gb_per_s: float
    tflop_per_s: float
    copy_gb_per_s: float
    matmul_tflop_per_s: float
    floor_ms: float
    percent_of_floor: float
    speedup: float
    peak_mib: float
    error: float
    error_torch: float


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0]


def environment() -> Environment:
    return Environment(
        gpu=torch.cuda.get_device_name(),
        driver=_first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        torch=torch.__version__,
        triton=triton.__version__,
        commit=_first_line("git", "describe", "--always", "--dirty"),
    )


def rows_of(case: Case, result: Result, ceilings: Ceilings, where: Environment) -> list[Row]:
    floor = 1e3 * ceilings.floor(case.flop, case.bytes, case.dtype)
    best = min(timing.ms for variant, timing in result.timings.items() if variant.name != OURS)
    error_torch = next(error for variant, error in result.errors.items() if variant.name == "torch")
    return [
        Row(
            **vars(where),
            op=case.op,
            name=case.name,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            direction=case.direction,
            variant=variant.name,
            layout=variant.layout,
            **timing._asdict(),
            gb_per_s=case.bytes / timing.ms / 1e6,
            tflop_per_s=case.flop / timing.ms / 1e9,
            copy_gb_per_s=ceilings.copy / 1e9,
            matmul_tflop_per_s=ceilings.matmul[case.dtype] / 1e12,
            floor_ms=floor,
            percent_of_floor=100 * floor / timing.ms,
            speedup=best / timing.ms if variant.name == OURS else 0.0,
            error=result.errors[variant],
            error_torch=error_torch,
        )
        for variant, timing in result.timings.items()
    ]


def write_rows(rows: list[Row], path: Path) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Rows that `write_rows` wrote. ValueError if the file has other columns."""
    numbers = {field.name for field in fields(Row) if field.type == "float"}
    names = [field.name for field in fields(Row)]
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            raise ValueError(f"{path} has columns {reader.fieldnames}, a results file has {names}; measure it anew")
        lines: list[dict[str, Any]] = [{k: float(v) if k in numbers else v for k, v in line.items()} for line in reader]
        return [Row(**line) for line in lines]


def results_table(rows: list[Row]) -> Table:
    table = Table(title="Speedup: fastest baseline's time / ours, above 1 where ours is faster")
    for column in ("case", "direction", "dtype", "variant", "ms (p20-p80)", "% of floor", "MiB", "error", "speedup"):
        table.add_column(column, justify="right" if column in ("% of floor", "MiB", "speedup") else "left")
    for row in rows:
        table.add_row(
            f"{row.op} {row.name}",
            row.direction,
            row.dtype,
            f"{row.variant} {row.layout}",
            f"{row.ms:.4f} ({row.ms_p20:.4f}-{row.ms_p80:.4f})",
            f"{row.percent_of_floor:.0f}",
            f"{row.peak_mib:.1f}",
            f"{row.error:.1e}",
            f"{row.speedup:.2f}" if row.variant == OURS else "",
        )
    return table


def compiled_table(path: Path) -> Table:
    """Of each kernel, target and dtype in the cross-compilation table the row with most spills, then registers."""
    heaviest: dict[tuple[str, str, str], dict[str, str]] = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            key = line["kernel"], line["target"], line["dtype"]
            weight = int(line["spills"]), int(line["registers"])
            kept = heaviest.get(key)
            if kept is None or weight > (int(kept["spills"]), int(kept["registers"])):
                heaviest[key] = line
    table = Table(title=f"{path.stem}: the heaviest tile of each kernel, as compiled, not run")
    columns = ("kernel", "target", "dtype", "tile", "registers", "spills", "shared", "matrix_instruction")
    for column in columns:
        table.add_column(column, justify="right" if column in ("registers", "spills", "shared") else "left")
    for key in sorted(heaviest):
        table.add_row(*(heaviest[key][column] for column in columns))
    return table
