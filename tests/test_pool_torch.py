"""PyTorch's own test inputs: every OpInfo sample and error, ModuleInfo, gradcheck, gradgradcheck, opcheck, compile."""

import re
from collections import defaultdict
from functools import cache, partial

import backstride.fused_ops as fused
import pytest
import torch
import torch.nn.functional as F
from backstride.fused_ops import dispatch
from backstride.fused_ops.pool import ops
from backstride.kernels import pool as kernels
from backstride.kernels.pool import reference
from backstride.kernels.runtime import INTERPRETED
from torch import nn
from torch.func import grad, vmap
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from .modes import run_python

SAMPLES = {
    "max_pool1d": 864,
    "max_pool2d": 1440,
    "max_pool3d": 576,
    "max_unpool1d": 144,
    "max_unpool2d": 288,
    "max_unpool3d": 96,
}
UNIQUE = {"max_unpool1d": 13, "max_unpool2d": 33, "max_unpool3d": 12}
ERRORS = {"max_pool1d": 24, "max_pool2d": 7, "max_pool3d": 7, "max_unpool1d": 1, "max_unpool2d": 1, "max_unpool3d": 1}
POOLS = ["max_pool1d", "max_pool2d", "max_pool3d"]

fp64_kernels = pytest.mark.skipif(not INTERPRETED, reason="fp64 runs on the kernels only when they are interpreted")


def info(name, variant=""):
    return next(o for o in op_db if o.name == f"nn.functional.{name}" and o.variant_test_name == variant)


@cache
def samples(name, device="cpu", dtype=torch.float32, variant=""):
    return list(info(name, variant).sample_inputs(device, dtype, requires_grad=False))


@cache
def errors(name):
    return list(info(name).error_inputs("cpu"))


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def assert_equal(ours, theirs, sample):
    for a, b in zip(as_tuple(ours), as_tuple(theirs), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride(), (sample.input.shape, sample.args, sample.kwargs)


def call(function, sample):
    return function(sample.input, *sample.args, **sample.kwargs)


def on_cpu(function, sample):
    """Torch's own there, wherever the sample is: on a GPU its max_unpool2d drops channels_last, and writes pixels that
    are named twice in any order."""
    results = as_tuple(call(function, sample.transform(lambda t: t.cpu() if isinstance(t, torch.Tensor) else t)))
    return tuple(result.to(sample.input.device) for result in results)


@pytest.mark.parametrize("name", SAMPLES)
def test_numbers(name):
    assert len(samples(name)) == SAMPLES[name]
    assert name not in UNIQUE or len(samples(name, variant="grad")) == UNIQUE[name]
    assert len(errors(name)) == ERRORS[name]


@pytest.mark.smoke
@pytest.mark.parametrize("name", SAMPLES)
def test_some_samples_one_by_one(name, device):
    """Every 101st, which has no factor in common with the numbers of options; all of them below."""
    for sample in samples(name, device)[::101]:
        assert_equal(call(getattr(fused, name), sample), on_cpu(info(name).op, sample), sample)


def together(images, axes):
    """In place of `kernels.max_pool`: for each image what one launch on all of them says, poisoned before.

    The interpreter's time goes by launches, not by images.
    """
    images = [x if x.dim() == axes + 2 else x.unsqueeze(0) for x in images]
    results = {}

    def max_pool(x, y, index, windows):
        if not results:
            batch = torch.cat(images)
            values = ops._empty(batch, y.shape[2:]).fill_(torch.nan)
            places = ops._empty(batch, y.shape[2:], index.dtype).fill_(-7)
            launch(batch, values, places, windows)
            lengths = [len(image) for image in images]
            for image, *parts in zip(images, values.split(lengths), places.split(lengths), strict=True):
                results[image.data_ptr()] = parts
        for given, answer in zip((y, index), results[x.data_ptr()], strict=True):
            given.copy_(answer)

    launch = kernels.max_pool
    return max_pool


def geometries(name, device):
    """The samples by all that the kernel is compiled for: they differ in batch, and whether they ask for indices."""
    axes, groups = int(name[-2]), defaultdict(list)
    for sample in samples(name, device):
        keywords = {key: value for key, value in sample.kwargs.items() if key != "return_indices"}
        groups[tuple(sample.input.shape[-axes:]), str(keywords), sample.input.is_contiguous()].append(sample)
    return list(groups.values())


@pytest.mark.parametrize("name", POOLS)
def test_every_sample(name, device, monkeypatch):
    """Equal to torch's to the bit, indices and strides included: every sample goes through the function by itself, and
    through the kernel together with the others of its geometry."""
    count = 0
    for group in geometries(name, device):
        if device == "cpu" and INTERPRETED:
            monkeypatch.setattr(ops.kernels, "max_pool", together([s.input for s in group], int(name[-2])))
        for sample in group:
            assert_equal(call(getattr(fused, name), sample), on_cpu(info(name).op, sample), sample)
            count += 1
        monkeypatch.undo()
    assert count == SAMPLES[name]


@pytest.mark.parametrize("name", POOLS)
def test_gradient_of_every_geometry(name, device):
    """The definition's gradient is torch's on every geometry, by the indices that the test above has compared; the
    kernel's on every eleventh, which has no factor in common with the numbers of options."""
    axes = int(name[-2])
    for number, group in enumerate(geometries(name, device)):
        sample = max(group, key=lambda s: s.input.numel())
        x = sample.input.detach().requires_grad_()
        arguments, keywords = (x, *sample.args), sample.kwargs | {"return_indices": True}
        y, index = info(name).op(*arguments, **keywords)
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(number)).to(device)
        (expected,) = torch.autograd.grad(y, x, seed)
        torch.testing.assert_close(reference.spread(seed, index, x.shape[-axes:]), expected)
        if number % 11 == 0:
            ours = getattr(fused, name)(*arguments, **keywords)[0]
            torch.testing.assert_close(torch.autograd.grad(ours, x, seed)[0], expected)


@pytest.mark.parametrize("variant", ["", "grad"])
@pytest.mark.parametrize("name", UNIQUE)
def test_every_unpooling(name, variant, device):
    """Values and strides; the samples that aren't for gradients name pixels twice."""
    for sample in samples(name, device, variant=variant):
        assert_equal(call(getattr(fused, name), sample), on_cpu(info(name, variant).op, sample), sample)


@pytest.mark.parametrize("name, index", [(name, i) for name, count in ERRORS.items() for i in range(count)])
def test_errors_are_torchs(name, index):
    error = errors(name)[index]
    with pytest.raises(error.error_type) as caught:
        call(getattr(fused, name), error.sample_input)
    assert re.search(error.error_regex, str(caught.value))


@fp64_kernels
@pytest.mark.parametrize("name", UNIQUE)
def test_derivatives_of_every_unpooling(name, monkeypatch):
    """The kernels' gradient is torch's; first and second derivatives are right with ATEN in the kernels' place, which
    takes a hundredth of the interpreter's time."""
    for sample in samples(name, dtype=torch.float64, variant="grad"):
        x = sample.input.detach().requires_grad_()

        def unpool(x, sample=sample):
            return getattr(fused, name)(x, *sample.args, **sample.kwargs)

        results = unpool(x), info(name, "grad").op(x, *sample.args, **sample.kwargs)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, torch.cos(y.detach())) for y in results))
        with monkeypatch.context() as patch:
            patch.setattr(ops, "kernel_path", lambda _: dispatch.ON_CPU)
            assert torch.autograd.gradcheck(unpool, x, fast_mode=True, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(unpool, x, fast_mode=True)


@pytest.mark.parametrize("name", ["MaxPool1d", "MaxPool2d", "MaxPool3d"])
def test_module_inputs(name, device):
    """torch's ModuleInfo: same outputs, gradients, representation and errors; state_dict, which is empty, both ways."""
    entry = next(m for m in module_db if m.module_cls is getattr(nn, name))
    arguments = {"device": device, "dtype": torch.float32, "requires_grad": True, "training": True}
    inputs = entry.module_inputs_func(entry, **arguments)
    assert len(inputs) == {"MaxPool1d": 3, "MaxPool2d": 3, "MaxPool3d": 4}[name]
    for case in inputs:
        modules = [
            getattr(library, name)(*case.constructor_input.args, **case.constructor_input.kwargs)
            for library in (fused, nn)
        ]
        assert modules[0].load_state_dict(modules[1].state_dict()) and isinstance(modules[0], type(modules[1]))
        assert modules[0].extra_repr() == modules[1].extra_repr()
        x = case.forward_input.args[0]
        results = [as_tuple(module(x)) for module in modules]
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(y[0].square().sum(), x) for y in results))
    for error in entry.module_error_inputs_func(entry, **arguments) if entry.module_error_inputs_func else []:
        case = error.module_error_input
        with pytest.raises(error.error_type, match=error.error_regex):
            module = getattr(fused, name)(*case.constructor_input.args, **case.constructor_input.kwargs)
            module(*case.forward_input.args, **case.forward_input.kwargs)


def test_per_sample_gradients(device):
    x = torch.randn(3, 1, 2, 6, 6, device=device)

    def loss(pool, x):
        values, indices = pool(x, 2, return_indices=True)
        return values.square().sum()

    torch.testing.assert_close(
        vmap(grad(partial(loss, fused.max_pool2d)))(x), vmap(grad(partial(loss, F.max_pool2d)))(x)
    )


WINDOW = ([2, 2], [2, 2], [0, 0], [1, 1])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("name", ["max_pool", "max_pool_spread", "max_pool_pick", "max_unpool"])
def test_opcheck(name, offsets, requires_grad):
    x = torch.randn(1, 2, 4, 6, requires_grad=requires_grad)
    y, index = torch.ops.backstride.max_pool(x.detach(), *WINDOW, [2, 3], offsets)
    y.requires_grad_(requires_grad)
    arguments = {
        "max_pool": (x, *WINDOW, [2, 3], offsets),
        "max_pool_spread": (y, index, *WINDOW, [4, 6], True),
        "max_pool_pick": (x, index, *WINDOW),
        "max_unpool": (y, index.long(), [4, 6]),
    }[name]
    torch.library.opcheck(getattr(torch.ops.backstride, name).default, arguments)


@pytest.mark.parametrize("interpreted", ["0", "1"], ids=["aten", "kernels"])
def test_torch_compile_without_graph_breaks(interpreted):
    run_python("-m", "tests.pool_compiled", interpreted=interpreted)
