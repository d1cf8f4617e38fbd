"""PyTorch's own test inputs: OpInfo samples and errors, ModuleInfo, gradcheck, gradgradcheck, opcheck."""

import re
from functools import cache, partial

import backstride.fused_ops as fused
import pytest
import torch
from backstride.fused_ops import dispatch
from backstride.fused_ops.conv import ops
from backstride.kernels.runtime import INTERPRETED
from torch import nn
from torch.func import functional_call, grad, hessian, vmap
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from .oracle import assert_as_exact_as

OPS = {
    name: (getattr(fused, name), next(op for op in op_db if op.name == f"nn.functional.{name}"))
    for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
}
SAMPLES = {
    "conv1d": 10,
    "conv2d": 30,
    "conv3d": 20,
    "conv_transpose1d": 10,
    "conv_transpose2d": 12,
    "conv_transpose3d": 10,
}
EVERY_SAMPLE = [(name, index) for name, count in SAMPLES.items() for index in range(count)]
MODULES = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]

fp64_kernels = pytest.mark.skipif(not INTERPRETED, reason="fp64 runs on the kernels only when they are interpreted")


def samples(name, device="cpu", dtype=torch.float64):
    return list(OPS[name][1].sample_inputs(device, dtype, requires_grad=True))


def differentiable(name, sample):
    """(function of the tensors alone, the tensors)."""
    tensors = [sample.input, *(a for a in sample.args if isinstance(a, torch.Tensor))]
    rest = sample.args[len(tensors) - 1 :]
    return lambda *t: OPS[name][0](*t, *rest, **sample.kwargs), tensors


@pytest.fixture
def products_by_aten(monkeypatch):
    """The ops differentiate as ever, but each computes by ATen, in a hundredth of the interpreter's time."""
    monkeypatch.setattr(ops, "kernel_path", lambda _: dispatch.ON_CPU)


@pytest.mark.parametrize("name", OPS)
def test_number_of_samples(name):
    assert len(samples(name)) == SAMPLES[name]


def small(name, sample):
    """A 3-D sample with its image, and a kernel of 120 taps, cut down: interpreted, the whole would take minutes."""
    size, kernel = sample.input.shape[-3:], sample.args[0].shape[2:]
    edge = 2 if name == "conv_transpose3d" else 5
    if len(kernel) == 3 and size.numel() > 60:
        sample.input = sample.input[..., :edge, :edge, :edge].detach().requires_grad_()
    if name == "conv_transpose3d" and kernel.numel() > 60:
        weight, *rest = sample.args
        sample.args = (weight[..., :2, :3, :3].detach().requires_grad_(), *rest)
    return sample


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name, index", EVERY_SAMPLE)
def test_samples(name, index, device):
    """Values and gradients in fp64, interpreted; on a GPU, where fp64 is torch's, fp32 values as exact as torch's."""
    ours, theirs = OPS[name]
    sample = small(name, samples(name, device, torch.float64 if device == "cpu" else torch.float32)[index])
    result = ours(sample.input, *sample.args, **sample.kwargs)
    expected = theirs.op(sample.input, *sample.args, **sample.kwargs)
    assert result.stride() == expected.stride()
    path = fused.explain(ours, sample.input, *sample.args, **sample.kwargs).name
    assert path == (
        "interpreted kernel" if INTERPRETED and device == "cpu" else "kernel" if device == "cuda" else "aten"
    )
    if device == "cpu":
        torch.testing.assert_close(result, expected)
        tensors = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
        gradients = [torch.autograd.grad(y, tensors, torch.cos(expected.detach())) for y in (result, expected)]
        torch.testing.assert_close(*gradients)
        return
    exact = sample.transform(lambda t: t.detach().cpu().double() if isinstance(t, torch.Tensor) else t)
    magnitude = exact.transform(lambda t: t.abs() if isinstance(t, torch.Tensor) else t)
    oracles = [theirs.op(s.input, *s.args, **s.kwargs) for s in (exact, magnitude)]
    assert_as_exact_as(result, expected, *oracles)


@fp64_kernels
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name, index", EVERY_SAMPLE)
def test_derivatives(name, index, products_by_aten):
    """First and second, backward and forward mode; the first by the kernels: test_samples."""
    function, tensors = differentiable(name, samples(name)[index])
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@fp64_kernels
@pytest.mark.parametrize("name", OPS)
def test_derivatives_by_kernels(name):
    function, tensors = differentiable(name, small(name, samples(name)[0]))
    settings = {"fast_mode": True, "check_undefined_grad": False}
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, **settings)
    assert torch.autograd.gradgradcheck(function, tensors, **settings)


def epilogue(x, w, b, r):
    return fused.conv2d(x, w, b, padding=1, residual=r, activation="relu")


def transposed_epilogue(x, w, b, r):
    return fused.conv_transpose2d(x, w, b, stride=2, residual=r, activation="relu")


def concat(x, w, b, skip):
    return fused.conv_transpose2d_concat(x, skip, w, b, stride=2, activation="relu")


@fp64_kernels
@pytest.mark.parametrize(
    "function, shapes",
    [
        (epilogue, [(1, 2, 4, 3), (3, 2, 3, 3), (3,), (1, 3, 4, 3)]),
        (transposed_epilogue, [(1, 3, 2, 3), (3, 2, 2, 2), (2,), (1, 2, 4, 6)]),
        (concat, [(1, 3, 2, 3), (3, 2, 2, 2), (2,), (1, 4, 4, 6)]),
    ],
)
def test_gradients_through_epilogues(function, shapes):
    torch.manual_seed(1)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@fp64_kernels
def test_gradients_only_where_needed(monkeypatch):
    """A frozen weight costs no weight gradient, a first layer no input gradient."""
    from backstride.kernels import conv as kernels

    calls = []
    for name in ("apply", "apply_transposed", "weight_grad"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, _k=kernel, _n=name, **k: (calls.append(_n), _k(*a, **k)))
    x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    fused.conv2d(x, w.requires_grad_()).sum().backward()
    assert calls == ["apply", "weight_grad"]
    calls.clear()
    fused.conv2d(x.requires_grad_(), w.detach()).sum().backward()
    assert calls == ["apply", "apply_transposed"]


@cache
def errors(name):
    info = OPS[name][1]
    return list(info.error_inputs("cpu")) if info.error_inputs_func else []


ERRORS = [(name, index) for name in OPS for index in range(len(errors(name)))]


def test_number_of_errors():
    assert [name for name, _ in ERRORS] == ["conv1d"] * 10 + ["conv2d"] * 10 + ["conv3d"] * 10


@pytest.mark.parametrize("name, index", ERRORS)
def test_errors_are_torchs(name, index):
    ours, error = OPS[name][0], errors(name)[index]
    with pytest.raises(error.error_type) as caught:
        ours(error.sample_input.input, *error.sample_input.args, **error.sample_input.kwargs)
    assert re.search(error.error_regex, str(caught.value))


@pytest.mark.parametrize(
    "name, shapes, arguments",
    [
        ("conv_transpose2d", [(1, 3, 4, 4), (4, 2, 3, 3)], {}),
        ("conv_transpose2d", [(1, 4, 4, 4), (4, 2, 3, 3)], {"output_padding": 1}),
        ("conv_transpose2d", [(1, 4, 4, 4), (4, 2, 3, 3), (3,)], {}),
        ("conv_transpose1d", [(1, 4, 4), (4, 2, 3)], {"padding": 9}),
        ("conv2d", [(1, 4, 4, 4), (2, 4, 3, 3)], {"padding": "same", "stride": 2}),
        ("conv2d", [(1, 4, 4, 4), (2, 4, 3, 3)], {"padding": "full"}),
        ("conv2d", [(1, 4, 4, 4), (3, 2, 3, 3)], {"groups": 2}),
        ("conv2d", [(1, 4, 4, 4), (2, 4, 3, 3)], {"stride": (1, 2, 3)}),
        ("conv3d", [(1, 4, 4, 4), (2, 4, 3, 3)], {}),
    ],
)
def test_more_errors_are_torchs(name, shapes, arguments):
    ours, info = OPS[name]
    tensors = [torch.randn(shape) for shape in shapes]
    with pytest.raises(Exception) as expected:
        info.op(*tensors, **arguments)
    with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
        ours(*tensors, **arguments)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, training, device):
    """torch's ModuleInfo inputs: same outputs, gradients and parameters, and state_dict loads both ways."""
    info = next(m for m in module_db if m.module_cls is getattr(nn, name))
    inputs = info.module_inputs_func(info, device=device, dtype=torch.float32, requires_grad=True, training=training)
    assert inputs
    for entry in inputs:
        arguments, keywords = entry.constructor_input.args, entry.constructor_input.kwargs
        theirs = getattr(nn, name)(*arguments, **keywords).to(device).train(training)
        ours = getattr(fused, name)(*arguments, **keywords).to(device).train(training)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert isinstance(ours, getattr(nn, name)) and ours.extra_repr() == theirs.extra_repr()
        call = entry.forward_input
        results = [module(*call.args, **call.kwargs) for module in (ours, theirs)]
        torch.testing.assert_close(*results)
        grads = [
            torch.autograd.grad(y.square().sum(), [call.args[0], *module.parameters()])
            for y, module in zip(results, (ours, theirs), strict=True)
        ]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


def test_output_size_chooses_output_padding():
    x = torch.randn(1, 2, 5, 5)
    ours, theirs = fused.ConvTranspose2d(2, 3, 3, stride=2, padding=1), nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x, output_size=[10, 9]), theirs(x, output_size=[10, 9]))
    with pytest.raises(ValueError, match="requested an output size"):
        ours(x, output_size=[12, 9])


def test_module_activation():
    module = fused.Conv2d(2, 3, 3, activation="relu")
    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(module(x), torch.relu(nn.functional.conv2d(x, module.weight, module.bias)))
    assert "activation='relu'" in repr(module)
    with pytest.raises(ValueError, match="activation must be"):
        fused.ConvTranspose1d(2, 3, 3, activation="tanh")


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_per_sample_gradients_ensembles_and_hessians(name, device):
    """torch.func, through every op: the gradients of a sample, of an ensemble's member, and second derivatives."""
    torch.manual_seed(0)
    ours, theirs = (getattr(library, name)(2, 4, 3, stride=2, groups=2) for library in (fused, nn))
    theirs.load_state_dict(ours.state_dict())
    params = {name: p.detach().to(device) for name, p in ours.named_parameters()}
    x = torch.randn(3, 1, 2, 5, 4, device=device)

    def loss(module, params, x):
        return functional_call(module, params, (x,)).square().sum()

    for dims in ((None, 0), ({"weight": 0, "bias": 0}, None), ({"weight": 0, "bias": None}, 0)):
        stacked = {
            key: torch.stack([p, 2 * p, -p]) if isinstance(dims[0], dict) and dims[0][key] == 0 else p
            for key, p in params.items()
        }
        input = x if dims[1] == 0 else x[0]
        gradients = [vmap(grad(partial(loss, m)), dims)(stacked, input) for m in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    hessians = [hessian(partial(loss, m, params))(x[0]) for m in (ours, theirs)]
    torch.testing.assert_close(*hessians, rtol=1e-3, atol=1e-3)


def test_tensors_that_are_not_in_memory_as_they_are():
    """Calls without gradients go past the dispatcher, which turns negatives and missing zeros into ordinary tensors."""
    x, w = torch.randn(1, 4, 6, dtype=torch.complex64), torch.randn(3, 4, 3)
    negative = x.conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(fused.conv1d(negative, w), nn.functional.conv1d(negative, w))
    weight = w.to(torch.complex64).mul(1j).conj().imag
    torch.testing.assert_close(fused.conv1d(x.real, weight), nn.functional.conv1d(x.real, weight))
    torch.testing.assert_close(fused.max_pool1d(negative, 2), nn.functional.max_pool1d(negative, 2))
    zeros = torch._efficientzerotensor((1, 4, 6))
    assert not fused.conv1d(zeros, w).any()


def test_vmap_of_the_concatenation(device):
    x, skip, w = torch.randn(3, 1, 2, 2, 2), torch.randn(3, 1, 1, 4, 4), torch.randn(3, 2, 2, 2, 2)
    x, skip, w = x.to(device), skip.to(device), w.to(device)

    def ours(x, skip, w):
        return fused.conv_transpose2d_concat(x, skip, w, stride=2, activation="relu").square().sum()

    def theirs(x, skip, w):
        up = nn.functional.conv_transpose2d(x, w, stride=2).relu()
        return torch.cat([skip, up], dim=1).square().sum()

    for dims, weight in (((0, 0, None), w[0]), ((0, 0, 0), w)):
        gradients = [vmap(grad(f, (0, 1, 2)), dims)(x, skip, weight) for f in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


x, w, g = ((1, 4, 5, 5), (6, 4, 3, 3), (1, 6, 3, 3))
GEOMETRY = ([2, 2], [1, 1], [1, 1], 1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["conv", "conv_transpose", "conv_weight_grad", "conv_transpose_concat"])
def test_opcheck(name, requires_grad, memory_format):
    """Schema, fake tensors, autograd registration and AOT dispatch with dynamic shapes, as torch checks custom ops."""

    def tensor(*shape):
        t = torch.randn(*shape)
        t = t.to(memory_format=memory_format) if len(shape) == 4 else t
        return t.requires_grad_(requires_grad)

    arguments = {
        "conv": (tensor(*x), tensor(*w), tensor(6), tensor(*g), [3, 3], *GEOMETRY, True),
        "conv_transpose": (tensor(*g), tensor(*w), tensor(4), tensor(*x), [5, 5], *GEOMETRY, True),
        "conv_weight_grad": (tensor(*x), tensor(*g), [3, 3], *GEOMETRY),
        "conv_transpose_concat": (tensor(*g), tensor(1, 3, 5, 5), tensor(*w), tensor(4), [5, 5], *GEOMETRY, True),
    }[name]
    torch.library.opcheck(getattr(torch.ops.backstride, name).default, arguments, rtol=1e-4, atol=1e-4)
