"""Whole networks on the CPU: a training step with ops="fused" against ops="torch". Drop-in must not cost CPU users."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.table import Table
from torch import nn

from ..kernels.runtime import INTERPRETED
from ..models.language.char_rnn import CharRNN
from ..models.segmentation.segnet import SegNetBasic
from ..models.segmentation.unet import UNet
from .bench_networks import VOCABULARY, Step
from .host import cpu_name
from .report import commit
from .timing import quantiles

GOAL = 0.95
# Small enough for some hundred steps, large enough for the convolutions to take most of the time.
NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "U-Net, width 16, 3x64x64, batch 2": (
        partial(UNet, 3, 2, width=16, depth=3, padding="same", dropout=0.0),
        (2, 3, 64, 64),
    ),
    "SegNet-Basic, width 16, 3x48x64, batch 2": (partial(SegNetBasic, width=16), (2, 3, 48, 64)),
    "char-RNN, 2 x 128, 50 steps, batch 50": (partial(CharRNN, VOCABULARY), (50, 50)),
    "char-RNN, 1 x 64, 10 steps, batch 1": (partial(CharRNN, VOCABULARY, layers=1, width=64), (10, 1)),
}


@dataclass(frozen=True)
class Row:
    """Ratio: time with "torch" / time with "fused", of steps that follow each other; median, 20th and 80th percentile.
    Milliseconds of one step: medians."""

    cpu: str
    torch: str
    commit: str
    network: str
    steps: int
    fused_ms: float
    torch_ms: float
    ratio: float
    ratio_p20: float
    ratio_p80: float


def measure(seconds: float) -> list[Row]:
    """Every network for about `seconds`, on one thread, the two in turn. Times are CPU times of the process.

    RuntimeError where Triton interprets: CPU tensors then go to the kernels.
    """
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET")
    torch.set_num_threads(1)
    rows = []
    for name, (build, size) in NETWORKS.items():
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))
        fused, plain = (Step(build, ops, joined=False) for ops in ("fused", "torch"))
        for step in (fused, plain, fused, plain):
            step(x)
        times: dict[Step, list[float]] = {fused: [], plain: []}
        started = time.monotonic()
        while time.monotonic() - started < seconds or len(times[plain]) < 5:
            # Each goes first as often as the other.
            for step in (fused, plain) if len(times[plain]) % 2 else (plain, fused):
                begun = time.process_time_ns()
                step(x)
                times[step].append((time.process_time_ns() - begun) / 1e6)
        ratio = quantiles([b / a for a, b in zip(times[fused], times[plain], strict=True)])
        medians = quantiles(times[fused])[0], quantiles(times[plain])[0]
        rows.append(Row(cpu_name(), torch.__version__, commit(), name, len(times[plain]), *medians, *ratio))
    return rows


def table(rows: list[Row]) -> Table:
    result = Table(title=f"Training step on {rows[0].cpu}: time with torch / time with fused; goal: {GOAL}")
    for column in ("network", "steps", "fused ms", "torch ms", "ratio", "p20-p80"):
        result.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        ratio = f"[{'green' if row.ratio >= GOAL else 'red'}]{row.ratio:.3f}[/]"
        spread = f"{row.ratio_p20:.3f}-{row.ratio_p80:.3f}"
        result.add_row(row.network, str(row.steps), f"{row.fused_ms:.2f}", f"{row.torch_ms:.2f}", ratio, spread)
    return result
