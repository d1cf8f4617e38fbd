"""PyTorch's own test inputs: every OpInfo sample, ModuleInfo, opcheck, torch.func, dispatch modes, compile."""

from functools import cache, partial

import backstride.fused_ops as fused
import pytest
import torch
import torch.nn.functional as F
from backstride.fused_ops import dispatch
from backstride.fused_ops.batch_norm import ops
from backstride.kernels.runtime import INTERPRETED
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._python_dispatch import TorchDispatchMode

from .modes import kernels_run, run_python

VARIANTS = {"": 12, "without_cudnn": 12}
MODULES = {"BatchNorm1d": 8, "BatchNorm2d": 7, "BatchNorm3d": 7}

fp64_kernels = pytest.mark.skipif(not INTERPRETED, reason="fp64 runs on the kernels only when they are interpreted")


@cache
def samples(variant, device="cpu", dtype=torch.float32):
    info = next(o for o in op_db if o.name == "nn.functional.batch_norm" and o.variant_test_name == variant)
    return list(info.sample_inputs(device, dtype, requires_grad=True))


def call(function, sample):
    """Output, gradients, and what became of the running statistics."""
    arguments = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in sample.args]
    keywords = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in sample.kwargs.items()}
    leaves = [sample.input.detach().clone(), *(keywords[k] for k in ("weight", "bias") if keywords.get(k) is not None)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y = function(leaves[0], *arguments, **keywords)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return y, *torch.autograd.grad(y, leaves, seed), *(a for a in arguments[:2] if a is not None)


@pytest.mark.smoke
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_sample(variant, device):
    assert len(samples(variant, device)) == VARIANTS[variant]
    for sample in samples(variant, device):
        ours, theirs = call(fused.batch_norm, sample), call(F.batch_norm, sample)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert ours[0].stride() == theirs[0].stride()


@fp64_kernels
def test_derivatives_of_every_sample():
    """First ones by the kernels; second ones, in torch's ops whoever computed the first, of every sample too."""
    for sample in samples("", dtype=torch.float64):
        tensors = {k: v for k, v in sample.kwargs.items() if isinstance(v, torch.Tensor)}
        others = {k: v for k, v in sample.kwargs.items() if k not in tensors}

        def norm(x, *vectors, sample=sample, names=tuple(tensors), others=others):
            running = [a.clone() if isinstance(a, torch.Tensor) else a for a in sample.args]
            return fused.batch_norm(x, *running, **dict(zip(names, vectors, strict=True)), **others)

        leaves = [t.detach().clone().requires_grad_() for t in (sample.input, *tensors.values())]
        assert torch.autograd.gradcheck(norm, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(norm, leaves, fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_module_inputs(name, training, device):
    """torch's ModuleInfo: same outputs, gradients, state_dict, representation and errors."""
    entry = next(m for m in module_db if m.module_cls is getattr(nn, name))
    arguments = {"device": device, "dtype": torch.float32, "requires_grad": True, "training": training}
    inputs = entry.module_inputs_func(entry, **arguments)
    assert len(inputs) == MODULES[name]
    for case in inputs:
        keywords = {"device": device} | case.constructor_input.kwargs
        modules = [getattr(lib, name)(*case.constructor_input.args, **keywords).train(training) for lib in (fused, nn)]
        assert modules[0].load_state_dict(modules[1].state_dict()) and isinstance(modules[0], type(modules[1]))
        assert modules[0].extra_repr() == modules[1].extra_repr()
        x = case.forward_input.args[0]
        results = [module(x) for module in modules]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        seed = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(0)).to(device)
        leaves = [[x, *module.parameters()] for module in modules]
        gradients = [torch.autograd.grad(y, t, seed) for y, t in zip(results, leaves, strict=True)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        assert modules[0].state_dict().keys() == modules[1].state_dict().keys()
        for mine, right in zip(modules[0].buffers(), modules[1].buffers(), strict=True):
            torch.testing.assert_close(mine, right)


@pytest.mark.parametrize(
    "name, shape", [("BatchNorm1d", (2, 3, 4, 5)), ("BatchNorm2d", (2, 3, 4)), ("BatchNorm3d", (2, 3))]
)
def test_modules_refuse_other_axes(name, shape):
    for library in (nn, fused):
        with pytest.raises(ValueError, match="expected"):
            getattr(library, name)(3)(torch.randn(shape))


@kernels_run
@pytest.mark.parametrize("name", ["training", "evaluation", "backward"])
def test_opcheck(name):
    """They have no autograd: batch_norm's is a Function of them."""
    x, residual, weight, bias = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), torch.randn(4), torch.randn(4)
    mean, inverse = torch.randn(4), torch.rand(4)
    name, arguments = {
        "training": ("forward", (x, mean, inverse, weight, bias, residual, True, 0.1, 1e-5, True)),
        "evaluation": ("forward", (x, mean, inverse, weight, None, None, False, 0.1, 1e-5, True)),
        "backward": ("backward", (x, x, mean, inverse, weight, bias, residual, 1e-5, True, [True] * 4)),
    }[name]
    torch.library.opcheck(getattr(torch.ops.backstride, f"batch_norm_{name}").default, arguments)


@kernels_run
def test_modes_see_the_ops():
    """The autograd.Function of eager code calls ops, and goes past the dispatcher only where no mode looks."""
    seen = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with Noting():
        y = fused.batch_norm(x, None, None, training=True, activation="relu")
        torch.autograd.grad(y.sum(), x)
    names = [name.removeprefix("backstride::batch_norm_") for name in seen if name.startswith("backstride")]
    assert names == ["forward", "backward"]


def test_transforms_are_torchs(device):
    """Per-sample gradients, forward gradients, functional calls: torch.func sees into torch's own op."""
    x, weight = torch.randn(4, 2, 3, 5, 5, device=device), torch.randn(3, device=device)

    def loss(norm, x, weight):
        return norm(x, None, None, weight, training=True).square().mean()

    for transform in (lambda f: vmap(grad(f), (0, None)), lambda f: vmap(f, (0, None))):
        torch.testing.assert_close(*(transform(partial(loss, n))(x, weight) for n in (fused.batch_norm, F.batch_norm)))
    forward = [jvp(partial(loss, n), (x[0], weight), (x[1], weight)) for n in (fused.batch_norm, F.batch_norm)]
    torch.testing.assert_close(*forward)
    assert fused.explain(fused.batch_norm, x[0], None, None, training=True).name != dispatch.ATEN or device == "cpu"
    modules = [library.BatchNorm2d(3).to(device) for library in (fused, nn)]
    state = dict(modules[0].named_parameters()) | {k: v.clone() for k, v in modules[0].named_buffers()}
    torch.testing.assert_close(*(functional_call(m, dict(state), (x[0],)) for m in modules), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_passes_it_by(dtype, device):
    x = torch.randn(2, 3, 4, 4, device=device)
    module = fused.BatchNorm2d(3).to(device)
    with torch.autocast(device, dtype):
        assert module(x).dtype == torch.float32 and module(x.to(dtype)).dtype == dtype


@pytest.mark.gpu
def test_cuda_graphs():
    x = torch.randn(4, 8, 16, 16, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    module = fused.BatchNorm2d(8).cuda()
    x.requires_grad_()

    def step():
        y = module(x, activation="relu")
        return y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    before = module.running_mean.clone()
    graph.replay()
    torch.testing.assert_close(replayed, expected, rtol=0, atol=0)
    assert not torch.equal(module.running_mean, before)


@pytest.mark.parametrize("interpreted", ["0", "1"], ids=["aten", "kernels"])
def test_torch_compile_without_graph_breaks(interpreted):
    run_python("-m", "tests.batch_norm_compiled", interpreted=interpreted)


def test_registered_ops_are_those_of_the_docstring():
    names = [name for name in dir(torch.ops.backstride) if name.startswith("batch_norm")]
    assert names and all(f"backstride::{name} " in (ops.__doc__ or "") for name in names)
