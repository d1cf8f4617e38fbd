"""torch.compile(fullgraph=True) of batch normalisation against eager. Run by test_batch_norm_torch.py, interpreted and
not: it is torch's own op that is compiled, whatever eager code runs."""

import backstride.fused_ops as fused
import torch
from backstride.kernels.runtime import INTERPRETED
from torch import nn

from .interpretation import accelerate


class Block(nn.Module):
    """A shortcut, ReLU, and statistics that training updates."""

    def __init__(self):
        super().__init__()
        self.first, self.second = fused.BatchNorm2d(3), fused.BatchNorm2d(3, affine=False)

    def forward(self, x):
        return self.second(self.first(x, activation="relu").sin(), activation="relu", residual=x)


def check(backend, dynamic, shapes, memory_format):
    torch._dynamo.reset()
    eager, block = Block(), Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=backend)
    for training in (True, False):
        eager.train(training)
        block.train(training)
        for shape in shapes:
            x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
            results = [function(x) for function in (eager, compiled)]
            assert results[0].stride() == results[1].stride()
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
            pairs = zip(results, (eager, block), strict=True)
            torch.testing.assert_close(
                *(torch.autograd.grad(y.square().sum(), [x, *m.parameters()]) for y, m in pairs), rtol=1e-3, atol=1e-4
            )
        for mine, right in zip(block.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(mine, right)


if __name__ == "__main__":
    accelerate()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    check("aot_eager", False, [(2, 3, 6, 7)], torch.channels_last)
    if not INTERPRETED:
        check("aot_eager", True, [(2, 3, 6, 7), (3, 3, 9, 8)], torch.contiguous_format)
        check("inductor", None, [(2, 3, 6, 7)], torch.contiguous_format)
