"""Times on a CUDA GPU, and the floor below which no time can lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

Key = TypeVar("Key")

FLUSH_BYTES = 512 * 2**20  # several times the largest L2
GRAPH_BELOW = 50e-6  # seconds; below, the launch from Python would be most of what is measured
WARM_UP = 3


class Timing(NamedTuple):
    """Milliseconds (median, 20th and 80th percentile), and MiB that a call allocates at its peak, inputs apart."""

    ms: float
    ms_p20: float
    ms_p80: float
    peak_mib: float


class Ceilings(NamedTuple):
    """What this GPU reached in this run: bytes/s of a copy (read + written), FLOP/s of a matrix product by dtype."""

    copy: float
    matmul: Mapping[torch.dtype, float]

    def floor(self, flop: float, bytes: float, dtype: torch.dtype) -> float:
        """Least seconds for this work, max(FLOP / matmul ceiling, bytes / copy ceiling): the roofline."""
        return max(flop / self.matmul[dtype], bytes / self.copy)


def _peak_mib(call: Callable[[], Any]) -> float:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(calls: Mapping[Key, Callable[[], Any]], repeats: int, graph: bool) -> dict[Key, Timing]:
    """Time the calls in turn, `repeats` times each, so that a clock that drifts touches all alike.

    Each call finds L2 flushed. The flush also keeps the GPU busy while Python issues the call, so its launch is
    hidden as long as it is shorter. With `graph`, a CUDA graph of the call is replayed.
    """
    peaks = {}
    for key, call in calls.items():
        for _ in range(WARM_UP):
            call()
        peaks[key] = _peak_mib(call)
    torch.cuda.synchronize()
    replays = {key: _captured(call) if graph else call for key, call in calls.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = {key: [] for key in calls}
    for _ in range(repeats):
        for key, replay in replays.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            replay()
            end.record()
            events[key].append((start, end))
    torch.cuda.synchronize()
    timings = {}
    for key, pairs in events.items():
        times = torch.tensor([start.elapsed_time(end) for start, end in pairs], dtype=torch.float64)
        p20, median, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        timings[key] = Timing(median, p20, p80, peaks[key])
    return timings


def measure_ceilings(dtypes: set[torch.dtype], repeats: int) -> Ceilings:
    """Copy of 1 GiB, and 8192^3 matrix products; fp32 ones in TF32, as convolutions multiply by default."""
    torch.set_float32_matmul_precision("high")
    source = torch.randint(127, (2**30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy = measure({"copy": lambda: target.copy_(source)}, repeats, graph=False)["copy"]
    matmul = {}
    for dtype in dtypes:
        a, b = (torch.randn(8192, 8192, dtype=dtype, device="cuda") for _ in range(2))
        timing = measure({"matmul": lambda a=a, b=b: a @ b}, repeats, graph=False)["matmul"]
        matmul[dtype] = 2 * 8192**3 / (timing.ms / 1e3)
    return Ceilings(2 * 2**30 / (copy.ms / 1e3), matmul)
