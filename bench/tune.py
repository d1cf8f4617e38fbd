"""Candidate launch configurations, each tried alone: the evidence behind the thresholds in kernels/*/config.py."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from rich.table import Table
from torch import Tensor

from ..fused_ops.conv import aten
from ..kernels.batch_norm import launch as batch_norm_launch
from ..kernels.batch_norm.config import BatchNormConfig
from ..kernels.conv import plan_forward, plan_weight_grad, zones
from ..kernels.conv import pyramid as conv_pyramid
from ..kernels.conv.config import ConvConfig
from ..kernels.depthwise import launch as depthwise_launch
from ..kernels.depthwise.config import DepthwiseConfig
from ..kernels.pool import launch as pool_launch
from ..kernels.pool import plan_small
from ..kernels.pool.small_config import SmallConfig
from ..kernels.rnn import launch as rnn_launch
from ..kernels.rnn.config import RESIDENT, SHARDED, STEPWISE, RnnConfig
from .case import Case, GateError, Measure, Output, Variant, epsilon, error_of, first_algorithm, in_layout
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
TINY_CONV = [ConvConfig(16, 16, 16, 4, 1), ConvConfig(32, 16, 16, 4, 1), ConvConfig(16, 32, 32, 4, 1)]
# Elements of a tile, warps, programs of a multiprocessor.
BATCH_NORM = [BatchNormConfig(*each) for each in product((2048, 4096, 8192), (4, 8), (2, 3, 4, 6))]


def _rnn(hidden: int) -> list[RnnConfig]:
    """A resident program holds the whole matrix; the others a part of its columns."""
    whole = max(16, 1 << (hidden - 1).bit_length())
    resident = [RnnConfig(RESIDENT, b, whole, whole, w, 1) for b, w in product((16, 32), (2, 4, 8)) if whole <= 512]
    sharded = [RnnConfig(SHARDED, b, n, k, w, 1) for b, n, k, w in product((16, 32), (16, 32, 64), (64, 128), (4, 8))]
    stepwise = [RnnConfig(STEPWISE, b, n, k, 4, s) for b, n, k, s in product((16, 32, 64), (32, 64), (32, 64), (2, 3))]
    return resident + sharded + stepwise


def _pool(shipped: SmallConfig) -> list[SmallConfig]:
    """Rows and columns of a lane that are multiples of a stride of 2, for both ways."""
    columns = (8, 16) if shipped.channels == 1 else (2, 4)
    choices = product((2, 4), columns, (2, 4, 8))
    return [SmallConfig(v, u, shipped.channels, 32 * warps, warps) for v, u, warps in choices]


def _depthwise(shipped: DepthwiseConfig, stride_h: int, stride: int) -> list[DepthwiseConfig]:
    """Other lanes, and rows and columns of a lane, of X^T multiples of the stride; and each other choice alone."""
    lanes = shipped.rows * shipped.cols
    tiles = [
        replace(shipped, u=u, rows=total // cols, cols=cols, num_warps=num_warps)
        for u in ([stride * n for n in (1, 2, 4)] if shipped.window else [1])
        for total in (lanes // 2, lanes, 2 * lanes)
        for cols in sorted({8, 32, 128, shipped.cols})
        for num_warps in (2, 4, 8)
        if total >= cols
    ]
    looped = {"window_h": False, "v": 1, "spacing_h": 0, "tap_rows": 1}
    alone = [{"tap_rows": 1}, looped, looped | {"window": False, "u": 1, "spacing_w": 0}]
    alone += [{"v": v} for v in (shipped.v // 2, 2 * shipped.v) if shipped.window_h and v % stride_h == 0 and v > 0]
    every = dict.fromkeys([*(replace(shipped, **options) for options in alone), *tiles])
    return [config for config in every if config != shipped]


@dataclass(frozen=True)
class Zones:
    """Whether a convolution goes over validity zones, wherever there are any, or over plain tiles, a pyramid branch by
    branch: the evidence behind `zones.WORTH`."""

    zones: bool


class NoZonesError(Exception):
    """A launch that should have gone over zones went over tiles all the same: there are none, or too many."""


class Asked(NamedTuple):
    """A choice that a launch asked for: the arguments by name, and the configuration that ships."""

    arguments: dict[str, Any]
    config: Any


FAMILIES: dict[type, tuple[Any, ...]] = {
    ConvConfig: (plan_forward, plan_weight_grad, conv_pyramid),
    DepthwiseConfig: (depthwise_launch,),
    SmallConfig: (plan_small, pool_launch),
    BatchNormConfig: (batch_norm_launch,),
    RnnConfig: (rnn_launch,),
}


def candidates(case: Case, asked: Sequence[Asked], tiny: bool) -> list[Any]:
    """Configurations to try for a case whose launches asked for these; `tiny`: a few, for the interpreter, where no
    program waits for another. None for whole networks, whose layers each have their own."""
    if case.op == "network" or not asked:
        return []
    first = asked[0]
    if isinstance(first.config, ConvConfig):
        either = [Zones(True), Zones(False)] if case.direction != "weight gradient" else []
        return either + (TINY_CONV if tiny else CONV)
    if isinstance(first.config, DepthwiseConfig):
        every = _depthwise(first.config, first.arguments["height"].step, first.arguments["width"].step)
        return every[:3] + every[3::16] if tiny else every
    if isinstance(first.config, SmallConfig):
        every = _pool(first.config)
        return every[:2] if tiny else every
    if isinstance(first.config, BatchNormConfig):
        return BATCH_NORM[::7] if tiny else BATCH_NORM
    every = _rnn(case.shapes[3][-1])  # of W_hh
    return [c for c in every if c.regime != SHARDED][::12] if tiny else every


@contextlib.contextmanager
def changed(modules: Sequence[Any], **attributes: Any) -> Iterator[None]:
    """Within, these attributes of the modules that have them are others. Kept plans are dropped before and after."""
    before = [
        (module, name, getattr(module, name)) for module in modules for name in attributes if hasattr(module, name)
    ]
    kept = [value for module in modules for value in vars(module).values() if hasattr(value, "cache_clear")]
    for plans in kept:
        plans.cache_clear()
    for module, name, _ in before:
        setattr(module, name, attributes[name])
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        for plans in kept:
            plans.cache_clear()


@contextlib.contextmanager
def noting(asked: list[Asked]) -> Iterator[None]:
    """Within, what the launches' choices are asked and answer is added to `asked`."""
    modules = [module for family in FAMILIES.values() for module in family]

    def noted(choose: Any) -> Any:
        def chosen(*args: Any, **kwargs: Any) -> Any:
            config = choose(*args, **kwargs)
            asked.append(Asked(dict(inspect.signature(choose).bind(*args, **kwargs).arguments), config))
            return config

        return chosen

    with contextlib.ExitStack() as stack:
        for module in modules:
            if hasattr(module, "choose_config"):
                stack.enter_context(changed([module], choose_config=noted(module.choose_config)))
        yield


@contextlib.contextmanager
def forced(config: Any) -> Iterator[None]:
    """Within, every launch takes this configuration. Raises NoZonesError where none went over zones and should have."""
    if not isinstance(config, Zones):
        with changed(FAMILIES[type(config)], choose_config=lambda *_, **__: config):
            yield
        return
    taken: list[bool] = []

    def plan(*args: Any, **kwargs: Any) -> Any:
        taken.append(True)
        return shipped(*args, **kwargs)

    shipped = plan_forward.zones_plan
    settings = {"WORTH": math.inf} if config.zones else {"MOST_ROWS": 0}
    with changed((zones, plan_forward, conv_pyramid), zones_plan=plan, **settings):
        yield
    if config.zones and not taken:
        raise NoZonesError


@contextlib.contextmanager
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


def tune(case: Case, device: str, layout: str, measure: Measure | None) -> list[Row]:
    """The case with the shipped choice and with every candidate: checked on poisoned memory, then timed alone."""
    with changed([aten], is_at_hand=lambda _: False):  # dense products too are the kernels'
        return _tune(case, device, layout, measure)


def _tune(case: Case, device: str, layout: str, measure: Measure | None) -> list[Row]:
    contiguous = case.inputs(device)
    with first_algorithm():
        oracle = case.theirs(*(t.double() for t in contiguous))
    inputs = [t if t.dim() == 1 else in_layout(t, layout) for t in contiguous]
    limit = 2 * error_of(case.theirs(*inputs), oracle, case.reduction) + epsilon(case.dtype, device)
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none: interpreted"

    def row(config: Any) -> Row | None:
        error = ms = p20 = p80 = 0.0
        try:
            error, timing = _try(case, inputs, oracle, limit, config, measure)
            verdict = "right"
            if timing:
                ms, p20, p80, *_ = timing
        except NoZonesError:
            return None
        except Exception as problem:  # too large for the GPU, or wrong: the table says so
            verdict = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
        words = layout, _words(config), verdict
        times: Any = (error, ms, p20, p80)
        return Row(gpu, triton.__version__, commit(), *_names(case), *words, *times)

    asked: list[Asked] = []
    with noting(asked):
        rows = [row(None)]
    rows += map(row, candidates(case, asked, tiny=device == "cpu"))
    return [each for each in rows if each]


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
