"""Times on a CUDA GPU, and the floor below which no time can lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .algorithm import algorithm

Key = TypeVar("Key")
Calls = Mapping[Key, Callable[[], Any]]

FLUSH_BYTES = 512 * 2**20  # several times the largest L2
GRAPH_BELOW = 50e-6  # seconds; below, the launch from Python would be most of what is measured
WARM_UP = 3
MARK = "spin_kernel"  # what torch.cuda._sleep runs
SECONDS = 0.25  # for all repeats of one case; a slow case is repeated less often, but at least FEWEST times
FEWEST = 7


class Timing(NamedTuple):
    """Milliseconds (median, 20th and 80th percentile), MiB that a call allocates at its peak, inputs apart, whether a
    CUDA graph was replayed, the algorithm that the names of its GPU kernels tell, and the two kernels that took most of
    it, with how often each ran."""

    ms: float
    ms_p20: float
    ms_p80: float
    peak_mib: float
    replayed: str = "no"
    algorithm: str = ""
    kernels: str = ""


class Ceilings(NamedTuple):
    """Bytes/s of a copy (read + written), and FLOP/s of a matrix product by dtype."""

    copy: float
    matmul: Mapping[torch.dtype, float]

    def floor(self, flop: float, bytes: float, dtype: torch.dtype) -> float:
        """Least seconds for this work, max(FLOP / matmul ceiling, bytes / copy ceiling): the roofline."""
        return max(flop / self.matmul[dtype], bytes / self.copy)


# Not measured: what an H200 is expected to reach, for the cost model where there is no results file. fp32 in TF32.
ASSUMED = Ceilings(4.3e12, {torch.bfloat16: 790e12, torch.float16: 790e12, torch.float32: 400e12})


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


def _replays(calls: Calls, graph: bool) -> tuple[dict[Any, Callable[[], Any]], bool]:
    """CUDA graphs of the calls. Of all or of none: a launch that only some of them pay for would be no comparison."""
    if graph:
        try:
            return {key: _captured(call) for key, call in calls.items()}, True
        except RuntimeError:  # some call waits for the GPU, which a capture forbids
            torch.cuda.synchronize()
    return dict(calls), False


def kernels_of(calls: Calls) -> dict[Any, list[tuple[int, str]]]:
    """Of each call how often each of its GPU kernels ran, and its name; those that took most time first.

    One profile for all of them: to start and read one takes as long as a small case.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call in calls.values():
            call()
            torch.cuda._sleep(1)  # the mark behind it
        torch.cuda.synchronize()
    # Not key_averages(): it makes a Python object of each event, of which a loop over time steps has tens of thousands.
    results: Any = profiler.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = [event for event in results.events() if event.device_type() == DeviceType.CUDA]
    events.sort(key=lambda event: event.start_ns())
    found = kernels_between_marks([(event.name(), event.duration_ns()) for event in events])
    # With a mark lost by the profiler nobody could say whose a kernel is; the times don't depend on it.
    return dict(zip(calls, found if len(found) == len(calls) else [[]] * len(calls), strict=True))


def kernels_between_marks(events: list[tuple[str, int]]) -> list[list[tuple[int, str]]]:
    """`kernels_of`, from names and durations in the order in which they ran."""
    found: list[list[tuple[int, str]]] = []
    durations: dict[str, list[int]] = {}
    for name, duration in events:
        if MARK in name:
            found.append([(len(each), n) for n, each in sorted(durations.items(), key=lambda item: -sum(item[1]))])
            durations = {}
        else:
            durations.setdefault(name, []).append(duration)
    return found


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    p20, median, p80 = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    )
    return median, p20, p80


def _round(replays: Calls, flush: torch.Tensor) -> dict[Any, tuple[torch.cuda.Event, torch.cuda.Event]]:
    """Every call once, between two events, L2 flushed before. The flush also keeps the GPU busy while Python issues
    the call, so its launch is hidden as long as it is shorter."""
    events = {}
    for key, replay in replays.items():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        replay()
        end.record()
        events[key] = start, end
    return events


def measure(calls: Calls, repeats: int, graph: bool) -> dict[Any, Timing]:
    """Time the calls in turn, up to `repeats` times each, so that a clock that drifts touches all alike.

    With `graph`, CUDA graphs of the calls are replayed where all of them can be captured.
    """
    peaks = {}
    for key, call in calls.items():
        for _ in range(WARM_UP):
            call()
        peaks[key] = _peak_mib(call)
    kernels = kernels_of(calls)
    replays, replayed = _replays(calls, graph)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    _round(replays, flush)
    last.record()
    torch.cuda.synchronize()
    repeats = max(min(repeats, int(1e3 * SECONDS / first.elapsed_time(last))), min(repeats, FEWEST))
    rounds = [_round(replays, flush) for _ in range(repeats)]
    torch.cuda.synchronize()
    return {
        key: Timing(
            *quantiles([start.elapsed_time(end) for start, end in (events[key] for events in rounds)]),
            peaks[key],
            "yes" if replayed else "no",
            algorithm(kernels[key]),
            "; ".join(f"{count} x {name[:80]}" for count, name in kernels[key][:2]),
        )
        for key in calls
    }


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
