"""The cost model: each case's operations, bytes and floor, and beside them what was measured."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from rich.table import Table

from .case import Case
from .report import Row, by_case, key_of, name_of, ours_of
from .timing import ASSUMED, Ceilings


def ceilings_of(rows: Iterable[Row]) -> Ceilings | None:
    """The ceilings that a results file was measured with."""
    rows = list(rows)
    if not rows:
        return None
    matmul = {getattr(torch, row.dtype): 1e12 * row.matmul_tflop_per_s for row in rows}
    return Ceilings(1e9 * rows[-1].copy_gb_per_s, dict(ASSUMED.matmul) | matmul)


def model_table(cases: list[Case], rows: list[Row]) -> Table:
    """Microseconds; a case that was measured shows its own time and the best baseline's beside its floor."""
    ceilings = ceilings_of(rows)
    kind = "measured" if ceilings else "assumed, not measured"
    ceilings = ceilings or ASSUMED
    products = ", ".join(f"{name_of(dtype)} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in ceilings.matmul.items())
    table = Table(title=f"Floors at ceilings that are {kind}: copy {ceilings.copy / 1e12:.2f} TB/s, {products}")
    for column in ("op", "case", "direction", "dtype"):
        table.add_column(column)
    for column in ("GFLOP", "MB", "FLOP/B", "floor us", "bound by", "ours us", "best other us", "% of floor"):
        table.add_column(column, justify="left" if column == "bound by" else "right")
    measured = by_case(rows)
    for case in cases:
        floor = ceilings.floor(case.flop, case.bytes, case.dtype)
        bytes_bind = case.bytes / ceilings.copy >= case.flop / ceilings.matmul[case.dtype]
        intensity = f"{case.flop / case.bytes:.0f}" if case.bytes else ""
        ours = ours_of(measured.get(key_of(case), []))
        times = ("", "", "")
        if ours:
            best = ours.ms * ours.speedup
            times = f"{1e3 * ours.ms:.1f}", f"{1e3 * best:.1f}", f"{1e5 * floor / ours.ms:.0f}"
        table.add_row(
            case.op,
            case.name,
            case.direction,
            name_of(case.dtype),
            f"{case.flop / 1e9:.2f}",
            f"{case.bytes / 1e6:.2f}",
            intensity,
            f"{1e6 * floor:.2f}",
            "bytes" if bytes_bind else "FLOP",
            *times,
        )
    return table
