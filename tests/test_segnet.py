import pytest
import torch
from backstride.models.layers import BatchNorm2d
from backstride.models.segmentation.deconvnet import DeconvNet
from backstride.models.segmentation.segnet import SegNet, SegNetBasic
from torch import nn

from .models_base import NetworkTests


class TestSegNet(NetworkTests):
    network = SegNet
    parameters = {(3, 11): 29_449_355}
    published_input = (1, 3, 360, 480)
    layer_table = [
        ("stages.0", (1, 64, 360, 480)),
        ("stages.1", (1, 128, 180, 240)),
        ("stages.2", (1, 256, 90, 120)),
        ("stages.3", (1, 512, 45, 60)),
        ("stages.4", (1, 512, 23, 30)),
        ("decoder.0", (1, 512, 23, 30)),
        ("decoder.1", (1, 256, 45, 60)),
        ("decoder.2", (1, 128, 90, 120)),
        ("decoder.3", (1, 64, 180, 240)),
        ("decoder.4", (1, 2, 360, 480)),
    ]
    tiny = {"stages": ((2, 2), (3,))}
    tiny_sizes = {(4, 5): (4, 5), (1, 2): (1, 2), (37, 50): (37, 50)}
    compiled_sizes = 2
    learning_rate = 0.1


class TestSegNetBasic(NetworkTests):
    network = SegNetBasic
    parameters = {(3, 11): 1_416_587}
    published_input = (1, 3, 360, 480)
    layer_table = [
        ("stages.0", (1, 64, 360, 480)),
        ("stages.1", (1, 64, 180, 240)),
        ("stages.2", (1, 64, 90, 120)),
        ("stages.3", (1, 64, 45, 60)),
        ("decoder.0", (1, 64, 45, 60)),
        ("decoder.1", (1, 64, 90, 120)),
        ("decoder.2", (1, 64, 180, 240)),
        ("decoder.3", (1, 64, 360, 480)),
        ("classifier", (1, 2, 360, 480)),
    ]
    tiny = {"width": 2, "kernel": 3}
    tiny_sizes = {(6, 17): (6, 17), (1, 2): (1, 2), (37, 50): (37, 50)}
    learning_rate = 0.1


class TestDeconvNet(NetworkTests):
    network = DeconvNet
    parameters = {(3, 21): 251_805_653}
    published_input = (1, 3, 224, 224)
    # Table 2 of the paper.
    layer_table = [
        ("stages.0", (1, 64, 224, 224)),
        ("stages.1", (1, 128, 112, 112)),
        ("stages.2", (1, 256, 56, 56)),
        ("stages.3", (1, 512, 28, 28)),
        ("stages.4", (1, 512, 14, 14)),
        ("fc", (1, 4096, 1, 1)),
        ("unfc", (1, 512, 7, 7)),
        ("decoder.0", (1, 512, 14, 14)),
        ("decoder.1", (1, 256, 28, 28)),
        ("decoder.2", (1, 128, 56, 56)),
        ("decoder.3", (1, 64, 112, 112)),
        ("decoder.4", (1, 64, 224, 224)),
        ("classifier", (1, 2, 224, 224)),
    ]
    tiny = {"stages": ((2, 2), (3,)), "dense": 4, "window": 2}
    tiny_sizes = {(8, 9): (8, 9), (5, 6): (5, 6), (37, 50): (37, 50)}
    learning_rate = 0.1

    def test_too_small_an_image(self):
        network = self.build("torch")
        network.eval()(torch.zeros(1, 1, 5, 5))
        with pytest.raises(ValueError, match="4 x 9 pixels is too small .* needs at least 5"):
            network(torch.zeros(1, 1, 4, 9))


def test_widths_of_deconvnet():
    """Table 2 of the paper: which layer of a stage narrows the channels."""
    with torch.device("meta"):
        decoder = DeconvNet().decoder
    widths = [[m.out_channels for m in stage if isinstance(m, nn.ConvTranspose2d)] for stage in decoder]
    assert widths == [[512, 512, 512], [512, 512, 256], [256, 256, 128], [128, 64], [64, 64]]


def test_widths_of_segnet():
    with torch.device("meta"):
        decoder = SegNet().decoder
    widths = [[m.out_channels for m in stage if isinstance(m, nn.Conv2d)] for stage in decoder]
    assert widths == [[512, 512, 512], [512, 512, 256], [256, 256, 128], [128, 64], [64, 11]]
    assert isinstance(decoder[-1][-1], nn.Conv2d)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_values_return_to_the_places_of_the_maxima(size):
    """With identities for convolutions SegNet keeps the maximum of each 2x2 window and sets the rest to zero."""
    network = SegNet(1, 1, stages=((1,),), ops="torch").eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    x = torch.rand(1, 1, *size)
    y = network(x)
    for top in range(0, size[0], 2):
        for left in range(0, size[1], 2):
            window = (0, 0, slice(top, top + 2), slice(left, left + 2))
            assert y[window].max() == y[window].sum() == x[window].max()
            assert torch.equal(y[window] > 0, x[window] == x[window].max())


def test_segnet_basic_has_no_relu_in_its_decoder():
    network = SegNetBasic(width=1)
    for part, activation in ((network.stages, "relu"), (network.decoder, None)):
        assert [m.activation for m in part.modules() if isinstance(m, BatchNorm2d)] == [activation] * 4
        assert not [m for m in part.modules() if isinstance(m, nn.ReLU)]
