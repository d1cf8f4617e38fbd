import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from backstride.models import cli, demo
from backstride.models.data.cells import TouchingCells
from backstride.models.language.hello import learn_hello
from PIL import Image

from .killed_runs import contents
from .models_base import without_interpreter

TINY = ["--width", "2", "--depth", "1", "--tile", "130", "--optimizer", "adamw", "--lr", "0.01"]


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of `backstride ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["backstride", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code or 0


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from backstride.models.cli import main; main()", *map(str, arguments)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unet"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert (
            run_cli(monkeypatch, "train", "unet", "--out", out, "--ops", "torch", "--steps", 8, "--every", 4, *TINY)
            == 0
        )
    return out


def test_train_writes_everything(trained: Path):
    wanted = {"best.safetensors", "last.safetensors", "config.json", "history.json", "metrics.json", "loss.png"}
    wanted |= {"samples/step-000004.png", "samples/step-000008.png"}
    assert set(contents(trained)) == wanted
    metrics = json.loads((trained / "metrics.json").read_text())
    assert list(metrics) == ["one pass", "mean of 8 symmetries"]
    assert set(metrics["one pass"]) == {"pixel_accuracy", "mean_iou", "mean_dice", "v_rand", "v_info"}
    config = json.loads((trained / "config.json").read_text())
    assert (config["steps"], config["width"], config["lr"], config["ops"]) == (8, 2, 0.01, "torch")


def test_predict(trained: Path, tmp_path: Path, monkeypatch, capsys):
    names = []
    for number, size in enumerate([(5, 7), (200, 150)]):
        names.append(tmp_path / f"cell{number}.png")
        Image.fromarray(np.full(size, 90, dtype=np.uint8)).save(names[-1])
    out = tmp_path / "out"
    assert run_cli(monkeypatch, "predict", "--checkpoint", trained, "--out", out, "--average", *names) == 0
    kinds = ("classes", "probability", "overlay")
    assert set(contents(out)) == {f"cell{number}_{kind}.png" for number in (0, 1) for kind in kinds}
    for kind in kinds:
        assert Image.open(out / f"cell1_{kind}.png").size == (150, 200)
    assert "cell1" in capsys.readouterr().out

    twin = tmp_path / "twin" / "cell0.png"
    twin.parent.mkdir()
    twin.write_bytes(names[0].read_bytes())
    assert run_cli(monkeypatch, "predict", "--checkpoint", trained, names[0], twin) == 1
    assert "2 images are named cell0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "unet", "--data", "nowhere"], "nowhere is not a folder"),
        (["train", "unet", "--val", "3-x"], "'3-x' is neither a number nor a range"),
        (["train", "unet", "--tile", "301"], "an input size of 301 does not fit"),
        (["train", "unet", "--width", "0"], "width=0: must be at least 1"),
        (["train", "unet", "--resume", "--out", "nowhere"], "nowhere holds no training run"),
        (["predict", "--checkpoint", "nowhere", "image.png"], "nowhere holds no training run"),
        (["train", "unet", "--steps", "0"], "steps=0: must be at least 1"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, *arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and "Traceback" not in captured.err
    assert contents(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(monkeypatch, capsys):
    assert run_cli(monkeypatch, "train", "unet", "--device", "cuda") == 1
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["fly"], ["train", "unet", "--lr", "fast"], ["train", "unet", "--ops", "cudnn"], ["predict"]]
)
def test_wrong_usage(arguments, monkeypatch, capsys):
    assert run_cli(monkeypatch, *arguments) == 2


def test_mistakes_with_an_existing_run(trained: Path, monkeypatch, capsys):
    before = contents(trained)
    assert run_cli(monkeypatch, "train", "unet", "--out", trained) == 1
    assert "already holds a run (8 steps done)" in capsys.readouterr().err
    assert run_cli(monkeypatch, "train", "unet", "--out", trained, "--resume", "--lr", "0.5", "--width", "2") == 1
    message = capsys.readouterr().err
    assert "lr is 0.5 now, but was 0.01" in message and "width" not in message
    (trained.parent / "picture.png").write_text("no picture")
    assert run_cli(monkeypatch, "predict", "--checkpoint", trained, trained.parent / "picture.png") == 1
    assert "cannot be read as a picture" in capsys.readouterr().err
    assert contents(trained) == before


@pytest.mark.parametrize(
    "arguments",
    [[], ["train"], ["train", "unet"], ["train", "char-rnn"], ["predict"], ["sample"], ["show"], ["demo"], ["doctor"]],
)
def test_help(arguments, monkeypatch, capsys):
    assert run_cli(monkeypatch, *arguments, "--help") == 0
    assert "Usage: backstride" in capsys.readouterr().out


def test_show(tmp_path: Path, monkeypatch, capsys):
    assert run_cli(monkeypatch, "show", "bptt", "--out", tmp_path / "runs" / "bptt.png") == 0
    assert "autograd" in capsys.readouterr().out and contents(tmp_path).keys() == {"runs/bptt.png"}


def test_parse_indices():
    assert cli.parse_indices("25-29") == (25, 26, 27, 28, 29)
    assert cli.parse_indices("7, 3,3-4") == (3, 4, 7)
    for wrong in ("a", "3-", "-3", "1,,2", "5-3"):
        with pytest.raises(ValueError, match="--val"):
            cli.parse_indices(wrong)


def test_kill_and_resume_by_command_line(tmp_path: Path):
    """Fused ops, the paper's SGD and dropout, generated cells; killed at some moment after its first checkpoint."""
    settings = ["--steps", 6, "--every", 3, *TINY, "--optimizer", "sgd"]
    environment = without_interpreter() | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command("train", "unet", "--out", tmp_path / "whole", *settings), check=True, env=environment)

    killed = subprocess.Popen(command("train", "unet", "--out", tmp_path / "killed", *settings), env=environment)
    while not (tmp_path / "killed" / "last.safetensors").exists():
        assert killed.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    resume = command("train", "unet", "--out", tmp_path / "killed", "--resume")
    subprocess.run(resume, check=True, env=environment)
    for name in ("history.json", "metrics.json", "best.safetensors", "last.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_demo(tmp_path: Path, monkeypatch, capsys):
    """The demo's own code on a smaller problem; `make demo` runs it in full."""
    monkeypatch.setattr(demo, "open_data", lambda config: (TouchingCells(8, 96), TouchingCells(2, 96, seed=1), config))
    easier = {"width": 8, "depth": 2, "tile": 100, "elastic": 0.0, "border_weight": 0.0, "lr": 0.01}
    config = replace(demo.CONFIG, steps=120, every=60, ops="torch", **easier)
    text_config = replace(demo.TEXT_CONFIG, width=4, steps=100, every=100, ops="torch")
    monkeypatch.setattr("backstride.models.language.hello.learn_hello", lambda: learn_hello(steps=100, ops="torch"))
    demo.run_demo(tmp_path, cli.console, replace(config, steps=1), replace(text_config, steps=1))
    capsys.readouterr()
    demo.run_demo(tmp_path, cli.console, config, text_config)  # a second demo overwrites the first
    written = capsys.readouterr().out
    scores = [float(line.split("│")[2]) for line in written.splitlines() if "mean IoU on unseen" in line]
    before, after = scores[-2:]
    assert after > before + 0.1
    for name in ("before-and-after.png", "overlay-before.png", "overlay-after.png", "loss.png"):
        assert Image.open(tmp_path / name).size[0] > 50
    assert "interpreted kernel" in written
    assert 'Sampled greedily from "h": "ello"' in written
    assert (tmp_path / "char-rnn" / "samples" / "step-000100.txt").read_text().splitlines()[0] in written
    assert "bits per character" in written


def test_the_interpreted_layer_agrees():
    layer = demo.compare_layer_in_a_process()
    assert layer["path"] == "interpreted kernel" and 0 <= float(layer["difference"]) < 1e-5
