"""What the three ways to run the recurrence share: where a step's rows lie, and the step itself."""

import triton
import triton.language as tl

RUNTIME = ["T", "B", "stride_xt", "stride_xb", "stride_xd", "stride_wd", "stride_wk", "stride_wn"]


@triton.jit
def locate(step, pid_d, offsets_ptr, T, B, BACKWARD: tl.constexpr, PACKED: tl.constexpr):
    """Time, first row and number of rows of the step-th step: direction 1 walks against direction 0."""
    t = tl.where((pid_d == 0) != BACKWARD, step, T - 1 - step)
    if PACKED:
        start = tl.load(offsets_ptr + t)
        size = (tl.load(offsets_ptr + t + 1) - start).to(tl.int32)
    else:
        start = t.to(tl.int64) * B
        size = B
    return t.to(tl.int64), start, size


@triton.jit
def tanh(z):
    """Exact to rounding everywhere: 1 - 2 / (e^2|z| + 1) has no overflow that matters, but cancels for small z."""
    magnitude = tl.abs(z)
    value = 1 - 2 / (tl.exp(2 * magnitude) + 1)
    value = tl.where(z < 0, -value, value)
    if z.dtype == tl.float32:
        # Minimax polynomial of the Cephes library's tanhf (S. Moshier) below 0.625.
        s = z * z
        p = -5.70498872745e-3 * s + 2.06390887954e-2
        p = p * s - 5.37397155531e-2
        p = p * s + 1.33314422036e-1
        p = p * s - 3.33332819422e-1
        value = tl.where(magnitude < 0.625, z + z * s * p, value)
    return value


@triton.jit
def load_inputs(
    x_ptr,
    gate_ptr,
    first_ptr,
    step,
    previous_size,
    offs_b,  # [BLOCK_B]
    offs_n,  # [BLOCK_N]
    pid_d,
    offsets_ptr,
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
    HAS_FIRST: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    """What a step needs and no other program writes: x_t + first where a sequence starts, the gate, and its rows."""
    t, start, size = locate(step, pid_d, offsets_ptr, T, B, BACKWARD, PACKED)  # pyright: ignore[reportGeneralTypeIssues]
    rows = offs_b.to(tl.int64)
    mask = (offs_b < size)[:, None] & (offs_n < H)[None, :]
    base = start * stride_xb if PACKED else t * stride_xt
    offs_x = tl.multiple_of(base + rows * stride_xb + pid_d.to(tl.int64) * stride_xd, VEC)
    x = tl.load(x_ptr + offs_x[:, None] + offs_n[None, :], mask=mask, other=0.0)
    if HAS_FIRST:
        offs_first = tl.multiple_of((pid_d.to(tl.int64) * B + rows) * H, VEC)[:, None] + offs_n[None, :]
        starts = mask & (offs_b >= previous_size)[:, None]
        x = x.to(ACC) + tl.load(first_ptr + offs_first, mask=starts, other=0.0).to(ACC)
    gate = x
    if EFFECT != "tanh" and EFFECT != "relu":
        offs = tl.multiple_of(((start + rows) * D + pid_d) * H, VEC)[:, None] + offs_n[None, :]
        gate = tl.load(gate_ptr + offs, mask=mask, other=0.0)
    return x, gate, start, size


@triton.jit
def finish(
    y_ptr,
    factor_ptr,
    product,  # [BLOCK_B, BLOCK_N], y_{t-1} M
    x,  # [BLOCK_B, BLOCK_N]
    gate,  # [BLOCK_B, BLOCK_N]
    start,
    size,
    previous_size,
    offs_b,  # [BLOCK_B]
    offs_n,  # [BLOCK_N]
    pid_d,
    H: tl.constexpr,
    D: tl.constexpr,
    EFFECT: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    VEC: tl.constexpr,
):
    """One step for a tile: e_t(x_t + product), stored, and returned in y's dtype."""
    gate = gate.to(product.dtype)
    z = x.to(product.dtype) + tl.where((offs_b < previous_size)[:, None], product, 0.0)
    if EFFECT == "tanh":
        y = tanh(z)
    elif EFFECT == "relu":
        y = tl.where(z < 0, 0.0, z)  # not tl.maximum: NaN has to come through
    elif EFFECT == "tanh_derivative":
        y = z * (1 - gate * gate)
    elif EFFECT == "relu_derivative":
        y = tl.where(gate <= 0, 0.0, z)
    else:
        y = z * gate
    y = y.to(product.dtype)
    mask = (offs_b < size)[:, None] & (offs_n < H)[None, :]
    offs = tl.multiple_of(((start + offs_b.to(tl.int64)) * D + pid_d) * H, VEC)[:, None] + offs_n[None, :]
    result = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs, result, mask=mask)
    if HAS_FACTOR:
        tl.store(factor_ptr + offs, (1 - y * y).to(factor_ptr.dtype.element_ty), mask=mask)
    return result
