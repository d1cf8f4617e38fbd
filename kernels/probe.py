"""Kernels that no op uses: they show what the installed Triton and a GPU can do."""

import triton
import triton.language as tl


@triton.jit
def descriptor_copy_kernel(x_ptr, y_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y = x (M, N), tile by tile through tensor descriptors: on Hopper and later, bulk copies of the TMA unit."""
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    x = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    y.store([pid_m * BLOCK_M, pid_n * BLOCK_N], x.load([pid_m * BLOCK_M, pid_n * BLOCK_N]))
