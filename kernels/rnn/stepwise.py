"""One step of the recurrence in a launch of its own."""

import triton
import triton.language as tl

from ..tf32 import rounded
from ..tile import dot
from .step import RUNTIME, apply, load_bias, load_first, load_inputs, locate, size_of, store, store_last, turn


@triton.jit(do_not_specialize=[*RUNTIME, "step"])
def rnn_stepwise_kernel(
    x_ptr,
    b_ih_ptr,
    b_hh_ptr,
    gate_ptr,
    first_ptr,
    w_ptr,
    offsets_ptr,
    state_ptr,
    y_ptr,
    factor_ptr,
    last_ptr,
    T,
    B,
    stride_xt,
    stride_xb,
    stride_xd,
    step,
    H: tl.constexpr,
    D: tl.constexpr,
    EFFECT: tl.constexpr,
    BACKWARD: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y_t = e_t(x_t + y_{t-1} M) for the t of this step; program (b, n, d) has a tile of it. W = M^T is (D, H, H).

    In TF32 W is rounded, and so is y_{t-1} in `state_ptr` (2, B, D, H), whose halves take turns.
    """
    pid_b = tl.program_id(0)
    pid_n = tl.program_id(1)
    pid_d = tl.program_id(2)
    x_ptr += tl.multiple_of(pid_d.to(tl.int64) * stride_xd, VEC)
    offs_b = pid_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, units = offs_b[:, None], offs_n[None, :]
    t, start, end = locate(step, pid_d, offsets_ptr, T, B, BACKWARD, PACKED)  # pyright: ignore[reportGeneralTypeIssues]
    size = size_of(start, end, B, PACKED)
    x, gate = load_inputs(
        x_ptr, gate_ptr, t, start, size, rows, units, pid_d, stride_xt, stride_xb, H, D, EFFECT, PACKED, VEC
    )
    first = load_first(first_ptr, x, rows, units, pid_d, B, H, HAS_FIRST)
    bias = load_bias(b_ih_ptr, b_hh_ptr, units, pid_d, H, HAS_BIAS, ACC)
    product = tl.zeros([BLOCK_B, BLOCK_N], dtype=ACC)
    _, start_before, end_before = locate(tl.maximum(step - 1, 0), pid_d, offsets_ptr, T, B, BACKWARD, PACKED)  # pyright: ignore[reportGeneralTypeIssues]
    size_before = tl.where(step > 0, size_of(start_before, end_before, B, PACKED), 0)
    if step > 0:
        before_ptr = y_ptr + (start_before * D + pid_d) * H
        if PRECISION == "tf32":
            before_ptr = state_ptr + (turn(step + 1, B) * D + pid_d) * H
        before_rows = before_ptr + offs_b.to(tl.int64)[:, None] * (D * H)
        w_rows = w_ptr + pid_d.to(tl.int64) * H * H + offs_n.to(tl.int64)[None, :] * H
        for k in range(0, H, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            state_mask = (rows < size_before) & (offs_k < H)[None, :]
            state = tl.load(before_rows + offs_k[None, :], mask=state_mask, other=0.0)
            w = tl.load(w_rows + offs_k[:, None], mask=(offs_k < H)[:, None] & (units < H), other=0.0)
            product = dot(state, w, product, PRECISION, UPCAST)
    y = apply(product, first, x, bias, gate, rows, size_before, EFFECT, HAS_BIAS)
    store(y_ptr, y, start, size, rows, units, pid_d, H, D)
    if PRECISION == "tf32":
        store(state_ptr, rounded(y, PRECISION), turn(step, B), size, rows, units, pid_d, H, D)
    if HAS_FACTOR:
        store(factor_ptr, 1 - y * y, start, size, rows, units, pid_d, H, D)
    _, next_start, next_end = locate(step + 1, pid_d, offsets_ptr, T, B, BACKWARD, PACKED)  # pyright: ignore[reportGeneralTypeIssues]
    next_size = size_of(next_start, next_end, B, PACKED)
    store_last(last_ptr, y, step, size, next_size, rows, units, pid_d, T, B, H, HAS_LAST)
