import pytest
import torch
import torch.nn.functional as F
from backstride.models.segmentation.deeplab_vgg import FIELDS, DeepLabVGG
from backstride.models.segmentation.vgg import load_vgg16

from .test_deeplab import DeepLabTests, awakened

TINY = {"stages": ((1,), (1,), (2,), (2,), (2,)), "dense": 2, "dropout": 0.0}
TABLE = [
    ("stages.0", (1, 64, 321, 321)),
    ("pools.0", (1, 64, 161, 161)),
    ("pools.1", (1, 128, 81, 81)),
    ("pools.2", (1, 256, 41, 41)),
    ("pools.3", (1, 512, 41, 41)),
    ("stages.4", (1, 512, 41, 41)),
    ("pools.4", (1, 512, 41, 41)),
]


class TestLargeFOV(DeepLabTests):
    network = DeepLabVGG
    parameters = {(3, 21): 20_505_429}
    published_input = (1, 3, 321, 321)
    layer_table = [
        *TABLE,
        ("first.0", (1, 1024, 41, 41)),
        ("second.0", (1, 1024, 41, 41)),
        ("scores.0", (1, 2, 41, 41)),
    ]
    tiny = TINY
    tiny_sizes = {(9, 5): (9, 5), (1, 2): (1, 2), (37, 50): (37, 50)}
    fused = ("stages.4", "pools.3", "first", "scores")


class TestASPP(DeepLabTests):
    network = DeepLabVGG
    parameters = {(3, 21): 37_877_652}
    published = {"variant": "aspp-l"}
    published_input = (1, 3, 321, 321)
    layer_table = [*TABLE, ("second.3", (1, 1024, 41, 41)), ("scores.3", (1, 2, 41, 41))]
    tiny = TINY | published
    tiny_sizes = {(9, 5): (9, 5), (37, 50): (37, 50)}
    fused = ("first", "scores")


@pytest.mark.parametrize(
    ("variant", "count"), [("4x4", 65_140_565), ("7x7", 134_346_581), ("largefov", 20_505_429), ("aspp-s", 37_877_652)]
)
def test_the_published_parameter_counts(variant, count):
    with torch.device("meta"):
        network = DeepLabVGG(variant=variant, ops="torch")
        assert network.score(torch.empty(1, 3, 321, 321)).shape == (1, 21, 41, 41)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize("variant", FIELDS)
def test_the_scores_sum_the_branches(variant):
    """Against the definition in torch.nn.functional."""
    torch.manual_seed(0)
    network = awakened(DeepLabVGG(1, 2, variant=variant, **TINY, ops="torch")).double().eval()
    field = FIELDS[variant]
    x = torch.randn(1, 1, 41, 57, dtype=torch.float64)
    y = x
    for number, (layer,) in enumerate(network.stages):
        spread = 2 if number == 4 else 1
        y = F.relu(F.conv2d(y, layer.weight, layer.bias, padding=spread, dilation=spread))
        y = F.max_pool2d(y, 3, 2 if number < 3 else 1, 1)
    if variant == "largefov":
        y = F.avg_pool2d(y, 3, 1, 1)
    wanted = 0
    for rate, first, second, score in zip(field.rates, network.first, network.second, network.scores, strict=True):
        padding = (field.kernel - 1) * rate // 2
        z = F.relu(F.conv2d(y, first.weight, first.bias, padding=padding, dilation=rate))
        z = F.relu(F.conv2d(z, second.weight, second.bias))
        wanted = wanted + F.conv2d(z, score.weight, score.bias)
    assert wanted.std() > 0
    torch.testing.assert_close(network.score(x), wanted)
    # 41 = 5 * 8 + 1 and 57 = 7 * 8 + 1: interpolation leaves every eighth pixel as it is.
    torch.testing.assert_close(network(x)[:, :, ::8, ::8], wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"variant": "5x5"}, "variant='5x5' is unknown: choose 7x7"), ({"stages": ((2,), (2,))}, "five stages")],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeepLabVGG(1, 2, **(TINY | arguments))


def test_vgg16_s_convolutions_load(tmp_path):
    """From torchvision's format; the first dense layer of LargeFOV is another than VGG16's and stays."""
    network, source = (DeepLabVGG(1, 2, **TINY, ops="torch") for _ in range(2))
    tensors = {"classifier.0.weight": torch.ones(4, 98), "classifier.0.bias": torch.ones(4)}
    for number, (layer,) in enumerate(source.stages):
        tensors |= {f"features.{3 * number}.weight": layer.weight.data, f"features.{3 * number}.bias": layer.bias.data}
    torch.save(tensors, tmp_path / "vgg16.pth")
    before = network.first[0].weight.clone()
    load_vgg16(network, tmp_path / "vgg16.pth")
    for (layer,), (wanted,) in zip(network.stages, source.stages, strict=True):
        assert torch.equal(layer.weight, wanted.weight) and torch.equal(layer.bias, wanted.bias)
    assert torch.equal(network.first[0].weight, before)
