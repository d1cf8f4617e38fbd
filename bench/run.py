"""The runs behind `python -m backstride.bench`: timed on a GPU, dry without one."""

from __future__ import annotations

import gc
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import bench_batch_norm, bench_conv, bench_networks, bench_pool, bench_pyramid, bench_rnn, probe, report, tune
from .ahead import CASES_AT_ONCE, Ahead
from .case import Case, layouts, run_case
from .timing import GRAPH_BELOW, Ceilings, measure, measure_ceilings

BENCHES = (bench_conv, bench_pyramid, bench_pool, bench_batch_norm, bench_rnn, bench_networks)
REPEATS = 100
QUICK_REPEATS = 25
PROBE_REPEATS = 15
WRITTEN_EVERY = 3  # seconds

# Outside a terminal, where rich assumes 80 columns, the tables would lose half of their words.
console = Console(width=None if sys.stdout.isatty() else 180)


def all_cases(quick: bool, tiny: bool) -> list[Case]:
    return [case for bench in BENCHES for case in bench.cases(quick, tiny)]


def most_wanted_first(cases: list[Case]) -> list[Case]:
    """Quick cases, networks, then bf16, fp32 and fp16: a run may end before its cases do."""
    quick = {report.key_of(case) for case in all_cases(True, False)}
    dtypes = [torch.bfloat16, torch.float32, torch.float16]

    def rank(case: Case) -> tuple[bool, bool, int]:
        return report.key_of(case) not in quick, case.op != "network", dtypes.index(case.dtype)

    return sorted(cases, key=rank)


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def check(case: Case) -> bool:
    """Compute the case once and say whether ours is right."""
    try:
        result = run_case(case, "cpu")
    except Exception as error:  # one broken case must not hide the others
        console.print(f"[red]WRONG[/] {escape(f'{case}: {type(error).__name__}: {error}')}", soft_wrap=True)
        return False
    errors = ", ".join(f"{v.name} {v.layout} {error:.1e}" for v, error in result.errors.items())
    console.print(f"right {escape(f'{case}: {errors}')}", highlight=False, soft_wrap=True)
    return True


def dry_run(selected: list[Case]) -> bool:
    console.print("[bold]No CUDA GPU here: no GPU was measured, and no results file is written.[/]\n")
    for path in sorted(report.RESULTS.glob("cross_compile_triton-*.csv")):
        console.print(report.compiled_table(path))
    console.print("\nEvery case once, tiny, on the CPU with interpreted kernels; errors against fp64:")
    right = 0
    with progress() as bar:
        for case in bar.track(selected, description="checking"):
            right += check(case)
    console.print(f"\n{right} of {len(selected)} cases are right. Nothing was timed.")
    return right == len(selected)


def pending(selected: list[Case], rows: list[report.Row], where: report.Environment) -> list[Case]:
    """The cases that have no row from this GPU with these versions, of this code or of what an op is in it."""
    same = vars(where).keys() - {"commit"}
    done = {
        row.case
        for row in rows
        if all(getattr(row, name) == getattr(where, name) for name in same)
        and (row.commit == where.commit or report.is_unchanged(row.op, row.commit))
    }
    return [case for case in selected if report.key_of(case) not in done]


def merged(rows: list[report.Row], new: list[report.Row]) -> list[report.Row]:
    """`rows` with those of the same case on the same GPU replaced."""
    cases = {(row.case, row.gpu) for row in new}
    return [row for row in rows if (row.case, row.gpu) not in cases] + new


def timed_run(selected: list[Case], quick: bool, compiled: bool, minutes: float, path: Path) -> bool:
    """Time the cases that `path` does not hold yet; False if one of them was wrong. It is written every few seconds,
    and no case is started after `minutes`."""
    started = time.monotonic()
    repeats = QUICK_REPEATS if quick else REPEATS
    where = report.environment()
    rows = report.read_rows(path) if path.exists() else []
    left = most_wanted_first(pending(selected, rows, where))
    console.print(f"{len(selected) - len(left)} of {len(selected)} cases are in {path}")
    if not left:
        return True
    ceilings = measure_ceilings({case.dtype for case in left}, repeats)
    wrong = 0
    new: list[report.Row] = []
    to_time = len(left)
    written = time.monotonic()
    with progress() as bar, Ahead(partial(all_cases, quick, False), "cuda") as processes:
        task = bar.add_task("timing", total=to_time)
        try:
            while left and time.monotonic() - started < 60 * minutes:
                if (to_time - len(left)) % CASES_AT_ONCE == 0:
                    bar.update(task, description="compiling")
                    processes.compile(left[:CASES_AT_ONCE])
                case = left.pop(0)
                bar.update(task, description=escape(str(case)[:60]))
                mine = _timed(case, repeats, compiled, ceilings, where)
                wrong += mine[0].gate != report.GREEN
                rows, new = merged(rows, mine), new + mine
                if time.monotonic() - written > WRITTEN_EVERY:
                    report.write_rows(rows, path)
                    written = time.monotonic()
                _free_memory()
                bar.advance(task)
        finally:
            if new:
                report.write_rows(rows, path)
    console.print(report.results_table(new))
    console.print(f"{len(rows)} rows in {path}; {wrong} cases failed")
    if left:
        console.print(f"[yellow]{len(left)} cases are left: run the same command again, and it goes on there.[/]")
    return wrong == 0


def _timed(case: Case, repeats: int, compiled: bool, ceilings: Ceilings, where: report.Environment) -> list[report.Row]:
    """Its rows, or where it is wrong or does not fit one that says so: it must not cost the others their times."""
    graph = case.replayed
    if graph is None:
        graph = ceilings.floor(case.flop, case.bytes, case.dtype) < GRAPH_BELOW
    try:
        result = run_case(case, "cuda", lambda calls: measure(calls, repeats, graph), compiled)
        return report.rows_of(case, result, ceilings, where)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        console.print(f"[red]NOT TIMED[/] {escape(f'{case}: {reason}')}")
        return [report.failed_row(case, reason[:300], ceilings, where)]


def _free_memory() -> None:
    """Where torch keeps so much of the GPU's that the next case may not fit; it takes as long as a small case."""
    free, total = torch.cuda.mem_get_info()
    if free < total / 2:
        gc.collect()
        torch.cuda.empty_cache()


def default_path(quick: bool, op: str | None) -> Path:
    """A name of its own for each GPU and choice of cases, so that a part never replaces the whole."""
    parts = [torch.cuda.get_device_name(), f"torch-{torch.__version__}", op or "all", "quick" if quick else "full"]
    return report.RESULTS / f"{file_name('_'.join(parts))}.csv"


def file_name(words: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", words).lower()


def tuning_run(cases: list[Case], minutes: float, path: Path | None) -> bool:
    """Try the candidates on each case and layout; False if a configuration that ships is wrong."""
    started = time.monotonic()
    gpu = torch.cuda.is_available()
    rows: list[tune.Row] = []
    for case, layout in [(each, layout) for each in cases for layout in layouts(each)]:
        if time.monotonic() - started > 60 * minutes:
            console.print("[yellow]Out of time: the remaining cases were not tried.[/]")
            break
        measured = (lambda calls: measure(calls, QUICK_REPEATS, graph=False)) if gpu else None
        new = tune.tune(case, "cuda" if gpu else "cpu", layout, measured)
        console.print(tune.table(new))
        rows += new
        if path:
            report.write_table(rows, path)
    return all(row.verdict == "right" for row in rows if row.config == tune.SHIPPED)


def probing_run(names: list[str], folder: Path) -> None:
    """Measure these probes and write a CSV file for each."""
    where = report.environment()
    ceilings = measure_ceilings({torch.bfloat16, torch.float16, torch.float32}, QUICK_REPEATS)
    for name in names:
        if name == probe.host_overhead.__name__:
            console.print(f"\n[bold]{probe.question(probe.host_overhead)}[/]")
            rows = probe.host_overhead(where)
        else:
            console.print(f"\n[bold]{probe.question(probe.PROBES[name])}[/]")
            rows = probe.run(
                name, "cuda", False, where, ceilings, lambda calls: measure(calls, PROBE_REPEATS, graph=False)
            )
        console.print(probe.table(rows))
        report.write_table(rows, folder / f"probe_{name}_{file_name(where.gpu)}.csv")
