"""The recurrence with the matrix's columns spread over programs that run at once and exchange y_t in every step."""

import triton
import triton.language as tl

from ..tf32 import rounded
from ..tile import dot
from .exchange import signal, wait
from .order import order_k, sum_of_parts
from .step import RUNTIME, apply, load_bias, load_first, load_inputs, locate, size_of, store, store_last, turn


@triton.jit
def load_parts(
    ptr,
    first_row,
    stride_row,
    end,
    k,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    INNER: tl.constexpr,
):
    """[S, ROWS, K]: of ROWS rows the columns k ... k + S K - 1, an S-th for each warp, in a product's order along k.

    With INNER = 8 each thread loads what it will multiply.
    """
    line = tl.arange(0, ROWS * S)  # INNER rows of one part, the same of the next part and so on, then the next INNER
    rows = first_row + line // (INNER * S) * INNER + line % INNER
    offs_k = (k + line // INNER % S * K)[:, None] + tl.arange(0, K)[None, :]
    offs = (rows.to(tl.int64) * stride_row)[:, None] + offs_k
    # Past L1: another multiprocessor wrote it.
    tile = tl.load(ptr + offs, mask=(rows < end)[:, None] & (offs_k < H), other=0.0, cache_modifier=".cg")
    tile = tl.permute(tl.reshape(tile, [ROWS // INNER, S, INNER, K]), (1, 0, 2, 3))
    return order_k(tl.reshape(tile, [S, ROWS, K]), max(1, 32 // tile.dtype.primitive_bitwidth))


@triton.jit(do_not_specialize=RUNTIME)
def rnn_sharded_kernel(
    x_ptr,
    b_ih_ptr,
    b_hh_ptr,
    gate_ptr,
    first_ptr,
    w_ptr,
    offsets_ptr,
    counter_ptr,
    state_ptr,
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
    COUNTER_LINE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """y_t = e_t(x_t + y_{t-1} M) for all steps; program (b, n, d) has a tile of each. All programs must run at once.

    W = M^T is (D, H, H); a program keeps its BLOCK_N rows of it. Each step begins when all programs (b, *, d) have
    written their part of y_{t-1}; each warp multiplies a WARPS-th of k, so that each number of y_{t-1} is read once.
    In TF32 what they read is y_{t-1} rounded, in `state_ptr` (2, B, D, H), whose halves take turns.
    """
    pid_b = tl.program_id(0)
    pid_n = tl.program_id(1)
    pid_d = tl.program_id(2)
    x_ptr += tl.multiple_of(pid_d.to(tl.int64) * stride_xd, VEC)
    shards = tl.num_programs(1)
    counter_ptr += (pid_d * tl.num_programs(0) + pid_b) * COUNTER_LINE
    K: tl.constexpr = 64 * 8 // w_ptr.dtype.element_ty.primitive_bitwidth
    CHUNKS: tl.constexpr = (H + WARPS * K - 1) // (WARPS * K)
    INNER: tl.constexpr = BLOCK_N if not IN_REGISTERS else 8  # pyright: ignore[reportAssignmentType]
    w_ptr += pid_d.to(tl.int64) * H * H
    columns = ()
    for c in tl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
        w = load_parts(w_ptr, pid_n * BLOCK_N, H, H, c * WARPS * K, H, BLOCK_N, WARPS, K, INNER)
        columns = columns + (tl.permute(rounded(w, PRECISION), (0, 2, 1)),)
    rows = pid_b * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    units = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    t, start, end = locate(0, pid_d, offsets_ptr, T, B, BACKWARD, PACKED)  # pyright: ignore[reportGeneralTypeIssues]
    size = size_of(start, end, B, PACKED)
    x, gate = load_inputs(
        x_ptr, gate_ptr, t, start, size, rows, units, pid_d, stride_xt, stride_xb, H, D, EFFECT, PACKED, VEC
    )
    first = load_first(first_ptr, x, rows, units, pid_d, B, H, HAS_FIRST)
    bias = load_bias(b_ih_ptr, b_hh_ptr, units, pid_d, H, HAS_BIAS, ACC)
    # No step before the first. Not `start` itself: where a loop sets a variable to what by name it was before the loop,
    # Triton takes it for one that the loop leaves alone.
    start_before, size_before = start * 0, size * 0
    t, next_start, next_end = locate(1, pid_d, offsets_ptr, T, B, BACKWARD, PACKED)  # pyright: ignore[reportGeneralTypeIssues]
    for step in tl.range(0, T, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        # The next step's inputs come in while this one waits, and where the one after it lies.
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
        wait(counter_ptr, step * shards, ASSEMBLY)
        # All loads before the first product: they wait together.
        before_ptr = y_ptr + (start_before * D + pid_d) * H
        if PRECISION == "tf32":
            before_ptr = state_ptr + (turn(step + 1, B) * D + pid_d) * H
        state = ()
        for c in tl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
            part = load_parts(before_ptr, pid_b * BLOCK_B, D * H, size_before, c * WARPS * K, H, BLOCK_B, WARPS, K, 8)
            state = state + (part,)
        products = tl.zeros([WARPS, BLOCK_B, BLOCK_N], dtype=ACC)
        for c in tl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
            products = dot(state[c], columns[c], products, PRECISION, UPCAST)
        product = sum_of_parts(products, max(1, min(K // 4, BLOCK_B * BLOCK_N // (32 * WARPS))))
        y = apply(product, first, x, bias, gate, rows, size_before, EFFECT, HAS_BIAS)
        if PRECISION == "tf32":
            store(state_ptr, rounded(y, PRECISION), turn(step, B), size, rows, units, pid_d, H, D)
            signal(counter_ptr)
            store(y_ptr, y, start, size, rows, units, pid_d, H, D)
        else:
            store(y_ptr, y, start, size, rows, units, pid_d, H, D)
            signal(counter_ptr)
        if HAS_FACTOR:
            store(factor_ptr, 1 - y * y, start, size, rows, units, pid_d, H, D)
        store_last(last_ptr, y, step, size, next_size, rows, units, pid_d, T, B, H, HAS_LAST)
        start_before, size_before = start, size
        x, gate, start, size = next_x, next_gate, next_start, next_size
        next_start, next_end = later_start, later_end
