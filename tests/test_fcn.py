import pytest
import torch
import torch.nn.functional as F
from backstride.models.segmentation.fcn import FCN, bilinear
from torch import Tensor, nn

from .models_base import NetworkTests

TINY = {"stages": ((2,), (2,), (2,), (2,), (2,)), "dense": 3, "window": 5, "dropout": 0.0}


# The blobs of the authors' Caffe network for an image of 500 x 500.
TRUNK = [
    ("stages.0.0", (1, 64, 698, 698)),
    ("stages.1.1", (1, 128, 349, 349)),
    ("stages.2.2", (1, 256, 175, 175)),
    ("stages.3.2", (1, 512, 88, 88)),
    ("stages.4.2", (1, 512, 44, 44)),
    ("fc6", (1, 4096, 16, 16)),
    ("fc7", (1, 4096, 16, 16)),
    ("score", (1, 2, 16, 16)),
]
SKIP_4 = [("skip_scores.0", (1, 2, 44, 44)), ("up.0", (1, 2, 34, 34))]
SKIP_3 = [("skip_scores.1", (1, 2, 88, 88)), ("up.1", (1, 2, 70, 70))]


class TestFCN8s(NetworkTests):
    network = FCN
    parameters = {(3, 21): 134_489_759}
    published = {"stride": 8, "at_once": True}
    published_input = (1, 3, 500, 500)
    layer_table = [*TRUNK, *SKIP_4, *SKIP_3, ("upsample.8s", (1, 2, 568, 568))]
    tiny = TINY
    tiny_sizes = {(1, 2): (1, 2), (27, 70): (27, 70)}
    # Padding makes these so large; test_conv.py has smaller such layers.
    too_large = ("stages.0.0", "stages.1.0", "upsample.8s")
    learning_rate = 0.03

    def target(self) -> Tensor:
        """A grid of 8 to 32 pixels can't tell two neighbours apart."""
        return torch.ones(next(iter(self.tiny_sizes))[1], dtype=torch.int64)


class TestFCN16s(TestFCN8s):
    parameters = {(3, 21): 134_815_994}
    published = {"stride": 16}
    layer_table = [*TRUNK, *SKIP_4, ("upsample.16s", (1, 2, 560, 560))]
    tiny = TINY | {"stride": 16}
    too_large = ("stages.0.0", "stages.1.0", "upsample.16s")
    interpreted_steps = 1


class TestFCN32s(TestFCN8s):
    parameters = {(3, 21): 136_152_917}
    published = {"stride": 32}
    layer_table = [*TRUNK, ("upsample.32s", (1, 2, 544, 544))]
    tiny = TINY | {"stride": 32}
    tiny_sizes = {(3, 4): (3, 4), (1, 2): (1, 2), (27, 70): (27, 70)}  # of (1, 2) no pixel gets through the max-pools
    too_large = ("stages.0.0", "stages.1.0", "upsample.32s")
    interpreted_steps = 1


def randomised(network: FCN) -> FCN:
    """The network in fp64 with weights that aren't zero anywhere, the upsampling aside."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.double().named_parameters():
        if not name.startswith("up"):
            parameter.data = torch.randn(parameter.shape, generator=generator).double() / parameter[0].numel() ** 0.5
    return network.eval()


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_the_crops_are_at_the_centre(stride):
    """With kernels that a flip leaves as they are, a flipped image must give the flipped scores. (Where the grid of 32
    pixels fits the padded image, that is; a crop one pixel off breaks it.)"""
    network = randomised(FCN(1, 2, stride=stride, stages=TINY["stages"], dense=3, dropout=0.0, ops="torch"))
    for name, parameter in network.named_parameters():
        if parameter.dim() == 4 and not name.startswith("up"):
            parameter.data += parameter.data.flip(2) + parameter.data.flip(3) + parameter.data.flip(2, 3)
    x = torch.randn(1, 1, 26, 58, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (x.shape[2] + 198) % 32 == (x.shape[3] + 198) % 32 == 0
    y = network(x)
    assert y.std() > 1e-3
    for axis in (2, 3):
        torch.testing.assert_close(network(x.flip(axis)), y.flip(axis), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [5, 7])
@pytest.mark.parametrize("stride", [32, 16, 8])
def test_every_size_has_scores_for_every_pixel(stride, window):
    arguments = {"stages": ((1,), (1,), (1,), (1,), (1,)), "dense": 1, "window": window, "stride": stride}
    with torch.device("meta"):
        network = FCN(1, 1, **arguments, ops="torch")
        for size in range(1, 33):
            assert network(torch.empty(1, 1, size, 500 - size)).shape == (1, 1, size, 500 - size)


def test_skips_count_less_in_training_at_once():
    staged, at_once = (randomised(FCN(1, 2, **(TINY | {"at_once": value}), ops="torch")) for value in (False, True))
    x = torch.randn(1, 1, 20, 30, dtype=torch.float64)
    assert not torch.allclose(staged(x), at_once(x))
    staged.skip_scores[0].weight.data *= 0.01
    staged.skip_scores[1].weight.data *= 0.0001
    torch.testing.assert_close(staged(x), at_once(x))


def test_a_coarser_network_starts_a_finer_one():
    coarse, middle, fine = (FCN(1, 2, **(TINY | {"stride": stride}), ops="torch").eval() for stride in (32, 16, 8))
    nn.init.constant_(coarse.score.bias, 2.0)
    for before, after in ((coarse, middle), (middle, fine)):
        loaded = after.load_state_dict(before.state_dict(), strict=False)
        assert loaded.unexpected_keys == [f"upsample.{before.stride}s.weight"]
    # The skips' scores are zero at first, so the finer network says the same (but near the border, where scores fade).
    for network in (coarse, middle, fine):
        inner = network(torch.randn(1, 1, 90, 100))[:, :, 30:-30, 30:-30]
        torch.testing.assert_close(inner, torch.full((1, 2, 30, 40), 2.0))


@pytest.mark.parametrize("size", [4, 16, 32, 64])
def test_bilinear_weights_interpolate(size):
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    stride = size // 2
    y = F.conv_transpose2d(x, bilinear(2, size).double(), stride=stride, padding=stride // 2)
    wanted = F.interpolate(x, scale_factor=stride, mode="bilinear", align_corners=False)
    # At the border F.interpolate repeats the last value, where a transposed convolution sees zeros.
    inner = (..., slice(stride, -stride), slice(stride, -stride))
    torch.testing.assert_close(y[inner], wanted[inner])


def test_bilinear_weights_of_an_odd_size():
    assert bilinear(1, 3).tolist() == [[[[0.25, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 0.25]]]]


def test_only_the_last_upsampling_is_fixed():
    fixed = [name for name, parameter in FCN(1, 2, **TINY).named_parameters() if not parameter.requires_grad]
    assert fixed == ["upsample.8s.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 4}, "stride=4: choose 32, 16 or 8"),
        ({"window": 4}, "window=4: must be odd"),
        ({"window": 3}, "window=3: must be odd and at least 5"),
        ({"stages": ((2,), (2,))}, "five stages"),
        ({"stages": ((2,), (), (2,), (2,), (2,))}, "every stage needs at least one convolution"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FCN(1, 2, **(TINY | arguments))


@pytest.mark.parametrize("shape", [(1, 3, 9, 9), (1, 9, 9), (1, 1, 0, 9)])
def test_wrong_inputs(shape):
    with pytest.raises(ValueError, match=r"expected an input \[N, 1, H, W\]|needs at least 1"):
        FCN(1, 2, **TINY)(torch.zeros(shape))
