from pathlib import Path

import numpy as np
import pytest
import torch
from backstride.models.predict import predict_logits, predict_probability, read_image, save_prediction
from backstride.models.segmentation.unet import UNet
from PIL import Image
from torch import Tensor, nn


def mirrored(image: Tensor, network: UNet) -> Tensor:
    """The whole image with its mirrored surroundings as one input of the network, by numpy."""
    pads = [(0, 0)]
    for size in image.shape[1:]:
        total = network.fitting_size(size + 2 * network.context)
        pads.append((network.context, total - size - network.context))
    return torch.from_numpy(np.pad(image.numpy(), pads, mode="reflect"))


def whole(network: UNet, image: Tensor) -> Tensor:
    """The prediction in one piece, without predict.py."""
    with torch.no_grad():
        output = network(mirrored(image, network)[None])[0]
    first = network.context if network.padding == "same" else 0
    return output[:, first : first + image.shape[1], first : first + image.shape[2]]


def integer_network(padding, depth: int) -> UNet:
    """All weights are -1, 0 or 1: in fp64 its sums are exact, in whatever order a library adds them up."""
    generator = torch.Generator().manual_seed(0)
    network = UNet(1, 3, width=2, depth=depth, padding=padding, ops="torch").double().eval()
    for parameter in network.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).double()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda _, __, output: assert_exact(output))
    return network


def assert_exact(output: Tensor) -> None:
    assert output.abs().max() < 2**44  # times at most 2 * 32 * 9 summands stays below 2^53


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tiles_equal_the_whole_image_exactly(padding, depth):
    network = integer_network(padding, depth)
    image = torch.randint(0, 8, (1, 61, 90), generator=torch.Generator().manual_seed(1)).double()
    expected = whole(network, image)
    assert len(expected.unique()) > 100
    smallest = network.fitting_size(2 * network.context + network.alignment)
    for tile in (smallest, smallest + 1, network.fitting_size(smallest + 20), 4000):
        assert torch.equal(predict_logits(network, image, tile), expected)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_tiles_equal_the_whole_image_to_rounding(padding, dtype, tolerance):
    torch.manual_seed(0)
    network = UNet(1, 2, width=2, padding=padding, ops="torch").to(dtype).eval()
    image = torch.rand(1, 70, 40, dtype=dtype)
    expected = whole(network, image)
    for tile in (208 if padding == "same" else 204, 252):
        difference = predict_logits(network, image, tile) - expected
        assert difference.abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (16, 17)])
def test_an_image_smaller_than_its_mirrored_surroundings(padding, size):
    network = integer_network(padding, 2)
    image = torch.randint(0, 8, (1, *size), generator=torch.Generator().manual_seed(1)).double()
    assert torch.equal(predict_logits(network, image), whole(network, image))


def test_context_of_same_padding_is_as_large_as_it_must_be():
    network = integer_network("same", 3)
    image = torch.randint(0, 8, (1, 90, 90), generator=torch.Generator().manual_seed(1)).double()
    expected = whole(network, image)
    network.context -= 1
    assert not torch.equal(predict_logits(network, image, 120), expected)


def test_what_can_not_be_tiled():
    network = UNet(width=1, ops="torch").eval()
    with pytest.raises(ValueError, match="tile=188 is too small for this network: the smallest is 204"):
        predict_logits(network, torch.zeros(1, 9, 9), 188)
    for shape in ((9, 9), (1, 1, 9, 9), (1, 0, 9)):
        with pytest.raises(ValueError, match=r"expected an image \[C, H, W\]"):
            predict_logits(network, torch.zeros(shape))


def test_averaging_over_symmetries_commutes_with_them():
    torch.manual_seed(0)
    network = UNet(1, 2, width=2, depth=1, ops="torch").double().eval()
    image = torch.rand(1, 12, 19, dtype=torch.float64)
    averaged = predict_probability(network, image, symmetries=True)
    torch.testing.assert_close(averaged.sum(0), torch.ones(12, 19))
    assert (averaged - predict_probability(network, image)).abs().max() > 1e-3
    for turns in range(4):
        for mirrored_too in (False, True):
            change = lambda x: torch.rot90(x.flip(2) if mirrored_too else x, turns, (1, 2))  # noqa: B023, E731
            torch.testing.assert_close(predict_probability(network, change(image), symmetries=True), change(averaged))


def test_read_image(tmp_path: Path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(np.stack([grey, grey, grey], -1)).save(tmp_path / "rgb.png")
    expected = torch.from_numpy(grey)[None] / 255
    for name in ("grey.png", "deep.png", "rgb.png"):
        torch.testing.assert_close(read_image(tmp_path / name, 1), expected)
    for name in ("grey.png", "rgb.png"):
        torch.testing.assert_close(read_image(tmp_path / name, 3), expected.expand(3, -1, -1))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png cannot be read as a picture"):
        read_image(tmp_path / "text.png", 1)
    with pytest.raises(ValueError, match=r"missing\.png"):
        read_image(tmp_path / "missing.png", 1)
    with pytest.raises(ValueError, match="5 input channels"):
        read_image(tmp_path / "grey.png", 5)


def test_save_prediction(tmp_path: Path):
    image = torch.rand(1, 5, 6)
    probability = torch.stack([torch.full((5, 6), 0.2), torch.full((5, 6), 0.8)])
    probability[:, 0, 0] = torch.tensor([0.6, 0.4])
    paths = save_prediction(probability, image, tmp_path / "new", "cell")
    assert [path.name for path in paths] == ["cell_classes.png", "cell_probability.png", "cell_overlay.png"]
    assert sorted(tmp_path.glob("new/*")) == sorted(paths)
    classes = np.asarray(Image.open(paths[0]))
    assert classes[0, 0] == 0 and classes.sum() == 29
    probabilities = np.asarray(Image.open(paths[1]))
    assert probabilities[0, 0] == 102 and probabilities[4, 5] == 204
    assert Image.open(paths[2]).mode == "RGB" and Image.open(paths[2]).size == (6, 5)

    three = save_prediction(torch.tensor([0.1, 0.3, 0.6])[:, None, None].expand(3, 5, 6), image, tmp_path, "three")
    assert np.unique(np.asarray(Image.open(three[1]))).tolist() == [153]  # of the class that was chosen
