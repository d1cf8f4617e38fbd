"""Batch normalisation against torch: layouts, dtypes, hostile numbers, what follows it, derivatives of any order."""

import itertools
from functools import partial

import backstride.fused_ops as fused
import pytest
import torch
import torch.nn.functional as F
from backstride.fused_ops import dispatch
from backstride.fused_ops.batch_norm import functional
from backstride.kernels import batch_norm as kernels
from backstride.kernels.batch_norm import launch, reference
from backstride.kernels.batch_norm.config import BatchNormConfig
from backstride.kernels.runtime import INTERPRETED
from torch import nn

from .modes import kernels_run
from .oracle import assert_as_exact_as

fp64_kernels = pytest.mark.skipif(not INTERPRETED, reason="fp64 runs on the kernels only when they are interpreted")

# One to five axes, images without and with a vector's worth of pixels, more channels than a tile has, one channel.
SHAPES = [
    (5, 8),
    (3, 17, 9),
    (4, 6, 5, 7),
    (2, 3, 32, 20),
    (2, 1, 6, 8),
    (2, 70, 3, 4),
    (2, 5, 2, 3, 4),
    (7, 130, 1, 1),
]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
RESULTS = ("output", "running mean", "running variance", "by input", "by weight", "by bias", "by residual")


def layouts(x):
    """The same numbers contiguous, channels_last, sliced, and with gaps that no walk has one stride for."""
    yield x
    if x.dim() in FORMATS:
        yield x.to(memory_format=FORMATS[x.dim()])
        yield torch.cat([x, x], dim=1).to(memory_format=FORMATS[x.dim()])[:, : x.shape[1]]
    yield torch.cat([x, x], dim=1)[:, : x.shape[1]]
    yield torch.stack([x, x], dim=-1)[..., 0]
    yield x.transpose(0, -1).contiguous().transpose(0, -1)


def arguments(shape, dtype=torch.float32, parameters=torch.float32, device="cpu", seed=0):
    """x, running mean and variance, weight, bias, residual, gradient."""
    generator = torch.Generator().manual_seed(seed)
    x, residual, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    mean, weight, bias = (torch.randn(shape[1], generator=generator).to(device, parameters) for _ in range(3))
    var = torch.rand(shape[1], generator=generator).add(0.5).to(device, parameters)
    return x * 3 + 2, mean, var, weight, bias, residual, grad


def theirs(x, mean, var, weight, bias, training, momentum=0.1, eps=1e-5, *, activation=None, residual=None):
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return y.relu() if activation else y


def results(function, x, mean, var, weight, bias, residual, grad, training, activation):
    """The output, the running statistics after it, and all gradients."""
    mean, var = (None if v is None else v.clone() for v in (mean, var))
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    x, weight, bias, residual = leaves
    y = function(x, mean, var, weight, bias, training, activation=activation, residual=residual)
    given = [leaf for leaf in leaves if leaf is not None]
    return y.detach(), mean, var, *torch.autograd.grad(y, given, grad)


def sizes_of_gradients(x, mean, var, weight, grad, training):
    """By x, weight and bias, as large as their sums' terms are where nothing cancels."""
    mean, inverse = reference.moments(x, 1e-5) if training else (mean, (var + 1e-5).rsqrt())
    normalised = reference.normalise(x, mean, inverse, None, None).abs()
    axes, count = [0, *range(2, x.dim())], x.numel() // x.shape[1]
    by_weight, by_bias = (grad.abs() * normalised).sum(axes), grad.abs().sum(axes)
    one = [1, -1, *[1] * (x.dim() - 2)]
    sizes = grad.abs()
    if training:
        sizes = sizes + (by_bias / count).view(one) + normalised * (by_weight / count).view(one)
    return sizes * (inverse * weight.abs()).view(one), by_weight, by_bias


def clear_of_the_kink(x, mean, var, weight, bias, residual, training):
    """The residual, moved away from where rounding decides what ReLU lets through."""
    y = theirs(x, None if training else mean, None if training else var, weight, bias, training, residual=residual)
    return residual + torch.where(y.abs() < 0.1, 0.25, 0.0).to(residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(shape, dtype, device):
    """Outputs, statistics and gradients of a training step and of evaluation, with and without what follows."""
    for parameters, training, follows in itertools.product({dtype, torch.float32}, (True, False), (False, True)):
        x, mean, var, weight, bias, residual, grad = arguments(shape, dtype, parameters, device)
        residual = clear_of_the_kink(x, mean, var, weight, bias, residual, training) if follows else None
        every = x, mean, var, weight, bias, residual, grad
        exact = [None if t is None else t.cpu().double() for t in every]
        ours, torchs, oracle = (
            results(function, *tensors, training, "relu" if follows else None)
            for function, tensors in ((fused.batch_norm, every), (theirs, every), (theirs, exact))
        )
        scale = (*oracle[:3], *sizes_of_gradients(*exact[:4], exact[-1], training), oracle[-1])
        for name, *four in zip(RESULTS, ours, torchs, oracle, scale, strict=False):
            assert_as_exact_as(*four, f"{name}, {parameters}, training {training}, epilogue {follows}")


@pytest.mark.parametrize("shape", [(4, 6, 5, 7), (2, 5, 2, 3, 4), (3, 17, 9), (5, 8)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_layouts(shape, training, device):
    """Of the input, the residual and the gradient, each against the others; outputs lie as torch's do."""
    x, *vectors, residual, grad = arguments(shape, device=device)
    residual = clear_of_the_kink(x, *vectors, residual, training)
    expected = results(theirs, x, *vectors, residual, grad, training, "relu")
    many = list(layouts(x))
    tensors = [(a, residual, grad) for a in many]
    tensors += [(many[1 % len(many)], r, g) for r, g in zip(layouts(residual), layouts(grad), strict=True)]
    for a, r, g in tensors:
        ours = results(fused.batch_norm, a, *vectors, r, g, training, "relu")
        for name, mine, right in zip(RESULTS, ours, expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if a.device.type == "cpu":
            assert ours[0].stride() == F.batch_norm(a, None, None, training=True).stride()


@pytest.mark.parametrize("given", list(itertools.product((False, True), repeat=3)), ids=str)
def test_whatever_is_left_out(given, device):
    """Weight, bias and running statistics, each by itself; gradients of what is there."""
    x, mean, var, weight, bias, _, grad = arguments((3, 6, 4, 5), device=device)
    has_weight, has_bias, has_running = given
    weight, bias = weight if has_weight else None, bias if has_bias else None
    mean, var = (mean, var) if has_running else (None, None)
    for training in (True, False) if has_running else (True,):
        both = [results(f, x, mean, var, weight, bias, None, grad, training, None) for f in (fused.batch_norm, theirs)]
        for mine, right in zip(*both, strict=True):
            torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=4) if any(w)], ids=str)
def test_only_gradients_that_are_wanted(wanted, device):
    for training, activation in itertools.product((True, False), (None, "relu")):
        x, mean, var, weight, bias, residual, grad = arguments((3, 6, 4, 5), device=device)
        residual = clear_of_the_kink(x, mean, var, weight, bias, residual, training)
        found = []
        for function in (fused.batch_norm, theirs):
            leaves = [
                t.detach().requires_grad_(want) for t, want in zip((x, weight, bias, residual), wanted, strict=True)
            ]
            a, w, b, r = leaves
            y = function(a, mean.clone(), var.clone(), w, b, training, activation=activation, residual=r)
            found.append(torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], grad))
        torch.testing.assert_close(*found)


@kernels_run
@pytest.mark.parametrize("shift", [1e2, 1e4, -3e5])
def test_a_mean_far_from_zero(shift, device, monkeypatch):
    """Little cancels: the variance of numbers around 10^4 is as exact as torch's, in one part and in many. fp32 itself
    leaves 0.03 between neighbours at 3 10^5."""
    for programs, shape in itertools.product((1, 2), [(4, 6, 40, 50), (64, 3)]):
        monkeypatch.setattr(launch, "MOST_PARTS", programs)
        launch.forward_plans.cache_clear()
        x, mean, var, *_ = arguments(shape, device=device)
        x = x + shift
        running = []
        for function, data in ((fused.batch_norm, x), (F.batch_norm, x), (F.batch_norm, x.cpu().double())):
            statistics = [torch.zeros(shape[1], dtype=data.dtype, device=data.device) for _ in range(2)]
            running.append((function(data, *statistics, training=True, momentum=1.0), *statistics))
        for ours, torchs, oracle in zip(*running, strict=True):
            assert_as_exact_as(ours, torchs, oracle, oracle)
    launch.forward_plans.cache_clear()


@kernels_run
@pytest.mark.parametrize("first", [0.0, 1e4, -1e4])
def test_an_outlier_at_the_beginning(first, device):
    """Distances are summed from the first block's mean, which one number may spoil."""
    x = torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(0)).add(50).to(device)
    x[0, :, 0, 0] = first
    statistics, y = torch.empty(2, 3, device=device), torch.empty_like(x)
    kernels.forward(plans_of(x)[0], x, y, statistics, *[None] * 5, 0.0, 1e-5, relu=False)
    exact = torch.stack(reference.moments(x.double(), 1e-5)).cpu()
    torch.testing.assert_close(statistics.cpu().double(), exact, rtol=2e-5, atol=1e-6)


def plans_of(x):
    forward, backward = kernels.plan_forward(x, x), kernels.plan_backward(x, x, x)
    assert forward and backward
    return forward, backward


@kernels_run
def test_every_element_is_written(device):
    for shape in SHAPES:
        x, mean, var, weight, bias, residual, grad = arguments(shape, device=device)
        for a in (x, x.to(memory_format=FORMATS[x.dim()])) if x.dim() in FORMATS else (x,):
            y, by_x, by_residual = (torch.full_like(a, torch.nan) for _ in range(3))
            residual, grad = (torch.empty_like(a).copy_(t) for t in (residual, grad))
            by_weight, by_bias = torch.full_like(weight, torch.nan), torch.full_like(bias, torch.nan)
            statistics = torch.full((2, shape[1]), torch.nan, device=device)
            forward, backward = plans_of(a)
            kernels.forward(forward, a, y, statistics, mean, var, weight, bias, residual, 0.1, 1e-5, relu=True)
            given = by_x, by_weight, by_bias, by_residual
            kernels.backward(backward, grad, a, statistics, None, weight, bias, y, *given, 1e-5, relu=True)
            assert not any(t.isnan().any() for t in (statistics, y, mean, var, *given))


def test_nan_and_infinities_come_through(device):
    """Where torch's output and gradient are NaN, ours are; other channels don't notice."""
    for value in (float("nan"), float("inf"), float("-inf")):
        x, mean, var, weight, bias, _, grad = arguments((3, 4, 5, 6), device=device)
        x[1, 2, 3, 4] = value
        for training in (True, False):
            ours, torchs = (
                results(f, x, mean, var, weight, bias, None, grad, training, "relu") for f in (fused.batch_norm, theirs)
            )
            torch.testing.assert_close(ours[0], torchs[0], equal_nan=True)
            torch.testing.assert_close(ours[3], torchs[3], equal_nan=True)
            assert ours[1].isfinite().tolist() == [True, True, not training, True]


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e4])
def test_a_constant_channel(value, device):
    """Its variance is not negative, so that the square root of eps is what it is divided by."""
    x = arguments((3, 4, 33, 31), device=device)[0]
    x[:, 1] = value
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    y = fused.batch_norm(x, mean, var, training=True, momentum=1.0, eps=1e-12)
    torch.testing.assert_close(mean[1].item(), value)
    assert 0 <= var[1].item() <= 1e-12 * max(1.0, value**2) and y.isfinite().all()


def test_running_statistics_over_several_batches(device):
    modules = [library.BatchNorm2d(5, momentum=None).to(device) for library in (fused, nn)]
    for seed in range(4):
        x = arguments((3, 5, 4, 6), seed=seed)[0].to(device)
        torch.testing.assert_close(*(module(x) for module in modules))
        for mine, right in zip(modules[0].buffers(), modules[1].buffers(), strict=True):
            torch.testing.assert_close(mine, right)
    for module in modules:
        module.eval()
    torch.testing.assert_close(*(module(x) for module in modules))


def test_momentum_may_be_an_int(device):
    """What the kernel was compiled for has to take the next one, too."""
    x = arguments((3, 5, 4, 6), device=device)[0]
    found = []
    for function in (fused.batch_norm, F.batch_norm):
        mean, var = torch.zeros(5, device=device), torch.ones(5, device=device)
        for momentum in (1, 0.25, 0, 0.5):
            function(x * (1 + momentum), mean, var, training=True, momentum=momentum)
        found.append((mean, var))
    torch.testing.assert_close(*found)


def test_modules_take_what_follows(device):
    x, residual = (t.to(device) for t in (arguments((3, 5, 4, 6))[0], arguments((3, 5, 4, 6), seed=1)[0]))
    module = fused.BatchNorm2d(5).to(device)
    y = module(x, activation="relu", residual=residual)
    torch.testing.assert_close(y, F.relu(F.batch_norm(x, None, None, training=True) + residual))


@fp64_kernels
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_derivatives(training, activation):
    """First ones by the kernels, second ones by torch's ops in their place: both as their differences are."""
    x, mean, var, weight, bias, residual, _ = (t.double() for t in arguments((3, 2, 2, 3)))
    residual = clear_of_the_kink(x, mean, var, weight, bias, residual, training)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]

    def call(x, weight, bias, residual):
        statistics = (None, None) if training else (mean, var)
        return fused.batch_norm(x, *statistics, weight, bias, training, activation=activation, residual=residual)

    assert fused.explain(fused.batch_norm, x, mean, var, training=training).name == dispatch.INTERPRETED_KERNEL
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    if activation:  # what ReLU lets through is found in another way without a residual
        assert torch.autograd.gradgradcheck(lambda x, weight, bias: call(x * 5, weight, bias + 9, None), leaves[:3])


def by_definition(x, weight):
    axes = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * weight.view(1, -1, *[1] * (x.dim() - 2))


@fp64_kernels
def test_third_derivatives():
    """Against the definition: torch's own takes the statistics of its second ones for constants."""
    x, _, _, weight, *_ = (t.double().requires_grad_() for t in arguments((4, 2, 3)))
    found = []
    for function in (lambda x, w: fused.batch_norm(x, None, None, w, training=True), by_definition):
        value = function(x, weight).sin().sum()
        for _ in range(3):
            (by_x,) = torch.autograd.grad(value, x, create_graph=True)
            value = by_x.sin().sum()
        found.append(by_x.detach())
    torch.testing.assert_close(*found)


def test_same_bits_every_time(device):
    x, *vectors, residual, grad = arguments((4, 6, 33, 40), device=device)
    every = [results(fused.batch_norm, x, *vectors, residual, grad, True, "relu") for _ in range(3)]
    for other in every[1:]:
        assert all(map(torch.equal, other, every[0]))


@kernels_run
def test_parts_and_tiles_do_not_matter(device, monkeypatch):
    """More parts than blocks, one part, tiles that don't fit: the same numbers but for rounding."""
    x, *vectors, residual, grad = arguments((3, 70, 9, 11), device=device)
    x = x.to(memory_format=torch.channels_last)
    residual = clear_of_the_kink(x, *vectors, residual, True)
    expected = results(theirs, x, *vectors, residual, grad, True, "relu")
    kept = launch.forward_plans, launch.backward_plans
    for tile, num_warps, programs in ((256, 1, 50), (256, 4, 1), (1024, 2, 3), (4096, 8, 200)):
        config = BatchNormConfig(tile, num_warps, programs)
        monkeypatch.setattr(launch, "choose_config", lambda _, config=config: config)
        for plans in kept:
            plans.cache_clear()
        ours = results(fused.batch_norm, x, *vectors, residual, grad, True, "relu")
        for mine, right in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    for plans in kept:
        plans.cache_clear()


@kernels_run
def test_strides_past_two_to_the_31(device):
    """Images far apart, in memory that is hardly touched."""
    gap = 2**30
    x = torch.empty(2 * gap + 64, dtype=torch.float16, device=device).as_strided((3, 2, 4, 8), (gap, 32, 8, 1))
    dense = arguments((3, 2, 4, 8), torch.float16, device=device)[0]
    x.copy_(dense)
    assert torch.equal(
        fused.batch_norm(x, None, None, training=True), fused.batch_norm(dense, None, None, training=True)
    )


def test_residual_and_activation_that_do_not_fit():
    x = torch.randn(2, 3, 4, 4)
    call = partial(fused.batch_norm, x, None, None, training=True)
    with pytest.raises(ValueError, match=r'activation must be None or "relu", got \'tanh\''):
        call(activation="tanh")
    with pytest.raises(ValueError, match=r"the output's shape \(2, 3, 4, 4\), got \(2, 3, 4, 1\); expand or crop it"):
        call(residual=x[..., :1])
    with pytest.raises(TypeError, match=r"output's dtype torch.float32, got torch.float16; convert it"):
        call(residual=x.half())


def test_statistics_stay_where_a_residual_is_refused(device):
    x, mean, var, *_ = arguments((3, 4, 5, 6), device=device)
    before = mean.clone(), var.clone()
    with pytest.raises(ValueError, match="residual must have the output's shape"):
        fused.batch_norm(x, mean, var, training=True, residual=x[..., :1])
    with pytest.raises(ValueError, match="residual must be on the output's device"):
        fused.batch_norm(x, mean, var, training=True, residual=x.to("meta"))
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


REFUSED = {
    "one value for a channel": (lambda: (torch.randn(1, 3), None, None, None, None, True), ValueError),
    "no statistics to normalise by": (lambda: (torch.randn(2, 3), None, None), RuntimeError),
    "weight of another size": (lambda: (torch.randn(2, 3, 4), None, None, torch.ones(4), None, True), RuntimeError),
    "statistics of another size": (lambda: (torch.randn(2, 3, 4), torch.zeros(2), torch.ones(2)), RuntimeError),
    "one axis": (lambda: (torch.randn(3), torch.zeros(3), torch.ones(3)), (RuntimeError, IndexError)),
    "integers": (lambda: (torch.ones(2, 3, dtype=torch.int64), torch.zeros(3), torch.ones(3)), RuntimeError),
    "eps of 0": (lambda: (torch.randn(2, 3), None, None, None, None, True, 0.1, 0.0), ValueError),
    "a mean without a variance": (lambda: (torch.randn(2, 3, 4), torch.zeros(3), None), RuntimeError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_are_torchs(name):
    arrange, error = REFUSED[name]
    with pytest.raises(error) as torchs:
        F.batch_norm(*arrange())
    with pytest.raises(error) as ours:
        fused.batch_norm(*arrange())
    assert str(ours.value) == str(torchs.value)


def test_an_empty_batch(device):
    x = torch.randn(0, 3, 4, 4, device=device, requires_grad=True)
    y = fused.batch_norm(x, torch.zeros(3, device=device), torch.ones(3, device=device))
    assert y.shape == x.shape and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_little_data_with_gradients_is_torchs(monkeypatch):
    """On a GPU, where launching kernels from Python takes longer than they do."""
    asked = []
    monkeypatch.setattr(functional, "is_short", lambda *arguments: asked.append(arguments) or True)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    monkeypatch.setattr(functional, "kernel_path", lambda _: dispatch.ON_GPU[torch.float32])
    assert fused.explain(fused.batch_norm, x, None, None, training=True) is dispatch.BY_AUTOGRAD
    assert asked[0][0] == x.numel() and fused.batch_norm(x, None, None, training=True).requires_grad


def test_the_kink_is_kept_away_from():
    """Near it rounding would decide what ReLU lets through, and a right gradient could differ from torch's."""
    x, mean, var, weight, bias, residual, _ = arguments((4, 6, 5, 7))
    for training in (True, False):
        moved = clear_of_the_kink(x, mean, var, weight, bias, residual, training)
        y = theirs(x, mean.clone(), var.clone(), weight, bias, training, residual=moved)
        assert y.abs().min() > 0.05
