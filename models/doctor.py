"""`backstride doctor`: what this machine runs, and whether every op gives the right numbers on it."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from .. import fused_ops
from ..fused_ops import dispatch
from ..fused_ops.registration import full_precision
from ..kernels.runtime import INTERPRETED

DTYPES = (torch.float32, torch.bfloat16)
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def _conv_transpose2d_concat(input: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return torch.cat([skip, F.conv_transpose2d(input, weight, bias, **options)], dim=1)


def _atrous_pyramid(
    input: Tensor, weights: list[Tensor], biases: list[Tensor], dilations: tuple[int, ...], **_: Any
) -> Tensor:
    branches = zip(weights, biases, dilations, strict=True)
    return torch.cat([F.conv2d(input, w, b, padding="same", dilation=d) for w, b, d in branches], dim=1)


def _sequence(tensors: list[Tensor]) -> tuple[Any, ...]:
    """Arguments of torch.rnn_tanh for one layer: the weights in a list, and halved, since saturated units would
    show the rounding of 1 - h^2 and little else."""
    x, hx, *params = tensors
    return x, hx, [parameter / 2 for parameter in params], True, 1, 0.0, True, False, False


@dataclass(frozen=True)
class Example:
    """A small call of one op, `fused_ops.<name>(*arrange(tensors), **options)`, and torch's own definition of it."""

    name: str
    reference: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    arrange: Callable[[list[Tensor]], tuple[Any, ...]] = tuple


def _places(indices: Callable[[Tensor], Tensor], *rest: Any) -> Callable[[list[Tensor]], tuple[Any, ...]]:
    """Arguments of an unpooling: one value in each window of two, at the place that `indices` gives for it."""
    return lambda tensors: (tensors[0], indices(tensors[0]), *rest)


def _every_other(values: Tensor) -> Tensor:
    return 2 * torch.arange(values[0, 0].numel(), device=values.device).view(values.shape[2:]).expand_as(values)


def _pooled(axes: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def pool(x: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
        values, indices = getattr(F, f"max_pool{axes}d")(x, kernel_size, return_indices=True)
        return values, fused_ops.indices_to_offsets(indices, x.shape, kernel_size)

    return pool


def _nails(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Each value at the first place of its window of two, in whatever number of axes."""
    y = x.new_zeros(*x.shape[:2], *(2 * i for i in x.shape[2:]))
    y[(..., *[slice(None, None, 2)] * (x.dim() - 2))] = x
    return y


def _pool_examples() -> list[Example]:
    sizes = {1: (11,), 2: (6, 9), 3: (4, 5, 6)}
    zeros = partial(torch.zeros_like, dtype=torch.uint8)
    doubled = {axes: tuple(2 * i for i in size) for axes, size in sizes.items()}
    options = {"kernel_size": 2}
    rows: list[Example] = []
    for axes, size in sizes.items():
        rows.append(Example(f"max_pool{axes}d", getattr(F, f"max_pool{axes}d"), ((2, 3, *size),), options))
    for axes, size in sizes.items():
        function = getattr(F, f"max_unpool{axes}d")
        rows.append(Example(f"max_unpool{axes}d", function, ((2, 3, *size),), options, _places(_every_other)))
    for axes, size in sizes.items():
        rows.append(Example(f"max_pool{axes}d_with_offsets", _pooled(axes), ((2, 3, *size),), options))
    for axes, size in sizes.items():
        arrange = _places(zeros, doubled[axes])
        rows.append(Example(f"max_unpool{axes}d_with_offsets", _nails, ((2, 3, *size),), options, arrange))
    rows.append(Example("unpool_nearest2d", partial(F.interpolate, scale_factor=2), ((2, 3, 5, 7),)))
    rows.append(Example("unpool_nails2d", _nails, ((2, 3, 5, 7),)))
    return rows


# One line for every op of fused_ops. Odd sizes, so that no tile fits exactly.
EXAMPLES = (
    Example(
        "batch_norm",
        F.batch_norm,
        ((3, 5, 7, 9), (5,), (5,)),
        {"training": True},
        lambda tensors: (tensors[0], None, None, *tensors[1:]),
    ),
    Example("conv1d", F.conv1d, ((2, 5, 19), (7, 5, 3), (7,)), {"stride": 2, "padding": 1}),
    Example("conv2d", F.conv2d, ((2, 5, 9, 11), (7, 5, 3, 3), (7,)), {"padding": 2, "dilation": 2}),
    Example("conv3d", F.conv3d, ((1, 3, 5, 6, 7), (5, 3, 2, 3, 3), (5,)), {"padding": 1}),
    Example("conv_transpose1d", F.conv_transpose1d, ((2, 5, 9), (5, 7, 4), (7,)), {"stride": 2, "padding": 1}),
    Example(
        "conv_transpose2d",
        F.conv_transpose2d,
        ((2, 5, 5, 6), (5, 7, 3, 3), (7,)),
        {"stride": 2, "padding": 1, "output_padding": 1},
    ),
    Example("conv_transpose3d", F.conv_transpose3d, ((1, 3, 3, 4, 5), (3, 5, 2, 2, 2), (5,)), {"stride": 2}),
    Example(
        "conv_transpose2d_concat",
        _conv_transpose2d_concat,
        ((2, 6, 5, 7), (2, 3, 10, 14), (6, 3, 2, 2), (3,)),
        {"stride": 2},
    ),
    Example(
        "atrous_pyramid",
        _atrous_pyramid,
        ((2, 5, 9, 11), (7, 5, 1, 1), (4, 5, 3, 3), (3, 5, 3, 3), (7,), (4,), (3,)),
        arrange=lambda tensors: (tensors[0], tensors[1:4], tensors[4:], (1, 3, 12)),
    ),
    *_pool_examples(),
    Example("rnn_tanh", torch.rnn_tanh, ((5, 3, 6), (1, 3, 19), (19, 6), (19, 19), (19,), (19,)), arrange=_sequence),
    Example("rnn_relu", torch.rnn_relu, ((5, 3, 6), (1, 3, 19), (19, 6), (19, 19), (19,), (19,)), arrange=_sequence),
    Example("rnn_tanh_cell", torch.rnn_tanh_cell, ((3, 6), (3, 19), (19, 6), (19, 19), (19,), (19,))),
    Example("rnn_relu_cell", torch.rnn_relu_cell, ((3, 6), (3, 19), (19, 6), (19, 19), (19,), (19,))),
)


@dataclass(frozen=True)
class Errors:
    """Largest error against fp64, relative to the largest value."""

    forward: float
    gradients: float


@dataclass(frozen=True)
class Check:
    """What one op did in one dtype: the path it took, and its errors beside ATen's."""

    op: str
    dtype: str
    path: str
    reason: str
    ours: Errors | None
    theirs: Errors | None
    problem: str | None


def _results(op: Callable[..., Any], tensors: list[Tensor], example: Example) -> list[Tensor]:
    """Output and gradients of all inputs, moved to fp64 on the CPU. The output's gradient is a fixed one."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = op(*example.arrange(leaves), **example.options)
    if isinstance(output, tuple):
        output = torch.cat([t.flatten() for t in output])
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).cos().reshape(output.shape)
    gradients = torch.autograd.grad(output, leaves, cotangent.to(output))
    return [t.detach().to("cpu", torch.float64) for t in (output, *gradients)]


def _errors(results: list[Tensor], oracle: list[Tensor]) -> Errors:
    relative = []
    for result, right in zip(results, oracle, strict=True):
        if result.shape != right.shape:
            raise ValueError(f"a result has shape {tuple(result.shape)} where ATen's has {tuple(right.shape)}")
        relative.append(((result - right).abs().max() / right.abs().max()).item())
    return Errors(relative[0], max(relative[1:]))


def _judge(ours: Errors, theirs: Errors, dtype: torch.dtype, longest_sum: int) -> str | None:
    """None if our errors are in order: at most twice ATen's, plus one rounding and that of an fp32 sum."""
    slack = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(longest_sum)
    for what, error, other in (
        ("output", ours.forward, theirs.forward),
        ("gradients", ours.gradients, theirs.gradients),
    ):
        if not error <= 2 * other + slack:
            return f"{what} off by {error:.1e}, ATen's by {other:.1e}"
    return None


def check(example: Example, dtype: torch.dtype, device: torch.device) -> Check:
    """Run one op and its gradients beside ATen's, both against ATen in fp64 on the CPU. Never raises."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in example.shapes]
    name, short = example.name, str(dtype).removeprefix("torch.")
    path = reason = "unknown"
    try:
        op = getattr(fused_ops, name)
        explained = fused_ops.explain(op, *example.arrange(tensors), **example.options)
        path, reason = explained.name, explained.reason
        oracle = _results(example.reference, [t.to("cpu", torch.float64) for t in tensors], example)
        ours = _errors(_results(op, tensors, example), oracle)
        theirs = _errors(_results(example.reference, tensors, example), oracle)
    except Exception as error:
        return Check(name, short, path, reason, None, None, f"{type(error).__name__}: {error}")
    longest_sum = max(t.numel() for t in (*tensors, oracle[0]))
    return Check(name, short, path, reason, ours, theirs, _judge(ours, theirs, dtype, longest_sum))


@contextmanager
def _kernels_for_little_data() -> Iterator[None]:
    """Within, gradients are the kernels' however little data there is: on a GPU these calls' would be torch's."""
    before = dispatch.SHORT
    dispatch.SHORT = -1
    try:
        yield
    finally:
        dispatch.SHORT = before


def run_checks() -> list[Check]:
    """Check every op in every dtype of DTYPES, fp32 in full, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with full_precision(), _kernels_for_little_data():
        return [check(example, dtype, device) for example in EXAMPLES for dtype in DTYPES]


def run_interpreted_checks() -> list[Check]:
    """The same checks with the kernels interpreted, in a process of its own: Triton decides that at import."""
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        problem = f"the process ended with status {done.returncode}: {done.stderr.strip()[-2000:]}"
        return [Check("all ops", "", "unknown", "nothing ran", None, None, problem)]
    rows = json.loads(done.stdout)
    for row in rows:
        for side in ("ours", "theirs"):
            row[side] = row[side] and Errors(**row[side])
    return [Check(**row) for row in rows]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str]:
    """Versions and devices, as shown in the first table."""
    facts = {
        "backstride": _version("backstride"),
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "CUDA": torch.version.cuda or "none: torch is built without it",
        "cuDNN": str(torch.backends.cudnn.version() or "none"),
        "GPU": "none",
        "CPU": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "not set"),
    }
    if torch.version.hip:
        facts["CUDA"] = f"ROCm {torch.version.hip}"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = f"capability {properties.major}.{properties.minor}"
        facts["GPU"] = f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
        # Both torch's convolutions and ours follow this switch; TF32 keeps ten bits, and the errors show it.
        facts["fp32 RNN"] = torch.backends.cudnn.rnn.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
        facts["fp32 convolution"] = torch.backends.cudnn.conv.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    return facts


def _machine_table() -> Table:
    table = Table(title="This machine", title_justify="left", show_header=False, box=box.SIMPLE_HEAD)
    table.add_column(style="bold")
    table.add_column()
    for name, value in machine().items():
        table.add_row(name, value)
    return table


def _pair(ours: float | None, theirs: float | None) -> str:
    return "" if ours is None or theirs is None else f"{ours:.0e}/{theirs:.0e}"


def _checks_table(title: str, checks: list[Check]) -> Table:
    # Narrow enough for 80 columns.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0))
    for heading in ("op", "", "path"):
        table.add_column(heading, vertical="bottom", no_wrap=True)
    for heading in ("output\nours/ATen", "gradients\nours/ATen"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    previous = None
    for row in checks:
        ours, theirs = row.ours, row.theirs
        table.add_row(
            row.op if row.op != previous else "",
            SHORT.get(row.dtype, row.dtype),
            row.path,
            _pair(ours and ours.forward, theirs and theirs.forward),
            _pair(ours and ours.gradients, theirs and theirs.gradients),
            "[red]FAIL[/]" if row.problem else "[green]ok[/]",
        )
        previous = row.op
    return table


def _report(console: Console, title: str, checks: list[Check]) -> None:
    console.print(_checks_table(title, checks))
    for path, reason in dict.fromkeys((row.path, row.reason) for row in checks):
        console.print(f"[bold]{path}[/]: {escape(reason)}", highlight=False)
    for row in checks:
        if row.problem:
            console.print(f"  [red]{row.op} {row.dtype}[/]: {escape(row.problem)}", highlight=False)
    console.print()


def run_doctor(console: Console | None = None) -> int:
    """Print what this machine runs and a self-check of every op; 0 if all checks pass, else 1.

    Each op runs forward and backward in fp32 and bf16 on the default device; errors are the largest deviation
    from ATen in fp64, relative to the largest value. Without a GPU, the kernels are checked in Triton's
    interpreter too.
    """
    console = console or Console()
    console.print(_machine_table())
    console.print()
    with console.status("Checking every op"):
        checks = run_checks()
    _report(console, "Ops as called here", checks)
    if not (torch.cuda.is_available() or INTERPRETED):
        with console.status("Checking the kernels in Triton's interpreter"):
            interpreted = run_interpreted_checks()
        _report(console, "The kernels, interpreted on the CPU", interpreted)
        checks += interpreted
    console.print("Errors: largest deviation from ATen in fp64, relative to the largest value.", style="dim")
    failed = [row for row in checks if row.problem]
    if failed:
        console.print(f"[bold red]{len(failed)} of {len(checks)} checks failed.[/]")
        return 1
    console.print(f"[bold green]All {len(checks)} checks passed.[/]")
    return 0


if __name__ == "__main__":
    json.dump([asdict(row) for row in run_checks()], sys.stdout)
