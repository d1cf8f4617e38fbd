"""What ours is compared with: torch.compile in both layouts."""

import pytest
import torch
from backstride.bench import bench_conv, bench_networks, bench_pool
from backstride.bench.case import Variant, run_case, variants
from backstride.bench.timing import WARM_UP

CONV = bench_conv.case(bench_conv.Layer("layer", 2, 3, 5, (6, 7), 3, 2, 1), "forward", torch.float32)
POOL, ROUND_TRIP = bench_pool.cases(True, True)[:2]
NETWORK = bench_networks.case(bench_networks.NETWORKS[0].tiny(), torch.float32)


class Backend:
    """Of torch.compile: notes what it is given to compile, and runs that as it is."""

    def __init__(self) -> None:
        self.graphs: list[tuple[bool, int]] = []  # whether its first image is channels_last; number of results

    def __call__(self, graph, inputs):
        image = next(t for t in inputs if t.dim() == 4)
        results = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        self.graphs.append((image.stride(1) == 1, len(results)))
        return graph


@pytest.fixture
def backend(monkeypatch):
    result, compile = Backend(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, mode, dynamic: compile(call, backend=result, dynamic=dynamic))
    yield result
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("case", "results"),
    [(CONV, [1]), (POOL, [2]), (ROUND_TRIP, [2, 1]), (NETWORK, None)],
    ids=["convolution", "pooling", "unpooling", "network"],
)
def test_both_layouts_are_compiled_in_the_warm_up(backend, case, results):
    """And not when they are timed. Pooling has to return its indices: what nobody wants would not be computed."""
    calls = {v: call for v, call in variants(case, "cpu", compiled=True).items() if v.name == "torch.compile"}
    assert {v.layout for v in calls} == {"contiguous", "channels_last"}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    compiled = list(backend.graphs)
    for call in calls.values():
        call()
    assert backend.graphs == compiled
    assert {last for last, _ in compiled} == {False, True}
    if results:
        assert [n for last, n in compiled if last] == results


def test_compiled_baselines_are_checked_too(backend):
    errors = run_case(CONV, "cpu", None, True).errors
    assert errors[Variant("torch.compile", "channels_last")] < 1e-5
