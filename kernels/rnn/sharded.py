"""The recurrence with the matrix's columns spread over programs: all steps in one launch, or one step in each."""

import triton
import triton.language as tl

from ..tile import dot
from .exchange import signal, wait
from .step import RUNTIME, finish, load_inputs, locate


@triton.jit
def load_state(
    y_ptr, offs_b, offs_k, pid_d, start, size, H: tl.constexpr, D: tl.constexpr, VEC: tl.constexpr
):  # [BLOCK_B, BLOCK_K]
    offs = tl.multiple_of(((start + offs_b) * D + pid_d) * H, VEC)[:, None] + offs_k[None, :]
    mask = (offs_b < size)[:, None] & (offs_k < H)[None, :]
    # Past L1: another multiprocessor wrote it.
    return tl.load(y_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def load_columns(w_ptr, offs_k, offs_n, stride_wk, stride_wn, H: tl.constexpr):  # [BLOCK_K, BLOCK_N]
    offs = offs_k.to(tl.int64)[:, None] * stride_wk + offs_n.to(tl.int64)[None, :] * stride_wn
    return tl.load(w_ptr + offs, mask=(offs_k < H)[:, None] & (offs_n < H)[None, :], other=0.0)


@triton.jit(do_not_specialize=[*RUNTIME, "first_step", "last_step"])
def rnn_sharded_kernel(
    x_ptr,
    gate_ptr,
    first_ptr,
    w_ptr,
    offsets_ptr,
    counter_ptr,
    y_ptr,
    factor_ptr,
    T,
    B,
    stride_xt,
    stride_xb,
    stride_xd,
    stride_wd,
    stride_wk,
    stride_wn,
    first_step,
    last_step,
    H: tl.constexpr,
    D: tl.constexpr,
    EFFECT: tl.constexpr,
    BACKWARD: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    PERSISTENT: tl.constexpr,
    COUNTER_LINE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y_t = e_t(x_t + y_{t-1} M) for the steps from first_step to last_step; program (b, n, d) has a tile of each.

    PERSISTENT: M's columns [H, BLOCK_N] stay in registers, and each step begins when all programs (b, *, d) have
    written their part of y_{t-1}. All programs must run at once. Otherwise one step a launch, and M is read anew.
    """
    pid_b = tl.program_id(0).to(tl.int64)
    pid_n = tl.program_id(1)
    pid_d = tl.program_id(2).to(tl.int64)
    shards = tl.num_programs(1)
    offs_b = pid_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    w_ptr += pid_d * stride_wd
    if PERSISTENT:
        counter_ptr += (pid_d * tl.num_programs(0) + pid_b) * COUNTER_LINE
        columns = ()
        for k in tl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
            offs_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
            columns = columns + (load_columns(w_ptr, offs_k, offs_n, stride_wk, stride_wn, H),)
    before = tl.maximum(first_step - 1, 0)
    _, start_before, size_before = locate(before, pid_d, offsets_ptr, T, B, BACKWARD, PACKED)  # pyright: ignore[reportGeneralTypeIssues]
    size_before = tl.where(first_step > 0, size_before, 0)
    x, gate, start, size = load_inputs(
        x_ptr,
        gate_ptr,
        first_ptr,
        first_step,
        size_before,
        offs_b,
        offs_n,
        pid_d,
        offsets_ptr,
        T,
        B,
        stride_xt,
        stride_xb,
        stride_xd,
        H,
        D,
        EFFECT,
        BACKWARD,
        PACKED,
        HAS_FIRST,
        VEC,
        ACC,
    )
    for step in tl.range(first_step, last_step, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        # One step ahead where there are several: the next step's inputs come in while this one waits.
        next_x, next_gate, next_start, next_size = load_inputs(
            x_ptr,
            gate_ptr,
            first_ptr,
            tl.minimum(step + PERSISTENT, T - 1),
            size if PERSISTENT else size_before,
            offs_b,
            offs_n,
            pid_d,
            offsets_ptr,
            T,
            B,
            stride_xt,
            stride_xb,
            stride_xd,
            H,
            D,
            EFFECT,
            BACKWARD,
            PACKED,
            HAS_FIRST,
            VEC,
            ACC,
        )
        product = tl.zeros([BLOCK_B, BLOCK_N], dtype=ACC)
        if step > 0:
            if PERSISTENT:
                wait(counter_ptr, step * shards, ASSEMBLY)
                for k in tl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
                    offs_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
                    state = load_state(y_ptr, offs_b, offs_k, pid_d, start_before, size_before, H, D, VEC)
                    product = dot(state, columns[k], product, PRECISION, UPCAST)
            else:
                for k in range(0, H, BLOCK_K):
                    offs_k = k + tl.arange(0, BLOCK_K)
                    state = load_state(y_ptr, offs_b, offs_k, pid_d, start_before, size_before, H, D, VEC)
                    w = load_columns(w_ptr, offs_k, offs_n, stride_wk, stride_wn, H)
                    product = dot(state, w, product, PRECISION, UPCAST)
        finish(
            y_ptr,
            factor_ptr,
            product,
            x,
            gate,
            start,
            size,
            size_before,
            offs_b,
            offs_n,
            pid_d,
            H,
            D,
            EFFECT,
            HAS_FACTOR,
            VEC,
        )
        if PERSISTENT:
            signal(counter_ptr)
        start_before, size_before = start, size
        x, gate, start, size = next_x, next_gate, next_start, next_size
