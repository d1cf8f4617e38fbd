import pytest
import torch
from backstride.models.segmentation.pspnet import PSPNet, PyramidPooling
from backstride.models.segmentation.resnet import RESNET50, RESNET101

from .test_deeplab import DeepLabTests

TINY = {"blocks": (1, 1, 1, 1), "width": 1, "bins": (1, 2)}


class TestPSPNet(DeepLabTests):
    network = PSPNet
    parameters = {(3, 21): 65_708_501}
    published_input = (1, 3, 473, 473)
    layer_table = [
        ("backbone.conv1", (1, 64, 237, 237)),
        ("backbone.conv3", (1, 128, 237, 237)),
        ("backbone.layer1", (1, 256, 119, 119)),
        ("backbone.layer2", (1, 512, 60, 60)),
        ("backbone.layer3", (1, 1024, 60, 60)),
        ("backbone.layer4", (1, 2048, 60, 60)),
        ("pyramid.features.0", (1, 512, 1, 1)),
        ("pyramid.features.3", (1, 512, 6, 6)),
        ("pyramid", (1, 4096, 60, 60)),
        ("classifier.0", (1, 512, 60, 60)),
        ("classifier", (1, 2, 60, 60)),
    ]
    tiny = TINY
    tiny_sizes = {(18, 9): (18, 9), (1, 2): (1, 2), (37, 50): (37, 50)}
    batch_size = 2
    fused = ("pyramid", "classifier")


@pytest.mark.parametrize(
    ("blocks", "classes", "auxiliary", "wanted"),
    [
        (RESNET101, 21, True, 68_073_706),
        (RESNET50, 21, False, 46_716_373),
        (RESNET50, 21, True, 49_081_578),
        (RESNET50, 150, False, 46_782_550),
    ],
)
def test_the_published_parameter_counts(blocks, classes, auxiliary, wanted):
    with torch.device("meta"):
        network = PSPNet(3, classes, blocks=blocks, auxiliary=auxiliary)
    assert sum(parameter.numel() for parameter in network.parameters()) == wanted
    assert [block.conv2.dilation for block in network.backbone.layer3] == [(2, 2)] * blocks[2]
    assert [block.conv2.dilation for block in network.backbone.layer4] == [(4, 4)] * blocks[3]


def test_the_pyramid_holds_means_of_equal_parts():
    pyramid = PyramidPooling(4, (1, 2), "torch").eval()
    for feature in pyramid.features:
        feature[1].weight.data = torch.eye(2, 4)[:, :, None, None]  # hands on two channels
    x = torch.rand(1, 4, 6, 10)
    y = pyramid(x)
    assert torch.equal(y[:, :4], x)
    close = {"rtol": 1e-4, "atol": 1e-5}  # batch normalisation's eps
    torch.testing.assert_close(y[:, 4:6], x[:, :2].mean((2, 3), keepdim=True).expand(-1, -1, 6, 10), **close)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        part = x[:, :2, 3 * row : 3 * row + 3, 5 * column : 5 * column + 5]
        torch.testing.assert_close(y[:, 6:, -row, -column], part.mean((2, 3)), **close)


def test_auxiliary_logits():
    network = PSPNet(1, 2, **TINY, auxiliary=True, ops="torch").eval()
    x = torch.randn(1, 1, 20, 31)
    main, auxiliary = network(x, auxiliary=True)
    assert torch.equal(main, network(x)) and main.shape == auxiliary.shape and not torch.equal(main, auxiliary)
    with pytest.raises(ValueError, match="build it with auxiliary=True"):
        PSPNet(1, 2, **TINY, ops="torch").eval()(x, auxiliary=True)


def test_errors():
    with pytest.raises(ValueError, match=r"bins=\(1, 2, 3\): their number must divide the trunk's 32 channels"):
        PSPNet(1, 2, **(TINY | {"bins": (1, 2, 3)}))
    with pytest.raises(ValueError, match="one image is too few to train on"):
        PSPNet(1, 2, **TINY, ops="torch")(torch.zeros(1, 1, 20, 20))
