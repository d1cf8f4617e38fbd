"""One benchmark case: what to compute, how much work that is, and the check that comes before any timing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..fused_ops.registration import full_precision
from .timing import Timing

Output = Tensor | tuple[Tensor, ...]
Call = Callable[..., Output]
Measure = Callable[[dict["Variant", Callable[[], Output]]], dict["Variant", Timing]]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Case:
    """A computation on random tensors by this package's op (`ours`) and by torch (`theirs`), same arguments.

    Each bench_<op>.py has a function `cases(quick, tiny)` that returns them.
    """

    op: str
    regime: str  # the row of README's table that it counts in
    name: str
    shape: str
    direction: str  # "forward", "input gradient", "weight gradient" or "forward and backward"
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]  # of the arguments
    flop: int  # 2 x multiply-adds that are needed; those with padding, or zeros between pixels (X^T), are not
    bytes: int  # every tensor read or written once
    reduction: int | None  # terms in one sum; None where there are many sums
    ours: Call
    theirs: Call
    rivals: Mapping[str, Call] = field(default_factory=dict)  # other ways to compute the same, by name
    compiled: Call | None = None  # `theirs` through torch.compile, where that makes anything of it
    replayed: bool | None = None  # as a CUDA graph; None: where the floor is so low that launching would hide the work
    checks: tuple[Case, ...] = ()  # compared with fp64 in its stead, where fp64 would not fit or would tell little
    full_precision: bool = False  # fp32 is multiplied in full, whatever torch's switches say
    slack: float = 0.0  # what the error may be more than the rule of `gate` allows

    def inputs(self, device: str) -> list[Tensor]:
        """Standard normal, the same on every call; zeros would run faster than real data on a GPU."""
        generator = torch.Generator(device).manual_seed(0)
        return [torch.randn(s, device=device, dtype=self.dtype, generator=generator) for s in self.shapes]

    def __str__(self) -> str:
        return f"{self.op} {self.name}, {self.direction}, {str(self.dtype).removeprefix('torch.')}"


class Compiled:
    """A call through torch.compile, compiled when it is first used, and again for inputs in another layout.

    Without its own CUDA graphs, which copy the inputs of every call: small cases are replayed from ours.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.function: Call | None = None

    def __call__(self, *tensors: Tensor) -> Output:
        if self.function is None:
            torch._dynamo.reset()  # the cases share code, and would meet the limit on recompilations
            self.function = torch.compile(lambda *t: self.call(*t), mode="max-autotune-no-cudagraphs", dynamic=False)
        return self.function(*tensors)


class Variant(NamedTuple):
    """Who computes a case ("ours", "torch", "torch.compile") and in which memory layout."""

    name: str
    layout: str


def dtypes(quick: bool, tiny: bool) -> list[torch.dtype]:
    """That most ops are timed in; the interpreter multiplies no bf16."""
    return [torch.float32] if tiny else [torch.bfloat16] if quick else [torch.bfloat16, torch.float32]


OURS = "ours"
BASELINE = Variant("torch", "contiguous")


class Result(NamedTuple):
    """`errors` as `error_of`; `timings` is empty in a dry run."""

    errors: dict[Variant, float]
    timings: dict[Variant, Timing]


class GateError(Exception):
    """A case's numbers are wrong, so there is nothing to time."""


def results_of(output: Output) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def error_of(output: Output, oracle: Output, reduction: int | None) -> float:
    """max |y - oracle|, relative to the usual size of a sum of standard normal products, sqrt(reduction); without a
    reduction ||y - oracle|| / ||oracle||. Of several results the largest."""
    pairs = zip(results_of(output), results_of(oracle), strict=True)
    return max(_error(y, right, reduction) for y, right in pairs)


def _error(y: Tensor, oracle: Tensor, reduction: int | None) -> float:
    if y.shape != oracle.shape:
        raise GateError(f"shape {tuple(y.shape)} instead of {tuple(oracle.shape)}")
    difference = y.double() - oracle
    # A network's gradients are of all sizes: the largest error would be that of a few large numbers alone.
    error = difference.norm() / oracle.norm() if reduction is None else difference.abs().max() / math.sqrt(reduction)
    return math.inf if error.isnan() else error.item()


def epsilon(dtype: torch.dtype, device: str) -> float:
    """Spacing of numbers at 1 as the multiplications see them: TF32 has ten bits, whatever dtype it is stored in."""
    if dtype == torch.float32 and device == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32":  # pyright: ignore[reportAttributeAccessIssue]
        return 2.0**-10
    return torch.finfo(dtype).eps


def layouts(case: Case) -> list[str]:
    """Memory layouts of its arguments: channels_last too where they have pixels."""
    known = all(len(shape) in FORMATS or len(shape) == 1 for shape in case.shapes)
    return ["contiguous", "channels_last"] if known else ["contiguous"]


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    return tensor.contiguous(memory_format=FORMATS[tensor.dim()]) if layout == "channels_last" else tensor


def variants(case: Case, device: str, compiled: bool) -> dict[Variant, Callable[[], Output]]:
    """Every way to compute the case, each with its inputs bound."""
    contiguous = case.inputs(device)
    calls: dict[Variant, Callable[[], Output]] = {}
    for layout in layouts(case):
        inputs = [t if t.dim() == 1 else in_layout(t, layout) for t in contiguous]
        calls[Variant(OURS, layout)] = partial(case.ours, *inputs)
        calls[Variant("torch", layout)] = partial(case.theirs, *inputs)
        calls |= {Variant(name, layout): partial(call, *inputs) for name, call in case.rivals.items()}
        if compiled and case.compiled:
            calls[Variant("torch.compile", layout)] = partial(case.compiled, *inputs)
    return calls


@contextmanager
def first_algorithm() -> Iterator[None]:
    """Within, cuDNN takes what it guesses to be fast, and tries nothing: in fp64 that would take seconds a case."""
    before = torch._C._get_cudnn_benchmark()  # torch.backends' own context would set TF32 and more, too
    torch._C._set_cudnn_benchmark(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_benchmark(before)


def gate(case: Case, device: str, compiled: bool = False) -> dict[Variant, float]:
    """Errors of all variants against fp64, as `error_of`.

    Every variant of ours must have error <= 2 x torch's own in the same dtype + eps (`error_of`'s unit, that is
    eps sqrt(reduction) in the numbers themselves) + the case's slack. Raises GateError otherwise.
    """
    if case.full_precision:
        with full_precision():
            return gate(replace(case, full_precision=False), device, compiled)
    with first_algorithm():
        oracle = case.theirs(*(t.double() for t in case.inputs(device)))
    errors = {
        variant: error_of(call(), oracle, case.reduction) for variant, call in variants(case, device, compiled).items()
    }
    limit = 2 * errors[BASELINE] + epsilon(case.dtype, device) + case.slack
    for variant, error in errors.items():
        if variant.name == OURS and not error <= limit < math.inf:
            raise GateError(f"{variant.layout}: error {error:.2e} against fp64, allowed {limit:.2e}")
    return errors


def run_case(case: Case, device: str, measure: Measure | None = None, compiled: bool = False) -> Result:
    """Check the case and then, only if it is right, time it with `measure`. Raises GateError if it is wrong.

    The errors are those of the first check.
    """
    if case.checks:
        with first_algorithm():  # a search among cuDNN's for these sizes would be of no use
            errors, *_ = [gate(check, device, compiled) for check in case.checks]
    else:
        errors = gate(case, device, compiled)
    return Result(errors, measure(variants(case, device, compiled)) if measure else {})
