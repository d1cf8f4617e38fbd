"""Candidate launch configurations, each tried alone: the evidence behind the thresholds in kernels/*/config.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
import triton
from rich.table import Table
from torch import Tensor

from ..kernels.conv import launch as conv_launch
from ..kernels.conv.config import ConvConfig
from ..kernels.pool import launch as pool_launch
from ..kernels.pool.config import PoolConfig
from ..kernels.rnn import launch as rnn_launch
from ..kernels.rnn.config import RESIDENT, SHARDED, STEPWISE, RnnConfig
from .case import FORMATS, Case, GateError, Measure, Output, Variant, epsilon, error_of, in_layout
from .report import commit, name_of

SHIPPED = "as shipped"
# A spread of tiles around those that ship: rows, columns, reduction, warps, stages.
CONV = [
    ConvConfig(block_m, block_n, block_k, num_warps, num_stages)
    for block_m, block_n in ((32, 32), (64, 32), (64, 64), (128, 64), (64, 128), (128, 128), (256, 64), (128, 256))
    for block_k in (16, 32, 64)
    for num_warps in (4, 8)
    for num_stages in (2, 3, 4)
    if block_m * block_n >= 32 * 32 * num_warps // 4
]
POOL = [
    PoolConfig(block, num_warps)
    for block in (128, 256, 512, 1024)
    for num_warps in (1, 2, 4, 8)
    if block >= 32 * num_warps
]
TINY_CONV = [ConvConfig(16, 16, 16, 4, 1), ConvConfig(32, 16, 16, 4, 1), ConvConfig(16, 32, 32, 4, 1)]


def _rnn(hidden: int) -> list[RnnConfig]:
    """A resident program holds the whole matrix; the others a part of its columns."""
    whole = max(16, 1 << (hidden - 1).bit_length())
    resident = [RnnConfig(RESIDENT, b, whole, whole, w, 1) for b, w in product((16, 32), (2, 4, 8)) if whole <= 512]
    sharded = [RnnConfig(SHARDED, b, n, k, w, 1) for b, n, k, w in product((16, 32), (16, 32, 64), (64, 128), (4, 8))]
    stepwise = [RnnConfig(STEPWISE, b, n, k, 4, s) for b, n, k, s in product((16, 32, 64), (32, 64), (32, 64), (2, 3))]
    return resident + sharded + stepwise


def candidates(case: Case, tiny: bool) -> list[Any]:
    """Configurations to try for a case; `tiny`: a few, for the interpreter, where no program waits for another."""
    if case.op.startswith("conv"):
        return TINY_CONV if tiny else CONV
    if case.op.startswith("max"):
        return POOL[:2] if tiny else POOL
    if case.op.startswith("rnn"):
        every = _rnn(case.shapes[3][-1])  # of W_hh
        return [c for c in every if c.regime != SHARDED][::12] if tiny else every
    return []


@contextmanager
def forced(config: Any) -> Iterator[None]:
    """Within, every launch takes this configuration. Kept plans are dropped before and after."""
    module: Any = {ConvConfig: conv_launch, PoolConfig: pool_launch, RnnConfig: rnn_launch}[type(config)]
    chosen: Callable[..., Any] = module.choose_config
    kept = [value for value in vars(module).values() if hasattr(value, "cache_clear")]
    for plans in kept:
        plans.cache_clear()
    module.choose_config = lambda *_, **__: config
    try:
        yield
    finally:
        module.choose_config = chosen
        for plans in kept:
            plans.cache_clear()


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, torch.empty gives NaN: what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class Row:
    """One configuration on one case. `error` as the benchmark's; `verdict`: "right", or what went wrong. Milliseconds
    are 0 where nothing was timed."""

    gpu: str
    triton: str
    commit: str
    op: str
    name: str
    shape: str
    dtype: str
    direction: str
    layout: str
    config: str
    verdict: str
    error: float
    ms: float
    ms_p20: float
    ms_p80: float


def _words(config: Any) -> str:
    return SHIPPED if config is None else " ".join(f"{name}={value}" for name, value in asdict(config).items())


def tune(case: Case, device: str, layout: str, configs: list[Any], measure: Measure | None) -> list[Row]:
    """The case with the shipped choice and with every candidate: checked on poisoned memory, then timed alone."""
    contiguous = case.inputs(device)
    oracle = case.theirs(*(t.double() for t in contiguous))
    inputs = [t if t.dim() == 1 else in_layout(t, layout) for t in contiguous]
    limit = 2 * error_of(case.theirs(*inputs), oracle, case.reduction) + epsilon(case.dtype, device)
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none: interpreted"
    rows = []
    for config in [None, *configs]:
        error = ms = p20 = p80 = 0.0
        try:
            error, timing = _try(case, inputs, oracle, limit, config, measure)
            verdict = "right"
            if timing:
                ms, p20, p80, *_ = timing
        except Exception as problem:  # too large for the GPU, or wrong: the table says so
            verdict = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
        words = layout, _words(config), verdict
        times: Any = (error, ms, p20, p80)
        rows.append(Row(gpu, triton.__version__, commit(), *_names(case), *words, *times))
    return rows


def _try(case: Case, inputs: list[Tensor], oracle: Output, limit: float, config: Any, measure: Measure | None):
    if config is not None:
        with forced(config):
            return _try(case, inputs, oracle, limit, None, measure)
    with poisoned():
        error = error_of(case.ours(*inputs), oracle, case.reduction)
    if not error <= limit:
        raise GateError(f"error {error:.2e} against fp64, allowed {limit:.2e}")
    variant = Variant("ours", "")
    return error, measure({variant: lambda: case.ours(*inputs)})[variant] if measure else None


def _names(case: Case) -> tuple[str, str, str, str, str]:
    return case.op, case.name, case.shape, name_of(case.dtype), case.direction


def layouts(case: Case) -> list[str]:
    known = all(len(shape) in FORMATS or len(shape) == 1 for shape in case.shapes)
    return ["contiguous", "channels_last"] if known else ["contiguous"]


def table(rows: list[Row]) -> Table:
    """Of each case the fastest ten, and what is wrong."""
    first = rows[0]
    result = Table(title=f"{first.op} {first.name}, {first.direction}, {first.dtype}, {first.layout}")
    for column in ("configuration", "ms (p20-p80)", "error", "verdict"):
        result.add_column(column)
    right = sorted((row for row in rows if row.verdict == "right"), key=lambda row: row.ms)
    shown = [*right[:10], *(row for row in right[10:] if row.config == SHIPPED)]
    for row in [*shown, *(row for row in rows if row.verdict != "right")]:
        times = f"{row.ms:.4f} ({row.ms_p20:.4f}-{row.ms_p80:.4f})" if row.ms else ""
        config = f"[bold]{row.config}[/]" if row.config == SHIPPED else row.config
        result.add_row(config, times, f"{row.error:.1e}", row.verdict)
    return result
