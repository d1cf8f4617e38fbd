"""Results: rows of a CSV file, and tables in the terminal."""

from __future__ import annotations

import csv
import hashlib
import math
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from rich.table import Table

from ..models.training.checkpoint import atomic_path
from .case import BASELINE, OURS, Case, Result, Variant
from .occupancy import issue_share, programs_of
from .timing import Ceilings, Timing

RESULTS = Path(__file__).parent / "results"
GREEN = "green"
# What times depend on, by how the name of an op begins, and what all depend on; as git's patterns.
SOURCES = {
    **dict.fromkeys(("conv", "atrous"), ("kernels/conv", "kernels/depthwise", "fused_ops/conv")),
    "max": ("kernels/pool", "fused_ops/pool"),
    "batch": ("kernels/batch_norm", "fused_ops/batch_norm"),
    "rnn": ("kernels/rnn", "fused_ops/rnn"),
    "network": ("kernels", "fused_ops", "models"),
}
SHARED = (":(glob)kernels/*.py", ":(glob)fused_ops/*.py", "bench/case.py", "bench/timing.py")
CaseKey = tuple[str, ...]


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
    """One variant of one case. Errors: as `case.error_of`. MiB at the peak of a call, inputs
    apart. `percent_of_floor` is 100 floor / ms; `speedup` of ours is the fastest baseline's ms / ms, 0 for baselines.
    `gate` is "green", or what was wrong: then no number of the row is one, and nothing was timed. `algorithm` is read
    from the names of all GPU kernels (`algorithm.algorithm`), `kernels` are the two that took most time.
    """

    op: str
    regime: str
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
    replayed: str
    error: float
    error_torch: float
    gate: str
    algorithm: str
    kernels: str

    @property
    def case(self) -> CaseKey:
        """What is computed, whoever computes it."""
        return self.op, self.name, self.shape, self.dtype, self.direction


def key_of(case: Case) -> CaseKey:
    """As `Row.case`."""
    return case.op, case.name, case.shape, name_of(case.dtype), case.direction


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0]


@lru_cache
def commit() -> str:
    """The commit; with a digest of the sources where they differ from it, or where there is no git to ask."""
    described = first_line("git", "describe", "--always", "--dirty")
    if described and not described.endswith("-dirty"):
        return described
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for package in ("kernels", "fused_ops", "models", "bench"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"{described or 'sources'}-{digest.hexdigest()[:10]}"


@lru_cache
def is_unchanged(op: str, commit: str) -> bool:
    """Whether what this op's times depend on is as it was at that commit. False where git can't tell."""
    if "-" in commit:  # with a digest: what was measured is no commit
        return False
    families = next(sources for prefix, sources in SOURCES.items() if op.startswith(prefix))
    command = ["git", "diff", "--quiet", commit, "--", *families, *SHARED]
    try:
        return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True).returncode == 0
    except OSError:
        return False


def environment() -> Environment:
    return Environment(
        gpu=torch.cuda.get_device_name(),
        driver=first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        torch=torch.__version__,
        triton=triton.__version__,
        commit=commit(),
    )


def rows_of(case: Case, result: Result, ceilings: Ceilings, where: Environment) -> list[Row]:
    """One row for each variant of a case that passed its check."""
    best = min(timing.ms for variant, timing in result.timings.items() if variant.name != OURS)
    return [
        _row(case, variant, timing, result.errors, ceilings, where, best) for variant, timing in result.timings.items()
    ]


def failed_row(case: Case, reason: str, ceilings: Ceilings, where: Environment) -> Row:
    """The row of a case that did not pass: without a time, so without a speed-up."""
    timing = Timing(math.nan, math.nan, math.nan, math.nan)
    return _row(case, Variant(OURS, "contiguous"), timing, {}, ceilings, where, math.nan, " ".join(reason.split()))


def _row(
    case: Case,
    variant: Variant,
    timing: Timing,
    errors: Mapping[Variant, float],
    ceilings: Ceilings,
    where: Environment,
    best: float,
    gate: str = GREEN,
) -> Row:
    floor = 1e3 * ceilings.floor(case.flop, case.bytes, case.dtype)
    return Row(
        **vars(where),
        op=case.op,
        regime=case.regime,
        name=case.name,
        shape=case.shape,
        dtype=name_of(case.dtype),
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
        error=errors.get(variant, math.nan),
        error_torch=errors.get(BASELINE, math.nan),
        gate=gate,
    )


def write_rows(rows: list[Row], path: Path) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_table(rows: Sequence[Any], path: Path) -> None:
    """A CSV file with one line for each row, all of one dataclass."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)


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


def results_files(folder: Path) -> list[Path]:
    """The files that hold `Row`s."""
    header = ",".join(field.name for field in fields(Row))
    return [path for path in sorted(folder.glob("*.csv")) if path.read_text().partition("\n")[0] == header]


def by_case(rows: Iterable[Row]) -> dict[CaseKey, list[Row]]:
    cases: dict[CaseKey, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return cases


def ours_of(rows: Iterable[Row]) -> Row | None:
    """Of one case's rows our fastest, whatever its layout; None where its check failed."""
    mine = [row for row in rows if row.variant == OURS and row.gate == GREEN]
    return min(mine, key=lambda row: row.ms) if mine else None


def ratios(rows: Iterable[Row]) -> dict[str, float]:
    """Each baseline's time / ours of one case, by name; empty where our check failed."""
    rows = list(rows)
    ours = ours_of(rows)
    return {
        row.variant if row.layout == BASELINE.layout else f"{row.variant} {row.layout}": row.ms / ours.ms
        for row in rows
        if ours and row.variant != OURS
    }


def results_table(rows: list[Row]) -> Table:
    table = Table(title="Speed-up: a baseline's time / ours, above 1 where ours is faster; `best` against the fastest")
    columns = ("case", "direction", "dtype", "layout", "ms (p20-p80)", "% of floor", "MiB", "error", "best", "each")
    columns += ("the fastest baseline's kernels",)
    for column in columns:
        table.add_column(column, justify="right" if column in ("% of floor", "MiB", "best") else "left")
    for of_case in by_case(rows).values():
        ours = ours_of(of_case)
        if ours is None:
            row = of_case[0]
            table.add_row(
                f"{row.op} {row.name}", row.direction, row.dtype, "", "", "", "", "", "", f"[red]{row.gate}[/]", ""
            )
            continue
        fastest = min((row for row in of_case if row.variant != OURS), key=lambda row: row.ms)
        table.add_row(
            f"{ours.op} {ours.name}",
            ours.direction,
            ours.dtype,
            ours.layout,
            f"{ours.ms:.4f} ({ours.ms_p20:.4f}-{ours.ms_p80:.4f})",
            f"{ours.percent_of_floor:.0f}",
            f"{ours.peak_mib:.1f}",
            f"{ours.error:.1e}",
            f"[{'green' if ours.speedup >= 1 else 'red'}]{ours.speedup:.2f}[/]",
            ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios(of_case).items()),
            _first(fastest.algorithm),
        )
    return table


def _first(algorithm: str, most: int = 4) -> str:
    """The labels that took most time: a whole network has dozens."""
    labels = algorithm.split("; ")
    return "; ".join([*labels[:most], *(["…"] if len(labels) > most else [])])


def slower_table(old: list[Row], new: list[Row]) -> Table:
    """Our variants whose new 20th percentile is above the old 80th: slower by more than both spreads."""
    before = {(*row.case, row.variant, row.layout, row.gpu): row for row in old}
    table = Table("case", "direction", "dtype", "layout", "old ms", "new ms", "new / old", title="Slower than before")
    for row in new:
        was = before.get((*row.case, row.variant, row.layout, row.gpu))
        if row.variant != OURS or was is None:
            continue
        names = f"{row.op} {row.name}", row.direction, row.dtype, row.layout
        if was.gate == GREEN and row.gate != GREEN:
            table.add_row(*names, f"{was.ms:.4f}", "wrong now", "")
        elif row.ms_p20 > was.ms_p80:
            table.add_row(*names, f"{was.ms:.4f}", f"{row.ms:.4f}", f"{row.ms / was.ms:.2f}")
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
    table = Table(
        title=f"{path.stem}: the heaviest tile of each kernel, as compiled, not run; instructions in its main loop; "
        "cycles to issue them over cycles of its products; programs that fit on a multiprocessor at once"
    )
    columns = ("kernel", "target", "dtype", "tile", "registers", "spills", "shared", "matrix_instruction", "loop")
    for column in columns:
        table.add_column(column, justify="right" if column in ("registers", "spills", "shared", "loop") else "left")
    for column in ("issue", "programs"):
        table.add_column(column, justify="right")
    for key in sorted(heaviest):
        line = heaviest[key]
        issue = issue_share(line)
        shown = "" if issue is None else f"{issue:.2f}"
        table.add_row(*(line[column] for column in columns), shown, str(programs_of(line)))
    return table
