"""Tuning: every family of kernels has candidates, each reaches the launch alone, and one that is wrong is found."""

import dataclasses

import pytest
import torch
from backstride.bench import bench_batch_norm, bench_conv, bench_networks, bench_pool, bench_pyramid, tune
from backstride.bench.tune import Asked, Zones, candidates, forced, noting
from backstride.kernels.conv.config import ConvConfig
from backstride.kernels.conv.transpose import transpose_kernel
from backstride.kernels.depthwise.config import DepthwiseConfig
from backstride.kernels.pool.small_config import SmallConfig
from backstride.kernels.runtime import Plan

UP = bench_conv.Layer("bilinear", 1, 3, 3, (3, 4), 4, 2, 1, groups=3, transposed=True)
ATROUS = bench_conv.Layer("atrous", 1, 16, 16, (5, 6), 3, 1, 2, 2)


@pytest.fixture
def launched(monkeypatch):
    """The plans that are launched, but for those that bring tensors into another order."""
    plans, launch = [], Plan.launch

    def noted(self, *pointers, **options):
        if self.kernel is not transpose_kernel:
            plans.append(self)
        launch(self, *pointers, **options)

    monkeypatch.setattr(Plan, "launch", noted)
    return plans


def run(case):
    return case.ours(*case.inputs("cpu"))


def asked_by(case):
    asked = []
    with noting(asked):
        run(case)
    return asked


def test_zones_or_tiles(launched):
    """Of a convolution, its transpose, and a pyramid, whose branches are launches of their own over tiles."""
    cases = [bench_conv.case(ATROUS, direction, torch.float32) for direction in ("forward", "input gradient")]
    pyramid = bench_pyramid.case(bench_pyramid.PYRAMIDS[0].tiny(), "forward", torch.float32)
    for case, tiles in ((cases[0], 1), (cases[1], 1), (pyramid, 4)):
        for choice, tables in ((Zones(True), [True]), (Zones(False), [False] * tiles)):
            launched.clear()
            with forced(choice):
                run(case)
            assert [plan.table is not None for plan in launched] == tables
        rows = tune.tune(case, "cpu", "contiguous", None)
        assert {"zones=True", "zones=False"} < {row.config for row in rows}
        assert {row.verdict for row in rows} == {"right"}


def test_zones_that_are_not_there_are_no_row():
    case = bench_conv.case(dataclasses.replace(ATROUS, channels=3), "forward", torch.float32)
    assert "zones=True" not in {row.config for row in tune.tune(case, "cpu", "contiguous", None)}
    gradient = bench_conv.case(ATROUS, "weight gradient", torch.float32)
    assert not any(isinstance(config, Zones) for config in candidates(gradient, asked_by(gradient), tiny=True))


@pytest.mark.parametrize("direction", ["forward", "input gradient", "weight gradient"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_depthwise(direction, layout):
    rows = tune.tune(bench_conv.case(UP, direction, torch.float32), "cpu", layout, None)
    assert len(rows) > 5 and {row.verdict for row in rows} == {"right"}
    assert all(word in rows[1].config for word in ("window=", "tap_rows=", "num_warps="))


def test_candidates_for_the_transpose_keep_whole_strides():
    case = bench_conv.case(UP, "forward", torch.float32)
    every = candidates(case, asked_by(case), tiny=False)
    assert len(every) == len(set(every)) > 50
    assert {config.u % UP.stride for config in every if config.window} == {0}
    assert {config.v % UP.stride for config in every if config.window_h} == {0}


def test_a_candidate_that_is_wrong_is_found(monkeypatch):
    """Three columns a lane are no multiple of the stride: were the choice not forced, this would be right."""
    case = bench_conv.case(UP, "forward", torch.float32)
    wrong = dataclasses.replace(asked_by(case)[0].config, u=3)
    monkeypatch.setattr(tune, "candidates", lambda *_, **__: [wrong])
    shipped, row = tune.tune(case, "cpu", "contiguous", None)
    assert shipped.verdict == "right" and row.verdict != "right"


CASES = [
    (bench_conv.case(ATROUS, "forward", torch.float32), ConvConfig(16, 16, 16, 4, 1), "BLOCK_M", 16),
    (bench_pyramid.cases(True, True)[0], ConvConfig(16, 16, 16, 4, 1), "BLOCK_M", 16),
    (bench_conv.case(UP, "forward", torch.float32), DepthwiseConfig(True, True, 2, 4, 0, 0, 2, 8, 1, 4, 1), "COLS", 8),
    (bench_pool.cases(True, True)[0], SmallConfig(2, 8, 1, 128, 1), "LANES", 128),
]


@pytest.mark.parametrize(("case", "config", "name", "value"), CASES, ids=["conv", "pyramid", "depthwise", "pool"])
def test_a_candidate_reaches_the_launch_and_is_gone_after(launched, case, config, name, value):
    run(case)
    shipped = [plan.constants[name] for plan in launched]
    launched.clear()
    with forced(config):
        run(case)
    assert [plan.constants[name] for plan in launched] == [value] * len(launched) != shipped
    launched.clear()
    run(case)
    assert [plan.constants[name] for plan in launched] == shipped


def test_batch_normalisation():
    """Few candidates in the interpreter, and of each choice every value."""
    case = bench_batch_norm.cases(True, True)[1]
    asked = asked_by(case)
    assert asked
    few, every = (candidates(case, asked, tiny) for tiny in (True, False))
    assert set(few) < set(every) and len(set(every)) == len(every)
    for name in ("tile", "num_warps", "programs"):
        assert {getattr(config, name) for config in few} == {getattr(config, name) for config in every}
    rows = tune.tune(case, "cpu", "channels_last", None)
    assert len(rows) == 1 + len(few) and {row.verdict for row in rows} == {"right"}


def test_whole_networks_have_no_candidates():
    network = bench_networks.cases(True, True)[0]
    assert candidates(network, [Asked({}, ConvConfig(16, 16, 16, 4, 1))], tiny=True) == []
