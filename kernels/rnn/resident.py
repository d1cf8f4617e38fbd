"""The recurrence with the whole matrix on one multiprocessor: no program waits for another."""

import triton
import triton.language as tl

from ..tf32 import rounded
from ..tile import dot
from .order import order_k, product_to_memory
from .step import RUNTIME, apply, load_bias, load_first, load_inputs, locate, size_of, store, store_last


@triton.jit(do_not_specialize=RUNTIME)
def rnn_resident_kernel(
    x_ptr,
    b_ih_ptr,
    b_hh_ptr,
    gate_ptr,
    first_ptr,
    w_ptr,
    offsets_ptr,
    y_ptr,
    factor_ptr,
    last_ptr,
    T,
    B,
    stride_xt,
    stride_xb,
    stride_xd,
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
):
    """y_t = e_t(x_t + y_{t-1} M) for all steps; program (b, d) has rows b BLOCK_B ... of direction d.

    y_{t-1} stays on the multiprocessor, and so does W = M^T (D, H, H), loaded once; only x_t and y_t pass through
    memory. Tiles have a line of 4 V units for each row of 8, of each of W warps, R times over, of each 8 rows.
    """
    pid_b = tl.program_id(0)
    pid_d = tl.program_id(1)
    x_ptr += tl.multiple_of(pid_d.to(tl.int64) * stride_xd, VEC)
    VECTOR: tl.constexpr = 16 * 8 // w_ptr.dtype.element_ty.primitive_bitwidth
    W: tl.constexpr = min(WARPS, BLOCK_N // 8)
    V: tl.constexpr = min(VECTOR, BLOCK_N // (4 * W))
    R: tl.constexpr = BLOCK_N // (4 * V * W)
    line = tl.arange(0, BLOCK_B * BLOCK_N // (4 * V))
    rows = (pid_b * BLOCK_B + line // (8 * W * R) * 8 + line % 8)[:, None]
    units = (line // 8 % (W * R) * (4 * V))[:, None] + tl.arange(0, 4 * V)[None, :]
    # Of W's rows, a warp's eight columns of the product, in the numbering of `product_to_memory`; k in memory's order.
    K: tl.constexpr = 4 * min(VECTOR, BLOCK_N // 4)
    line = tl.arange(0, BLOCK_N * BLOCK_N // K)
    column, warp, r = line % 8, line // 8 % W, line // (8 * W * (BLOCK_N // K))
    n = (r // (V // 2) * W + warp) * (4 * V) + column // 2 * V + r % (V // 2) * 2 + column % 2
    k = (line // (8 * W) % (BLOCK_N // K) * K)[:, None] + tl.arange(0, K)[None, :]
    w = tl.load(w_ptr + pid_d.to(tl.int64) * H * H + (n * H)[:, None] + k, mask=(n < H)[:, None] & (k < H), other=0.0)
    w = tl.reshape(w, [BLOCK_N // (8 * W), BLOCK_N // K, W, 8, K])
    w = tl.reshape(tl.permute(w, (0, 2, 3, 1, 4)), [BLOCK_N, BLOCK_N // K, K])
    E: tl.constexpr = max(1, VECTOR // 4)
    w = rounded(tl.trans(tl.reshape(order_k(w, E), [BLOCK_N, BLOCK_N])), PRECISION)
    state = tl.zeros([BLOCK_B, BLOCK_N], dtype=w.dtype)
    t, start, end = locate(0, pid_d, offsets_ptr, T, B, BACKWARD, PACKED)  # pyright: ignore[reportGeneralTypeIssues]
    size = size_of(start, end, B, PACKED)
    x, gate = load_inputs(
        x_ptr, gate_ptr, t, start, size, rows, units, pid_d, stride_xt, stride_xb, H, D, EFFECT, PACKED, VEC
    )
    first = load_first(first_ptr, x, rows, units, pid_d, B, H, HAS_FIRST)
    bias = load_bias(b_ih_ptr, b_hh_ptr, units, pid_d, H, HAS_BIAS, ACC)
    previous_size = size * 0
    t, next_start, next_end = locate(1, pid_d, offsets_ptr, T, B, BACKWARD, PACKED)  # pyright: ignore[reportGeneralTypeIssues]
    for step in tl.range(0, T, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        # The next step's inputs come in while this one computes, and where the one after it lies.
        next_size = size_of(next_start, next_end, B, PACKED)
        next_x, next_gate = load_inputs(
            x_ptr,
            gate_ptr,
            t,
            next_start,
            next_size,
            rows,
            units,
            pid_d,
            stride_xt,
            stride_xb,
            H,
            D,
            EFFECT,
            PACKED,
            VEC,
        )
        t, later_start, later_end = locate(step + 2, pid_d, offsets_ptr, T, B, BACKWARD, PACKED)  # pyright: ignore[reportGeneralTypeIssues]
        product = dot(state, w, tl.zeros([BLOCK_B, BLOCK_N], dtype=ACC), PRECISION, UPCAST)
        y = apply(product_to_memory(product, R, W, V), first, x, bias, gate, rows, previous_size, EFFECT, HAS_BIAS)
        if BLOCK_N > H and EFFECT != "tanh":  # a state that overflowed, times their zeros, is NaN
            y = tl.where(units < H, y, 0.0)
        store(y_ptr, y, start, size, rows, units, pid_d, H, D)
        if HAS_FACTOR:
            store(factor_ptr, 1 - y * y, start, size, rows, units, pid_d, H, D)
        store_last(last_ptr, y, step, size, next_size, rows, units, pid_d, T, B, H, HAS_LAST)
        state = tl.reshape(rounded(y.to(w.dtype), PRECISION), [BLOCK_B // 8, R * W, 8, 4 * V])
        state = tl.reshape(tl.permute(state, (0, 2, 1, 3)), [BLOCK_B, BLOCK_N // K, K])
        state = tl.reshape(order_k(state, E), [BLOCK_B, BLOCK_N])
        previous_size = size
        x, gate, start, size = next_x, next_gate, next_start, next_size
        next_start, next_end = later_start, later_end
