"""torch.compile(fullgraph=True) of pooling and unpooling against eager. Run by test_pool_torch.py, interpreted and not.

Not interpreted, CPU tensors take ATen's way: what users without a GPU have, and the other tests never see. So here the
offsets of every OpInfo sample are compared with torch's indices too.
"""

import backstride.fused_ops as fused
import torch
import torch.nn.functional as F
from backstride.kernels.runtime import INTERPRETED
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db

from .interpretation import accelerate


class ByIndices(nn.Module):
    """Pooling with indices and the way back, overlapping windows, a dilated pooling without indices before."""

    def __init__(self):
        super().__init__()
        self.first = fused.MaxPool2d(2, 1, dilation=2)
        self.pool = fused.MaxPool2d(3, 2, 1, ceil_mode=True, return_indices=True)
        self.unpool = fused.MaxUnpool2d(3, 2, 1)

    def forward(self, x):
        x = self.first(x)
        y, indices = self.pool(x)
        return self.unpool(y.sin(), indices, x.shape[2:])


def by_offsets(x):
    y, offsets = fused.max_pool2d_with_offsets(x, 2, ceil_mode=True)
    z, more = fused.max_pool2d_with_offsets(y, 3, 2, 1)
    y = y + fused.max_unpool2d_with_offsets(z.sin(), more, y.shape, 3, 2, 1)
    return (
        fused.max_unpool2d_with_offsets(y, offsets, x.shape, 2)
        + fused.unpool_nails2d(fused.unpool_nearest2d(y))[..., : x.shape[2], : x.shape[3]]
    )


def check(function, backend, dynamic, shapes, formats):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    for shape in shapes:
        for memory_format in formats:
            x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
            results = [f(x) for f in (function, compiled)]
            assert results[0].stride() == results[1].stride()
            torch.testing.assert_close(*results)
            gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in results]
            torch.testing.assert_close(*gradients)


def check_other_axes():
    """One and three axes, unbatched too."""
    for axes in (1, 3):
        pool, unpool = getattr(fused, f"max_pool{axes}d"), getattr(fused, f"max_unpool{axes}d")

        def round_trip(x, pool=pool, unpool=unpool):
            return unpool(*pool(x, 2, return_indices=True), 2)

        compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
        for shape in ((2, 3, *[4] * axes), (3, *[4] * axes)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), round_trip(x))


def check_wrong_indices_are_errors():
    compiled = torch.compile(lambda y, i: fused.max_unpool2d(y, i, 2), fullgraph=True, backend="aot_eager")
    y, indices = F.max_pool2d(torch.randn(1, 1, 4, 4), 2, return_indices=True)
    compiled(y, indices)
    try:
        compiled(y, indices + 2**32)
    except RuntimeError as error:
        assert "Found an invalid max index" in str(error)
    else:
        raise AssertionError("no error")


def check_offsets_of_every_sample():
    count = 0
    for axes in (1, 2, 3):
        info = next(o for o in op_db if o.name == f"nn.functional.max_pool{axes}d")
        for sample in info.sample_inputs("cpu", torch.float32, requires_grad=False):
            keywords = {k: v for k, v in sample.kwargs.items() if k != "return_indices"}
            x = sample.input if sample.input.dim() == axes + 2 else sample.input.unsqueeze(0)
            values, indices = info.op(x, return_indices=True, **keywords)
            ours, offsets = getattr(fused, f"max_pool{axes}d_with_offsets")(x, **keywords)
            keywords.pop("ceil_mode", None)
            assert torch.equal(ours, values) and ours.stride() == values.stride()
            assert torch.equal(fused.offsets_to_indices(offsets, x.shape, **keywords), indices)
            assert torch.equal(fused.indices_to_offsets(indices, x.shape, **keywords), offsets)
            count += 1
    assert count == 864 + 1440 + 576


if __name__ == "__main__":
    accelerate()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    both = torch.contiguous_format, torch.channels_last
    for function in (ByIndices(), by_offsets):
        check(function, "aot_eager", False, [(1, 2, 6, 7)], both[:1] if INTERPRETED else both)
        if not INTERPRETED:
            check(function, "aot_eager", True, [(2, 3, 6, 7), (1, 2, 9, 8)], both[:1])
    if not INTERPRETED:
        check(ByIndices(), "inductor", None, [(1, 2, 6, 7)], both[:1])
        check_other_axes()
    check_wrong_indices_are_errors()
    if not INTERPRETED:
        check_offsets_of_every_sample()
