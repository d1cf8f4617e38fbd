"""Host time per call: everything that Python does before a kernel starts, measured where there is no GPU.

The ops take the path that they take on a GPU, up to Triton's launcher: kernels are compiled for sm_90 and a driver
stands in for CUDA's whose launch does nothing. What is left out is the launcher itself, some microseconds in C. CPU
tensors stand for the GPU's. Times are CPU times of the one thread, so that others on the machine don't count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from rich.table import Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .. import fused_ops
from ..fused_ops import dispatch
from ..fused_ops.conv import ops as conv_ops
from ..fused_ops.pool import ops as pool_ops
from ..fused_ops.rnn import ops as rnn_ops
from ..kernels.runtime import H200, INTERPRETED
from .report import commit
from .timing import quantiles

GOAL_US = 30
Pair = tuple[Callable[[], Any], Callable[[], Any]]


class _Utils:
    """What Triton asks a driver about a device and a binary."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": H200.shared_memory, "multiprocessor_count": H200.multiprocessors}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads


class _Driver:
    """A GPU that compiles as an H200 and runs nothing."""

    utils = _Utils()

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def stubbed_launch() -> Iterator[None]:
    """Within, ops on CPU tensors do all that they do on a GPU but run a kernel: results are not computed.

    RuntimeError where Triton interprets: it has no launch then.
    """
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET")
    driver.set_active(_Driver())  # pyright: ignore[reportArgumentType]
    with ExitStack() as stack:
        stack.callback(setattr, driver, "_active", None)
        # CPU tensors go to the kernels, fp32 in TF32 as on a GPU; the answer to a check would have to be waited for.
        stack.enter_context(mock.patch.object(dispatch, "INTERPRETED", True))
        stack.enter_context(mock.patch.object(pool_ops, "_checked", lambda index: False))
        for ops in (conv_ops, rnn_ops):
            stack.enter_context(mock.patch.object(ops, "uses_tf32", lambda x, switch: x.dtype == torch.float32))
        yield


@contextmanager
def noting_loads(note: Callable[[dict[str, Path], str], None]) -> Iterator[None]:
    """Within, `note` is told of every kernel that Triton loads: its cached files by what they end in, and its hash."""

    def loaded(module: Any, function: Any, name: str, metadata_group: dict[str, str], hash: str) -> None:
        note({Path(path).suffix: Path(path) for path in metadata_group.values()}, hash)

    hooks = knobs.runtime.kernel_load_end_hook
    hooks.add(loaded)
    try:
        yield
    finally:
        hooks.remove(loaded)


def calls(device: str) -> dict[str, Pair]:
    """A tiny forward call of each op, ours and torch's. Convolutions are dilated: on a GPU dense ones are torch's."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    x1, x2, x3, skip = randn(1, 8, 8), randn(1, 8, 8, 8), randn(1, 8, 4, 4, 4), randn(1, 8, 16, 16)
    w1, w2, w3, up, bias = randn(8, 8, 3), randn(8, 8, 3, 3), randn(8, 8, 3, 3, 3), randn(8, 8, 2, 2), randn(8)
    pooled, indices = F.max_pool2d(x2, 2, return_indices=True)
    offsets = fused_ops.indices_to_offsets(indices, (8, 8), 2)
    ours_rnn, torch_rnn = fused_ops.RNN(8, 16).to(device), torch.nn.RNN(8, 16).to(device)
    steps = randn(4, 2, 8)
    beside_skip = randn(1, 16, 16, 16)[:, 8:]
    vectors = randn(8), randn(8).exp(), randn(8), bias  # running mean and variance, weight and bias
    ours = fused_ops
    return {
        "conv1d": (lambda: ours.conv1d(x1, w1, bias, 1, 2, 2), lambda: F.conv1d(x1, w1, bias, 1, 2, 2)),
        "conv2d": (lambda: ours.conv2d(x2, w2, bias, 1, 2, 2), lambda: F.conv2d(x2, w2, bias, 1, 2, 2)),
        "conv3d": (lambda: ours.conv3d(x3, w3, bias, 1, 2, 2), lambda: F.conv3d(x3, w3, bias, 1, 2, 2)),
        "conv_transpose2d": (
            lambda: ours.conv_transpose2d(x2, up, bias, 2),
            lambda: F.conv_transpose2d(x2, up, bias, 2),
        ),
        "conv_transpose2d_out": (
            lambda: ours.conv_transpose2d(x2, up, bias, 2, out=beside_skip),
            lambda: beside_skip.copy_(F.conv_transpose2d(x2, up, bias, 2)),
        ),
        "conv_transpose2d_concat": (
            lambda: ours.conv_transpose2d_concat(x2, skip, up, bias, 2),
            lambda: torch.cat([skip, F.conv_transpose2d(x2, up, bias, 2)], 1),
        ),
        "max_pool2d": (lambda: ours.max_pool2d(x2, 2), lambda: F.max_pool2d(x2, 2)),
        "max_pool2d_with_offsets": (
            lambda: ours.max_pool2d_with_offsets(x2, 2),
            lambda: F.max_pool2d(x2, 2, return_indices=True),
        ),
        "max_unpool2d_with_offsets": (
            lambda: ours.max_unpool2d_with_offsets(pooled, offsets, (8, 8), 2),
            lambda: F.max_unpool2d(pooled, indices, [2, 2]),
        ),
        "batch_norm": (
            lambda: ours.batch_norm(x2, *vectors, activation="relu"),
            lambda: F.relu(F.batch_norm(x2, *vectors)),
        ),
        "batch_norm_training": (
            lambda: ours.batch_norm(x2, *vectors, training=True, activation="relu"),
            lambda: F.relu(F.batch_norm(x2, *vectors, training=True)),
        ),
        "RNN": (lambda: ours_rnn(steps), lambda: torch_rnn(steps)),
    }


@dataclass(frozen=True)
class Row:
    """Microseconds of one forward call: median, 20th and 80th percentile."""

    cpu: str
    torch: str
    triton: str
    commit: str
    op: str
    ours_us: float
    ours_us_p20: float
    ours_us_p80: float
    torch_us: float


def cpu_name() -> str:
    """As the system calls it, with the number of cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{name}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def time_calls(pair: Pair, rounds: int, repeats: int) -> list[tuple[float, float, float]]:
    """Microseconds of each call (median, p20, p80) over `rounds` of `repeats`, in turn."""
    for call in pair:
        for _ in range(repeats):
            call()
    times: list[list[float]] = [[] for _ in pair]
    for _ in range(rounds):
        for call, mine in zip(pair, times, strict=True):
            started = time.thread_time_ns()
            for _ in range(repeats):
                call()
            mine.append((time.thread_time_ns() - started) / repeats / 1e3)
    return [quantiles(mine) for mine in times]


def measure(rounds: int, repeats: int) -> list[Row]:
    """Every op on one thread, on stubbed launches."""
    torch.set_num_threads(1)
    rows = []
    with stubbed_launch():
        for op, pair in calls("cpu").items():
            with torch.no_grad():
                ours, theirs = time_calls(pair, rounds, repeats)
            where = cpu_name(), torch.__version__, triton.__version__, commit()
            rows.append(Row(*where, op, *ours, theirs[0]))
    return rows


def table(rows: list[Row]) -> Table:
    result = Table(title=f"Host time of a forward call on {rows[0].cpu}; goal: {GOAL_US} us")
    for column in ("op", "ours us", "p20-p80", "torch us (its work on the CPU included)"):
        result.add_column(column, justify="left" if column == "op" else "right")
    for row in rows:
        colour = "green" if row.ours_us <= GOAL_US else "red"
        spread = f"{row.ours_us_p20:.1f}-{row.ours_us_p80:.1f}"
        result.add_row(row.op, f"[{colour}]{row.ours_us:.1f}[/]", spread, f"{row.torch_us:.1f}")
    return result
