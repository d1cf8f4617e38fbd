from typing import Any

import pytest
import torch
from backstride.models.layers import Conv2d
from backstride.models.segmentation.dilatednet import DilatedNet, context_module, identity_
from torch import nn

from .models_base import NetworkTests, fuse_only

TINY = {"stages": ((1,), (1,), (1,), (2,), (2,)), "dense": 2, "window": 3, "dropout": 0.0}


class TestDilatedNet(NetworkTests):
    network = DilatedNet
    # The front end of the authors' file for Pascal VOC and the context modules of table 1; that for CamVid.
    parameters = {(3, 21): 134_346_581 + 28_392, (3, 11): 134_313_443}
    published_input = (1, 3, 500, 500)
    layer_table = [
        ("stages.0", (1, 64, 872, 872)),
        ("stages.1", (1, 128, 432, 432)),
        ("stages.2", (1, 256, 210, 210)),
        ("stages.3", (1, 512, 99, 99)),
        ("stages.4", (1, 512, 87, 87)),
        ("fc6", (1, 4096, 63, 63)),
        ("fc7", (1, 4096, 63, 63)),
        ("final", (1, 2, 63, 63)),
        ("context", (1, 2, 63, 63)),
    ]
    tiny = TINY
    tiny_sizes = {(1, 2): (1, 2), (27, 40): (27, 40)}
    learning_rate = 0.01

    def build(self, ops: str = "fused", **kwargs: Any) -> nn.Module:
        return awakened(super().build(ops, **kwargs))

    def interpretable_pair(self) -> tuple[nn.Module, nn.Module]:
        fused, torch_ = self.pair()
        # Mirroring makes the first layers large; of the context module's, the dilation 4 and the 1x1.
        return fuse_only(fused, "stages.4", "fc6", "final", "context.3", "context.7"), torch_


def awakened(network: nn.Module) -> nn.Module:
    """Weights with which ReLU lets everything through, and scores that are too high for the first class."""
    for name, parameter in network.named_parameters():
        parameter.data.abs_()
        if parameter.dim() == 4 and not name.startswith(("final", "context")):
            parameter.data /= parameter.data.sum((1, 2, 3), keepdim=True)
    nn.init.uniform_(network.get_parameter("final.weight"))
    network.get_parameter("final.weight").data[0] *= 9
    return network


@pytest.mark.parametrize(("context", "count"), [(None, 134_346_581), ("large", 134_346_581 + 6_803_139)])
def test_the_published_parameter_counts(context, count):
    with torch.device("meta"):
        network = DilatedNet(context=context)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def receptive_field(layers: nn.Module, channels: int, size: int = 75) -> tuple[int, int]:
    """Height and width of the part of the input that reaches the output's middle value."""
    x = torch.rand(1, channels, size, size, requires_grad=True)
    layers(x)[0, 0, size // 2, size // 2].backward()
    reached = x.grad[0].any(0).nonzero()
    first, last = reached.min(0).values, reached.max(0).values
    assert (first + last == 2 * (size // 2)).all()
    return tuple((last - first + 1).tolist())


@pytest.mark.parametrize("size", ["basic", "large"])
def test_receptive_fields_of_the_context_module(size):
    """Table 1: 3, 5, 9, 17, 33, 65, 67, 67 pixels after the eight layers."""
    context = context_module(1, size, ops="torch")
    for layer in context:
        nn.init.uniform_(layer.weight, 0.1, 1.0)  # ReLU lets everything through
    fields = [receptive_field(context[: count + 1], 1) for count in range(8)]
    assert fields == [(side, side) for side in (3, 5, 9, 17, 33, 65, 67, 67)]


def test_the_front_end_sees_its_margin():
    stages = ((1, 1), (1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    network = DilatedNet(1, 1, context=None, stages=stages, dense=1, ops="torch").eval()
    assert network.margin == 186
    for parameter in network.parameters():
        nn.init.constant_(parameter, 1 / 9 if parameter.dim() == 4 else 0.0)
    x = torch.rand(1, 1, 380, 388).requires_grad_()
    y = network.front_end(x)
    assert y.shape == (1, 1, 1, 2)
    # The first and the last pixels of the image that are seen are near the ends of its 380, as max-pooling lets one of
    # two through; of the 388 columns the second value sees those that come 8 later.
    for number, left in ((0, 0), (1, 8)):
        (grad,) = torch.autograd.grad(y[0, 0, 0, number], x, retain_graph=True)
        reached = grad[0, 0].nonzero()
        assert (reached.min(0).values - torch.tensor([0, left])).abs().max() < 8
        assert (reached.max(0).values - torch.tensor([379, left + 379])).abs().max() < 8


@pytest.mark.parametrize("size", ["basic", "large"])
def test_the_context_module_begins_as_the_identity(size):
    context = context_module(3, size, sigma=0.0, ops="torch").double()
    x = torch.rand(2, 3, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(context(x), x, rtol=1e-12, atol=0)
    counts = [layer.weight.count_nonzero().item() for layer in context]
    assert counts == ([3] * 8 if size == "basic" else [3 * n for n in (2, 4, 8, 32, 128, 512, 1024, 32)])


def test_noise_of_the_large_context_module():
    torch.manual_seed(0)
    context = context_module(4, "large", ops="torch")
    for layer, multiplier in zip(context, (2, 2, 4, 8, 16, 32, 32, 1), strict=True):
        noise = layer.weight[layer.weight.abs() < 0.06 / multiplier]
        assert noise.numel() > 0.7 * layer.weight.numel()
        assert noise.std().item() == pytest.approx(0.01 / multiplier, rel=0.25)
    assert not context_module(4, "basic")[0].weight.detach().flatten()[1:4].any()


def test_identity_by_hand():
    layer = Conv2d(2, 4, 3, ops="torch")
    identity_(layer, 2, 0.0)
    assert layer.weight[:, :, 1, 1].tolist() == [[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]]
    assert layer.weight.sum() == 2 and not layer.bias.any()


def test_scores_stand_where_their_pixels_are():
    """With symmetric kernels a flipped image gives the flipped logits, if the grid of 8 pixels fits it."""
    torch.manual_seed(0)
    network = DilatedNet(1, 2, **TINY, ops="torch").double().eval()
    for parameter in network.parameters():
        if parameter.dim() == 4:
            nn.init.uniform_(parameter)
            parameter.data += parameter.data.flip(2) + parameter.data.flip(3) + parameter.data.flip(2, 3)
    x = torch.randn(1, 1, 24, 40, dtype=torch.float64)
    y = network(x)
    assert y.std() > 1e-3
    for axis in (2, 3):
        torch.testing.assert_close(network(x.flip(axis)), y.flip(axis), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": "huge"}, "context='huge' is unknown"),
        ({"window": 4}, "window=4: must be odd"),
        ({"stages": ((2,), (2,))}, "five stages"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DilatedNet(1, 2, **(TINY | arguments))
