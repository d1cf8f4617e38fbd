"""A bias that the layer before left to batch normalisation, against adding it."""

import itertools

import backstride.fused_ops as fused
import pytest
import torch
import torch.nn.functional as F
from backstride.fused_ops import dispatch
from backstride.kernels.runtime import INTERPRETED
from backstride.models.layers import BatchNorm2d, Conv2d, ConvTranspose2d, Stack
from torch import nn

from .modes import kernels_run


def tensors(shape, dtype=torch.float32, device="cpu"):
    """x, running mean and variance, weight, bias, residual, and a bias larger than all of them."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    vectors = torch.randn((4, shape[1]), generator=generator).to(device)
    return x, vectors[0], vectors[1].square() + 0.5, vectors[2], vectors[3], residual, vectors[3] * 5 + 3


def added(x, mean, var, weight, bias, training=False, momentum=0.1, *, activation=None, residual=None, input_bias):
    x = x + input_bias.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum)
    y = y if residual is None else y + residual
    return y.relu() if activation else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 6, 5, 7), (3, 17, 9), (5, 8), (2, 5, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_as_if_it_were_added(training, shape, dtype, device):
    """Outputs, running statistics, and the gradients by all that has one."""
    for wanted, follows in itertools.product(([0], [0, 1, 2, 4], [4], [3, 4], []), (False, True)):
        given = tensors(shape, dtype, device)
        exact = [t.cpu().double() for t in given]
        found = []
        for function, (x, mean, var, *others) in ((fused.batch_norm, given), (added, exact)):
            leaves = [t.detach().clone() for t in (x, *others)]
            for index in wanted:
                leaves[index].requires_grad_(index != 3 or follows)
            x, weight, bias, residual, input_bias = leaves
            running = mean.clone(), var.clone()
            options = {"activation": "relu", "residual": residual} if follows else {}
            y = function(x, *running, weight, bias, training, 0.25, **options, input_bias=input_bias)
            leaves = [leaf for leaf in leaves if leaf.requires_grad]
            # Near ReLU's kink this gradient is near 0, too.
            grads = torch.autograd.grad(y.to(weight.dtype).square().sum(), leaves) if leaves else ()
            found.append((y, *running, *grads))
        for ours, right in zip(*found, strict=True):
            close = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(ours.cpu().double(), right, rtol=close, atol=close)


@kernels_run
def test_in_training_its_gradient_is_zero(device):
    """Where torch's is rounding; and derivatives of any order don't ask for more."""
    x, *_, input_bias = tensors((4, 6, 5, 7), device=device)
    x.requires_grad_()
    input_bias.requires_grad_()
    y = fused.batch_norm(x, None, None, training=True, activation="relu", input_bias=input_bias)
    by_x, by_bias = torch.autograd.grad(y.square().sum(), [x, input_bias], create_graph=True)
    assert not by_bias.any() and by_bias.shape == input_bias.shape
    (second,) = torch.autograd.grad(by_x.square().sum(), x)
    assert second.isfinite().all() and second.any()


@kernels_run
def test_a_long_way_from_zero(device):
    """What is never added has nothing to lose: 16 bits would be left with four of the numbers' own."""
    x, mean, var, *_ = tensors((4, 6, 5, 7), torch.float16, device)
    running = mean.clone(), var.clone()
    y = fused.batch_norm(x, *running, training=True, momentum=1.0, input_bias=torch.full_like(mean, 1000.0))
    assert torch.equal(y, fused.batch_norm(x, mean, var, training=True, momentum=1.0))
    torch.testing.assert_close(running[0], mean + 1000)
    assert torch.equal(running[1], var)


@pytest.mark.parametrize("wrong", [(5,), (1,), (6, 1)], ids=str)
def test_another_shape_is_refused(wrong):
    x, mean, var, *_ = tensors((4, 6, 5, 7))
    with pytest.raises(ValueError, match="one value for each of the input's 6 channels, got a tensor of shape"):
        fused.batch_norm(x, mean, var, input_bias=torch.zeros(wrong))


def test_explain_takes_it():
    x, mean, var, *_, input_bias = tensors((4, 6, 5, 7))
    expected = dispatch.INTERPRETED_KERNEL if INTERPRETED else dispatch.ATEN
    assert fused.explain(fused.batch_norm, x, mean, var, input_bias=input_bias).name == expected


def stack(ops):
    """Convolutions with and without a bias, and normalisation behind them or not."""
    torch.manual_seed(0)
    layers = [
        *(Conv2d(3, 4, 3, ops=ops), BatchNorm2d(4, activation="relu", ops=ops), nn.Identity()),
        *(ConvTranspose2d(4, 5, 3, stride=2, ops=ops), BatchNorm2d(5, ops=ops)),
        *(Conv2d(5, 4, 1, activation="relu", ops=ops), BatchNorm2d(4, ops=ops)),
        *(Conv2d(4, 2, 1, bias=False, ops=ops), BatchNorm2d(2, ops=ops), Conv2d(2, 3, 1, ops=ops)),
    ]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None:
            nn.init.uniform_(layer.bias, 1, 2)
    return Stack(*layers)


@pytest.mark.parametrize("training", [True, False])
def test_a_stack_is_its_layers(training, device):
    x = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for ops in ("fused", "torch"):
        network = stack(ops).to(device).train(training)
        y = network(x)
        grads = torch.autograd.grad(y.square().sum(), list(network.parameters()))
        found.append((y, *grads, *network.buffers()))
        if ops == "torch":
            assert torch.equal(y, nn.Sequential(*stack("torch").to(device).train(training))(x))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@kernels_run
def test_a_stack_leaves_biases_out(device):
    """Those in front of normalisation, and no others."""
    network, seen = stack("fused").to(device), []
    for layer in network:
        if isinstance(layer, BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    network(torch.randn(2, 3, 6, 7, device=device))
    assert [list(kwargs) for kwargs in seen] == [["input_bias"], ["input_bias"], [], []]
    assert seen[0]["input_bias"] is network[0].bias


def test_a_convolution_without_its_bias():
    for kind, ops in itertools.product((Conv2d, ConvTranspose2d), ("fused", "torch")):
        layer = kind(3, 4, 3, ops=ops)
        x = torch.randn(1, 3, 6, 7)
        torch.testing.assert_close(layer(x, biased=False) + layer.bias.view(-1, 1, 1), layer(x))


def test_only_zeros_pad():
    with pytest.raises(ValueError, match="padding_mode='reflect': pad with torch.nn.functional.pad before this layer"):
        Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
