import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from backstride.models.training.checkpoint import (
    atomic_path,
    load_checkpoint,
    load_weights,
    process_state,
    read_metadata,
    save_checkpoint,
    save_weights,
)
from backstride.models.training.config import SegmentationConfig
from backstride.models.training.segmentation import SegmentationTask, evaluate, load_network, open_data
from backstride.models.training.task import seed_everything
from backstride.models.training.train import make_optimizer, prefetch, train
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from .killed_runs import CONFIG, NoisyTask, contents
from .models_base import without_interpreter

QUIET = Console(quiet=True)
SMALL = SegmentationConfig(width=2, depth=1, tile=66, ops="torch", steps=4, every=2, batch_size=2)


def test_a_killed_run_resumes_bitwise(tmp_path: Path):
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, script, tmp_path]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=without_interpreter())
    killed, moments = map(int, done.stdout.split())
    assert killed >= moments - 2 > 20  # a run has fewer files to put into place when the last network is not the best


class Stop(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_interrupted_run_resumes_bitwise(tmp_path: Path, optimizer, precision):
    config = replace(CONFIG, optimizer=optimizer, precision=precision, steps=6, every=2)
    whole = train(NoisyTask(config), config, tmp_path / "whole", console=QUIET)

    interrupted = NoisyTask(config)
    batch = interrupted.batch

    def stop_at_five(step: int) -> tuple[Tensor, ...]:
        if step == 5:
            raise Stop
        return batch(step)

    interrupted.batch = stop_at_five
    with pytest.raises(Stop):
        train(interrupted, config, tmp_path / "parts", console=QUIET)
    assert read_metadata(tmp_path / "parts" / "last.safetensors")["step"] == 4
    resumed = train(NoisyTask(config), config, tmp_path / "parts", resume=True, console=QUIET)
    assert resumed == whole
    assert [step for step, _ in whole["train"]] == [1, 2, 3, 4, 5, 6]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_mixed_precision_is_mixed(tmp_path: Path):
    seen = []
    for precision in ("fp32", "bf16", "fp16"):
        config = replace(CONFIG, precision=precision, steps=1)
        task = NoisyTask(config)
        task.network[0].register_forward_hook(
            lambda _, __, output: seen.append(output.dtype) if output.requires_grad else None
        )
        train(task, config, tmp_path / precision, console=QUIET)
        assert task.network[0].weight.dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16, torch.float16]


def test_best_is_the_network_with_the_highest_score(tmp_path: Path):
    scores = iter([0.2, 0.7, 0.5])
    config = replace(CONFIG, steps=6, every=2)
    task = NoisyTask(config)
    task.validate = lambda: {"validation": 1.0, "fit": next(scores)}
    train(task, config, tmp_path, console=QUIET)
    assert read_metadata(tmp_path / "best.safetensors") == {"step": 4, "metrics": {"validation": 1.0, "fit": 0.7}}
    assert json.loads((tmp_path / "history.json").read_text())["fit"] == [[2, 0.2], [4, 0.7], [6, 0.5]]
    best, last = NoisyTask(config).network, NoisyTask(config).network
    load_weights(best, tmp_path / "best.safetensors")
    load_weights(last, tmp_path / "last.safetensors")
    assert torch.equal(last[0].weight, task.network[0].weight)
    assert not torch.equal(best[0].weight, last[0].weight)


def test_other_settings_can_not_be_resumed(tmp_path: Path):
    train(NoisyTask(CONFIG), CONFIG, tmp_path, console=QUIET)
    other = replace(CONFIG, lr=0.5, seed=4)
    with pytest.raises(ValueError, match=r"lr is 0\.5 now, but was 0\.01; seed is 4 now, but was 3"):
        train(NoisyTask(other), other, tmp_path, resume=True, console=QUIET)
    with pytest.raises(ValueError, match=r"already holds a run \(10 steps done\)"):
        train(NoisyTask(CONFIG), CONFIG, tmp_path, console=QUIET)
    with pytest.raises(ValueError, match="holds no training run"):
        train(NoisyTask(CONFIG), CONFIG, tmp_path / "empty", resume=True, console=QUIET)


def test_an_infinite_loss_stops_the_run(tmp_path: Path):
    task = NoisyTask(CONFIG)
    task.loss = lambda batch: task.network(batch[0]).sum() / 0
    with pytest.raises(FloatingPointError, match=r"at step 1: try a lower learning rate than 0\.01"):
        train(task, CONFIG, tmp_path, console=QUIET)
    assert set(contents(tmp_path)) == {"config.json"}


def test_schedules():
    rates = [CONFIG.learning_rate(step) for step in range(CONFIG.steps)]
    assert rates[0] == CONFIG.lr and rates[5] == pytest.approx(CONFIG.lr / 2)
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.03 * CONFIG.lr
    assert {replace(CONFIG, schedule="constant").learning_rate(step) for step in range(20)} == {CONFIG.lr}
    paper = make_optimizer(nn.Linear(1, 1), replace(CONFIG, optimizer="sgd"))
    assert isinstance(paper, torch.optim.SGD) and paper.param_groups[0]["momentum"] == 0.99


def test_the_optimizer_follows_the_schedule(tmp_path: Path):
    config = replace(CONFIG, optimizer="sgd", steps=2, every=2)
    task = NoisyTask(config)
    task.network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    nn.init.zeros_(task.network[0].weight)
    task.loss = lambda batch: task.network(torch.ones(1, 1, 1, 1)).sum()
    task.validate = lambda: {"validation": 0.0, "fit": 0.0}
    train(task, config, tmp_path, console=QUIET)
    # The gradient is 1 in both steps; the momentum makes it 1 and 1.99; the rates are lr and lr / 2.
    assert task.network[0].weight.item() == pytest.approx(-config.lr * (1 + 1.99 / 2))


def test_prefetch_keeps_the_order():
    assert list(prefetch(lambda step: step * step, range(3, 40))) == [step * step for step in range(3, 40)]
    assert list(prefetch(lambda step: step, range(0))) == []


def test_atomic_path(tmp_path: Path):
    target = tmp_path / "new" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("first")
        assert not target.exists()
    with pytest.raises(Stop), atomic_path(target) as temporary:
        temporary.write_text("sec")
        raise Stop
    assert contents(tmp_path) == {"new/file.txt": b"first"}


def test_checkpoints_restore_every_generator(tmp_path: Path):
    task = NoisyTask(CONFIG)
    optimizer, scaler = make_optimizer(task.network, CONFIG), torch.amp.GradScaler("cpu", enabled=False)

    def draw() -> list[float]:
        return [torch.rand(()).item(), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)]

    draw()
    history, state = {"train": [(1, 0.1)]}, {"carried": torch.tensor(3)}
    save_checkpoint(tmp_path / "c", task.network, optimizer, scaler, 7, history, [process_state(state)])
    expected = draw()
    seed_everything(99)
    assert load_checkpoint(tmp_path / "c", task.network, optimizer, scaler) == (7, history, state)
    assert draw() == expected


def test_damaged_and_foreign_files(tmp_path: Path):
    network = nn.Linear(2, 2)
    path = tmp_path / "weights.safetensors"
    save_weights(network, path, {})
    with pytest.raises(ValueError, match=r"weights\.safetensors holds the weights of another network"):
        load_weights(nn.Linear(3, 2), path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
        load_weights(network, path)


def test_config_file(tmp_path: Path):
    config = replace(SMALL, validation=(3, 4), data="cells", lr=0.1 + 0.2)
    config.write(tmp_path)
    assert SegmentationConfig.read(tmp_path) == config
    (tmp_path / "config.json").write_text('{"colour": 1}')
    with pytest.raises(ValueError, match=r"config\.json .*colour"):
        SegmentationConfig.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not readable"):
        SegmentationConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"optimizer": "lion"}, "optimizer='lion' is unknown: choose 'sgd' or 'adamw' or 'rmsprop'"),
        ({"schedule": "step"}, "schedule='step'"),
        ({"precision": "fp8"}, "precision='fp8'"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


class SelfPortraits:
    """Masks that are their own images, so that any shift between image and target shows."""

    def __init__(self, count: int, size: tuple[int, int] = (60, 70)):
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 1, size[0] // 10, size[1] // 10, generator=generator)
        self.masks = (nn.functional.interpolate(coarse, size, mode="bilinear")[:, 0] > 0.5).long()
        self.masks[:, 0, 0] = torch.arange(count) % 2

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.masks[index][None].float(), self.masks[index]


@pytest.mark.parametrize(("padding", "tile", "size"), [("valid", 66, 50), ("valid", 130, 114), ("same", 40, 40)])
def test_targets_lie_where_the_network_predicts(padding, tile, size):
    data = SelfPortraits(3)
    task = SegmentationTask(replace(SMALL, padding=padding, tile=tile, elastic=0.0), data, data)
    images, targets, weights = task.batch(0)
    assert images.shape == (2, 1, tile, tile) and targets.shape == weights.shape == (2, size, size)
    assert task.network(images).shape == (2, 2, size, size)
    border = (tile - size) // 2
    assert torch.equal(images[:, 0, border : tile - border, border : tile - border].long(), targets)
    assert targets.unique().tolist() == [0, 1]

    warped, warped_targets, _ = SegmentationTask(replace(task.config, elastic=10.0), data, data).batch(0)
    inner = warped[:, 0, border : tile - border, border : tile - border]
    assert not torch.equal(warped_targets, targets)
    assert ((inner > 0.5).long() == warped_targets).float().mean() > 0.97


def test_batches_depend_on_seed_and_step_alone():
    data = SelfPortraits(5)
    forwards, backwards = (SegmentationTask(SMALL, data, data) for _ in range(2))
    expected = [forwards.batch(step) for step in range(4)]
    torch.rand(7)
    for step in (3, 1, 0, 2):
        assert all(torch.equal(a, b) for a, b in zip(backwards.batch(step), expected[step], strict=True))
    other = SegmentationTask(replace(SMALL, seed=1), data, data)
    assert not torch.equal(other.batch(0)[0], expected[0][0])
    assert not torch.equal(expected[0][0], expected[1][0])


def test_an_epoch_shows_every_image_once():
    data = SelfPortraits(5)
    task = SegmentationTask(SMALL, data, data)
    shown = []
    example = task.example
    task.example = lambda index: shown.append(index) or example(index)
    for step in range(10):
        task.batch(step)
    epochs = [shown[first : first + 5] for first in range(0, 20, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_validation_metrics_and_evaluation(tmp_path: Path):
    data = SelfPortraits(2)
    task = SegmentationTask(SMALL, data, data)
    # A network that answers with its input: class 1 where the image is above one half.
    for parameter in task.network.parameters():
        nn.init.zeros_(parameter)
    task.network.contracting[0][0].weight.data[0, 0, 1, 1] = 1
    task.network.contracting[0][1].weight.data[0, 0, 1, 1] = 1
    task.network.expanding[0][0].weight.data[0, 0, 1, 1] = 1
    task.network.expanding[0][1].weight.data[0, 0, 1, 1] = 1
    task.network.classifier.weight.data[1, 0] = 40
    task.network.classifier.bias.data[1] = -20
    task.network.eval()
    assert task.validate() == pytest.approx(
        {"validation": 0, "pixel_accuracy": 1, "mean_iou": 1, "mean_dice": 1}, abs=1e-6
    )
    task.draw(tmp_path / "samples" / "one.png")
    assert Image.open(tmp_path / "samples" / "one.png").size[0] > 300
    for symmetries in (False, True):
        metrics = evaluate(task.network, data, SMALL.tile, symmetries=symmetries)
        assert metrics == pytest.approx(
            {"pixel_accuracy": 1, "mean_iou": 1, "mean_dice": 1, "v_rand": 1, "v_info": 1}, abs=1e-6
        )


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for name in ("image", "label"):
        (folder / name).mkdir(parents=True)
    for number in range(12):
        mask = np.zeros((40, 50), dtype=np.uint8)
        mask[number + 2 : number + 12, 10:30] = 255
        Image.fromarray(mask // 2 + 60).convert("RGB").save(folder / "image" / f"{number}.png")
        Image.fromarray(mask).save(folder / "label" / f"{number}.png")
    return folder


def test_open_data(image_folder: Path):
    config = replace(SMALL, data=str(image_folder), num_classes=5)
    training, validation, full = open_data(config)
    assert (len(training), len(validation)) == (11, 1)
    assert (full.validation, full.in_channels, full.num_classes) == ((11,), 3, 2)
    training, validation, full = open_data(replace(config, validation=(0, 7)))
    assert (len(training), len(validation), full.validation) == (10, 2, (0, 7))
    assert validation[1][1][9:19].sum() == 200 and validation[1][1][8].sum() == 0
    with pytest.raises(ValueError, match=r"validation image 12 does not exist: .* holds 0 \.\.\. 11"):
        open_data(replace(config, validation=(3, 12)))
    with pytest.raises(ValueError, match="none is left to train on"):
        open_data(replace(config, validation=tuple(range(12))))

    training, validation, full = open_data(SMALL)
    assert full == SMALL and len(training) > len(validation) > 0
    assert not torch.equal(training[0][0], validation[0][0])


def test_training_on_a_folder_learns_and_loads(image_folder: Path, tmp_path: Path):
    training, validation, config = open_data(
        replace(SMALL, data=str(image_folder), steps=60, every=30, optimizer="adamw", lr=0.02, elastic=2.0, width=4)
    )
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="holds no training run"):
        load_network(out)
    config.write(out)
    with pytest.raises(ValueError, match="has not saved a checkpoint yet"):
        load_network(out)
    task = SegmentationTask(config, training, validation)
    history = train(task, config, out, console=QUIET)
    assert history["mean_iou"][-1][1] > 0.9
    network, loaded = load_network(out)
    assert loaded == config and not network.training
    assert evaluate(network, validation, config.tile)["mean_iou"] == max(score for _, score in history["mean_iou"])


def test_a_tile_that_does_not_fit():
    data = SelfPortraits(2)
    with pytest.raises(ValueError, match="size of 67 .* fits: 66 or 68"):
        SegmentationTask(replace(SMALL, tile=67), data, data)


def test_progress_in_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(NoisyTask(CONFIG), CONFIG, tmp_path, console=Console())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/10  loss ")
    assert [line for line in lines if "loss" in line][-1].endswith(" img/s")
    assert not any("nan" in line for line in lines)
    assert "a *[bold]picture*" in lines[lines.index("step 3:") + 1]
    assert [line for line in lines if "validation" in line][-1].startswith("step 10: validation ")
    assert not any(math.isnan(float(line.split()[3])) for line in lines if "loss" in line)
