"""The benchmark's gate, floors and files, and its dry run on the CPU."""

import dataclasses

import pytest
import torch
from backstride import fused_ops
from backstride.bench import bench_conv, bench_networks, bench_rnn, probe_rnn, report
from backstride.bench.__main__ import app
from backstride.bench.case import BASELINE, GateError, Variant, run_case
from backstride.bench.timing import Ceilings, Timing
from typer.testing import CliRunner

WHERE = report.Environment("a GPU", "1.2", "2.13", "3.7", "abc, dirty")
CEILINGS = Ceilings(copy=4e12, matmul={torch.float32: 400e12, torch.bfloat16: 800e12})
LAYER = bench_conv.Layer("layer", 2, 3, 5, (6, 7), 3, 2, 1)


def fake_measure(calls):
    return {variant: Timing(0.1 * (i + 1), 0.05, 0.3, 1 / 3) for i, variant in enumerate(calls)}


def forward_case():
    return bench_conv.case(LAYER, "forward", torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the command times")
def test_dry_run():
    done = CliRunner().invoke(app, ["--quick", "--op", "conv1d"])
    assert done.exit_code == 0, done.output
    assert "no GPU was measured" in done.output and "conv_apply_kernel" in done.output
    assert "3 of 3 cases are right" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the command times")
def test_dry_run_fails_if_an_op_is_wrong(monkeypatch):
    monkeypatch.setattr(fused_ops, "conv1d", lambda *a, **k: 1.001 * torch.nn.functional.conv1d(*a, **k))
    done = CliRunner().invoke(app, ["--quick", "--op", "conv1d"])
    assert done.exit_code == 1
    assert "WRONG" in done.output and "2 of 3 cases are right" in done.output


def test_unknown_op_is_refused():
    done = CliRunner().invoke(app, ["--op", "fold"])
    assert done.exit_code == 2 and "conv_transpose2d" in done.output


@pytest.mark.parametrize(
    "wrong", [lambda y: 1.001 * y, lambda y: y * float("nan"), lambda y: y[..., 1:]], ids=["scaled", "nan", "shape"]
)
def test_wrong_numbers_are_never_timed(monkeypatch, wrong):
    measured = []
    monkeypatch.setattr(fused_ops, "conv2d", lambda *a, **k: wrong(torch.nn.functional.conv2d(*a, **k)))
    with pytest.raises(GateError):
        run_case(forward_case(), "cpu", measured.append)
    assert measured == []


def test_right_numbers_are_timed():
    result = run_case(forward_case(), "cpu", fake_measure)
    assert result.timings.keys() == result.errors.keys() >= {BASELINE, Variant("ours", "channels_last")}


def test_a_case_can_be_checked_on_less_data(monkeypatch):
    """What is timed is the large one."""
    large = dataclasses.replace(forward_case(), check=bench_conv.case(LAYER, "forward", torch.float32), theirs=None)
    with pytest.raises(TypeError):
        run_case(dataclasses.replace(large, check=None), "cpu")
    assert run_case(large, "cpu").errors[BASELINE] < 1e-5
    monkeypatch.setattr(fused_ops, "conv2d", lambda *a, **k: 1.001 * torch.nn.functional.conv2d(*a, **k))
    wrong = dataclasses.replace(large, check=bench_conv.case(LAYER, "forward", torch.float32))
    with pytest.raises(GateError):
        run_case(wrong, "cpu")


def test_work_of_a_convolution_by_hand():
    # 2x3x6x7 -> 2x5x3x4 with 3x3 taps.
    case = bench_conv.case(LAYER, "forward", torch.float32)
    assert case.flop == 2 * (2 * 5 * 3 * 4) * (3 * 9)
    assert case.bytes == 4 * (2 * 3 * 6 * 7 + 5 * 3 * 9 + 2 * 5 * 3 * 4)
    assert case.reduction == 27
    assert bench_conv.case(LAYER, "weight gradient", torch.float32).reduction == 2 * 3 * 4
    assert bench_conv.case(LAYER, "input gradient", torch.float32).reduction == 5 * 2 * 2


def test_work_of_a_network_by_hand():
    """Two layers: 3 inputs and 5 units, 4 steps of 2 sequences."""
    case = bench_rnn.case(bench_rnn.Layer("network", 4, 2, 3, 5, layers=2), False, torch.float32)
    assert case.flop == 2 * (4 * 2) * (3 * 5 + 5 * 5 + 5 * 5 + 5 * 5)
    training = bench_rnn.case(bench_rnn.Layer("network", 4, 2, 3, 5, layers=2), True, torch.float32)
    assert training.flop == 3 * case.flop


def test_work_of_packed_sequences_by_hand():
    """Lengths 8, 5 and 2."""
    layer = bench_rnn.Layer("network", 8, 3, 3, 5, packed=True)
    assert layer.batch_sizes.tolist() == [3, 3, 2, 2, 2, 1, 1, 1]
    case = bench_rnn.case(layer, False, torch.float32)
    assert case.flop == 2 * 15 * (3 * 5 + 5 * 5)
    assert case.shapes[0] == (15, 3)


def test_work_of_a_whole_network_by_hand():
    """U-Net of width 4 and depth 1 on 8x8: forward, and twice as much backward, but no gradient by the image."""
    network = bench_networks.NETWORKS[0].tiny()
    first = 64 * 9 * 3 * 4
    others = 64 * 9 * (4 * 4 + 8 * 4 + 4 * 4) + 16 * 9 * (4 * 8 + 8 * 8) + 16 * 8 * 4 * 4 + 64 * 4 * 2
    assert bench_networks.flop(network) == 2 * (2 * first + 3 * others)


def test_floor_of_an_up_convolution_by_hand():
    """U-Net's first, in bf16: 3.29 GFLOP, 9.01 MB; 4.11 us by FLOP, 2.25 us by bytes."""
    layer = next(layer for layer in bench_conv.LAYERS if layer.name == "U-Net up 1024, valid")
    case = bench_conv.case(layer, "forward", torch.bfloat16)
    assert case.flop == 2 * 28 * 28 * 1024 * 512 * 4
    assert case.bytes == 2 * (1024 * 28 * 28 + 1024 * 512 * 4 + 512 * 56 * 56)
    assert CEILINGS.floor(case.flop, case.bytes, case.dtype) == pytest.approx(4.1104e-6, rel=1e-4)
    assert CEILINGS.floor(0, case.bytes, case.dtype) == pytest.approx(2.2528e-6, rel=1e-3)


def test_rows_compare_with_the_best_baseline_and_survive_the_file(tmp_path):
    case = forward_case()
    result = run_case(case, "cpu", fake_measure)
    rows = report.rows_of(case, result, CEILINGS, WHERE)
    best = min(row.ms for row in rows if row.variant == "torch")
    assert [row.speedup for row in rows if row.variant == "ours"] == [
        best / row.ms for row in rows if row.variant == "ours"
    ]
    path = tmp_path / "results" / "rows.csv"
    report.write_rows(rows, path)
    assert report.read_rows(path) == rows
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]


def test_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other.csv"):
        report.read_rows(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the probe times")
def test_probe_needs_a_gpu():
    done = CliRunner().invoke(probe_rnn.app, [])
    assert done.exit_code == 2 and "torch finds none here" in done.output
