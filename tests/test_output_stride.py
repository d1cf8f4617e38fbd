"""The lecture's sparse and dense feature extraction: atrous convolution gives a trained network a finer grid."""

import copy

import pytest
import torch
from backstride.models.segmentation.deeplab import DeepLabV2, DeepLabV3, DeepLabV3Plus
from backstride.models.segmentation.output_stride import set_output_stride
from backstride.models.segmentation.resnet import ResNet
from backstride.models.segmentation.xception import Xception
from torch import nn

SIZE = (67, 50)


def trained(network: nn.Module) -> nn.Module:
    """Weights and running statistics that nothing in particular holds for."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.double().state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(noise.abs() + 0.5 if "var" in name else noise / max(1, tensor[0].numel()) ** 0.5)
    return network.eval()


def image() -> torch.Tensor:
    return torch.randn(1, 2, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    "network",
    [
        ResNet(2, blocks=(1, 2, 2, 3), width=2, output_stride=32, ops="torch"),
        ResNet(2, blocks=(1, 1, 2, 3), width=2, output_stride=16, multi_grid=(1, 2, 4), stride_in="1x1", ops="torch"),
        ResNet(2, blocks=(1, 1, 1, 1), width=2, output_stride=32, deep_stem=True, ops="torch"),
        Xception(2, width=2, middle=1, output_stride=32, ops="torch"),
    ],
    ids=["3x3", "1x1-multi-grid", "deep-stem", "xception"],
)
@pytest.mark.parametrize("stride", [8, 4])
def test_a_finer_grid_keeps_the_values_it_had(network, stride):
    sparse = trained(copy.deepcopy(network))
    dense = copy.deepcopy(sparse)
    set_output_stride(dense, stride)
    for (name, before), after in zip(sparse.state_dict().items(), dense.state_dict().values(), strict=True):
        assert torch.equal(before, after), name
    before, after = sparse(image())[-1], dense(image())[-1]
    assert after.shape[2:] == tuple(-(-side // stride) for side in SIZE)
    step = (after.shape[2] - 1) // (before.shape[2] - 1)
    assert step > 1 and before.std() > 0
    shared = after[:, :, ::step, ::step]
    torch.testing.assert_close(shared, before, rtol=1e-9, atol=1e-9)
    assert not torch.equal(after[:, :, 1::step, 1::step], shared[:, :, : after[:, :, 1::step].shape[2], : -1 or None])


def test_scores_of_a_whole_network_at_shared_pixels():
    sparse = trained(DeepLabV2(2, 3, blocks=(1, 1, 2, 2), width=2, output_stride=16, rates=(1, 2), ops="torch"))
    dense = copy.deepcopy(sparse)
    set_output_stride(dense, 8)
    assert [layer.dilation for layer in dense.classifier] == [(2, 2), (4, 4)]
    wanted = sparse.score(image())
    torch.testing.assert_close(dense.score(image())[:, :, ::2, ::2], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "network",
    [
        DeepLabV3(2, 3, blocks=(1, 1, 2, 3), width=2, channels=3, ops="torch"),
        DeepLabV3(2, 3, form="torchvision", blocks=(1, 1, 2, 3), width=2, output_stride=16, channels=3, ops="torch"),
        DeepLabV3Plus(2, 3, blocks=(1, 1, 2, 3), width=2, channels=3, low_channels=2, ops="torch"),
        DeepLabV3Plus(2, 3, backbone="xception", width=1, middle=1, separable=True, channels=3, ops="torch"),
    ],
    ids=["v3", "v3-torchvision", "v3plus", "v3plus-xception"],
)
def test_trained_with_16_and_used_with_8(network):
    """DeepLab v3, section 4.1. But for image pooling, the pyramid gives the values that it gave."""
    sparse = trained(copy.deepcopy(network))
    for module in sparse.modules():
        if type(module).__name__ == "ImagePooling":
            nn.init.zeros_(module[1].weight)  # what remains of it is the same for every image
    dense = copy.deepcopy(sparse)
    set_output_stride(dense, 8)
    assert dense(image()).shape == (1, 3, *SIZE)
    heads = [net.aspp if isinstance(net, DeepLabV3Plus) else net.classifier for net in (sparse, dense)]
    wanted, finer = (head(net.backbone(image())[-1]) for head, net in zip(heads, (sparse, dense), strict=True))
    torch.testing.assert_close(finer[:, :, ::2, ::2], wanted, rtol=1e-9, atol=1e-9)


def test_the_paper_s_dilations():
    """Multi-grid (1, 2, 4) times 2 with output stride 16; all twice as far apart with 8, the pyramid too."""
    with torch.device("meta"):
        network = DeepLabV3(blocks=(3, 4, 6, 3), ops="torch")
    for stride, third, fourth, rates in ((16, 1, [2, 4, 8], [6, 12, 18]), (8, 2, [4, 8, 16], [12, 24, 36])):
        set_output_stride(network, stride)
        assert {block.conv2.dilation for block in network.backbone.layer3} == {(third, third)}
        assert [block.conv2.dilation for block in network.backbone.layer4] == [(rate, rate) for rate in fourth]
        convolutions = [branch[0] for branch in network.classifier[0].convs[1:-1]]
        assert [layer.dilation for layer in convolutions] == [layer.padding for layer in convolutions]
        assert [layer.dilation[0] for layer in convolutions] == rates
    with torch.device("meta"):
        built = DeepLabV3(blocks=(3, 4, 6, 3), output_stride=8, ops="torch")
    assert str(built) == str(network)


def test_errors():
    network = ResNet(1, blocks=(1, 1, 1, 1), width=1, output_stride=16, ops="torch")
    before = str(network)
    with pytest.raises(ValueError, match="output_stride=32: this network can have 1, 2, 4, 8, 16"):
        set_output_stride(network, 32)
    with pytest.raises(ValueError, match="output_stride=12"):
        set_output_stride(network, 12)
    with pytest.raises(ValueError, match="output_stride=1: MaxPool2d.* can't be spread out"):
        set_output_stride(network, 1)
    assert str(network) == before
    with pytest.raises(TypeError, match=r"Linear has no paths\(\)"):
        set_output_stride(nn.Linear(1, 1), 8)
    set_output_stride(network, 2)
    assert network(torch.zeros(1, 1, 9, 9))[-1].shape == (1, 32, 5, 5)
