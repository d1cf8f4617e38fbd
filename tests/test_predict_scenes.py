"""Prediction with the networks for scenes; U-Net's is in test_predict.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backstride.models.cli import app
from backstride.models.data import voc
from backstride.models.predict import normalise, predict_scene, predict_scene_logits
from backstride.models.segmentation.networks import NETWORKS, build_scene_network
from backstride.models.segmentation.segnet import SegNet, SegNetBasic
from backstride.models.training.checkpoint import save_weights
from backstride.models.training.config import CharRNNConfig, SceneConfig
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


class Colours(nn.Module):
    """Logits that are the input's channels."""

    def forward(self, input: Tensor) -> Tensor:
        self.seen = input
        return input


def random_network(network: nn.Module) -> nn.Module:
    """In fp64, with running statistics as after some training."""
    torch.manual_seed(0)
    for module in network.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)  # pyright: ignore
            module.running_var.uniform_(0.5, 2)  # pyright: ignore
    return network.eval()


@torch.no_grad()
def test_tiles_equal_the_whole_image():
    network = random_network(SegNet(3, 4, stages=((2, 2), (3,)), ops="torch"))  # sees at most 16 pixels far
    image = torch.randn(3, 150, 101, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = network(image[None])[0]
    assert torch.equal(predict_scene_logits(network, image), whole)
    for tile in (64, 65, 100, 101, 127, 149, 150):
        torch.testing.assert_close(predict_scene_logits(network, image, tile), whole, rtol=1e-11, atol=1e-11)
    far = random_network(SegNetBasic(3, 4, width=2, ops="torch"))  # sees about 100 pixels far
    assert (predict_scene_logits(far, image, 64) - far(image[None])[0]).abs().max() > 1e-3


def test_large_images_are_tiled_unless_asked_otherwise(monkeypatch):
    sizes = []
    network = Colours()
    network.register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[0].shape[2:])))
    monkeypatch.setattr("backstride.models.predict.SCENE_PIXELS", 70 * 100)
    monkeypatch.setattr("backstride.models.predict.SCENE_TILE", 64)
    for image in (torch.rand(3, 70, 100), torch.rand(3, 71, 100)):
        assert torch.equal(predict_scene_logits(network, image), image)
    assert sizes == [(70, 100), *[(rows, columns) for rows in (64, 39) for columns in (64, 64, 36)]]
    with pytest.raises(ValueError, match="tile=63: must be at least 64, or 0 for one that fits"):
        predict_scene_logits(network, torch.rand(3, 70, 100), 63)
    for shape in ((70, 100), (1, 3, 70, 100), (3, 0, 5)):
        with pytest.raises(ValueError, match=r"expected an image \[C, H, W\]"):
            predict_scene_logits(network, torch.zeros(shape))


def test_an_image_below_the_network_s_smallest_is_mirrored():
    network = Colours()
    network.smallest = 9  # pyright: ignore
    image = torch.rand(3, 5, 7)
    assert torch.equal(predict_scene_logits(network, image), image)
    assert torch.equal(network.seen[0], torch.from_numpy(np.pad(image, ((0, 0), (0, 4), (0, 2)), mode="reflect")))


def test_a_prediction_sees_what_training_saw():
    network, image = Colours(), torch.rand(3, 7, 10)
    expected = torch.stack([(image[i] - MEAN[i]) / STD[i] for i in range(3)]).softmax(0)
    torch.testing.assert_close(normalise(image, MEAN, STD).softmax(0), expected)
    torch.testing.assert_close(predict_scene(network, image, MEAN, STD), expected)
    torch.testing.assert_close(predict_scene(network, image, MEAN, STD, mirrored=True), expected)

    scaled = predict_scene(network, image, MEAN, STD, scale=3)
    small = F.avg_pool2d(image[:, :6, :9], 3)
    torch.testing.assert_close(network.seen[0, :, :2, :3], normalise(small, MEAN, STD))
    assert network.seen.shape == (1, 3, 3, 4) and scaled.shape == (3, 7, 10)
    torch.testing.assert_close(scaled[:, 1::3, 1::3], network.seen[0].softmax(0)[:, :2, :3])


def test_averaging_with_the_mirror_image_commutes_with_it():
    network = random_network(SegNetBasic(3, 3, width=2, ops="torch")).float()
    image = torch.rand(3, 12, 15)
    plain, averaged = (predict_scene(network, image, MEAN, STD, mirrored=mirrored) for mirrored in (False, True))
    turned = predict_scene(network, image.flip(2), MEAN, STD, mirrored=True)
    torch.testing.assert_close(turned.flip(2), averaged)
    assert (plain - averaged).abs().max() > 1e-3


def run_with(folder: Path, name: str, **settings) -> nn.Module:
    """A folder as `train` leaves it, with an untrained network for Pascal VOC's classes."""
    torch.manual_seed(0)
    config = SceneConfig(
        data="gone", network=name, width=2, ops="torch", classes=(*voc.CLASSES,), colours=(*voc.CLASSES.values(),)
    )
    config.write(folder)
    network = build_scene_network(name, len(voc.CLASSES), 2, "torch").eval()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    save_weights(network, folder / "best.safetensors", {"step": 1})
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_the_command_segments_with_every_network(name, tmp_path: Path):
    network = run_with(tmp_path / "run", name)
    pixels = {"tiny": (1, 3), "wide": (37, 410)}
    files = []
    for stem, size in pixels.items():
        files.append(str(tmp_path / f"{stem}.png"))
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(files[-1])
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["predict", *files, "--checkpoint", str(tmp_path / "run"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    for stem, size in pixels.items():
        for kind in ("classes", "probability", "overlay"):
            with Image.open(out / f"{stem}_{kind}.png") as picture:
                assert picture.size == (size[1], size[0]) or kind == "overlay"
        with Image.open(out / f"{stem}_classes.png") as picture:
            classes, palette = np.array(picture), np.reshape(picture.getpalette(), (-1, 3))
        assert classes.max() < 21 and [tuple(row) for row in palette[:21].tolist()] == list(voc.CLASSES.values())
        assert palette[255].tolist() == list(voc.colour(255))
    with Image.open(files[1]) as picture:
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    config = SceneConfig.read(tmp_path / "run")
    logits = predict_scene_logits(network, normalise(image, config.mean, config.std))
    assert classes.tolist() == logits.argmax(0).tolist()
    legend = np.array(Image.open(out / "wide_overlay.png"))[37:].reshape(-1, 3)
    for number in np.unique(classes)[np.unique(classes) > 0]:
        assert (legend == voc.colour(int(number))).all(-1).sum() > 100


def test_checkpoints_that_do_not_segment(tmp_path: Path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (5, 5)).save(picture)

    def message(folder: str) -> str:
        return str(CliRunner().invoke(app, ["predict", str(picture), "--checkpoint", str(tmp_path / folder)]).exception)

    assert "nowhere holds no training run: it has no config.json" in message("nowhere")
    CharRNNConfig(vocabulary="ab").write(tmp_path / "text")
    assert "text holds a network that writes text: use backstride sample" in message("text")
    SceneConfig(data="", classes=("a", "b")).write(tmp_path / "new")
    assert "has not saved a checkpoint yet: wait for it, or resume it" in message("new")
    path = tmp_path / "new" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"network": "lenet"}))
    assert "network='lenet' is unknown: choose segnet" in message("new")
