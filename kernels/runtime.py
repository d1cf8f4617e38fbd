"""Where kernels run: on a GPU, or interpreted on the CPU."""

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton

# Triton decides between compiling and interpreting when it is imported, so this can't change afterwards.
INTERPRETED: bool = triton.knobs.runtime.interpret

# Multiprocessors that a launch is planned for where there is no GPU to ask: an H200's.
DEFAULT_MULTIPROCESSORS = 132


@lru_cache(maxsize=64)
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor: torch.Tensor) -> int:
    """Number of multiprocessors (SMs, CUs) of the tensor's device."""
    return _multiprocessors(tensor.device.index) if tensor.is_cuda else DEFAULT_MULTIPROCESSORS


def device_guard(tensor: torch.Tensor):
    """Context in which a launch goes to the tensor's device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()
