"""`python -m backstride.bench`: times on a GPU; without one, what was compiled and whether the numbers are right."""

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Op = Annotated[str | None, typer.Option(help="Only this op, e.g. conv_transpose2d.")]
Out = Annotated[Path | None, typer.Option(help="Results file (CSV) to write.")]
File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A results file.")]


def interpret() -> None:
    """Without a GPU, have the kernels interpreted: a check is to be of them, not of ATen against itself. Triton reads
    this when it is imported, so the modules that use it are imported after."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    op: Op = None,
    quick: Annotated[bool, typer.Option("--quick", help="Some of the shapes, bf16, no torch.compile.")] = False,
    skip_compile: Annotated[bool, typer.Option("--skip-compile", help="Without torch.compile, which is slow.")] = False,
    minutes: Annotated[float, typer.Option(help="Start no further case after this time.")] = 7.5,
    out: Annotated[Path | None, typer.Option(help="Results file (CSV). Default: one in bench/results.")] = None,
) -> None:
    """Time every op against torch on a CUDA GPU, each case after a check of its numbers.

    The same command again goes on where the time was up. Without a GPU: show what the kernels compile to and check
    every case once on the CPU. Exit status 1 if a case is wrong.
    """
    if context.invoked_subcommand is not None:
        return
    interpret()
    from . import run

    gpu = torch.cuda.is_available()
    every = run.all_cases(quick, tiny=not gpu)
    selected = [case for case in every if op in (None, case.op)]
    if not selected:
        raise typer.BadParameter(f"no cases for {op!r}; choose one of {', '.join(sorted({c.op for c in every}))}")
    if gpu:
        torch.backends.cudnn.benchmark = True  # the baselines at their best
        path = out or run.default_path(quick, op)
        right = run.timed_run(selected, quick, not quick and not skip_compile, minutes, path)
    else:
        right = run.dry_run(selected)
    raise typer.Exit(0 if right else 1)


@app.command()
def model(
    op: Op = None, quick: Annotated[bool, typer.Option("--quick", help="Some of the shapes, bf16.")] = False
) -> None:
    """Show each case's operations, bytes and floor, beside its times where a results file holds them."""
    interpret()
    from . import report, run
    from .model import model_table

    rows = [row for path in report.results_files(report.RESULTS) for row in report.read_rows(path)]
    cases = [case for case in run.all_cases(quick, tiny=False) if op in (None, case.op)]
    run.console.print(model_table(cases, rows))


@app.command()
def plot(
    file: File, out: Annotated[Path | None, typer.Option(help="Folder. Default: the results file's.")] = None
) -> None:
    """Draw a results file: speed-up over each baseline, and per cent of the floor."""
    interpret()
    from . import plot, report

    for path in plot.draw(report.read_rows(file), out or file.parent, file.stem):
        typer.echo(path)


@app.command()
def readme() -> None:
    """Write README's figures from the committed results."""
    interpret()
    from . import readme, report

    path = report.RESULTS.parents[1] / "README.md"
    if not path.exists():
        raise typer.BadParameter(f"{path} does not exist: run this in a checkout")
    typer.echo(f"{path} {'changed' if readme.write(path, report.RESULTS) else 'is as the results say'}")


@app.command()
def compare(old: File, new: File) -> None:
    """Show what is slower in NEW than in OLD, by more than the spread of both."""
    interpret()
    from . import report, run

    run.console.print(report.slower_table(report.read_rows(old), report.read_rows(new)))


@app.command()
def tune(
    op: Annotated[str, typer.Option(help="E.g. conv_transpose2d.")],
    minutes: Annotated[float, typer.Option(help="Start no further case after this time.")] = 7.5,
    out: Out = None,
) -> None:
    """Try launch configurations on the quick cases of one op, each checked on memory full of NaN and then timed.

    Without a GPU: a few of them, checked in the interpreter on tiny cases. Exit status 1 if one that ships is wrong.
    """
    interpret()
    from . import run

    cases = [case for case in run.all_cases(True, tiny=not torch.cuda.is_available()) if case.op == op]
    if not cases:
        raise typer.BadParameter(f"no cases for {op!r}")
    raise typer.Exit(0 if run.tuning_run(cases, minutes, out) else 1)


@app.command()
def probe(
    name: Annotated[str | None, typer.Argument(help="One probe. Default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results. Default: bench/results.")] = None,
) -> None:
    """Measure facts about this GPU and its libraries that decide designs. Without a GPU: what they are, and what the
    installed Triton compiles."""
    os.environ["TRITON_INTERPRET"] = "0"
    from . import probe, report, run

    known = [*probe.PROBES, probe.host_overhead.__name__]
    if name not in (None, *known):
        raise typer.BadParameter(f"no probe {name!r}; choose one of {', '.join(known)}")
    run.console.print(probe.capabilities_table())
    if not torch.cuda.is_available():
        for each in (*probe.PROBES.values(), probe.host_overhead):
            run.console.print(f"[bold]{each.__name__}[/]: {probe.question(each)}", highlight=False)
        raise typer.BadParameter("the probes time a GPU, and torch finds none here")
    run.probing_run(known if name is None else [name], out or report.RESULTS)


@app.command("compile")
def compile_(
    op: Op = None,
    quick: Annotated[bool, typer.Option("--quick", help="Some of the shapes, bf16.")] = False,
    out: Out = None,
) -> None:
    """Compile every kernel that the cases launch, for an H200 that need not be there: registers, spills, main loops.

    Triton's cache then spares a GPU with the same versions of Triton and Python the compiling. Exit status 1 if a case
    does not compile.
    """
    os.environ["TRITON_INTERPRET"] = "0"
    from . import binaries

    selected = [case for case in binaries.cases(quick) if op in (None, case.op)]
    if not selected:
        raise typer.BadParameter(f"no cases for {op!r}")
    raise typer.Exit(0 if binaries.compiling_run(selected, quick, out) else 1)


@app.command()
def host(rounds: Annotated[int, typer.Option(help="How often 200 calls are timed.")] = 25, out: Out = None) -> None:
    """Measure the host's time per call of each op, with the launch stubbed out; needs no GPU."""
    os.environ["TRITON_INTERPRET"] = "0"
    from . import host, report

    rows = host.measure(rounds, 200)
    Console(width=120).print(host.table(rows))
    if out:
        report.write_table(rows, out)


@app.command()
def cpu(seconds: Annotated[float, typer.Option(help="For each network.")] = 20, out: Out = None) -> None:
    """Compare training steps of small networks with ops="fused" and ops="torch" on the CPU."""
    os.environ["TRITON_INTERPRET"] = "0"
    from . import cpu, report

    rows = cpu.measure(seconds)
    Console(width=120).print(cpu.table(rows))
    if out:
        report.write_table(rows, out)


if __name__ == "__main__":
    app()
