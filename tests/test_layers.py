"""Batch normalisation with what follows it, in one process and in several."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backstride.models.layers import BatchNorm2d, SyncBatchNorm2d, conv_norm, norm_relu, synchronised
from backstride.models.segmentation.aspp import check_batch
from backstride.models.segmentation.deeplab import DeepLabV3, DeepLabV3Plus
from torch import Tensor, nn


def random(module: nn.Module) -> nn.Module:
    """In fp64, with parameters and statistics that nothing in particular holds for."""
    generator = torch.Generator().manual_seed(0)
    for norm in module.double().modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.weight.data.uniform_(0.5, 2, generator=generator)
            norm.bias.data.normal_(generator=generator)
            norm.running_mean.normal_(std=0.1, generator=generator)  # pyright: ignore
            norm.running_var.uniform_(0.5, 2, generator=generator)  # pyright: ignore
    return module


def tensors(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return first.requires_grad_(), second.requires_grad_()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("ops", ["fused", "torch"])
def test_batch_norm_is_torch_s_and_what_follows(ops, with_residual, activation, training):
    norm = random(BatchNorm2d(3, activation=activation, ops=ops)).train(training)
    plain = nn.BatchNorm2d(3).double().train(training)
    plain.load_state_dict(norm.state_dict())
    x, residual = tensors(2, 3, 5, 7)
    wanted = plain(x) + residual if with_residual else plain(x)
    wanted = F.relu(wanted) if activation else wanted
    result = norm(x, residual) if with_residual else norm(x)
    torch.testing.assert_close(result, wanted)
    inputs = [x, residual][: 1 + with_residual]
    gradients = [
        torch.autograd.grad(y.square().sum(), [*inputs, *layer.parameters()])
        for y, layer in ((result, norm), (wanted, plain))
    ]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())


def test_unknown_ops():
    with pytest.raises(ValueError, match="ops='cudnn' is unknown"):
        BatchNorm2d(3, ops="cudnn")  # pyright: ignore


def test_relu_keeps_its_number():
    """The names in a checkpoint from when ReLU was a module of its own."""
    ours = nn.Sequential(*conv_norm(2, 3, 1), nn.Conv2d(3, 1, 1), *norm_relu(1, "fused"), nn.Conv2d(1, 1, 1))
    convolution = nn.Conv2d(2, 3, 1, bias=False)
    theirs = nn.Sequential(
        *(convolution, nn.BatchNorm2d(3), nn.ReLU()),
        nn.Conv2d(3, 1, 1),
        *(nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 1, 1)),
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())


SMALL: dict[str, Any] = {"channels": 3, "width": 2, "ops": "torch"}
NETWORKS = {
    "resnet": lambda: DeepLabV3(1, 2, form="torchvision", blocks=(1, 1, 1, 1), **SMALL),
    "xception": lambda: DeepLabV3Plus(1, 2, backbone="xception", middle=1, **SMALL),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_a_synchronised_network_is_the_same_network(build, training):
    """In one process, where there is nothing to wait for."""
    network = random(build()).train(training)
    before = dict(network.state_dict(keep_vars=True))
    activations = [m.activation for m in network.modules() if isinstance(m, BatchNorm2d)]
    assert {None, "relu"} == set(activations)
    x, _ = tensors(2, 1, 33, 18)
    state = {name: tensor.clone() for name, tensor in before.items()}
    results = []
    for _ in range(2):
        network.load_state_dict(state)
        torch.manual_seed(0)  # dropout
        results.append(network(x))
        assert synchronised(network) is network
    assert torch.equal(*results)
    assert [m.activation for m in network.modules() if isinstance(m, SyncBatchNorm2d)] == activations
    assert not [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert all(module.training == training for module in network.modules())


def test_every_batch_normalisation_is_synchronised():
    shared, frozen = BatchNorm2d(2, activation="relu"), BatchNorm2d(2).eval()
    shared.eps, shared.momentum = 0.25, 0.5
    network = nn.Sequential(shared, nn.Sequential(frozen, shared), shared, nn.BatchNorm1d(2))
    first, (second, again), third, other = synchronised(network)
    assert first is again is third and type(first) is type(second) is SyncBatchNorm2d
    assert (first.activation, first.eps, first.momentum, first.training) == ("relu", 0.25, 0.5, True)
    assert (second.activation, second.training) == (None, False)
    assert type(other) is nn.SyncBatchNorm
    assert list(synchronised(network)) == list(network) and network[0] is first


def test_a_network_that_is_one_layer():
    norm = random(BatchNorm2d(3, activation="relu", ops="torch"))
    layer = synchronised(norm)
    assert type(layer) is SyncBatchNorm2d and layer.weight is norm.weight and layer.running_var is norm.running_var
    x, residual = tensors(2, 3, 5, 7)
    assert torch.equal(layer.eval()(x, residual), norm.eval()(x, residual))


def test_one_image_in_each_process_is_enough_to_train_on():
    network, x = nn.Sequential(BatchNorm2d(3)), torch.zeros(1, 3, 1, 1)
    with pytest.raises(ValueError, match="one image is too few to train on"):
        check_batch(network, x)
    check_batch(synchronised(network), x)
