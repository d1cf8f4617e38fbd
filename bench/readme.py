"""README's figures, generated from the committed results: a figure stands there only if a results file holds it."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable
from pathlib import Path

from ..models.training.checkpoint import atomic_path
from . import report
from .report import GREEN, Row

BEGIN = "<!-- figures: `python -m backstride.bench readme` writes what is between these two lines -->"
END = "<!-- end of figures -->"
UNMEASURED = "not measured yet"
REGIMES = {
    "convolution, dense": "convolution, dense",
    "convolution, dilated": "convolution, dilated",
    "convolution, depthwise": "convolution, depthwise",
    "convolution, grouped": "convolution, groups of 4 to 32 channels",
    "transposed convolution, kernel = stride": "transposed convolution, kernel = stride",
    "transposed convolution, kernel > stride": "transposed convolution, kernel > stride",
    "transposed convolution, depthwise": "transposed convolution, depthwise",
    "atrous pyramid into the concatenation": "atrous pyramid (ASPP) into the concatenation",
    "up-convolution into the concatenation, skip copied": "up-convolution into the concatenation (skip copied)",
    "up-convolution into the concatenation, skip in place": "up-convolution into the concatenation (skip in place)",
    "max-pooling with places": "max-pooling, 8-bit offsets against 64-bit indices",
    "max-pooling and unpooling": "max-pooling and back, the same",
    "batch normalisation and ReLU": "batch normalisation and ReLU, training",
    "batch normalisation, residual and ReLU": "batch normalisation, residual and ReLU, training",
    "batch normalisation in evaluation": "batch normalisation (and residual) and ReLU, evaluation",
    "vanilla RNN, H ≤ 256": "vanilla RNN, H ≤ 256",
    "vanilla RNN, H ≤ 1024": "vanilla RNN, 256 < H ≤ 1024",
    "vanilla RNN, H > 1024": "vanilla RNN, H > 1024",
    "vanilla RNN, several layers, both directions or packed": "vanilla RNN: layers, directions, packed",
    "whole networks, training step": "whole networks, training step",
    "whole networks, training step replayed": "whole networks, the same replayed as a CUDA graph",
}
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
FORWARD = ("forward", "pool and unpool")


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _cell(rows: list[Row], regime: str, forward: bool) -> str:
    """Geometric mean and range of the speed-ups over the fastest baseline, for each dtype, and what failed."""
    parts = []
    for dtype, name in DTYPES.items():
        mine = [
            row for row in rows
            if row.regime == regime and row.dtype == dtype and (row.direction in FORWARD) == forward
        ]  # fmt: skip
        best = [ours.speedup for of_case in report.by_case(mine).values() if (ours := report.ours_of(of_case))]
        wrong = sum(row.gate != GREEN for row in mine)
        if best:
            spread = f"{min(best):.2f}–{max(best):.2f}, {len(best)} cases" if len(best) > 1 else "1 case"
            parts.append(f"{name} {geometric_mean(best):.2f} ({spread})")
        if wrong:
            parts.append(f"{name}: {wrong} failed")
    return ", ".join(parts) or UNMEASURED


def gpu_tables(files: list[tuple[str, list[Row]]]) -> list[str]:
    """One table for each results file; one that says so where there is none."""
    lines = []
    for name, rows in files or [("", [])]:
        if rows:
            where = rows[-1]
            commits = list(dict.fromkeys(row.commit for row in rows))
            lines += [
                f"Fastest baseline's time / ours on one {where.gpu} (driver {where.driver}, torch {where.torch},",
                f"Triton {where.triton}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}): geometric mean, least "
                "and most",
                f"([results](bench/results/{name})).",
                "",
            ]
        lines += ["| op | forward | backward |", "|---|---|---|"]
        for regime, words in REGIMES.items():
            lines.append(f"| {words} | {_cell(rows, regime, True)} | {_cell(rows, regime, False)} |")
        lines.append("")
    return lines


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cpu_lines(folder: Path) -> list[str]:
    """What the two kinds of results files say that need no GPU."""
    lines = []
    for path in sorted(folder.glob("host_overhead_*.csv")):
        rows = _read(path)
        lines += [
            f"Host time of one forward call, everything up to the launch itself, on {rows[0]['cpu']}",
            f"([results](bench/results/{path.name}); goal: 30 µs):",
            "",
            "| op | ours, µs | torch's own on the CPU, its work included, µs |",
            "|---|---|---|",
            *(f"| `{row['op']}` | {float(row['ours_us']):.0f} | {float(row['torch_us']):.0f} |" for row in rows),
            "",
        ]
    for path in sorted(folder.glob("cpu_training_*.csv")):
        rows = _read(path)
        lines += [
            f'Training step on {rows[0]["cpu"]}: time with `ops="torch"` / time with `ops="fused"`',
            f"([results](bench/results/{path.name}); goal: at least 0.95):",
            "",
            "| network | median | 20th–80th percentile |",
            "|---|---|---|",
            *(
                f"| {row['network']} | {float(row['ratio']):.3f} "
                f"| {float(row['ratio_p20']):.3f}–{float(row['ratio_p80']):.3f} |"
                for row in rows
            ),
            "",
        ]
    return lines


def block(folder: Path) -> str:
    """What stands between the two marks."""
    files = [(path.name, report.read_rows(path)) for path in report.results_files(folder)]
    return "\n".join([BEGIN, "", *gpu_tables(files), *cpu_lines(folder), END])


def split(text: str) -> tuple[str, str, str]:
    """README before the block, the block, and after. ValueError where the marks are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README must hold the lines {BEGIN!r} and {END!r} once each: put them back")
    before, rest = text.split(BEGIN)
    inside, after = rest.split(END)
    return before, BEGIN + inside + END, after


def write(readme: Path, folder: Path) -> bool:
    """Put the block into README; whether it changed."""
    before, old, after = split(readme.read_text())
    new = block(folder)
    if new != old:
        with atomic_path(readme) as temporary:
            temporary.write_text(before + new + after)
    return new != old


# A number with a unit of speed, or a factor with a word that compares.
SPEED = re.compile(
    r"\d[\d.,]*\s*(?:µs|us|[GT]B/s|[GT]FLOP/s|TFLOPS)\b"
    r"|\d[\d.,]*\s*(?:×|x|times|-fold|%)\s+(?:as fast|faster|slower|speed)"
    r"|(?:speed-?up|faster|slower)\w*\s+(?:of|by)\s+\d[\d.,]*",
    re.IGNORECASE,
)


def speed_figures(text: str) -> list[str]:
    """Speeds named in README outside of the block."""
    before, _, after = split(text)
    return [match.group() for part in (before, after) for match in SPEED.finditer(part)]
