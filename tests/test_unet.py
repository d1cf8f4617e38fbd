import pytest
import torch
from backstride.models.layers import Conv2d, UpConvConcat2d
from backstride.models.segmentation.unet import UNet
from torch import nn

from .models_base import NetworkTests


class TestUNet(NetworkTests):
    network = UNet
    parameters = {(1, 1): 31_030_593, (1, 2): 31_030_658, (3, 2): 31_031_810}
    published_input = (1, 1, 572, 572)
    # Figure 1 of the paper: the numbers beside and above its boxes.
    layer_table = [
        ("contracting.0.0", (1, 64, 570, 570)),
        ("contracting.0.1", (1, 64, 568, 568)),
        ("contracting.1.0", (1, 128, 282, 282)),
        ("contracting.1.1", (1, 128, 280, 280)),
        ("contracting.2.0", (1, 256, 138, 138)),
        ("contracting.2.1", (1, 256, 136, 136)),
        ("contracting.3.0", (1, 512, 66, 66)),
        ("contracting.3.1", (1, 512, 64, 64)),
        ("contracting.4.0", (1, 1024, 30, 30)),
        ("contracting.4.1", (1, 1024, 28, 28)),
        ("up.0", (1, 1024, 56, 56)),
        ("expanding.0.0", (1, 512, 54, 54)),
        ("expanding.0.1", (1, 512, 52, 52)),
        ("up.1", (1, 512, 104, 104)),
        ("expanding.1.0", (1, 256, 102, 102)),
        ("expanding.1.1", (1, 256, 100, 100)),
        ("up.2", (1, 256, 200, 200)),
        ("expanding.2.0", (1, 128, 198, 198)),
        ("expanding.2.1", (1, 128, 196, 196)),
        ("up.3", (1, 128, 392, 392)),
        ("expanding.3.0", (1, 64, 390, 390)),
        ("expanding.3.1", (1, 64, 388, 388)),
        ("classifier", (1, 2, 388, 388)),
    ]
    tiny = {"width": 2, "depth": 1, "dropout": 0.0}
    interpreted_steps = 10
    compiled_sizes = 2
    tiny_sizes = {(18, 20): (2, 4), (50, 18): (34, 2), (64, 66): (48, 50)}


class TestUNetSamePadding(TestUNet):
    published = {"padding": "same"}
    published_input = (1, 3, 48, 32)
    layer_table = [
        ("contracting.4.1", (1, 1024, 3, 2)),
        ("up.0", (1, 1024, 6, 4)),
        ("expanding.3.1", (1, 64, 48, 32)),
        ("classifier", (1, 2, 48, 32)),
    ]
    tiny = {"width": 2, "depth": 1, "dropout": 0.0, "padding": "same"}
    tiny_sizes = {(4, 6): (4, 6), (2, 30): (2, 30)}
    compiled_sizes = 1


def test_skip_comes_first_and_is_cropped_at_the_centre():
    up = UpConvConcat2d(2, 1, 2, stride=2, ops="torch")
    skip, below = torch.randn(1, 1, 4, 6), torch.randn(1, 2, 2, 3)
    output = up(below, skip)
    assert torch.equal(output[:, :1], skip)
    assert torch.equal(output[:, 1:], nn.functional.conv_transpose2d(below, up.weight, up.bias, 2))

    network = UNet(width=1, depth=1, ops="torch")
    seen = []
    network.up[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    features = []
    network.contracting[0].register_forward_hook(lambda _, __, output: features.append(output))
    network.eval()(torch.randn(1, 1, 28, 38))
    assert torch.equal(seen[0], features[0][:, :, 4:-4, 4:-4])


def test_initialisation():
    torch.manual_seed(0)
    network = UNet(3, 2, width=32, depth=3)
    for module in network.modules():
        if isinstance(module, Conv2d):
            summed = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        elif isinstance(module, UpConvConcat2d):
            summed = module.in_channels
        else:
            continue
        count, wanted = module.weight.numel(), (2 / summed) ** 0.5
        # Within five standard errors of the mean and of the standard deviation.
        assert abs(module.weight.mean()) < 5 * wanted / count**0.5
        assert abs(module.weight.std() / wanted - 1) < 5 / (2 * count) ** 0.5
        assert not module.bias.any()


def test_dropout_at_the_end_of_the_contracting_path_only():
    network = UNet(width=1, ops="torch")
    shapes = []
    network.dropout.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    x = torch.randn(1, 1, 188, 188)
    assert not torch.equal(network(x), network(x))
    assert shapes == 2 * [(8, 16, 16), (16, 4, 4)]
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_output_sizes(padding):
    network = UNet(width=1, padding=padding)
    fitting = [s for s in range(1, 700) if (s % 16 == 12 and s >= 188 if padding == "valid" else s % 16 == 0)]
    for size in range(1, 620):
        assert network.fitting_size(size) == next(s for s in fitting if s >= size)
        if size in fitting:
            assert network.output_size(size) == (size - 184 if padding == "valid" else size)
        else:
            with pytest.raises(ValueError, match=f"size of {size} does not fit"):
                network.output_size(size)


@pytest.mark.parametrize(
    ("padding", "size", "nearest"),
    [("valid", 573, "572 or 588"), ("valid", 187, "188, the smallest"), ("same", 250, "240 or 256")],
)
def test_a_size_that_does_not_fit_names_those_that_do(padding, size, nearest):
    network = UNet(width=1, padding=padding, ops="torch")
    fitting = network.fitting_size(1)
    for shape in ((size, fitting), (fitting, size)):
        with pytest.raises(ValueError, match=f"size of {size} .* The nearest size that fits: {nearest}$"):
            network(torch.zeros(1, 1, *shape))


@pytest.mark.parametrize("shape", [(1, 188, 188), (1, 3, 188, 188), (188, 188)])
def test_wrong_channels_or_dimensions(shape):
    with pytest.raises(ValueError, match=r"expected an input \[N, 1, H, W\]"):
        UNet(width=1)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width=0"),
        ({"depth": 0}, "depth=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"padding": "full"}, "'full'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_published_network_on_a_gpu():
    torch.manual_seed(0)
    fused = UNet().cuda().eval()
    plain, exact = UNet(ops="torch").cuda().eval(), UNet(ops="torch").double().cuda().eval()
    plain.load_state_dict(fused.state_dict())
    exact.load_state_dict(fused.state_dict())
    x = torch.randn(1, 1, 572, 572, device="cuda")
    with torch.no_grad():
        truth = exact(x.double())
        ours, theirs = ((network(x) - truth).abs().max().item() for network in (fused, plain))
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps * truth.abs().max().item()
