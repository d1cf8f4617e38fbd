"""Host side of the recurrence: choice of the regime and launch. No autograd, no allocation of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime import INTERPRETED, Device, Plan, device_guard, device_of
from ..tf32 import round_to_tf32
from .config import RESIDENT, SHARDED, STEPWISE, RnnConfig, choose_config, columns_in_registers
from .exchange import COUNTER_LINE
from .resident import rnn_resident_kernel
from .sharded import rnn_sharded_kernel
from .stepwise import rnn_stepwise_kernel


class Packing(NamedTuple):
    """Where the steps of a packed batch lie: step t has the rows offsets[t] ... offsets[t + 1] - 1."""

    offsets: torch.Tensor  # [T + 1], int64, on the device of the data
    batch: int


def uses_tensor_cores(dtype: torch.dtype, tf32: bool) -> bool:
    return dtype.itemsize == 2 or (dtype == torch.float32 and tf32)


def choose(batch: int, hidden: int, directions: int, like: torch.Tensor, tf32: bool) -> RnnConfig:
    """The configuration that `scan` takes for a layer of this size, in the dtype and on the device of `like`."""
    tensor_cores = uses_tensor_cores(like.dtype, tf32)
    return choose_config(batch, hidden, directions, like.dtype.itemsize, tensor_cores, _device_of(like))


def _device_of(tensor: torch.Tensor) -> Device:
    """The interpreter runs one program after the other, so that none may wait for a later one."""
    device = device_of(tensor)
    return device._replace(multiprocessors=1) if INTERPRETED else device


MAX_REGISTERS = 248  # of a thread: 8 warps of them fit a multiprocessor's 65536
KERNELS = {RESIDENT: rnn_resident_kernel, SHARDED: rnn_sharded_kernel, STEPWISE: rnn_stepwise_kernel}


def constants_of(
    x: torch.Tensor, effect: str, backward: bool, tf32: bool, config: RnnConfig, assembly: bool
) -> dict[str, Any]:
    """Compile-time arguments of the configuration's kernel; `assembly`: programs wait in NVIDIA's."""
    directions, hidden = x.shape[-2:]
    constants = {
        "H": hidden,
        "D": directions,
        "EFFECT": effect,
        "BACKWARD": backward,
        "VEC": math.gcd(16, hidden, *x.stride()[:-1]),
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 and x.dtype == torch.float32 else "ieee",
        "UPCAST": INTERPRETED and x.dtype == torch.bfloat16,
        "WARPS": config.num_warps,
        "BLOCK_B": config.block_b,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if assembly:
        # Left to itself, ptxas makes do with what lets more programs share a multiprocessor than ever will, and for it
        # loads y_{t-1} in several turns, or spills.
        constants["maxnreg"] = MAX_REGISTERS
    if config.regime == SHARDED:
        constants |= {
            "COUNTER_LINE": COUNTER_LINE,
            "ASSEMBLY": assembly,
            "IN_REGISTERS": columns_in_registers(hidden, x.dtype.itemsize, config),
        }
        if not INTERPRETED:
            # The driver refuses a grid that can't run all at once: an error, where waiting would never end.
            constants["launch_cooperative_grid"] = True
    if config.regime == STEPWISE:
        constants["BLOCK_K"] = config.block_k
    return constants


def scan(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    first: torch.Tensor | None,
    matrix: torch.Tensor,
    packing: Packing | None,
    y: torch.Tensor,
    factor: torch.Tensor | None,
    effect: str,
    *,
    biases: Sequence[torch.Tensor] = (),
    last: torch.Tensor | None = None,
    transposed: bool = False,
    backward: bool = False,
    tf32: bool = False,
) -> None:
    """Write y_t = e_t(x_t + b + y_{t-1} M), in both directions of time, into `y`.

    A row's first step has first[d, b] (or 0) in place of y_{t-1} M. Direction 0 walks from the first step to the
    last and direction 1 the other way, with `backward` both turned round.

    Shapes: x, y, gate and factor (T, B, D, H), or with `packing` (rows, D, H); first (D, B, H); matrix (D, H, H), any
    strides. x has any strides but its last, which is 1; the others are contiguous. With one direction, D may be left
    out of x, y and matrix together.

    Args:
        gate: what the effects "tanh_derivative", "relu_derivative" (outputs h_t of the RNN) and "factor" multiply by.
        factor: receives 1 - y^2 before it is rounded to the storage dtype, or None.
        effect: e_t: "tanh", "relu", "tanh_derivative" (z (1 - gate^2)), "relu_derivative" (z where gate > 0) or
            "factor" (z gate).
        biases: two whose sum is b, (D, H) each and contiguous, or none.
        last: (D, B, H), contiguous, receives each row's y at the end of its walk, or None.
        transposed: `matrix` is M^T, which is what the kernels read.
    """
    steps, batch = (packing.offsets.numel() - 1, packing.batch) if packing else x.shape[:2]
    b_ih, b_hh = biases or (None, None)
    flags = packing is not None, b_ih is not None, first is not None, factor is not None, last is not None
    regime, plan = _plan(steps, batch, x.shape, x.stride(), x.dtype, flags, effect, backward, tf32, _device_of(x))
    weight = matrix if transposed else matrix.mT
    if not weight.is_contiguous():
        weight = weight.contiguous()
    offsets = packing.offsets if packing else None
    rounds = plan.constants["PRECISION"] == "tf32"
    if rounds and regime == STEPWISE:
        weight = round_to_tf32(weight)
    state = x.new_empty(2, batch, *weight.shape[-3:-1]) if rounds and regime != RESIDENT else None
    with device_guard(x):
        if regime == RESIDENT:
            plan.launch(x, b_ih, b_hh, gate, first, weight, offsets, y, factor, last)
        elif regime == SHARDED:
            tiles, _, directions = plan.grid
            counters = torch.zeros(tiles * directions * COUNTER_LINE, dtype=torch.int32, device=x.device)
            plan.launch(x, b_ih, b_hh, gate, first, weight, offsets, counters, state, y, factor, last)
        else:
            for step in range(steps):
                plan.launch(x, b_ih, b_hh, gate, first, weight, offsets, state, y, factor, last, more=(step,))


@lru_cache(maxsize=4096)
def _plan(
    steps: int,
    batch: int,
    shape: torch.Size,
    x_strides: tuple[int, ...],
    dtype: torch.dtype,
    flags: tuple[bool, bool, bool, bool, bool],
    effect: str,
    backward: bool,
    tf32: bool,
    device: Device,
) -> tuple[str, Plan]:
    """The regime and its launch; of one step in the stepwise regime, of all in the others."""
    packed, has_bias, has_first, has_factor, has_last = flags
    if len(shape) == (2 if packed else 3):
        hidden = shape[-1]
        shape, x_strides = torch.Size((*shape[:-1], 1, hidden)), (*x_strides[:-1], hidden, 1)
    directions, hidden = shape[-2:]
    config = choose_config(batch, hidden, directions, dtype.itemsize, uses_tensor_cores(dtype, tf32), device)
    x = torch.empty_strided(shape, x_strides, dtype=dtype, device="meta")
    constants = constants_of(x, effect, backward, tf32, config, torch.version.hip is None and not INTERPRETED) | {
        "PACKED": packed,
        "HAS_BIAS": has_bias,
        "HAS_FIRST": has_first,
        "HAS_FACTOR": has_factor,
        "HAS_LAST": has_last,
    }
    sizes = (steps, batch, *((0, x_strides[0]) if packed else x_strides[:2]), x_strides[-2])
    tiles = triton.cdiv(batch, config.block_b)
    shards = () if config.regime == RESIDENT else (triton.cdiv(hidden, config.block_n),)
    return config.regime, Plan(KERNELS[config.regime], (tiles, *shards, directions), sizes, constants)
