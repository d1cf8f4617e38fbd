"""X and X^T over validity zones, and several of them over one input at once."""

import triton
import triton.language as tl

from ..tile import dot, element_offset, outer_and, outer_sum, rows_by_columns, unravel
from . import zones
from .tile import CHANNEL_STRIDES, RUNTIME, store_tile

COLUMNS = tl.constexpr(zones.COLUMNS)


@triton.jit
def _run(row_ptr, AXIS: tl.constexpr):
    """One axis of a zone, as in `zones.Run`: length, first, stride, hop, taps, and the hop in the weight."""
    at = row_ptr + 5 + 8 * AXIS
    length, first, stride, hop = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
    return length, first, stride, hop, tl.load(at + 6), tl.load(at + 7)


@triton.jit
def _output(row_ptr, AXIS: tl.constexpr, q):
    """Output pixel q of a zone's axis: start + step q. Looked up after the sum, which has no registers to spare."""
    at = row_ptr + 5 + 8 * AXIS
    return tl.load(at) + tl.load(at + 1) * q


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=CHANNEL_STRIDES)
def conv_zones_kernel(
    x_ptr,  # (N, groups * in channels, ID, IH, IW)
    w_ptr,  # as for the tiles; of several branches one after another
    bias_ptr,  # (out channels of all branches,)
    residual_ptr,  # as y
    y_ptr,  # (N, out channels of all branches, OD, OH, OW)
    table_ptr,  # (TABLE_ROWS, COLUMNS) int32, a row for each zone of each branch
    N,
    GROUPS,
    IN_UNITS,
    stride_xn,
    stride_xc,
    stride_xd,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yc,
    stride_yd,
    stride_yh,
    stride_yw,
    NDIM: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SUM_LAST: tl.constexpr,
    IN_VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = relu(X x + bias + residual), or with TRANSPOSED of X^T: every program works within one zone of one branch.

    A zone's output pixels form a box that is cut into tiles of BLOCK_M through the whole batch, and its taps a box
    too, all of which meet input pixels: no mask for padding. The table lists the zones with the most taps first.
    """
    C = IN_UNITS * IN_VEC
    pid = tl.program_id(0)
    first_pids = tl.load(table_ptr + tl.arange(0, TABLE_ROWS) * COLUMNS)
    row_ptr = table_ptr + (tl.sum((first_pids <= pid).to(tl.int32)) - 1) * COLUMNS
    pid -= tl.load(row_ptr)
    branch_channel = tl.load(row_ptr + 1) * OUT_VEC
    channels = tl.load(row_ptr + 2) * OUT_VEC
    W_VEC: tl.constexpr = OUT_VEC if TRANSPOSED else IN_VEC
    first_tap = tl.load(row_ptr + 3).to(tl.int64) * W_VEC
    stride_wa = tl.load(row_ptr + 4) * W_VEC
    QD, first_d, stride_d, hop_d, taps_d, hop_wd = 1, 0, 0, 0, 1, 0
    QH, first_h, stride_h, hop_h, taps_h, hop_wh = 1, 0, 0, 0, 1, 0
    if NDIM == 3:
        QD, first_d, stride_d, hop_d, taps_d, hop_wd = _run(row_ptr, 0)
    if NDIM >= 2:
        QH, first_h, stride_h, hop_h, taps_h, hop_wh = _run(row_ptr, 1)
    QW, first_w, stride_w, hop_w, taps_w, hop_ww = _run(row_ptr, 2)

    tiles_n = tl.cdiv(channels, BLOCK_N)
    pid_m = pid // (GROUPS * tiles_n)
    pid_n = pid % tiles_n
    group = (pid // tiles_n % GROUPS).to(tl.int64)

    pixel = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, qd, qh, qw = unravel(pixel, QD, QH, QW, NDIM)
    mask_m = n < N
    offs_x = element_offset(
        n,
        first_d + stride_d * qd,
        first_h + stride_h * qh,
        first_w + stride_w * qw,
        stride_xn,
        stride_xd,
        stride_xh,
        stride_xw,
        NDIM,
        X_VEC,
    )
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < channels
    x_ptr += group * C * stride_xc
    w_ptr += group * (C if TRANSPOSED else channels) * stride_wa

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    blocks = tl.cdiv(C, BLOCK_K)
    for step in range(0, taps_d * taps_h * taps_w * blocks):
        tap = step // blocks
        c = (step % blocks) * BLOCK_K + offs_k
        mask_c = c < C
        jd = tap // (taps_h * taps_w)
        jh = tap // taps_w % taps_h
        jw = tap % taps_w
        offs_tap = element_offset(
            tap * 0, jd * hop_d, jh * hop_h, jw * hop_w, 0, stride_xd, stride_xh, stride_xw, NDIM, X_VEC
        )
        x = tl.load(
            x_ptr + outer_sum(offs_x + offs_tap, c.to(tl.int64) * stride_xc, X_LAST),
            mask=outer_and(mask_m, mask_c, X_LAST),
            other=0.0,
        )
        offs_w = first_tap + (jd * hop_wd + jh * hop_wh + jw * hop_ww) * W_VEC
        if not TRANSPOSED:
            w_ptrs = w_ptr + (offs_n.to(tl.int64) * stride_wa)[None, :] + (offs_w + c)[:, None]
        elif SUM_LAST:
            w_ptrs = w_ptr + ((offs_w + offs_n) * C)[None, :] + c[:, None]
        else:
            w_ptrs = w_ptr + (c.to(tl.int64) * stride_wa + offs_w)[:, None] + offs_n[None, :]
        w = tl.load(w_ptrs, mask=mask_c[:, None] & mask_n[None, :], other=0.0)
        acc = dot(rows_by_columns(x, X_LAST), w, acc, PRECISION, UPCAST)

    channel = branch_channel + group * channels + offs_n
    offs_y = element_offset(
        n,
        _output(row_ptr, 0, qd),
        _output(row_ptr, 1, qh),
        _output(row_ptr, 2, qw),
        stride_yn,
        stride_yd,
        stride_yh,
        stride_yw,
        NDIM,
        Y_VEC,
    )
    store_tile(
        acc,
        bias_ptr,
        residual_ptr,
        y_ptr,
        channel,
        offs_y,
        channel * stride_yc,
        mask_n,
        outer_and(mask_m, mask_n, Y_LAST),
        Y_LAST,
        HAS_BIAS,
        HAS_RESIDUAL,
        RELU,
    )
