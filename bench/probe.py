"""Facts about a GPU and its libraries that decide designs: each probe has its question in its docstring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from rich.table import Table
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..fused_ops import conv2d
from ..kernels.probe import descriptor_copy_kernel
from ..kernels.rnn.exchange import exchange_probe_kernel
from . import host
from .report import Environment, name_of
from .timing import Ceilings, Timing

DTYPE = torch.bfloat16


class Probe(NamedTuple):
    """Something to time. `units`: how many of what is asked about one call holds."""

    name: str
    call: Callable[[], Any]
    flop: float = 0.0
    bytes: float = 0.0
    units: int = 1
    dtype: torch.dtype = DTYPE


@dataclass(frozen=True)
class Row(Environment):
    """Microseconds for one unit (median, 20th and 80th percentile), rates, and their share of the ceilings in per cent;
    the algorithm that the names of a call's kernels tell, and those that took most of it."""

    probe: str
    name: str
    us: float
    us_p20: float
    us_p80: float
    tflop_per_s: float
    gb_per_s: float
    percent_of_matmul: float
    percent_of_copy: float
    algorithm: str
    kernels: str


def _randn(*shape: int, device: str, channels_last: bool = True) -> Tensor:
    tensor = torch.randn(shape, device=device).to(DTYPE)
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def _bytes(*tensors: Tensor) -> float:
    return sum(t.numel() * t.element_size() for t in tensors)


def padding_taps(device: str, tiny: bool) -> list[Probe]:
    """Does cuDNN skip the taps of a dilated 3x3 that fall on zero padding, three fifths of them at d = 18 on 33x33?
    If it does, d = 18 takes less time than d = 1 on the same shape."""
    batch, channels, out = (1, 4, 4) if tiny else (8, 2048, 256)
    x, w = _randn(batch, channels, 33, 33, device=device), _randn(out, channels, 3, 3, device=device)
    flop = 2.0 * batch * 33 * 33 * out * channels * 9
    return [
        Probe(f"cuDNN 3x3, d = {d}", lambda d=d: F.conv2d(x, w, None, 1, d, d), flop, _bytes(x, w))
        for d in (1, 6, 12, 18)
    ]


def transposed_share(device: str, tiny: bool) -> list[Probe]:
    """What share of the matrix units' peak does cuDNN reach on transposed convolutions with stride 2, and does a 4x4
    kernel, which has no phase with fewer taps than another, do better than 3x3?"""
    batch, channels, size = (1, 4, 4) if tiny else (8, 512, 64)
    probes = []
    for kernel, extra in ((2, 0), (3, 1), (4, 0)):
        padding = (kernel - 1) // 2
        for layout in (True, False):
            w = _randn(channels, channels // 2, kernel, kernel, device=device, channels_last=layout)
            x = _randn(batch, channels, size, size, device=device, channels_last=layout)
            flop = 2.0 * batch * size * size * channels * (channels // 2) * kernel * kernel
            name = f"cuDNN transposed {kernel}x{kernel} s2, {'channels_last' if layout else 'contiguous'}"
            call = lambda x=x, w=w, p=padding, e=extra: F.conv_transpose2d(x, w, None, 2, p, e)  # noqa: E731
            probes.append(Probe(name, call, flop, _bytes(x, w)))
    return probes


def layout_and_bias(device: str, tiny: bool) -> list[Probe]:
    """What do NCHW tensors cost cuDNN, which works in NHWC and transposes, and what do a bias and ReLU cost: as torch's
    passes, as one pass of ours, and in cuDNN's own epilogue?"""
    batch, channels, size = (1, 4, 4) if tiny else (16, 64, 256)
    probes = []
    for layout in (True, False):
        words = "channels_last" if layout else "contiguous"
        x = _randn(batch, channels, size, size, device=device, channels_last=layout)
        w, b = _randn(channels, channels, 3, 3, device=device, channels_last=layout), _randn_vector(channels, device)
        flop = 2.0 * x.numel() * channels * 9
        calls: dict[str, Callable[[], Tensor]] = {
            "": lambda x=x, w=w: F.conv2d(x, w, None, 1, 1),
            " with bias": lambda x=x, w=w, b=b: F.conv2d(x, w, b, 1, 1),
            " with bias and ReLU": lambda x=x, w=w, b=b: F.relu(F.conv2d(x, w, b, 1, 1)),
            " with bias and ReLU, one pass": lambda x=x, w=w, b=b: conv2d(x, w, b, 1, 1, activation="relu"),
        }
        if x.is_cuda:
            own = partial(torch.ops.aten.cudnn_convolution_relu, x, w, b, [1, 1], [1, 1], [1, 1], 1)
            calls[" with bias and ReLU, its own"] = own
        for suffix, call in calls.items():
            probes.append(Probe(f"cuDNN 3x3, {words}{suffix}", call, flop, 2 * _bytes(x)))
    x = _randn(batch, channels, size, size, device=device, channels_last=False)
    transpose = lambda: x.contiguous(memory_format=torch.channels_last)  # noqa: E731
    return [*probes, Probe("contiguous to channels_last", transpose, 0, 2 * _bytes(x))]


def _randn_vector(size: int, device: str) -> Tensor:
    return torch.randn(size, device=device).to(DTYPE)


def pooling_floor(device: str, tiny: bool) -> list[Probe]:
    """How near to the copy rate do torch's max_pool2d with int64 indices and max_unpool2d, which zeroes and scatters,
    come?"""
    shape = (1, 4, 8, 8) if tiny else (16, 64, 512, 512)
    probes = []
    for layout in (False, True):
        words = "channels_last" if layout else "contiguous"
        x = _randn(*shape, device=device, channels_last=layout)
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        traffic = _bytes(x, y, indices)
        pool = lambda x=x: F.max_pool2d(x, 2, return_indices=True)  # noqa: E731
        unpool = lambda y=y, i=indices: F.max_unpool2d(y, i, [2, 2])  # noqa: E731
        probes += [Probe(f"max_pool2d, {words}", pool, 0, traffic), Probe(f"max_unpool2d, {words}", unpool, 0, traffic)]
    return probes


def exchange(device: str, tiny: bool) -> list[Probe]:
    """How long does one exchange between programs of one launch take, by their number and the way they wait? The
    sharded recurrence has one a step."""
    rounds, groups, methods = (
        (3, (1,), ("atomic",)) if tiny else (2000, (16, 32, 64, 128), ("assembly", "atomic", "flags"))
    )
    probes = []
    for group in groups:
        if not tiny and group > torch.cuda.get_device_properties(0).multi_processor_count:
            continue
        for method in methods:
            counters = torch.zeros(2, 256, dtype=torch.int32, device=device)

            def call(counters=counters, group=group, method=method):
                counters.zero_()
                options = {"METHOD": method, "GROUP": group, "num_warps": 4}
                options |= {} if tiny else {"launch_cooperative_grid": True}
                exchange_probe_kernel[(group,)](counters[0], counters[1], rounds, **options)

            probes.append(Probe(f"{group} programs, {method}", call, units=rounds))
    return probes


def cudnn_rnn(device: str, tiny: bool) -> Iterator[Probe]:
    """Which sizes does cuDNN's RNN run without a launch for each step, and how long does a step take? The names of the
    kernels tell the algorithm: persistent ones run once, the standard one's products once a step."""
    steps = 3 if tiny else 256
    dtypes = (torch.float32,) if tiny else (torch.bfloat16, torch.float16, torch.float32)
    sizes = (8,) if tiny else (128, 256, 384, 512, 1000, 1024, 2048)
    batches = (2,) if tiny else (1, 16, 50, 64, 128)
    for dtype in dtypes:
        for hidden in sizes:
            for batch in batches:
                for layers, directions, packed in ((1, 1, False), (2, 1, False), (1, 2, False), (1, 1, True)):
                    module = nn.RNN(hidden, hidden, layers, bidirectional=directions == 2).to(device, dtype)
                    x: Any = torch.randn(steps, batch, hidden, device=device, dtype=dtype)
                    if packed:
                        lengths = torch.linspace(steps, max(steps // 4, 1), batch).long()
                        x = nn.utils.rnn.pack_padded_sequence(x, lengths)

                    def forward(module=module, x=x):
                        with torch.no_grad():
                            module(x)

                    def training(module=module, x=x):
                        module(x)[1].sum().backward()

                    form = f"H{hidden} B{batch} L{layers} D{directions}{' packed' if packed else ''} {name_of(dtype)}"
                    yield Probe(f"{form}, forward, a step", forward, units=steps, dtype=dtype)
                    yield Probe(f"{form}, training, a step", training, units=steps, dtype=dtype)


PROBES: dict[str, Callable[[str, bool], Iterable[Probe]]] = {
    probe.__name__: probe
    for probe in (padding_taps, transposed_share, layout_and_bias, pooling_floor, exchange, cudnn_rnn)
}


def question(probe: Callable[..., Any]) -> str:
    return " ".join((probe.__doc__ or "").split())


def run(
    name: str,
    device: str,
    tiny: bool,
    where: Environment,
    ceilings: Ceilings,
    measure: Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, Timing]],
) -> list[Row]:
    """Time one probe's calls with `measure`, each by itself: hundreds of modules at once would not fit."""
    rows = []
    for probe in PROBES[name](device, tiny):
        timing = measure({probe.name: probe.call})[probe.name]
        us = [1e3 * ms / probe.units for ms in timing[:3]]
        rows.append(
            Row(
                **vars(where),
                probe=name,
                name=probe.name,
                us=us[0],
                us_p20=us[1],
                us_p80=us[2],
                tflop_per_s=probe.flop / timing.ms / 1e9,
                gb_per_s=probe.bytes / timing.ms / 1e6,
                percent_of_matmul=1e5 * probe.flop / timing.ms / ceilings.matmul[probe.dtype],
                percent_of_copy=1e5 * probe.bytes / timing.ms / ceilings.copy,
                algorithm=timing.algorithm,
                kernels=timing.kernels,
            )
        )
    return rows


def host_overhead(where: Environment) -> list[Row]:
    """How many microseconds does the host spend on one forward call of an op, launch included, ours and torch's?"""
    rows = []
    with torch.no_grad():
        for op, pair in host.calls("cuda").items():
            for name, times in zip(("ours", "torch"), host.time_calls(pair, rounds=15, repeats=50), strict=True):
                rows.append(Row(**vars(where), probe="host_overhead", name=f"{op}, {name}", **_host(times)))
    return rows


def _host(times: tuple[float, float, float]) -> dict[str, Any]:
    rates = dict.fromkeys(("tflop_per_s", "gb_per_s", "percent_of_matmul", "percent_of_copy"), 0.0)
    return dict(zip(("us", "us_p20", "us_p80"), times, strict=True)) | rates | {"algorithm": "", "kernels": ""}


def capabilities() -> list[tuple[str, str, str]]:
    """What do the installed torch and Triton compile? (target, feature, whether) Needs no GPU, but a Triton that does
    not interpret."""
    rows = []
    for arch in (80, 90, 100):
        pointers, divisible = ("x_ptr", "y_ptr"), [["tt.divisibility", 16]]
        constants = {"BLOCK_M": 64, "BLOCK_N": 64}
        types = dict.fromkeys(pointers, "*bf16") | {"M": "i32", "N": "i32"} | dict.fromkeys(constants, "constexpr")
        attributes = {(0,): divisible, (1,): divisible, (3,): divisible}
        copy = _compile(ASTSource(descriptor_copy_kernel, types, constants, attributes), arch, {"num_warps": 4})
        tma = copy is not None and "cp.async.bulk.tensor" in copy.asm["ptx"]
        rows.append((f"sm_{arch}", "tensor descriptors use TMA", "yes" if tma else "no"))
        types = {
            "counter_ptr": "*i32",
            "flags_ptr": "*i32",
            "ROUNDS": "i32",
            "METHOD": "constexpr",
            "GROUP": "constexpr",
        }
        source = ASTSource(exchange_probe_kernel, types, {"METHOD": "assembly", "GROUP": 64})
        grid = _compile(source, arch, {"num_warps": 4, "launch_cooperative_grid": True})
        rows.append(
            (f"sm_{arch}", "cooperative grids", "yes" if grid and grid.metadata.launch_cooperative_grid else "no")
        )
    return rows


def _compile(source: ASTSource, arch: int, options: dict[str, Any]) -> Any:
    try:
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception:  # that it does not compile is an answer
        return None


def capabilities_table() -> Table:
    table = Table("target", "feature", "compiles", title=f"torch {torch.__version__}, Triton {triton.__version__}")
    for row in capabilities():
        table.add_row(*row)
    return table


def table(rows: list[Row]) -> Table:
    result = Table(title=rows[0].probe)
    for column in ("what", "us (p20-p80)", "TFLOP/s", "% of matmul", "GB/s", "% of copy", "algorithm"):
        result.add_column(column, justify="left" if column in ("what", "algorithm") else "right")
    for row in rows:
        rates = row.tflop_per_s, row.percent_of_matmul, row.gb_per_s, row.percent_of_copy
        shown = [f"{rate:.0f}" if rate else "" for rate in rates]
        result.add_row(row.name, f"{row.us:.2f} ({row.us_p20:.2f}-{row.us_p80:.2f})", *shown, row.algorithm)
    return result
