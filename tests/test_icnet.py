import pytest
import torch
import torch.nn.functional as F
from backstride.models.segmentation.icnet import CascadeFusion, ICNet, pooling_windows, pyramid_sum

from .test_deeplab import DeepLabTests

TINY = {"blocks": (1, 2, 1, 1), "width": 1}


class TestICNet(DeepLabTests):
    network = ICNet
    parameters = {(3, 19): 6_699_993}
    # The blobs of the authors' Caffe network.
    published_input = (1, 3, 1025, 2049)
    layer_table = [
        ("backbone.conv1", (1, 32, 257, 513)),
        ("backbone.maxpool", (1, 64, 129, 257)),
        ("backbone.layer1", (1, 128, 129, 257)),
        ("backbone.layer2.0", (1, 256, 65, 129)),
        ("backbone.layer2.1", (1, 256, 33, 65)),
        ("backbone.layer3", (1, 512, 33, 65)),
        ("backbone.layer4", (1, 1024, 33, 65)),
        ("top", (1, 256, 33, 65)),
        ("fuse_middle.coarse", (1, 128, 65, 129)),
        ("fuse_middle.fine", (1, 128, 65, 129)),
        ("light.0", (1, 32, 513, 1025)),
        ("light.1", (1, 32, 257, 513)),
        ("light.2", (1, 64, 129, 257)),
        ("fuse_fine.coarse", (1, 128, 129, 257)),
        ("classifier", (1, 2, 257, 513)),
    ]
    tiny = TINY
    tiny_sizes = {(33, 18): (33, 18), (1, 2): (1, 2), (37, 50): (37, 50)}
    batch_size = 2
    learning_rate = 0.02
    fused = ("light.2", "fuse", "classifier")


def test_the_published_pooling_windows():
    """The authors' Caffe network, on a map of 33 x 65."""
    assert [pooling_windows((33, 65), number) for number in (1, 2, 3, 6)] == [
        ((33, 65), (33, 65)),
        ((17, 33), (16, 32)),
        ((13, 25), (10, 20)),
        ((8, 15), (5, 10)),
    ]


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_pooling_windows_cover_every_map(number):
    for height in range(1, 14, 2):
        for width in range(1, 40, 3):
            for size in ((height, width), (width, height)):
                kernel, stride = pooling_windows(size, number)
                shape = F.avg_pool2d(torch.empty(1, 1, *size, device="meta"), kernel, stride).shape[2:]
                assert shape == (min(number, *size),) * 2
                for side, window, step in zip(size, kernel, stride, strict=True):
                    assert (shape[0] - 1) * step + window == side and step <= window


def test_the_pyramid_is_a_sum():
    x = torch.randn(2, 3, 9, 13)
    torch.testing.assert_close(pyramid_sum(x, (1,)), x + x.mean((2, 3), keepdim=True))
    constant = torch.full((1, 1, 9, 13), 2.0)
    torch.testing.assert_close(pyramid_sum(constant, (1, 2, 3, 6)), 5 * constant)


def test_cascade_fusion_by_its_definition():
    """Figure 3: upsample twice, 3x3 with dilation 2; project 1x1; both normalised, summed, ReLU."""
    torch.manual_seed(0)
    fusion = CascadeFusion(3, 2, 4, "torch").double().eval()
    coarse, fine = torch.randn(1, 3, 5, 6).double(), torch.randn(1, 2, 9, 11).double()
    result, twice = fusion(coarse, fine)
    assert torch.equal(twice[:, :, ::2, ::2], coarse)
    upper = F.conv2d(twice, fusion.coarse[0].weight, padding=2, dilation=2) / (1 + 1e-5) ** 0.5
    lower = F.conv2d(fine, fusion.fine[0].weight) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(result, F.relu(upper + lower))


def test_auxiliary_logits_are_coarser():
    with torch.device("meta"):
        network = ICNet(auxiliary=True, ops="torch").eval()
        logits = network(torch.empty(1, 3, 1025, 2049), auxiliary=True)
    assert [tuple(part.shape) for part in logits] == [(1, 19, 257, 513), (1, 19, 129, 257), (1, 19, 65, 129)]
    assert len(network.loss_weights) == 3
    network = ICNet(1, 2, **TINY, auxiliary=True, ops="torch").eval()
    x = torch.randn(1, 1, 33, 49)
    assert torch.equal(network(x, auxiliary=True)[0], network(x)[:, :, ::4, ::4])
    with pytest.raises(ValueError, match="build it with auxiliary=True"):
        ICNet(1, 2, **TINY, ops="torch").eval()(x, auxiliary=True)


def test_the_input_s_factor_and_shift():
    network = ICNet(1, 2, **TINY, ops="torch").eval()
    x = torch.randn(1, 1, 33, 49)
    wanted = network(3 * x + 2)
    network.scale.data.fill_(3.0)
    network.shift.data.fill_(2.0)
    torch.testing.assert_close(network(x), wanted)
    assert not torch.equal(network(x), network(-x))
