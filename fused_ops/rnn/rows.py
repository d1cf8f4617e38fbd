"""Where the steps of a batch of sequences lie in memory: neighbours in time, first and last rows.

Rows are those of a tensor (T, B, ...) in order, or of packed data (rows, ...) where step t has the rows
offsets[t] ... offsets[t + 1] - 1, as in PackedSequence. Nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def offsets_of(batch_sizes: Tensor, device: torch.device) -> Tensor:
    """First row of each step, and the number of all rows."""
    return F.pad(batch_sizes.cumsum(0), (1, 0)).to(device, non_blocking=True)


def _last_packed(offsets: Tensor, batch: int) -> Tensor:
    sequences = torch.arange(batch, device=offsets.device)
    lengths = (offsets.diff()[None, :] > sequences[:, None]).sum(1)
    return offsets[lengths - 1] + sequences


def first_rows(offsets: Tensor | None, like: Tensor, batch: int, forward: bool) -> Tensor:
    """Row of each sequence's first step on the walk, forward or backward in time; `like` has the rows."""
    if offsets is not None and not forward:
        return _last_packed(offsets, batch)
    start = 0 if forward else (like.shape[0] - 1) * batch
    return torch.arange(start, start + batch, device=like.device)


def previous_rows(y: Tensor, offsets: Tensor | None, backward: bool) -> Tensor:
    """y_{t-1} at step t, and 0 where a sequence starts; y (T, B, D, H) or (rows, D, H).

    Direction 0 walks forward in time and direction 1 backward, or with `backward` the other way round.
    """
    shifted = []
    for d in range(y.shape[-2]):
        rows = y[..., d, :]
        forward = (d == 0) != backward
        if offsets is None:
            zero = torch.zeros_like(rows[:1])
            shifted.append(torch.cat([zero, rows[:-1]] if forward else [rows[1:], zero]))
        else:
            shifted.append(_shifted(rows, offsets, forward))
    return torch.stack(shifted, dim=-2)


def pairs_of_steps(y: Tensor, v: Tensor, offsets: Tensor | None, backward: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """For each direction y_{t-1} and v_t, (rows, H) each, as in `previous_rows`; steps without one before are left out
    or zeros. Of a dense batch these are views."""
    for d in range(y.shape[-2]):
        before, own = y[..., d, :], v[..., d, :]
        forward = (d == 0) != backward
        if offsets is None:
            before, own = (before[:-1], own[1:]) if forward else (before[1:], own[:-1])
        else:
            before = _shifted(before, offsets, forward)
        yield before.flatten(0, -2), own.flatten(0, -2)


def _shifted(rows: Tensor, offsets: Tensor, forward: bool) -> Tensor:
    """At each row of packed data that of the step before (forward) or after in its sequence, or 0."""
    index, valid = _neighbours(offsets, rows.shape[0], forward)
    return torch.where(valid[:, None], rows[index], 0)


def _neighbours(offsets: Tensor, rows: int, forward: bool) -> tuple[Tensor, Tensor]:
    """Row of the step before in each row's sequence (forward) or after it, and whether there is one."""
    row = torch.arange(rows, device=offsets.device)
    t = torch.searchsorted(offsets, row, right=True) - 1
    sequence = row - offsets[t]
    if forward:
        return (offsets[(t - 1).clamp(min=0)] + sequence).clamp(max=rows - 1), t > 0
    index = offsets[t + 1] + sequence
    after = offsets[(t + 2).clamp(max=offsets.numel() - 1)]
    return index.clamp(max=rows - 1), index < after
