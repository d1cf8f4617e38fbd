"""Where kernels run, on a GPU or interpreted on the CPU, and what their host sides share."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from triton import knobs

# Triton decides between compiling and interpreting when it is imported, so this can't change afterwards.
INTERPRETED: bool = knobs.runtime.interpret


class Device(NamedTuple):
    """What launch configurations depend on."""

    multiprocessors: int  # SMs, or CUs
    shared_memory: int  # bytes that one program can have
    matrix_columns: int = 8  # of the narrowest matrix instruction: mma.sync's 8, mfma's 16


# What a launch is planned for where there is no GPU to ask.
H200 = Device(multiprocessors=132, shared_memory=227 * 1024)


@lru_cache(maxsize=64)
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    shared = properties.shared_memory_per_block if torch.version.hip else properties.shared_memory_per_block_optin
    return Device(properties.multi_processor_count, shared, 16 if torch.version.hip else 8)


def device_of(tensor: torch.Tensor) -> Device:
    return _device(tensor.device.index) if tensor.is_cuda else H200


def device_guard(tensor: torch.Tensor):
    """Context in which a launch goes to the tensor's device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def three(values: Sequence[int], fill: int) -> tuple[int, ...]:
    """One to three axes as the three that kernels have: the leading ones are filled."""
    return (fill,) * (3 - len(values)) + tuple(values)
