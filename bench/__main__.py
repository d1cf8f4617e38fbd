"""`python -m backstride.bench`: times on a GPU; without one, what was compiled and whether the numbers are right."""

import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

if not torch.cuda.is_available():
    # Triton reads this when it is imported, just below: the dry run is to check the kernels, not ATen against itself.
    os.environ["TRITON_INTERPRET"] = "1"

from . import bench_conv, bench_pool, bench_rnn, report  # noqa: E402
from .case import Case, run_case  # noqa: E402
from .timing import GRAPH_BELOW, measure, measure_ceilings  # noqa: E402

RESULTS = Path(__file__).parent / "results"
BENCHES = (bench_conv, bench_pool, bench_rnn)
QUICK_SECONDS = 420  # after which --quick starts no further case: the rest of eight minutes is for the last one

# Outside a terminal, where rich assumes 80 columns, the tables would lose half of their words.
console = Console(width=None if sys.stdout.isatty() else 150)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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
    for path in sorted(RESULTS.glob("cross_compile_triton-*.csv")):
        console.print(report.compiled_table(path))
    console.print("\nEvery case once, tiny, on the CPU with interpreted kernels; errors against fp64:")
    right = sum([check(case) for case in selected])
    console.print(f"\n{right} of {len(selected)} cases are right. Nothing was timed.")
    return right == len(selected)


def timed_run(selected: list[Case], quick: bool, path: Path) -> bool:
    torch.backends.cudnn.benchmark = True  # the baselines at their best
    repeats = 25 if quick else 100
    started = time.monotonic()
    where = report.environment()
    ceilings = measure_ceilings({case.dtype for case in selected}, repeats)
    rows: list[report.Row] = []
    wrong = 0
    for done, case in enumerate(selected):
        if quick and time.monotonic() - started > QUICK_SECONDS:
            console.print(f"[yellow]Out of time: the last {len(selected) - done} cases were not measured.[/]")
            break
        graph = ceilings.floor(case.flop, case.bytes, case.dtype) < GRAPH_BELOW
        try:
            result = run_case(case, "cuda", lambda calls, graph=graph: measure(calls, repeats, graph), not quick)
        except Exception as error:  # a case that is wrong or does not fit must not cost the others their times
            console.print(f"[red]NOT TIMED[/] {escape(f'{case}: {type(error).__name__}: {error}')}")
            wrong += 1
            continue
        rows += report.rows_of(case, result, ceilings, where)
        report.write_rows(rows, path)
        console.print(f"{done + 1}/{len(selected)} {escape(str(case))}", highlight=False)
    console.print(report.results_table(rows))
    console.print(f"{len(rows)} rows in {path}; {wrong} cases failed")
    return wrong == 0


def default_path(quick: bool, op: str | None) -> Path:
    """A name of its own for each GPU and choice of cases, so that a part never replaces the whole."""
    parts = [torch.cuda.get_device_name(), f"torch-{torch.__version__}", op or "all", "quick" if quick else "full"]
    return RESULTS / (re.sub(r"[^\w.+-]+", "-", "_".join(parts)).lower() + ".csv")


@app.command()
def main(
    op: Annotated[str | None, typer.Option(help="Only this op, e.g. conv_transpose2d.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A third of the layers, bf16, no torch.compile.")] = False,
    out: Annotated[Path | None, typer.Option(help="Results file (CSV). Default: one in bench/results.")] = None,
) -> None:
    """Time every op against torch on a CUDA GPU, each case after a check of its numbers.

    Without a GPU: show what the kernels compile to and check every case once on the CPU. Exit status 1 if a case
    is wrong.
    """
    gpu = torch.cuda.is_available()
    every = [case for bench in BENCHES for case in bench.cases(quick, tiny=not gpu)]
    selected = [case for case in every if op in (None, case.op)]
    if not selected:
        raise typer.BadParameter(f"no cases for {op!r}; choose one of {', '.join(sorted({c.op for c in every}))}")
    right = timed_run(selected, quick, out or default_path(quick, op)) if gpu else dry_run(selected)
    raise typer.Exit(0 if right else 1)


if __name__ == "__main__":
    app()
