import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backstride.models.options import find_device
from backstride.models.training import distributed
from backstride.models.training.checkpoint import read_metadata
from backstride.models.training.train import train
from rich.console import Console
from safetensors import safe_open

from .distributed_runs import NOISY, NormalisedTask
from .models_base import without_interpreter
from .test_scenes import write_scenes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What distributed_runs.py trained, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, Path(__file__).with_name("distributed_runs.py"), folder]
    done = subprocess.run(command, capture_output=True, text=True, env=without_interpreter())
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_two_processes_have_the_losses_of_one_with_the_doubled_batch(runs):
    """Every loss and score of U-Net (no batch normalisation) and of a char-RNN, to float32's rounding."""
    differences = json.loads(runs[1].splitlines()[-1])
    assert differences.keys() == {"unet", "text"}
    assert max(differences.values()) < 1e-6


def test_only_the_first_process_prints(runs):
    lines = runs[1].splitlines()
    assert len([line for line in lines if line.startswith("step 1/5")]) == 4  # U-Net and text, by two and by one
    assert len([line for line in lines if line.startswith("step 6/6")]) == 2  # the whole run and the resumed one


def test_resuming_with_batch_normalisation_and_noise_is_bitwise(runs):
    folder, _ = runs  # the script has compared all files
    path = folder / "parts" / "last.safetensors"
    assert read_metadata(path)["step"] == 6 and len(read_metadata(path)["processes"]) == 2
    with safe_open(path, framework="pt") as file:
        own = [file.get_tensor(f"process.{number}.rng.torch") for number in (0, 1)]
        carried = [file.get_tensor(f"process.{number}.state.carried") for number in (0, 1)]
    assert not torch.equal(*own) and not torch.equal(*carried)


def test_another_number_of_processes_can_not_resume(runs):
    with pytest.raises(
        ValueError, match="was trained by 2 processes, and these are 1: resume it with torchrun --nproc"
    ):
        train(NormalisedTask(NOISY), NOISY, runs[0] / "whole", resume=True, console=Console(quiet=True))


def test_shares_cover_all_items(monkeypatch):
    for count in range(7):
        parts = []
        for number in range(3):
            monkeypatch.setattr(distributed, "rank", lambda number=number: number)
            monkeypatch.setattr(distributed, "size", lambda: 3)
            parts.append(distributed.share(count))
        assert [index for part in parts for index in part] == list(range(count))
        assert len(parts[0]) == max(map(len, parts))


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("auto") == torch.device("cuda", 1) and find_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2, counted from 0, but PyTorch finds 2 GPUs: start as many"):
        find_device("cuda")


def test_torchrun_trains_by_the_command_line(tmp_path: Path):
    data, out = write_scenes(tmp_path / "data"), tmp_path / "run"
    options = f"--data {data} --out {out} --width 2 --steps 2 --every 1 --batch-size 1 --ops torch --device cpu"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "backstride.models.cli", "train", "segnet-basic", *options.split()]
    environment = without_interpreter() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2") == done.stdout.count("test split") == 1
    assert json.loads((out / "metrics.json").read_text()).keys() >= {"mean_iou", "iou_road"}
    assert len(read_metadata(out / "last.safetensors")["processes"]) == 2
    assert not [path for path in out.rglob("*") if "partial" in path.name or "tmp" in path.name]
