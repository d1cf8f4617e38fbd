"""Compiled against eager: run by test_conv.py in processes of its own, interpreted and not."""

import backstride.fused_ops as fused
import torch
from torch import nn

from .interpretation import accelerate


class Net(nn.Module):
    """Convolution with ReLU, depthwise, transposed, concat, and "same" padding with an even kernel."""

    def __init__(self):
        super().__init__()
        self.down = fused.Conv2d(3, 8, 3, stride=2, padding=1, activation="relu")
        self.same = fused.Conv2d(8, 8, 2, padding="same")
        self.depthwise = fused.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = fused.ConvTranspose2d(7, 2, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x):
        deep = self.depthwise(self.same(self.down(x)))
        return self.out(fused.conv_transpose2d_concat(deep, x, self.up.weight, self.up.bias, stride=2))


def check(backend, dynamic, sizes):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in sizes:
        x = torch.randn(2, 3, size, size, requires_grad=True)
        results = []
        for function in (net, compiled):
            y = function(x)
            grads = torch.autograd.grad(y.square().mean(), [x, *net.parameters()])
            results.append([y, *grads])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)


def fill(buffer, x, weight, up):
    """Both halves of a concat in place, what they are added to, and a read of what is there then."""
    fused.conv2d(x, weight, padding=1, activation="relu", out=buffer[:, :4])
    right = buffer[:, 4:]
    fused.conv_transpose2d(buffer[:, :4, ::2, ::2], up, stride=2, residual=right, out=right)
    return buffer * 2


def check_out(backend, dynamic, sizes):
    torch._dynamo.reset()
    compiled = torch.compile(fill, fullgraph=True, dynamic=dynamic, backend=backend)
    weight, up = torch.randn(4, 3, 3, 3), torch.randn(4, 2, 2, 2)
    for size in sizes:
        x = torch.randn(2, 3, size, size)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            eager = torch.randn(2, 6, size, size).to(memory_format=memory_format)
            traced = eager.clone()
            torch.testing.assert_close(compiled(traced, x, weight, up), fill(eager, x, weight, up))
            torch.testing.assert_close(traced, eager)


if __name__ == "__main__":
    accelerate()
    check("aot_eager", False, [8])
    check("aot_eager", True, [8, 12])
    check("inductor", False, [8])
    check_out("aot_eager", True, [4, 6])
    check_out("inductor", False, [4])
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(1, 3, 8, 8)
        net = fused.Conv2d(3, 4, 3)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        assert compiled(x).dtype == net(x).dtype == torch.bfloat16
