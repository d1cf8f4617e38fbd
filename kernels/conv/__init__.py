"""The three kernels of convolution, in 1-D, 2-D and 3-D.

The lecture writes convolution as a matrix X acting on the flattened input, and transposed convolution as X^T:

    apply             y[n, a, o] = sum_{b, r} x[n, b, s o - p + d r] w[a, b, r]
    apply_transposed  x[n, b, i] = sum_{a, r} y[n, a, o]             w[a, b, r]   over s o - p + d r = i
    weight_grad       w[a, b, r] = sum_{n, o} y[n, a, o]             x[n, b, s o - p + d r]

Each is an implicit GEMM, and the derivatives of each are the other two. Weights arrive packed as [A, taps, B], so
that channels are contiguous. Tensors keep their strides: NCHW, channels_last and slices of a wider tensor are read
and written where they lie. 1-D and 2-D are 3-D with the leading axes of size 1 left out (`NDIM`).

Where a large dilation brings many taps to padding, the first two run over validity zones (`zones`): boxes of output
pixels that the same taps reach, so that no padding is multiplied; the third always sums over such boxes. A table lists
the boxes, and `apply_pyramid` puts those of several dilated branches over one input into one table, hence one launch.

Where a large stride meets few channels, as in the gradients of FCN's upsampling, the first and third sum over `runs`.
"""

from .epilogue import add_epilogue, channels_are_lanes, copy, epilogue_grad
from .launch import apply, apply_transposed, describe, weight_grad
from .plan import Geometry
from .pyramid import apply_pyramid, describe_pyramid, same_geometry
from .runs import apply_runs, may_be_runs, weight_grad_runs
from .transpose import from_channels_last, to_channels_last

__all__ = [
    "Geometry",
    "add_epilogue",
    "apply",
    "apply_pyramid",
    "apply_runs",
    "apply_transposed",
    "channels_are_lanes",
    "copy",
    "describe",
    "describe_pyramid",
    "epilogue_grad",
    "from_channels_last",
    "may_be_runs",
    "same_geometry",
    "to_channels_last",
    "weight_grad",
    "weight_grad_runs",
]
