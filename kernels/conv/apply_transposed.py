"""X^T: transposed convolution, and the input gradient of convolution."""

import triton
import triton.language as tl

from ..tile import element_offset, in_bounds, outer_and, outer_sum, residue_phase, unravel
from .tile import CHANNEL_STRIDES, RUNTIME, store_tile
from .walk import make_jumps, walk, within


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=CHANNEL_STRIDES)
def conv_apply_transposed_kernel(
    x_ptr,  # (N, groups * A, ID, IH, IW)
    w_ptr,  # (groups * A, KD * KH * KW, B), or with SUM_LAST, of one group, (KD * KH * KW, B, A)
    bias_ptr,  # (groups * B,)
    residual_ptr,  # as y
    y_ptr,  # (N, groups * B, OD, OH, OW)
    N,
    ID,
    IH,
    IW,
    OD,
    OH,
    OW,
    GROUPS,
    IN_UNITS,
    OUT_UNITS,
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
    PAD_D,
    PAD_H,
    PAD_W,
    NDIM: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DD: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    GD: tl.constexpr,
    GH: tl.constexpr,
    GW: tl.constexpr,
    IN_VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    SUM_LAST: tl.constexpr,
    EVEN: tl.constexpr,
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
    """y = relu(X^T x + bias + residual), by residue phases (Shi et al. 2016, arXiv 1609.07009).

    The output pixels fall into SD * SH * SW residue classes; within one, X^T is a stride-1 convolution with a fixed
    subset of the taps, so no inserted zero is ever multiplied. All phases run in one launch, those with the most taps
    first; a phase without taps still gets bias and residual.
    """
    Y_RUN: tl.constexpr = tl.constexpr(1) if Y_LAST else Y_VEC
    A = IN_UNITS * IN_VEC
    B = OUT_UNITS * OUT_VEC
    TAPS: tl.constexpr = KD * KH * KW
    QD = tl.cdiv(OD, SD)
    QH = tl.cdiv(OH, SH)
    QW = tl.cdiv(OW, SW)
    tiles_n = tl.cdiv(B, BLOCK_N)
    tiles_m = tl.cdiv(N.to(INDEX) * QD * QH * QW, BLOCK_M)
    pid_m = tl.program_id(0) // (GROUPS * tiles_n)
    pid_n = tl.program_id(0) % tiles_n
    group = (tl.program_id(0) // tiles_n % GROUPS).to(tl.int64)
    phase = (pid_m // tiles_m).to(tl.int32)
    pid_m = pid_m % tiles_m

    first_d, taps_d, residue_d, base_d = residue_phase(phase // (SH * SW), PAD_D, KD, SD, DD, GD)
    first_h, taps_h, residue_h, base_h = residue_phase(phase // SW % SH, PAD_H, KH, SH, DH, GH)
    first_w, taps_w, residue_w, base_w = residue_phase(phase % SW, PAD_W, KW, SW, DW, GW)

    pixel = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, qd, qh, qw = unravel(pixel, QD, QH, QW, NDIM)
    od = qd * SD + residue_d
    oh = qh * SH + residue_h
    ow = qw * SW + residue_w
    mask_m = tl.max_constancy(n < N, Y_RUN)
    if SD * SH * SW > 1:
        mask_m = mask_m & in_bounds(od, oh, ow, OD, OH, OW, NDIM)
    id0 = qd + base_d
    ih0 = qh + base_h
    iw0 = qw + base_w
    n = tl.minimum(n, N - 1)
    offs_x = element_offset(n, id0, ih0, iw0, stride_xn, stride_xd, stride_xh, stride_xw, NDIM, X_VEC)

    offs_k = tl.arange(0, BLOCK_K)
    offs_b = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_b = offs_b < B
    channel = group * B + offs_b
    column = within(offs_b, B, OUT_VEC).to(tl.int64)
    x_ptr += group * A * stride_xc
    w_ptr += group * A * (TAPS * B)
    first = (first_d * KH + first_h) * KW + first_w
    if SUM_LAST:
        w_ptrs = w_ptr + ((first * B + column) * A)[None, :] + offs_k[:, None]
        stride_wa = 1
        stride_wr = B.to(INDEX) * A
    else:
        w_ptrs = w_ptr + (offs_k.to(tl.int64) * (TAPS * B) + first * B)[:, None] + column[None, :]
        stride_wa = TAPS * B.to(INDEX)
        stride_wr = B

    # From a tap of the phase to its next one, in the input and in the kernel; and the most that a phase has.
    HOP_D: tl.constexpr = -(DD // GD)
    HOP_H: tl.constexpr = -(DH // GH)
    HOP_W: tl.constexpr = -(DW // GW)
    SKIP_D: tl.constexpr = SD // GD
    SKIP_H: tl.constexpr = SH // GH
    SKIP_W: tl.constexpr = SW // GW
    MOST_D: tl.constexpr = (KD + SKIP_D - 1) // SKIP_D
    MOST_H: tl.constexpr = (KH + SKIP_H - 1) // SKIP_H
    MOST_W: tl.constexpr = (KW + SKIP_W - 1) // SKIP_W
    blocks = tl.cdiv(A, BLOCK_K)
    taps = taps_d, taps_h, taps_w
    x_strides = stride_xd, stride_xh, stride_xw
    w_strides = KH * KW * stride_wr, KW * stride_wr, stride_wr
    acc = walk(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC),
        x_ptr + outer_sum(offs_x, offs_k.to(tl.int64) * stride_xc, X_LAST),
        w_ptrs,
        make_jumps(BLOCK_K, stride_xc, (HOP_D, HOP_H, HOP_W), x_strides, taps, blocks, INDEX),
        make_jumps(BLOCK_K, stride_wa, (SKIP_D, SKIP_H, SKIP_W), w_strides, taps, blocks, INDEX),
        (id0, ih0, iw0),
        (HOP_D, HOP_H, HOP_W),
        (ID, IH, IW),
        taps,
        A,
        NDIM,
        NDIM,
        MOST_D * MOST_H * MOST_W > 1,
        True,
        (MOST_D, MOST_H, MOST_W),
        EVEN,
        X_LAST,
        X_VEC,
        IN_VEC if SUM_LAST else OUT_VEC,
        PRECISION,
        UPCAST,
        BLOCK_K,
    )

    offs_y = element_offset(n, od, oh, ow, stride_yn, stride_yd, stride_yh, stride_yw, NDIM, Y_VEC, Y_RUN)
    offs_channel = channel * stride_yc
    if not Y_LAST:
        offs_channel = tl.multiple_of(offs_channel, Y_VEC)
    store_tile(
        acc,
        bias_ptr,
        residual_ptr,
        y_ptr,
        channel,
        offs_y,
        offs_channel,
        mask_b,
        outer_and(mask_m, mask_b, Y_LAST),
        Y_LAST,
        Y_VEC,
        HAS_BIAS,
        HAS_RESIDUAL,
        RELU,
    )


@triton.jit
def _positions(OUT, PAD, S: tl.constexpr):
    """Of q with S q + r - PAD inside of the result for some r < S: the first, and how many."""
    return PAD // S, tl.cdiv(OUT + PAD, S) - PAD // S


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=CHANNEL_STRIDES)
def conv_scatter_kernel(
    x_ptr,  # (N, groups * A, ID, IH, IW)
    w_ptr,  # (groups * A, taps, residues, B), with ACROSS > 1 (groups * A, taps, B, residues); with SUM_LAST A is last
    bias_ptr,  # (groups * B,)
    residual_ptr,  # as y
    y_ptr,  # (N, groups * B, OD, OH, OW)
    N,
    ID,
    IH,
    IW,
    OD,
    OH,
    OW,
    GROUPS,
    IN_UNITS,
    OUT_UNITS,
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
    PAD_D,
    PAD_H,
    PAD_W,
    NDIM: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    IN_VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    SUM_LAST: tl.constexpr,
    EVEN: tl.constexpr,
    W_VEC: tl.constexpr,
    COLUMN_VEC: tl.constexpr,
    ACROSS: tl.constexpr,
    CROP: tl.constexpr,
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
    """y = relu(X^T x + bias + residual) where the stride divides the kernel size: one GEMM and a scattering store.

    y[S q + r - p] = sum over t of x[q - t] w[r + S t]: all SD * SH * SW residues r of a position q sum over the same
    input pixels, so they are columns of one product, [positions, taps * A] times [taps * A, residues * B] (the
    sub-pixel convolution of Shi et al. 2016, arXiv 1609.05158). Where the stride is the kernel size there is one tap.
    With ACROSS > 1 (which SW is then) the residues along W are the innermost columns, and what they make of
    neighbouring positions is written as the row that it is.
    """
    X_RUN: tl.constexpr = tl.constexpr(1) if X_LAST else X_VEC
    Y_RUN: tl.constexpr = tl.constexpr(1) if Y_LAST else Y_VEC
    A = IN_UNITS * IN_VEC
    B = OUT_UNITS * OUT_VEC
    TAPS_D: tl.constexpr = KD // SD
    TAPS_H: tl.constexpr = KH // SH
    TAPS_W: tl.constexpr = KW // SW
    TAPS: tl.constexpr = TAPS_D * TAPS_H * TAPS_W
    COLUMNS = tl.multiple_of(SD * SH * SW * B, W_VEC)
    tiles_n = tl.cdiv(COLUMNS, BLOCK_N)
    pid_m = tl.program_id(0) // (GROUPS * tiles_n)
    pid_n = tl.program_id(0) % tiles_n
    group = (tl.program_id(0) // tiles_n % GROUPS).to(tl.int64)

    QD, QH, QW = ID, IH, IW
    first_d, first_h, first_w = 0, 0, 0
    if TAPS > 1:
        first_d, QD = _positions(OD, PAD_D, SD)  # pyright: ignore[reportGeneralTypeIssues]
        first_h, QH = _positions(OH, PAD_H, SH)  # pyright: ignore[reportGeneralTypeIssues]
        first_w, QW = _positions(OW, PAD_W, SW)  # pyright: ignore[reportGeneralTypeIssues]
    pixel = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, qd, qh, qw = unravel(pixel, QD, QH, QW, NDIM)
    qd += first_d
    qh += first_h
    qw += first_w
    mask_m = tl.max_constancy(n < N, X_RUN if X_RUN > Y_RUN or ACROSS > 1 else Y_RUN)
    n = tl.minimum(n, N - 1)
    offs_x = element_offset(n, qd, qh, qw, stride_xn, stride_xd, stride_xh, stride_xw, NDIM, X_VEC, X_RUN)
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < COLUMNS
    offs_group = group * A * stride_xc
    if not X_LAST:
        offs_group = tl.multiple_of(offs_group, X_VEC)
    x_ptr += offs_group
    w_ptr += group * A * (TAPS * COLUMNS)

    offs_a = offs_k.to(tl.int64) * stride_xc
    if not X_LAST:
        offs_a = tl.multiple_of(offs_a, X_VEC)
    column = within(offs_n, COLUMNS, W_VEC)
    if SUM_LAST:
        w_ptrs = w_ptr + (column.to(tl.int64) * A)[None, :] + offs_k[:, None]
        stride_wa = 1
        stride_wt = COLUMNS.to(INDEX) * A
    else:
        w_ptrs = w_ptr + (offs_k.to(tl.int64) * (TAPS * COLUMNS))[:, None] + column[None, :]
        stride_wa = TAPS * COLUMNS.to(INDEX)
        stride_wt = COLUMNS
    blocks = tl.cdiv(A, BLOCK_K)
    taps = TAPS_D, TAPS_H, TAPS_W
    x_strides = stride_xd, stride_xh, stride_xw
    w_strides = TAPS_H * TAPS_W * stride_wt, TAPS_W * stride_wt, stride_wt
    acc = walk(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC),
        x_ptr + outer_sum(offs_x, offs_a, X_LAST),
        w_ptrs,
        make_jumps(BLOCK_K, stride_xc, (-1, -1, -1), x_strides, taps, blocks, INDEX),
        make_jumps(BLOCK_K, stride_wa, (1, 1, 1), w_strides, taps, blocks, INDEX),
        (qd, qh, qw),
        (-1, -1, -1),
        (ID, IH, IW),
        taps,
        A,
        NDIM,
        NDIM,
        TAPS > 1,
        TAPS > 1,
        (TAPS_D, TAPS_H, TAPS_W),
        EVEN,
        X_LAST,
        X_VEC,
        IN_VEC if SUM_LAST else W_VEC,
        PRECISION,
        UPCAST,
        BLOCK_K,
    )

    ow = qw * SW
    if ACROSS > 1:
        acc = tl.permute(tl.reshape(acc, [BLOCK_M, BLOCK_N // SW, SW]), [0, 2, 1])
        acc = tl.reshape(acc, [BLOCK_M * SW, BLOCK_N // SW])
        pixel = pid_m.to(INDEX) * (BLOCK_M * SW) + tl.arange(0, BLOCK_M * SW)
        n, qd, qh, ow = unravel(pixel, QD, QH, QW * SW, NDIM)
        qd += first_d
        qh += first_h
        ow += first_w * SW
        mask_m = tl.max_constancy(n < N, Y_RUN)
        offs_n = pid_n * (BLOCK_N // SW) + tl.arange(0, BLOCK_N // SW)
        mask_n = offs_n < SD * SH * B
        residue = offs_n % (SD * SH) * SW
        channel = group * B + offs_n // (SD * SH)
    else:
        residue = offs_n // B
        channel = group * B + offs_n % B
    rd = residue // (SH * SW) - PAD_D
    rh = residue // SW % SH - PAD_H
    rw = residue % SW - PAD_W
    od = qd * SD
    oh = qh * SH
    mask = outer_and(mask_m, mask_n, Y_LAST)
    if CROP:
        d = outer_sum(od, rd, Y_LAST)
        h = outer_sum(oh, rh, Y_LAST)
        w = outer_sum(ow, rw, Y_LAST)
        mask = mask & in_bounds(d, h, w, OD, OH, OW, NDIM)
    offs_y = element_offset(n, od, oh, ow, stride_yn, stride_yd, stride_yh, stride_yw, NDIM, Y_VEC, Y_RUN)
    offs_residue = element_offset(residue * 0, rd, rh, rw, 0, stride_yd, stride_yh, stride_yw, NDIM, Y_VEC)
    # A run of OUT_VEC columns stays within one residue, so its addresses are consecutive: said, because the division
    # hides it from the compiler, which would otherwise store element by element.
    offs_column = offs_residue + channel * stride_yc
    if Y_LAST:
        offs_column = tl.max_contiguous(tl.multiple_of(offs_column, COLUMN_VEC), COLUMN_VEC)
    else:
        offs_column = tl.multiple_of(offs_column, Y_VEC)
    store_tile(
        acc,
        bias_ptr,
        residual_ptr,
        y_ptr,
        channel,
        offs_y,
        offs_column,
        mask_n,
        mask,
        Y_LAST,
        Y_VEC,
        HAS_BIAS,
        HAS_RESIDUAL,
        RELU,
    )
