"""What is made of results: pictures, README's figures, comparisons. The results here are made up."""

import dataclasses
import io
from pathlib import Path

import pytest
import torch
from backstride.bench import bench_conv, bench_rnn, model, plot, readme, report, run, timing
from backstride.bench.__main__ import app
from backstride.bench.case import Result, Variant
from backstride.bench.timing import Timing
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
WHERE = report.Environment("a made-up GPU", "1.2", "2.13", "3.7", "abc")
UP = next(layer for layer in bench_conv.LAYERS if layer.name == "U-Net up 128, batch 16")
RNN = bench_rnn.LAYERS[0]


def rows_of(case, ours, **others):
    """Times in multiples of the floor."""
    floor = 1e3 * timing.ASSUMED.floor(case.flop, case.bytes, case.dtype)
    times = {Variant("ours", "contiguous"): ours, Variant("torch", "contiguous"): others.pop("torch")}
    times |= {Variant("torch", layout): ms for layout, ms in others.items()}
    timings = {
        v: Timing(floor * ms, floor * ms * 0.99, floor * ms * 1.02, 1.0, algorithm=f"{v.layout} GEMM; b; c; d; e")
        for v, ms in times.items()
    }
    return report.rows_of(case, Result(dict.fromkeys(timings, 1e-3), timings), timing.ASSUMED, WHERE)


@pytest.fixture
def rows():
    forward, backward = (bench_conv.case(UP, d, torch.bfloat16) for d in ("forward", "input gradient"))
    return [
        *rows_of(forward, 1.25, torch=5.0, channels_last=2.5),
        *rows_of(backward, 2.0, torch=1.0),
        *rows_of(bench_rnn.case(RNN, False, torch.float32), 4.0, torch=8.0),
    ]


def printed(table) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_ratios_are_to_each_baseline_and_the_best(rows):
    of_case = rows[:3]
    assert report.ratios(of_case) == pytest.approx({"torch": 4.0, "torch channels_last": 2.0})
    assert of_case[0].speedup == pytest.approx(2.0)
    assert of_case[0].percent_of_floor == pytest.approx(80.0)
    text = printed(report.results_table(of_case))
    assert "2.00" in text and "torch 4.00, torch channels_last 2.00" in text
    assert "channels_last GEMM; b; c; d; …" in text and "contiguous GEMM" not in text  # the fastest baseline's


def test_a_failed_check_shows_no_speed(rows):
    failed = report.failed_row(bench_conv.case(UP, "forward", torch.bfloat16), "GateError: off", timing.ASSUMED, WHERE)
    text = printed(report.results_table([failed]))
    assert "GateError: off" in text and "nan" not in text
    assert report.ours_of([failed]) is None


def test_pictures(rows, tmp_path):
    file = tmp_path / "made-up.csv"
    report.write_rows(rows, file)
    done = CliRunner().invoke(app, ["plot", str(file), "--out", str(tmp_path / "pictures")])
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [
        f"made-up_{part}_{kind}.png"
        for part in ("convolution_bfloat16", "recurrence_float32")
        for kind in ("floor", "speedup")
    ]
    for name in names:
        with Image.open(tmp_path / "pictures" / name) as picture:
            colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
            assert min(picture.size) > 150 and len(colours) > 50
    failed = report.failed_row(bench_conv.case(UP, "forward", torch.bfloat16), "off", timing.ASSUMED, WHERE)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.draw([failed], tmp_path, "failed")


def test_comparison_lists_what_is_slower_than_both_spreads(rows, tmp_path):
    slower = dataclasses.replace(rows[0], ms=2 * rows[0].ms, ms_p20=2 * rows[0].ms_p20)
    wrong = dataclasses.replace(rows[3], gate="GateError")
    report.write_rows(rows, tmp_path / "old.csv")
    report.write_rows([slower, *rows[1:3], wrong, *rows[4:]], tmp_path / "new.csv")
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "old.csv"), str(tmp_path / "new.csv")])
    assert done.exit_code == 0, done.output
    assert "2.00" in done.output and "wrong now" in done.output
    assert "rnn_tanh" not in done.output


def test_model_beside_measurement(rows):
    case = bench_conv.case(UP, "forward", torch.bfloat16)
    other = bench_conv.case(UP, "weight gradient", torch.bfloat16)
    text = printed(model.model_table([case, other], rows))
    assert "that are measured" in text
    # 805.37 MB at 4.3 TB/s; ours at 1.25 of it, the best baseline at 2.5.
    assert "187.30" in text and "234.1" in text and "468.2" in text
    assert "assumed, not measured" in printed(model.model_table([case], []))


class TestReadme:
    def test_says_what_the_results_say(self):
        """After new results: `python -m backstride.bench readme`."""
        _, block, _ = readme.split((ROOT / "README.md").read_text())
        assert block == readme.block(ROOT / "bench" / "results")

    def test_names_no_speed_elsewhere(self):
        assert readme.speed_figures((ROOT / "README.md").read_text()) == []

    @pytest.mark.parametrize(
        "words",
        ["takes 12 µs", "runs at 3.4 TB/s", "is 2.5× faster", "3 times as fast", "a speed-up of 4.1", "20 % faster"],
    )
    def test_finds_a_speed_that_no_results_file_holds(self, words):
        text = f"It {words}.\n{readme.BEGIN}\n{readme.END}\n"
        assert len(readme.speed_figures(text)) == 1
        assert readme.speed_figures(f"{readme.BEGIN}\n{words}\n{readme.END}\n") == []

    def test_without_results_nothing_is_claimed(self, tmp_path):
        block = readme.block(tmp_path)
        assert block.count(readme.UNMEASURED) == 2 * len(readme.REGIMES)
        assert readme.speed_figures(f"{block}\n") == [] and "×" not in block

    def test_shows_geometric_mean_range_and_losses(self, rows, tmp_path):
        failed = report.failed_row(bench_conv.case(UP, "weight gradient", torch.bfloat16), "x", timing.ASSUMED, WHERE)
        report.write_rows([*rows, failed], tmp_path / "made-up.csv")
        lines = readme.block(tmp_path).splitlines()
        line = next(line for line in lines if line.startswith("| transposed convolution, kernel = stride"))
        assert "bf16 2.00 (1 case)" in line
        assert "bf16 0.50 (1 case), bf16: 1 failed" in line
        assert "a made-up GPU" in "".join(lines) and "commit abc" in "".join(lines)
        assert readme.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)

    def test_every_regime_has_a_row(self):
        assert {case.regime for case in run.all_cases(False, False)} == set(readme.REGIMES)

    def test_is_written_between_its_marks(self, tmp_path):
        file = tmp_path / "README.md"
        file.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
        assert readme.write(file, tmp_path) and not readme.write(file, tmp_path)
        assert file.read_text() == f"before\n{readme.block(tmp_path)}\nafter\n"
        file.write_text("no marks")
        with pytest.raises(ValueError, match="put them back"):
            readme.write(file, tmp_path)
