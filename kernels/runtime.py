"""Where kernels run, on a GPU or interpreted on the CPU, and what their host sides share."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.runtime import driver

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


_CURRENT = nullcontext()


def device_guard(tensor: torch.Tensor):
    """Context in which a launch goes to the tensor's device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _CURRENT


def three(values: Sequence[int], fill: int) -> tuple[int, ...]:
    """One to three axes as the three that kernels have: the leading ones are filled."""
    return (fill,) * (3 - len(values)) + tuple(values)


def block_of(size: int, smallest: int, largest: int) -> int:
    """Smallest power of two that holds `size`, within limits."""
    return min(max(1 << (size - 1).bit_length(), smallest), largest)


def power_of_two_divisor(*values: int) -> int:
    """Largest power of two, at most 16, that divides all values."""
    return math.gcd(16, *values)


class Layout(NamedTuple):
    """Shape and strides of a tensor (N, C, *spatial): all that a launch depends on but the values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


def layout_of(tensor: torch.Tensor) -> Layout:
    return Layout(tensor.shape, tensor.stride())


def _is_watched() -> bool:
    """Whether a profiler of Triton's has hooked itself to launches."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


@dataclass(frozen=True)
class Plan:
    """A launch without its pointers. A kernel's signature has the pointers first and what is compiled in last.

    Triton looks at all arguments of every launch to find what it compiled for them. Here only the pointers' alignment
    and the device can differ from one launch to the next, so the plan keeps what was found. It hands over addresses:
    of a tensor Triton asks the driver, every time, whether it lies on a GPU.
    """

    kernel: Any
    grid: tuple[int, ...]
    sizes: tuple[int, ...]  # run-time arguments behind the pointers
    constants: dict[str, Any]
    found: dict[tuple[Any, ...], tuple[Any, ...]] = field(default_factory=dict, repr=False)

    def launch(self, *pointers: torch.Tensor | None, more: tuple[float, ...] = (), **flags: Any) -> None:
        """Launch on the first pointer's device, which is the current one.

        Args:
            more: run-time arguments behind `sizes` that Triton is told not to specialise on: free to change, but not
                from an int to a float.
            flags: further compile-time arguments.
        """
        first: Any = pointers[0]
        device = first.get_device()
        addresses: list[int | None] = []
        key: list[Any] = [device, *flags.values()]
        for pointer in pointers:
            if pointer is None:
                addresses.append(None)
                key.append(None)
            else:
                addresses.append(address := pointer.data_ptr())
                key += pointer.dtype, address % 16 == 0
        if found := self.found.get(tuple(key)):
            compiled, run, loaded, grid, constants = found
            # Without a GPU a test's driver stands for one, and looks at tensors.
            given = addresses if device >= 0 else pointers
            if _is_watched():
                compiled[grid](*given, *self.sizes, *more, *constants)
                return
            active: Any = driver.active
            stream = active.get_current_stream(device)
            run(*grid, stream, *loaded, None, None, None, *given, *self.sizes, *more, *constants)
            return
        compiled = self.kernel[self.grid](*pointers, *self.sizes, *more, **flags, **self.constants)
        if compiled is not None:  # the interpreter compiles nothing
            known = flags | self.constants
            behind = self.kernel.arg_names[len(pointers) + len(self.sizes) + len(more) :]
            constants = tuple(known[name] for name in behind)
            loaded = compiled.function, compiled.packed_metadata
            self.found[tuple(key)] = compiled, compiled.run, loaded, (*self.grid, 1, 1)[:3], constants
