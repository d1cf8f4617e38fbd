"""The recurrence with the whole matrix on one multiprocessor: no program waits for another."""

import triton
import triton.language as tl

from ..tile import dot
from .step import RUNTIME, finish, load_inputs


@triton.jit(do_not_specialize=RUNTIME)
def rnn_resident_kernel(
    x_ptr,
    gate_ptr,
    first_ptr,
    w_ptr,
    offsets_ptr,
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
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y_t = e_t(x_t + y_{t-1} M) for all steps; program (b, d) has rows b BLOCK_B ... of direction d.

    y_{t-1} stays in registers, and so does M [H, H], loaded once; only x_t and y_t pass through memory.
    """
    pid_b = tl.program_id(0).to(tl.int64)
    pid_d = tl.program_id(1).to(tl.int64)
    offs_b = pid_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < H
    offs_w = pid_d * stride_wd + offs_n.to(tl.int64)[:, None] * stride_wk + offs_n.to(tl.int64)[None, :] * stride_wn
    w = tl.load(w_ptr + offs_w, mask=mask_n[:, None] & mask_n[None, :], other=0.0)
    state = tl.zeros([BLOCK_B, BLOCK_N], dtype=w.dtype)
    # The next step's inputs come in while this one computes, where there are registers left for them.
    AHEAD: tl.constexpr = BLOCK_N <= 128
    previous_size = B * 0
    x, gate, start, size = load_inputs(
        x_ptr,
        gate_ptr,
        first_ptr,
        0,
        previous_size,
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
    for step in tl.range(0, T, num_stages=1):
        next_x, next_gate, next_start, next_size = load_inputs(
            x_ptr,
            gate_ptr,
            first_ptr,
            tl.minimum(step + AHEAD, T - 1),
            size if AHEAD else previous_size,
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
        if not AHEAD:
            x, gate, start, size = next_x, next_gate, next_start, next_size
        product = dot(state, w, tl.zeros([BLOCK_B, BLOCK_N], dtype=ACC), PRECISION, UPCAST)
        state = finish(
            y_ptr,
            factor_ptr,
            product,
            x,
            gate,
            start,
            size,
            previous_size,
            offs_b,
            offs_n,
            pid_d,
            H,
            D,
            EFFECT,
            HAS_FACTOR,
            VEC,
        )
        previous_size = size
        if AHEAD:
            x, gate, start, size = next_x, next_gate, next_start, next_size
