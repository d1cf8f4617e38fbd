"""atrous_pyramid against its branches side by side in fp64: layouts, dtypes, gradients, registration, errors."""

import itertools
import math
import re

import backstride.fused_ops as fused
import pytest
import torch
import torch.nn.functional as F
from backstride.kernels import conv as kernels
from backstride.kernels.conv import pyramid, zones
from backstride.kernels.runtime import INTERPRETED, Layout, device_of
from torch.func import grad, vmap

from .modes import run_python
from .oracle import assert_as_exact_as, to_fp64

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# channels, size, (channels out, kernel, dilation) of each branch
PYRAMIDS = {
    "ASPP": (18, (7, 6), [(16, (1, 1), 1), (8, (3, 3), 2), (8, (3, 3), 4), (24, (3, 3), 9)]),
    "odd channels, other kernels": (5, (5, 8), [(3, (2, 4), (3, 1)), (17, (3, 3), 1), (1, (1, 3), (1, 5))]),
    "1-D": (16, (11,), [(16, (3,), 1), (16, (5,), 4)]),
    "3-D": (3, (3, 4, 5), [(4, (1, 1, 1), 1), (5, (3, 3, 2), (1, 2, 4))]),
}


@pytest.fixture(params=list(PYRAMIDS))
def layer(request):
    return PYRAMIDS[request.param]


def tensors_of(layer, batch=2, dtype=torch.float32, device="cpu"):
    """x, weights, biases and dilations."""
    channels, size, branches = layer
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        t = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        return t.requires_grad_()

    weights = [tensor(k, channels, *kernel) for k, kernel, _ in branches]
    return tensor(batch, channels, *size), weights, [tensor(k) for k, *_ in branches], [d for *_, d in branches]


def reference(x, weights, biases, dilations, activation=None):
    axes = weights[0].dim() - 2
    branches = itertools.zip_longest(weights, biases or (), dilations)
    y = torch.cat([CONV[axes](x, w, b, padding="same", dilation=d) for w, b, d in branches], dim=-axes - 1)
    return F.relu(y) if activation else y


def channels_last(tensor):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats.get(tensor.dim(), torch.contiguous_format)
    return tensor.detach().to(memory_format=memory_format).requires_grad_()


@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("dtype", "activation", "last"),
    [(torch.float32, "relu", False), (torch.float16, None, True)],
    ids=["fp32, ReLU", "fp16, channels_last"],
)
def test_against_its_branches(layer, dtype, activation, last, device):
    x, weights, biases, dilations = tensors_of(layer, dtype=dtype, device=device)
    if last:
        x, weights = channels_last(x), [channels_last(w) for w in weights]
    tensors, count = [x, *weights, *biases], len(weights)
    exact = to_fp64(*tensors)
    scale = [t.detach().abs().requires_grad_() for t in exact]
    results = []
    for function, inputs in (
        (fused.atrous_pyramid, tensors),
        (reference, tensors),
        (reference, exact),
        (reference, scale),
    ):
        y = function(inputs[0], inputs[1 : count + 1], inputs[count + 1 :], dilations, activation=activation)
        cotangent = torch.linspace(-3, 3, y.numel(), dtype=torch.float64).cos().reshape(y.shape).to(y)
        cotangent = cotangent.abs() if inputs is scale else cotangent
        results.append([y, *torch.autograd.grad(y, inputs, cotangent)])
    if layer[1:2] != ((3, 4, 5),):  # torch's 3-D convolution on the CPU gives up channels_last
        assert results[0][0].stride() == results[1][0].stride()
    names = ["y", "x", *[f"{name} {i}" for name in ("weight", "bias") for i in range(count)]]
    for name, *every in zip(names, *results, strict=True):
        assert_as_exact_as(*every, name)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_no_biases_and_unbatched_input(device):
    x, weights, _, dilations = tensors_of(PYRAMIDS["odd channels, other kernels"], device=device)
    expected = reference(x, weights, None, dilations)
    torch.testing.assert_close(fused.atrous_pyramid(x, weights, None, dilations), expected, rtol=1e-4, atol=1e-4)
    single = fused.atrous_pyramid(x[1], tuple(weights), None, tuple(dilations))
    torch.testing.assert_close(single, expected[1], rtol=1e-4, atol=1e-4)
    empty = fused.atrous_pyramid(x[:0], weights, None, dilations)
    assert empty.shape == (0, *expected.shape[1:])
    empty.sum().backward()


@pytest.fixture
def forget():
    """For what changes the limits that plans are made under."""
    caches = zones.find_zones, pyramid.plan_pyramid
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("alone", [False, True], ids=["one launch", "a launch for each"])
def test_every_element_is_written(alone, monkeypatch, forget, device):
    """Into a slice full of NaN, and no further; also where the zones are too many for one launch."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("the kernels run on a GPU or interpreted")
    x, weights, biases, dilations = tensors_of(PYRAMIDS["ASPP"], device=device)
    expected = reference(x, weights, biases, dilations)
    wide = torch.full((2, expected.shape[1] + 2, *x.shape[2:]), math.nan, device=device)
    if alone:
        monkeypatch.setattr(zones, "MOST_ROWS", 3)
    every = [(d, d) for d in dilations]
    with torch.no_grad():
        kernels.apply_pyramid(x, weights, biases, wide[:, 1:-1], every)
    torch.testing.assert_close(wide[:, 1:-1], expected.detach(), rtol=1e-4, atol=1e-4)
    assert wide[:, 0].isnan().all() and wide[:, -1].isnan().all()
    reason = fused.explain(fused.atrous_pyramid, x, weights, biases, dilations).reason
    assert ("one launch for each branch" if alone else "4 branches in one launch") in reason


def test_whole_aspp_in_one_launch():
    """DeepLabv3's, output stride 16: 215 tiles of pixels by 2 of channels for the three 3x3 branches (and 69 by 2 for
    the 1x1), the heaviest first."""
    weights = ((256, 2048, 1, 1), *[(256, 2048, 3, 3)] * 3)
    x, y = (Layout((8, c, 33, 33), (c * 33 * 33, 1, c * 33, c)) for c in (2048, 1024))
    dilations = ((1, 1), (6, 6), (12, 12), (18, 18))
    plan = pyramid.plan_pyramid(x, weights, y, dilations, torch.bfloat16, False, device_of(torch.empty(0)))
    assert plan is not None and plan.table is not None
    assert (plan.constants["BLOCK_M"], plan.constants["BLOCK_N"]) == (128, 128)
    assert plan.grid == (2 * (215 + 69),)
    # Columns 11, 19 and 27: the taps of each axis.
    taps = [row[11] * row[19] * row[27] for row in plan.table.rows if row[0] < plan.grid[0]]
    assert len(taps) == 28 and taps == sorted(taps, reverse=True)
    assert "4 branches in one launch over validity zones: 60% of the taps meet pixels" in plan.note


@pytest.mark.skipif(not INTERPRETED, reason="fp64 runs on the kernels only when they are interpreted")
def test_gradients_of_any_order():
    layer = (3, (5,), [(2, (1,), 1), (2, (3,), 2)])
    x, weights, biases, dilations = tensors_of(layer, batch=1, dtype=torch.float64)

    def function(x, v, w, a, b):
        return fused.atrous_pyramid(x, [v, w], [a, b], dilations, activation="relu")

    tensors = (x, *weights, *biases)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_gradients_only_where_needed(device):
    x, weights, biases, dilations = tensors_of(PYRAMIDS["1-D"], device=device)
    frozen = [weights[0].detach(), weights[1]]
    y = fused.atrous_pyramid(x.detach(), frozen, [b.detach() for b in biases], dilations)
    expected = reference(x.detach(), frozen, [b.detach() for b in biases], dilations)
    gradients = [torch.autograd.grad(t.square().sum(), weights[1]) for t in (y, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_two_runs_are_bitwise_equal(device):
    x, weights, biases, dilations = tensors_of(PYRAMIDS["1-D"], device=device)
    inputs = [x, *weights, *biases]
    runs = []
    for _ in range(2):
        y = fused.atrous_pyramid(x, weights, biases, dilations)
        runs.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    x, weights, biases, _ = tensors_of((4, (5, 4), [(3, (1, 1), 1), (2, (3, 3), 3)]), batch=1)
    x, *rest = (channels_last(t).requires_grad_(requires_grad) for t in (x, *weights, *biases))
    arguments = (x, rest[:2], rest[2:], [1, 1, 3, 3], True)
    torch.library.opcheck(torch.ops.backstride.atrous_pyramid.default, arguments, rtol=1e-4, atol=1e-4)


def test_per_sample_gradients_and_ensembles(device):
    x, (v, w), (a, b), dilations = tensors_of(PYRAMIDS["1-D"], batch=3, device=device)
    tensors = [t.detach() for t in (x.unsqueeze(1), v, w, a, b)]

    def loss(function, x, v, w, a, b):
        return function(x, [v, w], [a, b], dilations, activation="relu").square().sum()

    for dims in ((0, None, None, None, None), (None, None, 0, 0, None)):
        inputs = [
            t if index == 0 and dim == 0 else t[0] if index == 0 else torch.stack([t, 2 * t, -t]) if dim == 0 else t
            for index, (t, dim) in enumerate(zip(tensors, dims, strict=True))
        ]
        ours, theirs = (
            vmap(grad(lambda *t, f=f: loss(f, *t), (0, 1, 2, 3, 4)), dims)(*inputs)
            for f in (fused.atrous_pyramid, reference)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, device):
    x, weights, biases, dilations = tensors_of(PYRAMIDS["1-D"], device=device)
    with torch.autocast(device, dtype):
        y = fused.atrous_pyramid(x, weights, biases, dilations)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), reference(x, weights, biases, dilations), rtol=5e-2, atol=1e-1)


def test_complex_input_takes_torchs_way():
    x, w = torch.randn(1, 2, 5, dtype=torch.complex64), torch.randn(3, 2, 3, dtype=torch.complex64)
    assert fused.explain(fused.atrous_pyramid, x, [w], None, [2]).name == "aten"
    torch.testing.assert_close(fused.atrous_pyramid(x, [w], None, [2]), F.conv1d(x, w, padding="same", dilation=2))


x, w, b = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 3, 3), torch.randn(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((x, w, None, [1]), TypeError, "weights must be a sequence with one entry for each branch, got Tensor"),
        ((x, [], None, []), ValueError, "weights must have at least one branch"),
        ((x, [w, w], None, [1]), ValueError, "got 2 weights, 1 dilations"),
        ((x, [w, w], [b], [1, 2]), ValueError, "got 2 weights, 2 dilations, 1 biases"),
        ((x, [w, w[:, :3]], None, [1, 2]), ValueError, "input must have shape (N, 3, H, W) for weights[1], got (1, 4"),
        ((x, [w, w[0]], None, [1, 2]), ValueError, "weights[1] must have shape (K, C, *kernel)"),
        ((x, [w, w], [b, b[:2]], [1, 2]), ValueError, "biases[1] must have shape (3,), got (2,)"),
        ((x, [w, w.double()], None, [1, 2]), TypeError, "weights[1] must have the input's dtype and device"),
        ((x, [w, w], [b, None], [1, 2]), TypeError, "biases[1] must be a tensor, got NoneType"),
        ((x, [w], None, [0]), ValueError, "dilations[0] must be an int of at least 1, or 2 of them, got 0"),
        ((x, [w], None, [(1, 2, 3)]), ValueError, "dilations[0] must be an int of at least 1, or 2 of them"),
        ((x[0, 0], [w], None, [1]), ValueError, "input must have shape (N, 4, H, W)"),
        ((x[..., :0], [w], None, [1]), ValueError, "input must have no empty axis but the batch"),
        ((None, [w], None, [1]), TypeError, "input must be a tensor, got NoneType"),
    ],
)
def test_errors_name_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fused.atrous_pyramid(*arguments)


def test_wrong_activation():
    with pytest.raises(ValueError, match='activation must be None or "relu"'):
        fused.atrous_pyramid(x, [w], None, [1], activation="gelu")


COMPILED = """
import torch, backstride.fused_ops as fused
def function(x, v, w, b):
    return fused.atrous_pyramid(x, [v, w], [b, b], [1, 3], activation="relu")
tensors = [torch.randn(s, requires_grad=True) for s in ((1, 4, 6, 5), (3, 4, 1, 1), (3, 4, 3, 3), (3,))]
compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
results = [(y := f(*tensors), *torch.autograd.grad(y.square().sum(), tensors)) for f in (function, compiled)]
torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("interpreted", ["0", "1"], ids=["aten", "kernels"])
def test_torch_compile_without_graph_breaks(interpreted):
    run_python("-c", COMPILED, interpreted=interpreted)


@pytest.mark.gpu
def test_cuda_graph():
    """After a first call, which copies the zones' table to the device."""
    x, weights, biases, dilations = tensors_of(PYRAMIDS["ASPP"], device="cuda")
    with torch.no_grad():
        fused.atrous_pyramid(x, weights, biases, dilations)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fused.atrous_pyramid(x, weights, biases, dilations)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, reference(x, weights, biases, dilations), rtol=1e-3, atol=1e-3)
