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
