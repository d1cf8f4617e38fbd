"""What the networks of the DeepLab line need in training, auxiliary losses and the poly schedule, and ICNet's speed."""

import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from backstride.models.losses import auxiliary_cross_entropy, weighted_cross_entropy
from backstride.models.segmentation.speed import show_icnet
from backstride.models.training.config import SceneConfig
from backstride.models.training.scenes import SceneTask, open_scenes
from backstride.models.training.train import train
from rich.console import Console

from .test_scenes import write_scenes


def test_poly_schedule():
    config = SceneConfig(data="", lr=0.01, steps=100, schedule="poly")
    assert [config.learning_rate(step) for step in (0, 50, 75)] == pytest.approx(
        [0.01, 0.01 * 0.5**0.9, 0.01 * 0.25**0.9]
    )
    assert config.learning_rate(99) == pytest.approx(0.01**1.9) and config.learning_rate(100) == 0
    with pytest.raises(ValueError, match="schedule='step' is unknown: choose 'constant' or 'cosine' or 'poly'"):
        replace(config, schedule="step")


def test_auxiliary_losses_take_the_pixels_of_their_grid():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 9, 13), generator=generator)
    target[:, :2] = 255
    weight = torch.rand(2, 9, 13, generator=generator)
    logits = [torch.randn(2, 3, *size, generator=generator) for size in ((9, 13), (5, 7), (3, 4))]
    wanted = sum(
        share * weighted_cross_entropy(scores, target[:, ::step, ::step], weight[:, ::step, ::step])
        for share, scores, step in zip((1.0, 0.4, 0.16), logits, (1, 2, 4), strict=True)
    )
    torch.testing.assert_close(auxiliary_cross_entropy(logits, (1.0, 0.4, 0.16), target, weight), wanted)
    alone = auxiliary_cross_entropy(logits[:1], (1.0,), target, torch.ones(2, 9, 13))
    torch.testing.assert_close(alone, F.cross_entropy(logits[0], target, ignore_index=255))


@pytest.mark.parametrize("name", ["icnet", "pspnet"])
def test_training_adds_the_auxiliary_losses(name, tmp_path):
    root = write_scenes(tmp_path / "camvid", count=2, size=(33, 41))
    config = SceneConfig(data=str(root), network=name, width=2, steps=1, batch_size=2, schedule="poly", ops="torch")
    training, validation, config = open_scenes(config)
    task = SceneTask(config, training, validation)
    batch = images, targets, weights = task.batch(0)
    state = torch.get_rng_state()  # dropout's

    def loss(factor: float) -> torch.Tensor:
        torch.set_rng_state(state)
        task.config = replace(config, auxiliary=factor)
        return task.loss(batch)

    main, whole, half = (loss(factor).item() for factor in (0.0, 1.0, 0.5))
    torch.set_rng_state(state)
    logits = task.network(images, auxiliary=True)
    assert main == pytest.approx(auxiliary_cross_entropy(logits[:1], (1.0,), targets, weights).item(), rel=1e-5)
    assert whole - main == pytest.approx(2 * (half - main), rel=1e-3) and whole > main
    task.network.zero_grad()
    loss(1.0).backward()
    assert all(parameter.grad is not None for parameter in task.network.parameters())  # several processes need that
    task.config = config
    history = train(task, config, tmp_path / "run", console=Console(file=io.StringIO()))
    assert history["train"][0][1] == pytest.approx(whole, rel=0.5)
    with pytest.raises(ValueError, match="auxiliary=-1"):
        replace(config, auxiliary=-1.0)


def test_icnet_s_speed_without_a_gpu():
    output = io.StringIO()
    show_icnet(Console(file=output, width=200), torch.device("cpu"), size=(8 * 17, 8 * 9), width=1)
    text = output.getvalue()
    assert "no GPU was measured" in text and "17 x 9 pixels" in text and "Nothing was timed" in text
    assert 0 <= float(text.split("differ by ")[1].split()[0]) < 1e-4
    with pytest.raises(ValueError, match="frames=1: must be at least 2"):
        show_icnet(Console(file=output), torch.device("cpu"), frames=1)
