"""How close is close enough: errors against an fp64 oracle, measured beside torch's own op in the same dtype."""

import torch
from torch import Tensor


def to_fp64(*tensors: Tensor) -> list[Tensor]:
    """Detached fp64 copies that require grad where the originals do, on the CPU."""
    return [t.detach().cpu().double().requires_grad_(t.requires_grad) for t in tensors]


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0


def assert_as_exact_as(ours: Tensor, theirs: Tensor, oracle: Tensor, scale: Tensor, name: str = "result") -> None:
    """The RMS error of `ours` is at most twice that of `theirs` plus eps times the RMS of `scale`.

    `scale` is the oracle of the operands' absolute values: a sum of n products has a scale of about n, and a value of
    about √n, so that this is eps √n relative to the value, without being fooled where the products cancel.
    Shapes and dtypes must be equal; NaN never passes.
    """
    assert ours.shape == theirs.shape == oracle.shape, f"{name}: {ours.shape} for {theirs.shape}"
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype} for {theirs.dtype}"
    error = rms(ours.detach().cpu().double() - oracle.detach())
    baseline = rms(theirs.detach().cpu().double() - oracle.detach())
    limit = 2 * baseline + torch.finfo(ours.dtype).eps * rms(scale.detach())
    assert error <= limit, f"{name}: RMS error {error:.3e}, limit {limit:.3e} (torch's own {baseline:.3e})"


def to_tf32(tensor: Tensor) -> Tensor:
    """The nearest numbers with ten bits behind the point, ties away from zero."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def check_forward_and_gradients(ours, theirs, tensors):
    """`ours` and `theirs` are functions of the tensors; compares outputs and all gradients with an fp64 oracle."""
    exact_inputs = to_fp64(*tensors)
    scale_inputs = [t.detach().abs().requires_grad_(t.requires_grad) for t in exact_inputs]
    every = [
        f(*inputs) for f, inputs in ((ours, tensors), (theirs, tensors), (theirs, exact_inputs), (theirs, scale_inputs))
    ]
    assert_as_exact_as(*every)
    grad = torch.randn(every[0].shape, generator=torch.Generator().manual_seed(7)).to(every[0])
    grads = [
        torch.autograd.grad(y, [t for t in inputs if t.requires_grad], g)
        for y, inputs, g in zip(
            every,
            (tensors, tensors, exact_inputs, scale_inputs),
            (grad, grad, grad.cpu().double(), grad.cpu().double().abs()),
            strict=True,
        )
    ]
    for index, gradient in enumerate(zip(*grads, strict=True)):
        assert_as_exact_as(*gradient, f"gradient {index}")
    return every[:2]


def random_tensors(seed, *shapes, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def both_layouts(*tensors):
    """The tensors as they are, and channels_last where they have such a format."""
    yield tensors
    if tensors[0].dim() > 3:
        memory_format = torch.channels_last if tensors[0].dim() == 4 else torch.channels_last_3d
        yield tuple(t if t.dim() < 4 else t.to(memory_format=memory_format) for t in tensors)
