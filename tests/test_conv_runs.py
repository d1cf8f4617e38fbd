"""Convolutions of large stride over few channels, summed over runs of memory, their weight gradients, and the way back:
transposed convolutions of odd channels, padded with zeros and made row by row."""

import backstride.fused_ops as fused
import pytest
import torch
import torch.nn.functional as F
from backstride.kernels import conv as kernels
from backstride.kernels.conv import Geometry
from backstride.kernels.conv.plan_forward import plan_apply_transposed
from backstride.kernels.conv.runs import plan_runs
from backstride.kernels.runtime import H200, Device, layout_of
from torch import Tensor

from .modes import kernels_run
from .oracle import assert_as_exact_as, both_layouts, random_tensors, to_tf32

pytestmark = kernels_run

# Images, channels in and out, size, kernel, stride: runs shorter than a step of the sum, as long, and longer.
LAYERS = {
    "FCN-8s": (2, 21, 21, (40, 48), (16, 16), (8, 8)),
    "a step": (1, 3, 2, (72, 72), (64, 64), (8, 8)),
    "rows apart": (3, 2, 17, (31, 64), (3, 32), (2, 16)),
    "no overlap": (1, 4, 5, (24, 32), (8, 8), (8, 8)),
    "one pixel": (1, 21, 3, (32, 32), (32, 32), (16, 16)),
    "not all of the image": (2, 5, 7, (29, 56), (16, 16), (8, 8)),
}


def geometry(stride: tuple[int, int]) -> Geometry:
    return Geometry(stride, (0, 0), (1, 1), 1)


def tensors(layer: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Geometry]:
    """x, weight, y and geometry."""
    batch, channels, out_channels, size, kernel, stride = LAYERS[layer]
    out = [(i - k) // s + 1 for i, k, s in zip(size, kernel, stride, strict=True)]
    shapes = (batch, channels, *size), (out_channels, channels, *kernel), (batch, out_channels, *out)
    return *random_tensors(0, *shapes, dtype=dtype, device=device), geometry(stride)


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan)


def splitting(monkeypatch, parts: int) -> None:
    """As many parts of a sum as so many multiprocessors ask for."""
    monkeypatch.setattr(kernels.runs, "device_of", lambda _: Device(parts, H200.shared_memory))
    monkeypatch.setattr(kernels.runs, "LEAST_STEPS", 1)
    plan_runs.cache_clear()


@pytest.fixture(autouse=True)
def forget_plans():
    yield
    plan_runs.cache_clear()


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_products_over_runs(layer, dtype, parts, device, monkeypatch):
    splitting(monkeypatch, parts)
    x, weight, y, shape = tensors(layer, dtype, device)
    exact = F.conv2d(x.double(), weight.double(), None, shape.stride).cpu()
    scale = F.conv2d(x.double().abs(), weight.double().abs(), None, shape.stride).cpu()
    for x_, weight_, y_ in both_layouts(x, weight, y):
        result = poisoned(y_)
        assert kernels.apply_runs(x_, weight_, result, shape)
        assert_as_exact_as(result, exact.to(dtype), exact, scale)


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("layer", LAYERS)
def test_weight_gradients_over_runs(layer, parts, device, monkeypatch):
    splitting(monkeypatch, parts)
    x, weight, y, shape = tensors(layer, torch.float16, device)

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.grad.conv2d_weight(x.double(), weight.shape, y.double(), shape.stride).cpu()

    for x_, weight_, y_ in both_layouts(x, weight, y):
        result = poisoned(weight_)
        assert kernels.weight_grad_runs(x_, y_, result, shape)
        exact = gradient(x, y)
        assert_as_exact_as(result, exact.half(), exact, gradient(x.abs(), y.abs()))


@pytest.mark.parametrize("layer", ["FCN-8s", "a step"])
def test_operands_are_rounded_to_tf32(layer, device):
    x, weight, y, shape = tensors(layer, torch.float32, device)
    exact = F.conv2d(to_tf32(x).double(), to_tf32(weight).double(), None, shape.stride)
    for x_, weight_, y_ in both_layouts(x, weight, y):
        result = poisoned(y_)
        assert kernels.apply_runs(x_, weight_, result, shape, tf32=True)
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-3)
        assert not kernels.weight_grad_runs(x_, y_, poisoned(weight_), shape, tf32=True)


@pytest.mark.smoke
def test_gradients_of_fcns_upsampling(device, monkeypatch):
    """By the op, in whose forward nothing changes."""
    used = []
    for name in ("apply_runs", "weight_grad_runs"):
        function = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, f=function, n=name, **k: used.append((n, f(*a, **k))) or used[-1][1]
        )
    shapes = (1, 21, 3, 4), (21, 21, 16, 16), (21,)
    x, weight, bias = random_tensors(1, *shapes, dtype=torch.float16, device=device)
    for x_, weight_ in both_layouts(x, weight):
        mine = [t.detach().requires_grad_() for t in (x_, weight_, bias)]
        theirs = [t.detach().double().requires_grad_() for t in (x_, weight_, bias)]
        y = fused.conv_transpose2d(*mine, stride=8)
        expected = F.conv_transpose2d(*theirs, stride=8)
        grad = torch.randn_like(y)
        for ours, right in zip(
            torch.autograd.grad(y, mine, grad), torch.autograd.grad(expected, theirs, grad.double()), strict=True
        ):
            torch.testing.assert_close(ours.double(), right, rtol=2e-2, atol=2e-2 * right.abs().max().item())
            assert ours.stride() == right.stride()
    assert used == [("apply_runs", True), ("weight_grad_runs", True)] * 2


def test_what_is_not_a_matter_of_runs():
    good = (1, 21, 40, 48), (21, 21, 16, 16), (1, 21, 4, 5), geometry((8, 8)), torch.bfloat16, False

    def planned(x=good[0], weight=good[1], y=good[2], shape=good[3], dtype=good[4], tf32=False, weight_grad=False):
        layouts = (layout_of(torch.empty(each, device="meta")) for each in (x, y))
        return plan_runs(next(layouts), weight, next(layouts), shape, dtype, tf32, H200, weight_grad) is not None

    assert planned() and planned(weight_grad=True) and planned(dtype=torch.float32, tf32=True)
    assert not planned(dtype=torch.float32) and not planned(dtype=torch.float32, tf32=True, weight_grad=True)
    assert not planned(shape=Geometry((8, 8), (1, 1), (1, 1), 1))  # windows reach out of the image
    assert not planned(y=(1, 21, 5, 5))  # likewise
    assert not planned(shape=Geometry((8, 8), (0, 0), (1, 2), 1), x=(1, 21, 40, 80))
    assert not planned(shape=geometry((8, 4)))  # a run begins between two 16 bytes
    assert not planned(x=(1, 21, 40, 50))  # as does every second row
    assert not planned(x=(1, 64, 40, 48), weight=(21, 64, 16, 16))  # many channels are cuDNN's
    assert not planned(x=(1, 24, 40, 48), weight=(24, 24, 16, 16), y=(1, 24, 4, 5))  # as are whole vectors of them
    assert not planned(weight=(21, 21, 16, 24), y=(1, 21, 4, 4))  # a block of the sum has no whole number of runs
    sideways = torch.empty(1, 21, 48, 40, device="meta").transpose(2, 3)
    assert plan_runs(layout_of(sideways), *good[1:2], layout_of(torch.empty(good[2])), *good[3:], H200, False) is None
    assert not kernels.may_be_runs(torch.Size((21, 21, 16, 16)), geometry((1, 8)))
    assert not kernels.may_be_runs(torch.Size((21, 64, 16, 16)), geometry((8, 8)))


# channels in and out, size, kernel, stride, padding of X^T
UPSAMPLING = {
    "FCN-8s": (21, 21, (4, 5), 16, 8, 0),
    "padding": (5, 3, (3, 4), 16, 8, 4),
    "one tap": (13, 5, (3, 3), 8, 8, 0),
    "even results": (21, 24, (3, 3), 16, 8, 0),
    "small stride": (7, 9, (3, 4), 4, 4, 0),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", UPSAMPLING)
def test_upsampling_of_odd_channels(layer, dtype, device):
    """With an epilogue, into memory of its own and into a slice."""
    channels, out_channels, size, kernel, stride, padding = UPSAMPLING[layer]
    out = [(i - 1) * stride + kernel - 2 * padding for i in size]
    shapes = (2, channels, *size), (channels, out_channels, kernel, kernel), (out_channels,), (2, out_channels, *out)
    x, weight, bias, residual = random_tensors(3, *shapes, dtype=dtype, device=device)
    for x_, residual_ in both_layouts(x, residual):
        exact = F.conv_transpose2d(*(t.double() for t in (x, weight, bias)), stride, padding)
        exact = (exact + residual.double()).relu().cpu()
        scale = F.conv_transpose2d(*(t.double().abs() for t in (x, weight, bias)), stride, padding)
        scale = (scale + residual.double().abs()).cpu()
        arguments = x_, weight, bias, stride, padding
        y = fused.conv_transpose2d(*arguments, activation="relu", residual=residual_)
        assert_as_exact_as(y, exact.to(dtype), exact, scale)
        assert y.stride() == residual_.stride()
        buffer = torch.full_like(torch.cat([residual_, residual_], 1), torch.nan)
        given = buffer[:, out_channels:]
        fused.conv_transpose2d(*arguments, activation="relu", residual=residual_, out=given)
        assert torch.equal(given, y) and buffer[:, :out_channels].isnan().all()


def test_which_upsampling_is_padded_and_made_row_by_row():
    def plan(channels=21, out_channels=21, stride=8, dtype=torch.bfloat16, innermost=False, groups=1):
        form = torch.channels_last if innermost else torch.contiguous_format
        x = torch.empty(1, channels * groups, 4, 4, device="meta").to(memory_format=form)
        y = torch.empty(1, out_channels * groups, 4 * stride, 4 * stride, device="meta").to(memory_format=form)
        weight = channels * groups, out_channels, stride, stride
        shape = Geometry((stride, stride), (0, 0), (1, 1), groups)
        return plan_apply_transposed(layout_of(x), weight, layout_of(y), shape, dtype, True, H200)

    assert plan().padded == 24 and not plan().rowwise
    assert plan(innermost=True).padded == 24 and plan(innermost=True).rowwise
    assert plan(channels=24).padded == 0
    assert plan(stride=2).padded == 0  # the copy would be a fourth of the result
    assert plan(dtype=torch.float32).padded == 0  # four bytes go to shared memory by themselves
    assert plan(dtype=torch.float32, innermost=True).rowwise
    assert not plan(out_channels=24, innermost=True).rowwise
    assert plan(groups=2).padded == 0
