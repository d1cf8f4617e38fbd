"""The readable definition of `scan`, in plain PyTorch, step by step; differentiable by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch import Packing

EFFECTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tanh": lambda z, _: torch.tanh(z),
    "relu": lambda z, _: torch.relu(z),
    "tanh_derivative": lambda z, h: z * (1 - h * h),
    "relu_derivative": lambda z, h: torch.where(h <= 0, 0, z),
    "factor": lambda z, factor: z * factor,
}


def scan(
    x: Tensor,
    gate: Tensor | None,
    first: Tensor | None,
    matrix: Tensor,
    packing: Packing | None,
    effect: str,
    *,
    backward: bool = False,
) -> Tensor:
    """y_t = e_t(x_t + y_{t-1} M) for every direction; shapes and arguments as `launch.scan`, which writes into y."""
    results = []
    for d in range(x.shape[-2]):
        steps = _steps(x[..., d, :], packing)
        gates = steps if gate is None else _steps(gate[..., d, :], packing)
        order = range(len(steps)) if (d == 0) != backward else range(len(steps) - 1, -1, -1)
        outputs, previous = [x[..., d, :]] * len(steps), steps[0][:0]
        for t in order:
            started, size = previous.shape[0], steps[t].shape[0]
            carried = (previous @ matrix[d])[:size]
            if started < size:
                fresh = torch.zeros_like(steps[t]) if first is None else first[d]
                carried = torch.cat([carried, fresh[started:size]])
            previous = outputs[t] = EFFECTS[effect](steps[t] + carried, gates[t])
        results.append(torch.stack(outputs) if packing is None else torch.cat(outputs))
    return torch.stack(results, dim=-2)


def _steps(rows: Tensor, packing: Packing | None) -> list[Tensor]:
    if packing is None:
        return list(rows)
    return list(rows.split(packing.offsets.diff().tolist()))
