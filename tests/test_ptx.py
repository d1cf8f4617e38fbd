"""The PTX that the kernels compile to for Hopper, executed by an emulator: without a GPU, all but the GPU.

What the interpreter leaves out is in it: layouts, wide loads and what hints promised about them, matrix instructions
and their descriptors in shared memory, inline assembly, programs that wait for each other.
"""

import os
import subprocess
import sys
from pathlib import Path

import backstride.fused_ops as fused
import pytest
import torch
import triton
import triton.language as tl
from backstride.kernels.conv import apply, apply_transposed, reference, weight_grad
from backstride.kernels.conv.plan import Geometry
from backstride.kernels.rnn import reference as rnn_reference
from backstride.kernels.rnn import scan

from .test_rnn import fp64, regime, scan_inputs

__all__ = ["regime"]  # a fixture

ROOT = Path(__file__).parents[1]
# Relative to the root mean square: the rounding of the result, or of the operands.
PRECISION = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-10}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("marked", [pytest.param("emulated", marks=pytest.mark.compile), "smoke"])
def test_marked_tests_pass_emulated(marked):
    """In a process of its own, where Triton does not interpret. PyTorch's samples need a kernel each, and minutes."""
    selection = ["-m", f"{marked} and not gpu", "-k", "not samples"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"BACKSTRIDE_EMULATE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", *selection, "tests"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.fixture
def executed(monkeypatch):
    """The PTX of all launches so far."""
    from . import ptx_launch

    texts, run = [], ptx_launch.run
    monkeypatch.setattr(ptx_launch, "run", lambda path, *rest: (texts.append(Path(path).read_text()), run(path, *rest)))
    return texts


def relative_error(result, exact):
    assert result.shape == exact.shape
    return ((result.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.mark.emulated
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("dtype", "stride"), list(zip(PRECISION, (1, 2, 1), strict=True)), ids=str)
def test_matrix_instructions_of_convolution(dtype, last, stride, executed):
    """Full tiles: wgmma, with operands in shared memory or in registers, turned or not; fp32 in TF32."""
    generator = torch.Generator().manual_seed(stride)
    memory_format = torch.channels_last if last else torch.contiguous_format
    out = (16 + stride - 1) // stride

    def tensor(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(memory_format=memory_format)

    x, y, w = tensor(2, 64, 16, 16), tensor(2, 128, out, out), tensor(128, 64, 3, 3) / 24
    geometry = Geometry((stride, stride), (1, 1), (1, 1), 1)
    tf32 = dtype == torch.float32
    made, back, grad = torch.full_like(y, torch.nan), torch.full_like(x, torch.nan), torch.full_like(w, torch.nan)
    apply(x, w, None, None, made, geometry, tf32=tf32)
    apply_transposed(y, w, None, None, back, geometry, tf32=tf32)
    weight_grad(x, y, grad, geometry, tf32=tf32)
    exact = (
        reference.apply(x.double(), w.double(), (out, out), geometry),
        reference.apply_transposed(y.double(), w.double(), (16, 16), geometry),
        reference.weight_grad(x.double(), y.double(), (3, 3), geometry),
    )
    for result, right in zip((made, back, grad), exact, strict=True):
        assert relative_error(result, right) < PRECISION[dtype]
    assert any("wgmma.mma_async" in text for text in executed)


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_recurrence(regime, dtype):
    """With products of this type; the sharded programs wait for each other."""
    x, gate, first, matrix, _ = scan_inputs("tanh", False, True, dtype, "cpu", hidden=40)
    y = torch.full_like(x, torch.nan)
    scan(x, gate, first, matrix, None, y, None, "tanh", tf32=dtype == torch.float32)
    exact = rnn_reference.scan(fp64(x), None, fp64(first), fp64(matrix), None, "tanh")
    assert relative_error(y, exact) < 2 * PRECISION[dtype]


@pytest.mark.emulated
def test_training_step_of_depthwise_in_bf16(executed):
    """Two bf16 are converted by an instruction each, which only the compiled kernels have."""
    x = torch.randn(2, 16, 9, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    w = torch.randn(16, 1, 3, 3, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    y = fused.conv2d(x, w, padding=1, groups=16)
    grads = torch.autograd.grad(y.float().square().sum(), (x, w))
    exact_inputs = [t.detach().double().requires_grad_() for t in (x, w)]
    exact = torch.nn.functional.conv2d(*exact_inputs, padding=1, groups=16)
    assert relative_error(y, exact) < PRECISION[torch.bfloat16]
    for grad, right in zip(grads, torch.autograd.grad(exact.square().sum(), exact_inputs), strict=True):
        assert relative_error(grad, right) < 2 * PRECISION[torch.bfloat16]
    assert all("0xffff0000" in text for text in executed)


@triton.jit
def copy_kernel(x_ptr, y_ptr, OFFSET: tl.constexpr, PROMISE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.max_contiguous(tl.multiple_of(OFFSET + tl.arange(0, BLOCK), PROMISE), PROMISE)
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + offs))


@pytest.mark.emulated
def test_what_the_emulator_refuses():
    """Hints that are wrong, and addresses outside: the interpreter says nothing of the first."""
    x, y = torch.arange(512, dtype=torch.float32), torch.zeros(256)
    copy_kernel[(1,)](x, y, OFFSET=4, PROMISE=4, BLOCK=256)
    assert torch.equal(y, x[4:260])
    with pytest.raises(RuntimeError, match="no multiple of 8 bytes"):
        copy_kernel[(1,)](x, y, OFFSET=3, PROMISE=4, BLOCK=256)
    with pytest.raises(RuntimeError, match="outside of the tensors"):
        copy_kernel[(1,)](x, y, OFFSET=260, PROMISE=4, BLOCK=256)
    with pytest.raises(RuntimeError, match="outside of the tensors"):
        copy_kernel[(1,)](x, y[:255], OFFSET=0, PROMISE=4, BLOCK=256)
