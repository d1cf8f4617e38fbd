"""torch.compile(fullgraph=True) of the RNN, dense and packed, static and dynamic sizes. Run by test_rnn_torch.py."""

import backstride.fused_ops as fused
import torch
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils.rnn import pack_sequence

from .interpretation import accelerate


def check(module: fused.RNN, dynamic: bool) -> None:
    def loss(x, h):
        output, h_n = module(x, h)
        return output.square().sum() + h_n.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for steps, batch in ((4, 3), (6, 2)) if dynamic else ((4, 3),):
        shape = (batch, steps, 3) if module.batch_first else (steps, batch, 3)
        x = torch.randn(shape, requires_grad=True)
        h = torch.randn(module.num_layers * (1 + module.bidirectional), batch, 5, requires_grad=True)
        results = [f(x, h) for f in (loss, compiled)]
        torch.testing.assert_close(*results)
        tensors = [x, h, *module.parameters()]
        for a, b in zip(*(torch.autograd.grad(y, tensors) for y in results), strict=True):
            torch.testing.assert_close(a, b)


def check_sizes() -> None:
    """One graph for all numbers of steps and sequences, its gradients included."""
    module = fused.RNN(3, 5)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in range(3, 16):  # more than may be compiled anew
        x = torch.randn(steps, 2 + steps % 3, 3, requires_grad=True)
        tensors = [x, *module.parameters()]
        grads = [torch.autograd.grad(f(x)[0].square().sum(), tensors) for f in (module, compiled)]
        torch.testing.assert_close(*grads)


def check_ensemble() -> None:
    """torch.func's, where torch's own function has no rule for it."""
    modules = [fused.RNN(3, 5) for _ in range(2)]
    params, buffers = stack_module_state(modules)
    x = torch.randn(4, 2, 3)
    outputs = vmap(lambda p, b: functional_call(modules[0], (p, b), (x,))[0])(params, buffers)
    torch.testing.assert_close(outputs, torch.stack([module(x)[0] for module in modules]))


def check_packed() -> None:
    module = fused.RNN(3, 5, bidirectional=True)
    params = list(module.parameters())

    def outputs(data, batch_sizes, hx):
        return fused.rnn_tanh(data, batch_sizes, hx, params, True, 1, 0.0, True, True)

    packed = pack_sequence([torch.randn(n, 3) for n in (4, 2, 1)])
    arguments = packed.data, packed.batch_sizes, torch.randn(2, 3, 5)
    torch.testing.assert_close(torch.compile(outputs, fullgraph=True)(*arguments), outputs(*arguments))


if __name__ == "__main__":
    accelerate()
    torch.manual_seed(0)
    check(fused.RNN(3, 5), dynamic=False)
    check(fused.RNN(3, 5, 2, "relu", bidirectional=True, batch_first=True), dynamic=True)
    check_packed()
    check_sizes()
    check_ensemble()
