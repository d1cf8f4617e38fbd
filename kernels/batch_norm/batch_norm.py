"""Kernels of batch normalisation. All blocks of pixels are in PARTS parts. A program that sums has one of them for
BLOCK_C channels, and one that writes has one block of pixels: the last ones of all parts come first.

A batch's own statistics are its mean and 1 / sqrt(var + EPS), one vector behind the other at mean_ptr; GIVEN ones are a
mean and a variance.
"""

import triton
import triton.language as tl

from ..pixelwise import offsets, relu, through_relu, tile_of

SIZES = ["N", "CHANNELS", "PIXELS"]
X_STRIDES = ["stride_xn", "stride_xr"]
Y_STRIDES = ["stride_yn", "stride_yr"]
GRAD_STRIDES = ["stride_gn", "stride_gr"]


@triton.jit
def part_of(part, PARTS, N, P, BLOCK_P: tl.constexpr):
    """The first block of pixels of a part, and the one behind its last."""
    units = N * tl.cdiv(P, BLOCK_P)
    share = tl.cdiv(units, PARTS)
    return part * share, tl.minimum((part + 1) * share, units)


@triton.jit
def pixels_before(unit, P, BLOCK_P: tl.constexpr):
    """Pixels of all blocks before a block that begins an image or a part."""
    blocks = tl.cdiv(P, BLOCK_P)
    return (unit // blocks).to(tl.int64) * P + unit % blocks * BLOCK_P


@triton.jit
def pixels_of(first, end, P, BLOCK_P: tl.constexpr):
    return pixels_before(end, P, BLOCK_P) - pixels_before(first, P, BLOCK_P)


@triton.jit
def backwards(C, N, P, PARTS, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """This program's block of channels and block of pixels, and the first one of its part: there is none before."""
    tiles = tl.cdiv(C, BLOCK_C)
    step = tl.program_id(0) // tiles
    first, end = part_of(step % PARTS, PARTS, N, P, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
    return tl.program_id(0) % tiles, end - 1 - step // PARTS, first


@triton.jit
def load_vector(
    pointer,
    channels,
    C,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
    SECOND: tl.constexpr = False,  # pyright: ignore[reportArgumentType]
):
    """One value for each channel, of the second of two vectors in a row with SECOND. With LAST the number of channels
    is a multiple of VEC."""
    mask = channels < C
    if SECOND:
        channels += C
    if LAST:
        mask = tl.max_constancy(mask, VEC)
        channels = tl.max_contiguous(tl.multiple_of(channels, VEC), VEC)
    return tl.load(pointer + channels, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_inverse(
    mean_ptr,
    var_ptr,
    channels,
    C,
    EPS: tl.constexpr,
    GIVEN: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    """1 / sqrt(var + EPS) of each channel."""
    if GIVEN:
        return 1.0 / tl.sqrt(load_vector(var_ptr, channels, C, LAST, VEC, ACC) + EPS)
    else:
        return load_vector(mean_ptr, channels, C, LAST, VEC, ACC, SECOND=True)


@triton.jit
def along(vector, LAST: tl.constexpr):
    """One value for each channel, as a tile to be broadcast."""
    return vector[None, :] if LAST else vector[:, None]


@triton.jit
def affine(
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    channels,
    C,
    EPS: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    """(mean, scale, shift) with y = (x - mean) scale + shift, as tiles to be broadcast."""
    mean = load_vector(mean_ptr, channels, C, LAST, VEC, ACC)
    scale = load_inverse(mean_ptr, var_ptr, channels, C, EPS, GIVEN, LAST, VEC, ACC)
    shift = tl.zeros_like(scale)
    if HAS_WEIGHT:
        scale *= load_vector(weight_ptr, channels, C, LAST, VEC, ACC)
    if HAS_BIAS:
        shift = load_vector(bias_ptr, channels, C, LAST, VEC, ACC)
    return along(mean, LAST), along(scale, LAST), along(shift, LAST)


@triton.jit
def zeros(LAST: tl.constexpr, ACC: tl.constexpr, FOLD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """What `folded` tiles are added to."""
    return tl.zeros((BLOCK_P // FOLD, BLOCK_C) if LAST else (BLOCK_C, BLOCK_P // FOLD), dtype=ACC)


@triton.jit
def folded(tile, LAST: tl.constexpr, FOLD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The sum over FOLD parts of the pixels, which are a thread's own: it has one register for all of them."""
    if FOLD > 1:
        if LAST:
            tile = tl.sum(tl.reshape(tile, (FOLD, BLOCK_P // FOLD, BLOCK_C)), axis=0)
        else:
            tile = tl.sum(tl.reshape(tile, (BLOCK_C, FOLD, BLOCK_P // FOLD)), axis=1)
    return tile


@triton.jit
def normalised(x, mean, scale, shift):
    """What ReLU is taken of without a residual: its gradient finds it again, to the bit."""
    return (x - mean) * scale + shift


@triton.jit(do_not_specialize=SIZES + X_STRIDES)
def batch_norm_moments_kernel(
    x_ptr,  # (N, CHANNELS, PIXELS)
    partial_ptr,  # (3, PARTS, CHANNELS)
    N,
    CHANNELS,
    PIXELS,
    stride_xn,
    stride_xr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    FOLD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Of a part: a pivot, the mean of distances from it, and the sum of squared distances from the part's mean.

    The pivot is the mean of the part's first block: as near to the part's own as one can be expected to be, so that
    little cancels. It is handed on by itself since, where numbers are far from zero, the sum would be rounded.
    """
    pid_c = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    first, end = part_of(part, parts, N, PIXELS, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
    n, rows, lanes, mask = tile_of(first, pid_c, CHANNELS, PIXELS, LAST, VEC, BLOCK_C, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
    x = tl.load(x_ptr + offsets(n, rows, lanes, stride_xn, stride_xr, VEC), mask=mask, other=0.0).to(ACC)
    AXIS: tl.constexpr = tl.constexpr(0) if LAST else tl.constexpr(1)
    pivot = tl.sum(x, axis=AXIS) / pixels_of(first, tl.minimum(first + 1, end), PIXELS, BLOCK_P).to(ACC)
    total = zeros(LAST, ACC, FOLD, BLOCK_C, BLOCK_P)
    squares = total
    for unit in range(first, end):
        n, rows, lanes, mask = tile_of(unit, pid_c, CHANNELS, PIXELS, LAST, VEC, BLOCK_C, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
        x = tl.load(x_ptr + offsets(n, rows, lanes, stride_xn, stride_xr, VEC), mask=mask, other=0.0).to(ACC)
        distance = tl.where(mask, x - along(pivot, LAST), 0.0)
        total += folded(distance, LAST, FOLD, BLOCK_C, BLOCK_P)
        squares += folded(distance * distance, LAST, FOLD, BLOCK_C, BLOCK_P)
    count = pixels_of(first, end, PIXELS, BLOCK_P).to(ACC)
    total = tl.sum(total, axis=AXIS)
    squares = tl.sum(squares, axis=AXIS) - total * total / count
    channels = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs = part.to(tl.int64) * CHANNELS + channels
    plane = parts.to(tl.int64) * CHANNELS
    tl.store(partial_ptr + offs, pivot, mask=channels < CHANNELS)
    tl.store(partial_ptr + plane + offs, total / count, mask=channels < CHANNELS)
    tl.store(partial_ptr + 2 * plane + offs, squares, mask=channels < CHANNELS)


@triton.jit(do_not_specialize=[*SIZES, "PARTS", "momentum"])
def batch_norm_moments_finish_kernel(
    partial_ptr,  # (3, PARTS, CHANNELS)
    statistics_ptr,  # (2, CHANNELS)
    running_mean_ptr,  # (CHANNELS,)
    running_var_ptr,  # (CHANNELS,)
    N,
    CHANNELS,
    PIXELS,
    PARTS,
    momentum,
    EPS: tl.constexpr,
    HAS_RUNNING: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and 1 / sqrt(var + EPS) of BLOCK channels from those of the parts (Chan, Golub and LeVeque 1979)."""
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_c = channels < CHANNELS
    parts = tl.arange(0, BLOCK_S)
    mask = (parts < PARTS)[:, None] & mask_c[None, :]
    offs = parts[:, None] * CHANNELS + channels[None, :]
    plane = PARTS * CHANNELS
    pivots = tl.load(partial_ptr + offs, mask=mask, other=0.0)
    rest = tl.load(partial_ptr + plane + offs, mask=mask, other=0.0)
    squares = tl.load(partial_ptr + 2 * plane + offs, mask=mask, other=0.0)
    first, end = part_of(parts, PARTS, N, PIXELS, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
    counts = tl.where(parts < PARTS, pixels_of(first, end, PIXELS, BLOCK_P), 0).to(ACC)[:, None]
    count = (N.to(tl.int64) * PIXELS).to(ACC)
    pivot = tl.load(partial_ptr + channels, mask=mask_c, other=0.0)
    distances = tl.where(mask, pivots - pivot[None, :] + rest, 0.0)
    distance = tl.sum(counts * distances, axis=0) / count
    mean = pivot + distance
    distances = tl.where(mask, distances - distance[None, :], 0.0)
    total = tl.sum(squares + counts * distances * distances, axis=0)
    total = tl.where(total < 0, 0.0, total)  # by the rounding of a channel that is constant
    tl.store(statistics_ptr + channels, mean, mask=mask_c)
    tl.store(statistics_ptr + CHANNELS + channels, 1.0 / tl.sqrt(total / count + EPS), mask=mask_c)
    if HAS_RUNNING:
        old = tl.load(running_mean_ptr + channels, mask=mask_c, other=0.0).to(ACC)
        new = old + momentum * (mean - old)
        tl.store(running_mean_ptr + channels, new.to(running_mean_ptr.dtype.element_ty), mask=mask_c)
        old = tl.load(running_var_ptr + channels, mask=mask_c, other=0.0).to(ACC)
        new = old + momentum * (total / (count - 1) - old)
        tl.store(running_var_ptr + channels, new.to(running_var_ptr.dtype.element_ty), mask=mask_c)


@triton.jit(do_not_specialize=[*SIZES, "PARTS", *X_STRIDES, *Y_STRIDES])
def batch_norm_kernel(
    x_ptr,  # (N, CHANNELS, PIXELS)
    residual_ptr,  # as y
    y_ptr,  # (N, CHANNELS, PIXELS)
    mean_ptr,  # (2, CHANNELS)
    var_ptr,  # (CHANNELS,)
    weight_ptr,  # (CHANNELS,)
    bias_ptr,  # (CHANNELS,)
    N,
    CHANNELS,
    PIXELS,
    PARTS,
    stride_xn,
    stride_xr,
    stride_yn,
    stride_yr,
    EPS: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """y = relu((x - mean) scale + shift + residual)."""
    pid_c, unit, first = backwards(CHANNELS, N, PIXELS, PARTS, BLOCK_C, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
    if unit < first:
        return
    channels = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, scale, shift = affine(  # pyright: ignore[reportGeneralTypeIssues]
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channels, CHANNELS, EPS, GIVEN, HAS_WEIGHT, HAS_BIAS, LAST, VEC, ACC
    )
    n, rows, lanes, mask = tile_of(unit, pid_c, CHANNELS, PIXELS, LAST, VEC, BLOCK_C, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
    x = tl.load(x_ptr + offsets(n, rows, lanes, stride_xn, stride_xr, VEC), mask=mask, other=0.0).to(ACC)
    y = normalised(x, mean, scale, shift)
    offs = offsets(n, rows, lanes, stride_yn, stride_yr, VEC)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(ACC)
    if RELU:
        y = relu(y)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES + X_STRIDES + Y_STRIDES + GRAD_STRIDES)
def batch_norm_sums_kernel(
    grad_ptr,  # (N, CHANNELS, PIXELS)
    x_ptr,  # (N, CHANNELS, PIXELS)
    y_ptr,  # (N, CHANNELS, PIXELS)
    grad_residual_ptr,  # as y
    partial_ptr,  # (2, PARTS, CHANNELS)
    mean_ptr,  # (2, CHANNELS)
    var_ptr,  # (CHANNELS,)
    weight_ptr,  # (CHANNELS,)
    bias_ptr,  # (CHANNELS,)
    N,
    CHANNELS,
    PIXELS,
    stride_xn,
    stride_xr,
    stride_yn,
    stride_yr,
    stride_gn,
    stride_gr,
    EPS: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Y: tl.constexpr,
    RELU: tl.constexpr,
    TO_RESIDUAL: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    FOLD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Of a part: the sum of the gradient that comes through ReLU, which is grad_residual, and of its products with
    x - mean."""
    pid_c = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    first, end = part_of(part, parts, N, PIXELS, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
    channels = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, scale, shift = affine(  # pyright: ignore[reportGeneralTypeIssues]
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channels, CHANNELS, EPS, GIVEN, HAS_WEIGHT, HAS_BIAS, LAST, VEC, ACC
    )
    total = zeros(LAST, ACC, FOLD, BLOCK_C, BLOCK_P)
    products = total
    for unit in range(first, end):
        n, rows, lanes, mask = tile_of(unit, pid_c, CHANNELS, PIXELS, LAST, VEC, BLOCK_C, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
        grad = tl.load(grad_ptr + offsets(n, rows, lanes, stride_gn, stride_gr, VEC), mask=mask, other=0.0).to(ACC)
        x = tl.load(x_ptr + offsets(n, rows, lanes, stride_xn, stride_xr, VEC), mask=mask, other=0.0).to(ACC)
        offs = offsets(n, rows, lanes, stride_yn, stride_yr, VEC)
        if RELU:
            if HAS_Y:
                y = tl.load(y_ptr + offs, mask=mask, other=0.0)
            else:
                y = normalised(x, mean, scale, shift).to(grad_ptr.dtype.element_ty)
            grad = through_relu(grad, y)
        if TO_RESIDUAL:
            tl.store(grad_residual_ptr + offs, grad.to(grad_residual_ptr.dtype.element_ty), mask=mask)
        total += folded(grad, LAST, FOLD, BLOCK_C, BLOCK_P)
        products += folded(grad * (x - mean), LAST, FOLD, BLOCK_C, BLOCK_P)
    AXIS: tl.constexpr = tl.constexpr(0) if LAST else tl.constexpr(1)
    offs = part.to(tl.int64) * CHANNELS + channels
    tl.store(partial_ptr + offs, tl.sum(total, axis=AXIS), mask=channels < CHANNELS)
    plane = parts.to(tl.int64) * CHANNELS
    tl.store(partial_ptr + plane + offs, tl.sum(products, axis=AXIS), mask=channels < CHANNELS)


@triton.jit(do_not_specialize=[*SIZES, "PARTS"])
def batch_norm_sums_finish_kernel(
    partial_ptr,  # (2, PARTS, CHANNELS)
    mean_ptr,  # (2, CHANNELS)
    var_ptr,  # (CHANNELS,)
    means_ptr,  # (2, CHANNELS)
    grad_weight_ptr,  # (CHANNELS,)
    grad_bias_ptr,  # (CHANNELS,)
    N,
    CHANNELS,
    PIXELS,
    PARTS,
    EPS: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients by weight and bias, and the two means that the gradient by x takes, of BLOCK channels."""
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_c = channels < CHANNELS
    parts = tl.arange(0, BLOCK_S)
    mask = (parts < PARTS)[:, None] & mask_c[None, :]
    offs = parts[:, None] * CHANNELS + channels[None, :]
    total = tl.sum(tl.load(partial_ptr + offs, mask=mask, other=0.0), axis=0)
    plane = PARTS * CHANNELS
    products = tl.sum(tl.load(partial_ptr + plane + offs, mask=mask, other=0.0), axis=0)
    inverse = load_inverse(mean_ptr, var_ptr, channels, CHANNELS, EPS, GIVEN, False, 1, ACC)
    count = (N.to(tl.int64) * PIXELS).to(ACC)
    tl.store(means_ptr + channels, total / count, mask=mask_c)
    tl.store(means_ptr + CHANNELS + channels, products * inverse * inverse / count, mask=mask_c)
    if HAS_WEIGHT:
        tl.store(grad_weight_ptr + channels, (products * inverse).to(grad_weight_ptr.dtype.element_ty), mask=mask_c)
    if HAS_BIAS:
        tl.store(grad_bias_ptr + channels, total.to(grad_bias_ptr.dtype.element_ty), mask=mask_c)


@triton.jit(do_not_specialize=[*SIZES, "PARTS", *X_STRIDES, *Y_STRIDES, *GRAD_STRIDES])
def batch_norm_gradient_kernel(
    grad_ptr,  # (N, CHANNELS, PIXELS)
    x_ptr,  # (N, CHANNELS, PIXELS)
    y_ptr,  # (N, CHANNELS, PIXELS)
    grad_x_ptr,  # as y
    grad_residual_ptr,  # as y
    mean_ptr,  # (2, CHANNELS)
    var_ptr,  # (CHANNELS,)
    weight_ptr,  # (CHANNELS,)
    bias_ptr,  # (CHANNELS,)
    means_ptr,  # (2, CHANNELS)
    N,
    CHANNELS,
    PIXELS,
    PARTS,
    stride_xn,
    stride_xr,
    stride_yn,
    stride_yr,
    stride_gn,
    stride_gr,
    EPS: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Y: tl.constexpr,
    RELU: tl.constexpr,
    TO_X: tl.constexpr,
    TO_RESIDUAL: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """grad_x = (g - means[0] - (x - mean) means[1]) scale for the gradient g that comes through ReLU, which is
    grad_residual; with GIVEN ones grad_x = g scale."""
    pid_c, unit, first = backwards(CHANNELS, N, PIXELS, PARTS, BLOCK_C, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
    if unit < first:
        return
    channels = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, scale, shift = affine(  # pyright: ignore[reportGeneralTypeIssues]
        mean_ptr, var_ptr, weight_ptr, bias_ptr, channels, CHANNELS, EPS, GIVEN, HAS_WEIGHT, HAS_BIAS, LAST, VEC, ACC
    )
    if TO_X and not GIVEN:
        mean_grad = along(load_vector(means_ptr, channels, CHANNELS, LAST, VEC, ACC), LAST)
        mean_product = along(load_vector(means_ptr, channels, CHANNELS, LAST, VEC, ACC, SECOND=True), LAST)
    n, rows, lanes, mask = tile_of(unit, pid_c, CHANNELS, PIXELS, LAST, VEC, BLOCK_C, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
    grad = tl.load(grad_ptr + offsets(n, rows, lanes, stride_gn, stride_gr, VEC), mask=mask, other=0.0).to(ACC)
    offs = offsets(n, rows, lanes, stride_yn, stride_yr, VEC)
    if (TO_X and not GIVEN) or (RELU and not HAS_Y):
        x = tl.load(x_ptr + offsets(n, rows, lanes, stride_xn, stride_xr, VEC), mask=mask, other=0.0).to(ACC)
    if RELU:
        if HAS_Y:
            y = tl.load(y_ptr + offs, mask=mask, other=0.0)
        else:
            y = normalised(x, mean, scale, shift).to(grad_ptr.dtype.element_ty)
        grad = through_relu(grad, y)
    if TO_RESIDUAL:
        tl.store(grad_residual_ptr + offs, grad.to(grad_residual_ptr.dtype.element_ty), mask=mask)
    if TO_X:
        grad_x = grad * scale if GIVEN else (grad - mean_grad - (x - mean) * mean_product) * scale
        tl.store(grad_x_ptr + offs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
