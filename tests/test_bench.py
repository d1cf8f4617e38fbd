"""The benchmark's gate, floors and files, and its dry run on the CPU."""

import csv
import dataclasses
import itertools
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from backstride import fused_ops
from backstride.bench import bench_conv, bench_networks, bench_rnn, cpu, probe, report, run, timing, tune
from backstride.bench.__main__ import app
from backstride.bench.ahead import Ahead
from backstride.bench.case import BASELINE, GateError, Variant, run_case
from backstride.bench.occupancy import programs_of
from backstride.bench.timing import Ceilings, Timing
from backstride.kernels.conv.zones import find_zones
from typer.testing import CliRunner

WHERE = report.Environment("a GPU", "1.2", "2.13", "3.7", "abc, dirty")
CEILINGS = Ceilings(copy=4e12, matmul={torch.float32: 400e12, torch.bfloat16: 800e12})
LAYER = bench_conv.Layer("layer", 2, 3, 5, (6, 7), 3, 2, 1)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The commands that want compiled kernels set TRITON_INTERPRET for their process, which here is the tests'."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))


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
    monkeypatch.setattr(fused_ops, "conv1d", lambda *a, **k: 1.001 * F.conv1d(*a, **k))
    done = CliRunner().invoke(app, ["--quick", "--op", "conv1d"])
    assert done.exit_code == 1
    assert "WRONG" in done.output and "2 of 3 cases are right" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the command times")
@pytest.mark.parametrize("op", sorted({case.op for case in run.all_cases(False, True)}))
def test_one_case_of_each_op_is_right(op):
    """The rest of the dry run is more of the same."""
    run_case(min((c for c in run.all_cases(False, True) if c.op == op), key=lambda c: c.flop), "cpu")


def test_unknown_op_is_refused():
    done = CliRunner().invoke(app, ["--op", "fold"])
    assert done.exit_code == 2 and "conv_transpose2d" in done.output


@pytest.mark.parametrize(
    "wrong", [lambda y: 1.001 * y, lambda y: y * float("nan"), lambda y: y[..., 1:]], ids=["scaled", "nan", "shape"]
)
def test_wrong_numbers_are_never_timed(monkeypatch, wrong):
    measured = []
    monkeypatch.setattr(fused_ops, "conv2d", lambda *a, activation, **k: wrong(F.conv2d(*a, **k).relu()))
    with pytest.raises(GateError):
        run_case(forward_case(), "cpu", measured.append)
    assert measured == []


def test_right_numbers_are_timed():
    result = run_case(forward_case(), "cpu", fake_measure)
    assert result.timings.keys() == result.errors.keys() >= {BASELINE, Variant("ours", "channels_last")}


def test_a_case_can_be_checked_on_less_data(monkeypatch):
    """What is timed is the large one."""
    check = bench_conv.case(LAYER, "forward", torch.float32)
    large = dataclasses.replace(forward_case(), checks=(check,), theirs=None)
    with pytest.raises(TypeError):
        run_case(dataclasses.replace(large, checks=()), "cpu")
    assert run_case(large, "cpu").errors[BASELINE] < 1e-5
    monkeypatch.setattr(fused_ops, "conv2d", lambda *a, activation, **k: 1.001 * F.conv2d(*a, **k).relu())
    wrong = bench_conv.case(LAYER, "forward", torch.float32)
    for checks in ((wrong,), (check, wrong)):
        with pytest.raises(GateError):
            run_case(dataclasses.replace(large, checks=checks), "cpu")


def test_relu_follows_dense_convolutions_only():
    for layer, relu in ((LAYER, True), (dataclasses.replace(LAYER, dilation=2, padding=2), False)):
        case = bench_conv.case(layer, "forward", torch.float32)
        x, w, b = case.inputs("cpu")
        for compute in (case.ours, case.theirs):
            assert (compute(x, w, b).min() < 0) != relu
        assert case.shape.endswith("ReLU") == relu


def test_work_of_a_convolution_by_hand():
    # 2x3x6x7 -> 2x5x3x4 with 3x3 taps; of 3 a row 2, 3 and 3 meet pixels, of 3 a column 2, 3, 3 and 2.
    case = bench_conv.case(LAYER, "forward", torch.float32)
    assert case.flop == 2 * (2 * 5 * 3) * (8 * 10)
    assert case.bytes == 4 * (2 * 3 * 6 * 7 + 5 * 3 * 9 + 2 * 5 * 3 * 4)
    assert case.reduction == 27
    assert bench_conv.case(LAYER, "weight gradient", torch.float32).reduction == 2 * 3 * 4
    assert bench_conv.case(LAYER, "input gradient", torch.float32).reduction == 5 * 2 * 2


def met(layer):
    """Products of ones with ones count the pairs of pixels and taps; padding is zeros."""
    x = torch.ones(layer.batch, layer.channels, *layer.size, dtype=torch.float64)
    options = (layer.stride, layer.padding, *([layer.output_padding] if layer.transposed else []))
    order = (layer.groups, layer.dilation) if layer.transposed else (layer.dilation, layer.groups)
    op = getattr(torch.nn.functional, f"conv{'_transpose' if layer.transposed else ''}{len(layer.size)}d")
    return int(op(x, torch.ones(layer.weight, dtype=torch.float64), None, *options, *order).sum())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(7,), (5, 6), (4, 3, 5)], ids=len)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "output_padding"),
    [
        (3, 1, 1, 1, 0),
        (3, 1, 6, 6, 0),
        (3, 2, 1, 1, 1),
        (4, 2, 1, 1, 0),
        (2, 3, 0, 1, 0),
        (3, 2, 2, 3, 1),
        (1, 2, 1, 1, 0),
    ],
)
def test_flop_counts_no_padding(transposed, size, kernel, stride, padding, dilation, output_padding):
    """Against torch's own sum of ones, and against the zones that the kernels go over."""
    layer = bench_conv.Layer(
        "layer", 2, 4, 6, size, kernel, stride, padding, dilation, 2, output_padding if transposed else 0, transposed
    )
    assert bench_conv.flop(layer) == 2 * met(layer)
    axes = ([value] * len(size) for value in (kernel, stride, padding, dilation))
    zones = find_zones(*map(tuple, axes), size, layer.out_size, transposed)
    products = sum(zone.pixels * zone.taps for zone in zones) * layer.batch * math.prod(layer.weight[:2])
    assert bench_conv.flop(layer) == 2 * products


def test_flop_of_published_layers():
    """Shares of the taps that meet pixels."""
    shares = {"DeepLabv3 ASPP d6": 0.77, "DeepLabv3 ASPP d12": 0.57, "DeepLabv3 ASPP d18": 0.405}
    shares |= {"DeepLabv3 ASPP d36": 0.40, "DeepLabv2 ASPP d24": 0.37, "ResNet-101 layer 4, d4": 0.92}
    layers = {layer.name: layer for layer in bench_conv.LAYERS}
    for name, share in shares.items():
        layer = layers[name]
        every = 2 * layer.batch * math.prod(layer.out_size) * math.prod(layer.weight)
        assert bench_conv.flop(layer) / every == pytest.approx(share, abs=0.006)


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
    """U-Net of width 4 and depth 1 on 8x8: forward, and twice as much backward, but no gradient by the image. Of the 3
    taps along an axis of 8 pixels 22 meet pixels, of 4 pixels 10."""
    network = bench_networks.NETWORKS[0].tiny()
    first = 22**2 * 3 * 4
    others = 22**2 * (4 * 4 + 8 * 4 + 4 * 4) + 10**2 * (4 * 8 + 8 * 8) + 16 * 8 * 4 * 4 + 64 * 4 * 2
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the probes time")
def test_probes_need_a_gpu(monkeypatch):
    monkeypatch.setattr(probe, "capabilities", lambda: [("sm_90", "cooperative grids", "yes")])
    done = CliRunner().invoke(app, ["probe"])
    assert done.exit_code == 2 and "torch finds none here" in done.output
    assert all(name in done.output for name in probe.PROBES)


@pytest.mark.parametrize("name", probe.PROBES)
def test_probes_run_dry(name):
    def call_once(calls):
        for call in calls.values():
            call()
        return {key: Timing(2.0, 1.0, 3.0, 0.0) for key in calls}

    rows = probe.run(name, "cpu", True, WHERE, timing.ASSUMED, call_once)
    assert rows and all(row.us_p20 < row.us < row.us_p80 for row in rows)
    assert probe.question(probe.PROBES[name])


def test_every_layer_has_a_floor_and_a_name_of_its_own():
    for bench in run.BENCHES:
        cases = bench.cases(False, False)
        assert len({report.key_of(case) for case in cases}) == len(cases)
        assert all(timing.ASSUMED.floor(case.flop, case.bytes, case.dtype) > 0 for case in cases)
        assert {report.key_of(case) for case in bench.cases(True, False)} < {report.key_of(case) for case in cases}


def fake_gpu(monkeypatch, tiny_cases):
    """`timed_run` without a GPU: the cases on the CPU, times made up."""
    monkeypatch.setattr(report, "environment", lambda: WHERE)
    monkeypatch.setattr(run, "measure_ceilings", lambda dtypes, repeats: CEILINGS)
    monkeypatch.setattr(run, "measure", lambda calls, repeats, graph: fake_measure(calls))
    monkeypatch.setattr(run, "run_case", lambda case, device, *rest: run_case(case, "cpu", *rest))
    monkeypatch.setattr(run, "Ahead", lambda *_: nullcontext(SimpleNamespace(compile=lambda cases: None)))
    monkeypatch.setattr(run, "_free_memory", lambda: None)
    return tiny_cases


def test_what_is_most_wanted_comes_first():
    cases = run.all_cases(False, False)
    ordered = run.most_wanted_first(cases[::-1])
    assert set(map(report.key_of, ordered)) == set(map(report.key_of, cases)) and len(ordered) == len(cases)
    quick = set(map(report.key_of, run.all_cases(True, False)))
    assert {report.key_of(case) for case in ordered[: len(quick)]} == quick
    rest = ordered[len(quick) :]
    networks = [case.op == "network" for case in rest]
    assert networks == sorted(networks, reverse=True) and any(networks)
    dtypes = [case.dtype for case in rest[sum(networks) :]]
    assert [dtype for dtype, _ in itertools.groupby(dtypes)] == [torch.bfloat16, torch.float32, torch.float16]


def test_a_run_that_is_interrupted_has_written_what_was_timed(monkeypatch, tmp_path):
    cases = fake_gpu(monkeypatch, [bench_conv.case(LAYER, "input gradient", torch.float32), forward_case()])
    path = tmp_path / "results.csv"
    timed = []

    def interrupted(case, device, *rest):
        if timed:
            raise KeyboardInterrupt
        timed.append(case)
        return run_case(case, "cpu", *rest)

    monkeypatch.setattr(run, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.timed_run(list(cases), False, False, 1.0, path)
    assert set(report.by_case(report.read_rows(path))) == {report.key_of(timed[0])}


def test_cases_run_ahead_in_processes_of_their_own():
    first, second, third = bench_conv.cases(False, True)[:3]
    unknown = dataclasses.replace(third, name="unknown")
    with Ahead(partial(bench_conv.cases, False, True), "cpu") as processes:
        done = processes.compile([first, unknown, second])
    assert [type(future.exception()) for future in done] == [type(None), ValueError, type(None)]


def test_a_run_goes_on_where_it_stopped_and_tells_what_failed(monkeypatch, tmp_path):
    right, other = forward_case(), bench_conv.case(LAYER, "input gradient", torch.float32)
    wrong = dataclasses.replace(bench_conv.case(LAYER, "weight gradient", torch.float32), ours=lambda x, w, y: w + 1)
    cases = fake_gpu(monkeypatch, [right, wrong, other])
    path = tmp_path / "results.csv"
    assert run.timed_run(list(cases), False, False, 0.0, path)  # no time at all
    assert not path.exists()
    assert run.timed_run([right], False, False, 1.0, path)
    first = report.read_rows(path)
    assert not run.timed_run(list(cases), False, False, 1.0, path)
    rows = report.read_rows(path)
    assert rows[: len(first)] == first
    of_case = report.by_case(rows)
    assert set(of_case) == {report.key_of(case) for case in cases}
    (failed,) = of_case[report.key_of(wrong)]
    assert "GateError" in failed.gate and failed.ms != failed.ms and failed.speedup != failed.speedup
    assert report.ratios([failed]) == {}
    calls = []
    monkeypatch.setattr(run, "run_case", lambda *a: calls.append(a))
    assert run.timed_run(list(cases), False, False, 1.0, path) and calls == []
    monkeypatch.setattr(report, "environment", lambda: dataclasses.replace(WHERE, commit="def"))
    assert len(run.pending(cases, rows, report.environment())) == 3


def test_a_row_counts_until_its_op_is_changed(monkeypatch, tmp_path):
    """Whatever else has been committed since."""

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    for name in ("kernels/conv/a.py", "kernels/rnn/a.py", "kernels/runtime.py", "models/a.py", "README.md"):
        write(name, "old")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    first = git("rev-parse", "--short", "HEAD")
    monkeypatch.setattr(report, "__file__", str(tmp_path / "bench" / "report.py"))
    others = ["rnn_tanh", "max_pool2d_with_offsets", "batch_norm"]
    ops = ("conv2d", "atrous_pyramid", *others, "network")

    def unchanged() -> list[str]:
        report.is_unchanged.cache_clear()
        return [op for op in ops if report.is_unchanged(op, first)]

    assert unchanged() == list(ops)
    write("README.md", "new")
    assert unchanged() == list(ops)
    write("kernels/conv/a.py", "new")
    assert unchanged() == others
    git("commit", "-am", "second")
    assert unchanged() == others
    write("kernels/runtime.py", "new")
    assert unchanged() == []
    assert not report.is_unchanged("rnn_tanh", "0123abc") and not report.is_unchanged("rnn_tanh", f"{first}-abcdef")
    report.is_unchanged.cache_clear()


def test_cases_of_unchanged_ops_are_not_timed_again(monkeypatch):
    case = forward_case()
    rows = report.rows_of(case, run_case(case, "cpu", fake_measure), CEILINGS, WHERE)
    later = dataclasses.replace(WHERE, commit="def")
    for unchanged in (True, False):
        monkeypatch.setattr(report, "is_unchanged", lambda op, commit, unchanged=unchanged: unchanged)
        assert run.pending([case], rows, later) == ([] if unchanged else [case])
        assert run.pending([case], rows, dataclasses.replace(later, triton="9.9")) == [case]


def test_a_new_row_replaces_the_old_one_of_its_case():
    case = forward_case()
    result = run_case(case, "cpu", fake_measure)
    old = report.rows_of(case, result, CEILINGS, WHERE)
    new = [dataclasses.replace(row, commit="def") for row in old]
    elsewhere = [dataclasses.replace(row, gpu="another") for row in old]
    assert run.merged(old + elsewhere, new) == elsewhere + new


def test_programs_on_a_multiprocessor_by_hand():
    """168 registers x 32 lanes x 4 warps: 3 programs in 65536; shared memory, 73728 + 1024 of 233472: 3 too; 8 warps of
    64 alone would be 8."""
    line = {"target": "sm_90", "tile": "128x64x64 w4 s4", "registers": "168", "shared": "73728"}
    assert programs_of(line) == 3
    assert programs_of(line | {"registers": "255"}) == 2
    assert programs_of(line | {"registers": "32", "shared": "0", "tile": "256 w8 s1"}) == 8
    with pytest.raises(ValueError, match="tile"):
        programs_of(line | {"tile": "256"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it times")
@pytest.mark.parametrize("op", ["conv_transpose1d", "atrous_pyramid", "max_pool2d_with_offsets", "batch_norm"])
def test_tuning_runs_dry_and_finds_unwritten_memory(monkeypatch, tmp_path, op):
    """A kernel that leaves out the last element is found because memory is NaN before."""
    out = tmp_path / "tuned.csv"
    done = CliRunner().invoke(app, ["tune", "--op", op, "--minutes", "0.001", "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(out.open()))
    assert len(rows) > 2 and {row["verdict"] for row in rows} == {"right"}

    def forgetful(x, weight):
        y = torch.empty(3)
        y[:2] = x[:2]
        return y

    case = dataclasses.replace(
        forward_case(), op="fold", shapes=((3,), (1,)), reduction=1, ours=forgetful, theirs=lambda x, weight: x
    )
    (row,) = tune.tune(case, "cpu", "contiguous", None)
    assert row.verdict.startswith("GateError")


def test_launches_without_a_gpu():
    """In a process of its own, where Triton does not interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("host_launch.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_networks_on_the_cpu_are_compared(monkeypatch):
    monkeypatch.setattr(cpu, "INTERPRETED", False)
    name = "char-RNN, 1 x 64, 10 steps, batch 1"
    monkeypatch.setattr(cpu, "NETWORKS", {name: cpu.NETWORKS[name]})
    threads = torch.get_num_threads()
    (row,) = cpu.measure(seconds=0.0)
    torch.set_num_threads(threads)
    assert row.steps == 5 and row.fused_ms > 0 and row.ratio_p20 <= row.ratio <= row.ratio_p80
    monkeypatch.setattr(cpu, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        cpu.measure(seconds=0.0)
