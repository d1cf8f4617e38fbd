from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backstride.models.segmentation.deeplab import DeepLabV2, DeepLabV3, DeepLabV3Plus
from backstride.models.segmentation.resnet import RESNET50, RESNET101, load_torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from .models_base import NetworkTests, fuse_only

TINY = {"blocks": (1, 1, 1, 1), "width": 1}
TINY_V3 = TINY | {"multi_grid": (2,), "channels": 2, "rates": (1, 2)}
TRUNK = [
    ("backbone.conv1", (1, 64, 257, 257)),
    ("backbone.layer1", (1, 256, 129, 129)),
    ("backbone.layer2", (1, 512, 65, 65)),
]


def without_dropout(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def awakened(network: nn.Module) -> nn.Module:
    """Weights with which ReLU lets nearly everything through, even where a layer has one channel, and scores that are
    too high for the first class, so that there is something to learn."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data += 1
        elif isinstance(module, nn.Conv2d) and module.bias is not None and module.activation is None:
            module.bias.data[0] += 2
        elif isinstance(module, nn.Conv2d):
            module.weight.data.abs_()
            module.weight.data /= module.weight.data.sum((1, 2, 3), keepdim=True)
            if module.bias is not None:
                module.bias.data.abs_()
    return network


class DeepLabTests(NetworkTests):
    fused: tuple[str, ...] = ()
    """prefixes of the layers that are interpreted: the trunk is, in TestDeepLabV3"""
    learning_rate = 0.1

    def build(self, ops: str = "fused", **kwargs: Any) -> nn.Module:
        return awakened(without_dropout(super().build(ops, **kwargs)))

    def interpretable_pair(self) -> tuple[nn.Module, nn.Module]:
        fused, torch_ = self.pair()
        return fuse_only(fused, *self.fused), torch_


class TestDeepLabV2(DeepLabTests):
    network = DeepLabV2
    parameters = {(3, 21): 44_048_532}
    published_input = (1, 3, 513, 513)
    layer_table = [
        *TRUNK,
        ("backbone.layer3", (1, 1024, 65, 65)),
        ("backbone.layer4", (1, 2048, 65, 65)),
        ("classifier.0", (1, 2, 65, 65)),
        ("classifier.3", (1, 2, 65, 65)),
    ]
    tiny = TINY | {"rates": (1, 3)}
    tiny_sizes = {(9, 8): (9, 8), (1, 2): (1, 2), (37, 50): (37, 50)}
    fused = ("classifier",)
    learning_rate = 0.005


class TestDeepLabV3(DeepLabTests):
    network = DeepLabV3
    parameters = {(3, 21): 58_040_661}
    published_input = (1, 3, 513, 513)
    layer_table = [
        *TRUNK,
        ("backbone.layer3", (1, 1024, 33, 33)),
        ("backbone.layer4", (1, 2048, 33, 33)),
        ("classifier.0.convs.4", (1, 256, 33, 33)),
        ("classifier.0.project", (1, 256, 33, 33)),
        ("classifier.1", (1, 2, 33, 33)),
    ]
    tiny = TINY_V3
    tiny_sizes = {(18, 9): (18, 9), (1, 2): (1, 2), (37, 50): (37, 50)}
    batch_size = 2
    fused = ("backbone.maxpool", "backbone.layer4", "classifier")


class TestDeepLabV3Plus(DeepLabTests):
    network = DeepLabV3Plus
    parameters = {(3, 21): 59_344_309}
    published_input = (1, 3, 513, 513)
    layer_table = [
        *TRUNK,
        ("backbone.layer4", (1, 2048, 33, 33)),
        ("low", (1, 48, 129, 129)),
        ("aspp", (1, 256, 33, 33)),
        ("decoder.0", (1, 256, 129, 129)),
        ("decoder", (1, 2, 129, 129)),
    ]
    tiny = TINY_V3 | {"low_channels": 1}
    tiny_sizes = {(18, 9): (18, 9), (1, 2): (1, 2), (37, 50): (37, 50)}
    batch_size = 2
    fused = ("aspp.project", "low", "decoder")


class TestXception(DeepLabTests):
    network = DeepLabV3Plus
    parameters = {(3, 21): 54_705_317}
    published = {"backbone": "xception"}
    published_input = (1, 3, 513, 513)
    layer_table = [
        ("backbone.conv2", (1, 64, 257, 257)),
        ("backbone.entry.0", (1, 128, 129, 129)),
        ("backbone.entry.2", (1, 728, 33, 33)),
        ("backbone.middle.15", (1, 728, 33, 33)),
        ("backbone.exit", (1, 1024, 33, 33)),
        ("backbone.last", (1, 2048, 33, 33)),
        ("low", (1, 48, 129, 129)),
        ("aspp", (1, 256, 33, 33)),
        ("decoder", (1, 2, 129, 129)),
    ]
    tiny = published | {"width": 1, "middle": 1, "channels": 2, "rates": (1,), "low_channels": 1, "separable": True}
    tiny_sizes = {(18, 9): (18, 9), (1, 2): (1, 2), (37, 50): (37, 50)}
    batch_size = 2
    fused = ("backbone.entry.0.layers.0", "decoder.2")


def count(build) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


@pytest.mark.parametrize(
    ("blocks", "auxiliary", "wanted"),
    [
        (RESNET50, False, 39_638_869),
        (RESNET50, True, 42_004_074),
        (RESNET101, False, 58_630_997),
        (RESNET101, True, 60_996_202),
    ],
)
def test_torchvision_s_parameter_counts(blocks, auxiliary, wanted):
    assert count(lambda: DeepLabV3(form="torchvision", blocks=blocks, auxiliary=auxiliary)) == wanted


def test_separable_convolutions_save_what_they_should():
    """A 3x3 convolution from a to b channels has 9ab weights, a separable one 9a + ab, and 2a more in normalisation."""
    saved = sum(9 * a * 256 - (9 * a + a * 256) - 2 * a for a in (2048, 2048, 2048, 304, 256))
    plain, separable = (count(lambda value=value: DeepLabV3Plus(separable=value)) for value in (False, True))
    assert plain - separable == saved


def bottleneck_keys(prefix: str, before: int, inner: int, first: bool) -> dict[str, tuple[int, ...]]:
    keys = {}
    for number, shape in ((1, (inner, before, 1, 1)), (2, (inner, inner, 3, 3)), (3, (4 * inner, inner, 1, 1))):
        keys |= {f"{prefix}.conv{number}.weight": shape} | norm_keys(f"{prefix}.bn{number}", shape[0])
    if first:
        keys[f"{prefix}.downsample.0.weight"] = (4 * inner, before, 1, 1)
        keys |= norm_keys(f"{prefix}.downsample.1", 4 * inner)
    return keys


def norm_keys(prefix: str, channels: int) -> dict[str, tuple[int, ...]]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.{name}": (channels,) for name in names} | {f"{prefix}.num_batches_tracked": ()}


def torchvision_keys(blocks=RESNET50, width=64, classes=21, channels=256) -> dict[str, tuple[int, ...]]:
    """The state_dict of torchvision's deeplabv3_resnet50 and _resnet101 with auxiliary classifier, as documented by its
    source: names and shapes."""
    keys = {"backbone.conv1.weight": (width, 3, 7, 7)} | norm_keys("backbone.bn1", width)
    before = width
    for stage, number in enumerate(blocks):
        for block in range(number):
            keys |= bottleneck_keys(f"backbone.layer{stage + 1}.{block}", before, width * 2**stage, block == 0)
            before = 4 * width * 2**stage
    for branch, size in enumerate((1, 3, 3, 3)):
        keys[f"classifier.0.convs.{branch}.0.weight"] = (channels, before, size, size)
        keys |= norm_keys(f"classifier.0.convs.{branch}.1", channels)
    keys["classifier.0.convs.4.1.weight"] = (channels, before, 1, 1)
    keys |= norm_keys("classifier.0.convs.4.2", channels)
    keys["classifier.0.project.0.weight"] = (channels, 5 * channels, 1, 1)
    keys |= norm_keys("classifier.0.project.1", channels)
    keys["classifier.1.weight"] = (channels, channels, 3, 3)
    keys |= norm_keys("classifier.2", channels)
    keys |= {"classifier.4.weight": (classes, channels, 1, 1), "classifier.4.bias": (classes,)}
    keys["aux_classifier.0.weight"] = (before // 8, before // 2, 3, 3)
    keys |= norm_keys("aux_classifier.1", before // 8)
    return keys | {"aux_classifier.4.weight": (classes, before // 8, 1, 1), "aux_classifier.4.bias": (classes,)}


@pytest.mark.parametrize("blocks", [RESNET50, RESNET101])
def test_torchvision_s_state_dict(blocks):
    with torch.device("meta"):
        network = DeepLabV3(form="torchvision", blocks=blocks, auxiliary=True)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == torchvision_keys(blocks)


SMALL = {"form": "torchvision", "blocks": (2, 1, 2, 2), "width": 4, "channels": 3}


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """A state_dict as in a torchvision file, with all entries random."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in torchvision_keys(SMALL["blocks"], SMALL["width"], 5, SMALL["channels"]).items():
        noise = torch.randn(shape, generator=generator)
        noise = noise.abs() + 0.5 if "var" in name else noise / max(1, noise[0].numel() if shape else 1) ** 0.5
        tensors[name] = torch.tensor(7) if name.endswith("tracked") else noise
    return tensors


def plain_deeplabv3(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """torchvision's network in eval mode, in torch.nn.functional."""

    def conv_norm(x: Tensor, conv: str, norm: str, **options: Any) -> Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(F.conv2d(x, weights[f"{conv}.weight"], **options), *(weights[f"{norm}.{n}"] for n in names))

    def bottleneck(x: Tensor, name: str, stride: int, rate: int) -> Tensor:
        y = F.relu(conv_norm(x, f"{name}.conv1", f"{name}.bn1"))
        y = F.relu(conv_norm(y, f"{name}.conv2", f"{name}.bn2", stride=stride, padding=rate, dilation=rate))
        y = conv_norm(y, f"{name}.conv3", f"{name}.bn3")
        if f"{name}.downsample.0.weight" in weights:
            x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride=stride)
        return F.relu(y + x)

    size = x.shape[2:]
    x = F.max_pool2d(F.relu(conv_norm(x, "backbone.conv1", "backbone.bn1", stride=2, padding=3)), 3, 2, 1)
    stages = {
        "layer1": [(1, 1), (1, 1)],
        "layer2": [(2, 1)],
        "layer3": [(1, 1), (1, 2)],
        "layer4": [(1, 2), (1, 4)],
    }
    third = x
    for stage, blocks in stages.items():
        for number, (stride, rate) in enumerate(blocks):
            x = bottleneck(x, f"backbone.{stage}.{number}", stride, rate)
        third = x if stage == "layer3" else third
    head = "classifier.0"
    parts = [F.relu(conv_norm(x, f"{head}.convs.0.0", f"{head}.convs.0.1"))]
    for branch, rate in ((1, 12), (2, 24), (3, 36)):
        name = f"{head}.convs.{branch}"
        parts.append(F.relu(conv_norm(x, f"{name}.0", f"{name}.1", padding=rate, dilation=rate)))
    pooled = F.relu(conv_norm(x.mean((2, 3), keepdim=True), f"{head}.convs.4.1", f"{head}.convs.4.2"))
    parts.append(F.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=False))
    y = F.relu(conv_norm(torch.cat(parts, 1), f"{head}.project.0", f"{head}.project.1"))
    y = F.relu(conv_norm(y, "classifier.1", "classifier.2", padding=1))
    y = F.conv2d(y, weights["classifier.4.weight"], weights["classifier.4.bias"])
    z = F.relu(conv_norm(third, "aux_classifier.0", "aux_classifier.1", padding=1))
    z = F.conv2d(z, weights["aux_classifier.4.weight"], weights["aux_classifier.4.bias"])
    main, auxiliary = (F.interpolate(t, size, mode="bilinear", align_corners=False) for t in (y, z))
    return main, auxiliary


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_a_torchvision_file_gives_torchvision_s_outputs(weights, tmp_path, suffix, auxiliary):
    path = tmp_path / f"deeplabv3{suffix}"
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    network = DeepLabV3(3, 5, **SMALL, auxiliary=auxiliary, ops="torch")
    load_torchvision(network, path)
    network.double().eval()
    x = torch.randn(2, 3, 45, 60, dtype=torch.float64)
    wanted = plain_deeplabv3({name: tensor.double() for name, tensor in weights.items()}, x)
    results = network(x, auxiliary=True) if auxiliary else [network(x)]
    for result, right in zip(results, wanted, strict=False):
        assert right.std() > 1e-3
        torch.testing.assert_close(result, right, rtol=1e-10, atol=1e-10)


def test_a_classifier_s_file_loads_into_the_trunk(weights, tmp_path):
    trunk = {name.removeprefix("backbone."): t for name, t in weights.items() if name.startswith("backbone.")}
    torch.save(trunk | {"fc.weight": torch.ones(10, 128), "fc.bias": torch.ones(10)}, tmp_path / "resnet.pth")
    network = DeepLabV3(3, 5, **SMALL)
    load_torchvision(network.backbone, tmp_path / "resnet.pth")
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, trunk[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("classifier.4.bias"), r"doesn't fit DeepLabV3: it lacks classifier.4.bias$"),
        (lambda t: t.update(extra=torch.ones(1)), "it also holds extra$"),
        (
            lambda t: t.update({"backbone.conv1.weight": torch.ones(8, 3, 7, 7)}),
            r"other shapes: backbone.conv1.weight is \[8, 3, 7, 7\], not \[4, 3, 7, 7\]$",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "layer4" in name],
            r"lacks backbone.layer4.0.conv1.weight, .* and",
        ),
    ],
)
def test_files_that_do_not_fit(weights, tmp_path, change, message):
    change(weights)
    torch.save(weights, tmp_path / "file.pth")
    network = DeepLabV3(3, 5, **SMALL)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_torchvision(network, tmp_path / "file.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_auxiliary_logits():
    network = DeepLabV3(1, 2, **TINY_V3, auxiliary=True, ops="torch").eval()
    x = torch.randn(1, 1, 20, 31)
    main, auxiliary = network(x, auxiliary=True)
    assert torch.equal(main, network(x)) and main.shape == auxiliary.shape and not torch.equal(main, auxiliary)
    with pytest.raises(ValueError, match="build it with auxiliary=True"):
        DeepLabV3(1, 2, **TINY_V3, ops="torch").eval()(x, auxiliary=True)


def test_one_image_is_too_few_to_train_on():
    network = DeepLabV3(1, 2, **TINY_V3, ops="torch")
    with pytest.raises(ValueError, match="one image is too few to train on: .* batch of at least 2"):
        network(torch.zeros(1, 1, 20, 20))


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (DeepLabV3, {"form": "keras"}, 'form=\'keras\' is unknown: choose "paper" or "torchvision"'),
        (DeepLabV3, {"output_stride": 64}, "output_stride=64: this network can have 1, 2, 4, 8, 16, 32"),
        (DeepLabV3, {"multi_grid": (1, 2)}, r"multi_grid=\(1, 2\): give one factor for each of 1"),
        (DeepLabV3, {"blocks": (1, 1, 1)}, r"blocks=\(1, 1, 1\): a ResNet has four stages"),
        (DeepLabV3Plus, {"backbone": "vgg"}, "backbone='vgg' is unknown"),
    ],
)
def test_wrong_arguments(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        network(1, 2, **(TINY_V3 | arguments))
