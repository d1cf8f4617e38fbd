"""X and X^T over validity zones, and several of them over one input at once."""

import triton
import triton.language as tl

from ..tile import element_offset, outer_and, outer_sum, unravel
from . import zones
from .tile import CHANNEL_STRIDES, RUNTIME, store_tile
from .walk import make_jumps, walk, within

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
    EVEN: tl.constexpr,
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
        tl.minimum(n, N - 1),
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

    column = within(offs_n, channels, OUT_VEC)
    if not TRANSPOSED:
        w_ptrs = w_ptr + (column.to(tl.int64) * stride_wa)[None, :] + (first_tap + offs_k)[:, None]
        stride_wc = 1
        stride_wr = W_VEC
    elif SUM_LAST:
        w_ptrs = w_ptr + ((first_tap + column) * C)[None, :] + offs_k[:, None]
        stride_wc = 1
        stride_wr = W_VEC * C.to(INDEX)
    else:
        w_ptrs = w_ptr + (offs_k.to(tl.int64) * stride_wa + first_tap)[:, None] + column[None, :]
        stride_wc = stride_wa
        stride_wr = W_VEC
    blocks = tl.cdiv(C, BLOCK_K)
    taps = taps_d, taps_h, taps_w
    hops = hop_d, hop_h, hop_w
    x_strides = stride_xd, stride_xh, stride_xw
    w_strides = stride_wr, stride_wr, stride_wr
    acc = walk(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC),
        x_ptr + outer_sum(offs_x, offs_k.to(tl.int64) * stride_xc, X_LAST),
        w_ptrs,
        make_jumps(BLOCK_K, stride_xc, hops, x_strides, taps, blocks, INDEX),
        make_jumps(BLOCK_K, stride_wc, (hop_wd, hop_wh, hop_ww), w_strides, taps, blocks, INDEX),
        (qd, qh, qw),
        hops,
        (QD, QH, QW),
        taps,
        C,
        NDIM,
        NDIM,
        True,
        False,
        (1, 1, 1),
        EVEN,
        X_LAST,
        X_VEC,
        OUT_VEC if TRANSPOSED and not SUM_LAST else IN_VEC,
        PRECISION,
        UPCAST,
        BLOCK_K,
    )

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
        Y_VEC,
        HAS_BIAS,
        HAS_RESIDUAL,
        RELU,
    )
