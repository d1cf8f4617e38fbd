from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backstride.models.segmentation.deconvnet import DeconvNet
from backstride.models.segmentation.fcn import FCN
from backstride.models.segmentation.segnet import SegNet
from backstride.models.segmentation.sliding_window import multiply_adds, show_sliding_window, vgg16
from backstride.models.segmentation.vgg import VGG16, VGG16_STAGES, convolutionalize, load_vgg16
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

NARROW = ((2, 2), (3, 3), (4, 4, 4), (5, 5, 5), (6, 6, 6))
NETWORKS = {
    "vgg": lambda: VGG16(stages=NARROW, dense=8, ops="torch"),
    "fcn": lambda: FCN(stages=NARROW, dense=8, ops="torch"),
    "segnet": lambda: SegNet(stages=NARROW, ops="torch"),
    "deconvnet": lambda: DeconvNet(stages=NARROW, dense=8, ops="torch"),
}


def torchvision_vgg16(norm: bool = False, classes: int = 1000) -> nn.Module:
    """A narrow network whose modules have the numbers that torchvision's vgg16 and vgg16_bn give them."""
    layers: list[nn.Module] = []
    before = 3
    for widths in NARROW:
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, padding=1), *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU()]
            before = width
        layers.append(nn.MaxPool2d(2))
    network = nn.Module()
    network.features = nn.Sequential(*layers)
    network.classifier = nn.Sequential(
        nn.Linear(6 * 49, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, classes)
    )
    for name, buffer in network.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return network.eval()


def saved(network: nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path)
    return path


def test_parameter_counts():
    with torch.device("meta"):
        network = VGG16()
    assert sum(parameter.numel() for parameter in network.parameters()) == 138_357_544
    assert sum(parameter.numel() for parameter in network.stages.parameters()) == 14_714_688


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_vgg16_computes_what_the_file_s_network_computes(tmp_path, suffix):
    theirs = torchvision_vgg16()
    ours = NETWORKS["vgg"]().eval()
    load_vgg16(ours, saved(theirs, tmp_path / f"vgg16.{suffix}"))
    x = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(ours(x), theirs.classifier(theirs.features(x).flatten(1)))


@pytest.mark.parametrize("name", ["fcn", "segnet", "deconvnet"])
def test_trunks_take_the_weights(tmp_path, name):
    theirs = torchvision_vgg16(norm=name != "fcn")
    network = NETWORKS[name]().eval()
    load_vgg16(network, saved(theirs, tmp_path / "vgg16.pth"))
    x = torch.randn(1, 3, 224, 224)
    if name == "fcn":  # which pads more than VGG16
        network.stages[0][0].padding = (1, 1)
    features = x
    for stage in network.stages:
        features = F.max_pool2d(stage(features), 2)
    torch.testing.assert_close(features, theirs.features(x))
    if name != "segnet":
        x = theirs.features(x)
        torch.testing.assert_close(
            network.fc6(x).relu().flatten(1), F.relu(theirs.classifier[0](x.flatten(1))), rtol=1e-4, atol=1e-5
        )
        assert torch.equal(network.fc7.weight.flatten(), theirs.classifier[3].weight.flatten())


def test_a_network_without_batch_normalisation_refuses_weights_for_it(tmp_path):
    with pytest.raises(ValueError, match="holds 13 layers for the network's 0 of type BatchNorm2d"):
        load_vgg16(NETWORKS["fcn"](), saved(torchvision_vgg16(norm=True), tmp_path / "vgg16_bn.pth"))


def test_plain_weights_leave_batch_normalisation_as_it_is(tmp_path):
    network = NETWORKS["segnet"]()
    load_vgg16(network, saved(torchvision_vgg16(), tmp_path / "vgg16.pth"))
    assert all((m.weight == 1).all() for m in network.stages.modules() if isinstance(m, nn.BatchNorm2d))


def test_files_that_do_not_fit(tmp_path):
    path = saved(torchvision_vgg16(), tmp_path / "vgg16.pth")
    with pytest.raises(ValueError, match=r"features.0.weight has the shape \[2, 3, 3, 3\], but the network's is \[64,"):
        with torch.device("meta"):
            network = FCN()
        load_vgg16(network, path)
    with pytest.raises(ValueError, match="holds 13 layers for the network's 2 of type Conv2d"):
        load_vgg16(SegNet(stages=((2,), (3,))), path)
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("text.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=r"can't be read as a state_dict \(\w+\): save it again"):
            load_vgg16(NETWORKS["fcn"](), tmp_path / name)


def dense_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 16, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 6, bias=False), nn.Linear(6, 4)
    ).double()


def trunk() -> nn.Sequential:
    """Without padding: [N, 1, 18, 18] -> [N, 3, 4, 4]; one cell is two pixels."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.MaxPool2d(2), nn.Conv2d(3, 3, 4)
    ).double()


@pytest.mark.parametrize("ops", ["fused", "torch"])
def test_convolutions_compute_what_the_dense_layers_compute(ops):
    dense = dense_layers().eval()
    convolutions = convolutionalize(dense, 3, ops).eval()
    assert sum(p.numel() for p in convolutions.parameters()) == sum(p.numel() for p in dense.parameters())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    y = convolutions(x)
    assert y.shape == (2, 4, 1, 1)
    torch.testing.assert_close(y[:, :, 0, 0], dense(x))


def test_one_pass_over_a_larger_image_equals_the_sliding_window():
    features, dense = trunk(), dense_layers().eval()
    whole = nn.Sequential(features, convolutionalize(dense, 3, "torch").eval())
    image = torch.randn(1, 1, 24, 30, dtype=torch.float64)

    def classify(top: int, left: int) -> Tensor:
        return dense(features(image[:, :, top : top + 18, left : left + 18]))[0]

    y = whole(image)[0]
    assert y.shape == (4, 4, 7)
    for row in range(4):
        for column in range(7):
            torch.testing.assert_close(y[:, row, column], classify(2 * row, 2 * column))
    assert y.flatten(1).std(1).min() > 1e-3


def test_multiply_adds_of_vgg16():
    """By hand: 3x3 convolutions at each stage's size, then the dense layers at every position of the 7x7 window."""
    for height, width in ((224, 224), (320, 512)):
        count, before = 0, 3
        for stage, widths in enumerate(VGG16_STAGES):
            for channels in widths:
                count += 9 * before * channels * (height >> stage) * (width >> stage)
                before = channels
        rows, columns = height // 32 - 6, width // 32 - 6
        count += rows * columns * (49 * 512 * 4096 + 4096 * 4096 + 4096 * 1000)
        assert vgg16().windows(height, width) == (rows, columns)
        assert multiply_adds(vgg16(), height, width) == (15_470_264_320, count)


def test_sliding_window_is_shown(capsys):
    show_sliding_window(Console(width=80))
    output = capsys.readouterr().out
    assert "…" not in output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert [row[1] for row in rows[:2]] == ["1x1", "5x9"]
    for *_, largest, difference in rows[:2]:
        assert float(difference) <= 1e-14 < float(largest)
    assert rows[4] == ["512x512", "10x10", "1.5 T", "92.5 G", "16.7x", "4,055 T", "43,823x"]


def test_the_copy_has_weights_of_its_own():
    dense = dense_layers()
    convolutions = convolutionalize(dense, 3)
    nn.init.zeros_(dense[1].weight)
    assert convolutions[0].weight.any()


def test_layers_that_can_not_become_convolutions():
    with pytest.raises(TypeError, match=r"BatchNorm1d.* can't become a convolution"):
        convolutionalize(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 4)
    with pytest.raises(ValueError, match="reads no square map of 5 channels"):
        convolutionalize(dense_layers(), 5)


def test_a_dense_network_takes_one_size():
    network = NETWORKS["vgg"]()
    with pytest.raises(ValueError, match=r"224 x 224 pixels only, got \[1, 3, 256, 256\].* convolutionalize"):
        network(torch.zeros(1, 3, 256, 256))
