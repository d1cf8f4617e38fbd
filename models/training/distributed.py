"""Several processes that train one network together, as torchrun starts them, by torch.distributed."""

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def join(device: torch.device) -> torch.device:
    """Joins the other processes if torchrun started this one among several; returns the device.

    NCCL connects processes that compute on GPUs, gloo those on CPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        timeout = timedelta(hours=2)  # others wait while the first one draws and writes
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    return device


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number from 0. Process 0 alone prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(count: int) -> range:
    """Which of `count` items this process handles; process 0 has one if anyone has."""
    first, last = (-(-number * count // size()) for number in (rank(), rank() + 1))
    return range(first, last)


def total(value: Tensor) -> Tensor:
    """The sum of all processes' values."""
    if size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def gather(value: T) -> list[T]:
    """Every process's value, in the order of their numbers."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def align_buffers(network: nn.Module) -> None:
    """Gives all processes the buffers of process 0: batch normalisation's running statistics."""
    if size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
