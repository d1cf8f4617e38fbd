"""What the three ways to run the recurrence share: where a step's rows lie, and the step itself.

`rows` (of the batch) and `units` (hidden) are index tensors of any shapes that broadcast to a tile's.
"""

import triton
import triton.language as tl

RUNTIME = ["T", "B", "stride_xt", "stride_xb", "stride_xd"]


@triton.jit
def locate(step, pid_d, offsets_ptr, T, B, BACKWARD: tl.constexpr, PACKED: tl.constexpr):
    """Time, first row and the row behind the last of the step-th step: direction 1 walks against direction 0.

    A step that does not exist is the last one.
    """
    step = tl.minimum(step, T - 1)
    t = tl.where((pid_d == 0) != BACKWARD, step, T - 1 - step)
    if PACKED:
        start = tl.load(offsets_ptr + t)
        end = tl.load(offsets_ptr + t + 1)
    else:
        start = t.to(tl.int64) * B
        end = start + B
    return t.to(tl.int64), start, end


@triton.jit
def size_of(start, end, B, PACKED: tl.constexpr):
    """Number of rows of a step."""
    return (end - start).to(tl.int32) if PACKED else B


@triton.jit
def turn(step, B):
    """First row of a step's half of `state_ptr`: the step before may still be read while this one is written."""
    return B.to(tl.int64) * (step % 2)


@triton.jit
def tanh(z, LOW: tl.constexpr):
    """Exact to rounding everywhere: 1 - 2 / (e^2z + 1) has no overflow that matters, but cancels for small z.

    With LOW to an eighth of what is rounded off in 16 bits, for half of the instructions.
    """
    if LOW:
        value = 1 - 2 / (tl.exp2(2.8853900817779268 * z) + 1)
        value = tl.where(tl.abs(z) < 0.00390625, z, value)
    else:
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
    t,
    start,
    size,
    rows,
    units,
    pid_d,
    stride_xt,
    stride_xb,
    H: tl.constexpr,
    D: tl.constexpr,
    EFFECT: tl.constexpr,
    PACKED: tl.constexpr,
    VEC: tl.constexpr,
):
    """What a step needs and no other program writes, x_t and the gate, as they are stored.

    x_ptr is the direction's own.
    """
    mask = (rows < size) & (units < H)
    stride_b = tl.multiple_of(stride_xb.to(tl.int64), VEC)
    base = tl.multiple_of(start * stride_b if PACKED else t * stride_xt, VEC)
    x = tl.load(x_ptr + base + (rows.to(tl.int64) * stride_b + units), mask=mask, other=0.0)
    gate = x
    if EFFECT != "tanh" and EFFECT != "relu":
        gate = tl.load(gate_ptr + (start * D + pid_d) * H + (rows.to(tl.int64) * (D * H) + units), mask=mask, other=0.0)
    return x, gate


@triton.jit
def load_first(first_ptr, like, rows, units, pid_d, B, H: tl.constexpr, HAS_FIRST: tl.constexpr):
    """What the first step of each row has in place of y_{t-1} M; `like` has the tile's shape and dtype."""
    if HAS_FIRST:
        offs = pid_d.to(tl.int64) * B * H + (rows.to(tl.int64) * H + units)
        return tl.load(first_ptr + offs, mask=(rows < B) & (units < H), other=0.0)
    return tl.zeros_like(like)


@triton.jit
def load_bias(b_ih_ptr, b_hh_ptr, units, pid_d, H: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """What is added in every step, (D, H) each; `units` has the tile's rows, or one."""
    if HAS_BIAS:
        offs = pid_d * H + units
        b_ih = tl.load(b_ih_ptr + offs, mask=units < H, other=0.0)
        return b_ih.to(ACC) + tl.load(b_hh_ptr + offs, mask=units < H, other=0.0).to(ACC)
    else:
        return 0.0


@triton.jit
def apply(
    product,  # y_{t-1} M, valid in the rows that had a step before
    first,
    x,
    bias,
    gate,
    rows,
    previous_size,
    EFFECT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """e_t(x_t + bias + y_{t-1} M), in the product's dtype."""
    gate = gate.to(product.dtype)
    z = x.to(product.dtype)
    if HAS_BIAS:
        z += bias
    z += tl.where(rows < previous_size, product, first.to(product.dtype))
    if EFFECT == "tanh":
        y = tanh(z, x.dtype.primitive_bitwidth == 16)
    elif EFFECT == "relu":
        y = tl.where(z < 0, 0.0, z)  # not tl.maximum: NaN has to come through
    elif EFFECT == "tanh_derivative":
        y = z * (1 - gate * gate)
    elif EFFECT == "relu_derivative":
        y = tl.where(gate <= 0, 0.0, z)
    else:
        y = z * gate
    return y.to(product.dtype)


@triton.jit
def store(ptr, value, start, size, rows, units, pid_d, H: tl.constexpr, D: tl.constexpr):
    offs = (start * D + pid_d) * H + (rows.to(tl.int64) * (D * H) + units)
    tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=(rows < size) & (units < H))


@triton.jit
def store_last(last_ptr, y, step, size, next_size, rows, units, pid_d, T, B, H: tl.constexpr, HAS_LAST: tl.constexpr):
    """y of the rows that have no further step, (D, B, H)."""
    if HAS_LAST:
        going_on = tl.where(step < T - 1, next_size, 0)
        if going_on < size:
            offs = pid_d.to(tl.int64) * B * H + (rows.to(tl.int64) * H + units)
            mask = (rows >= going_on) & (rows < size) & (units < H)
            tl.store(last_ptr + offs, y.to(last_ptr.dtype.element_ty), mask=mask)
