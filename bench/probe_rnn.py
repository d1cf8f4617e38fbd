"""`python -m backstride.bench.probe_rnn`: what cuDNN's RNN runs, and what one exchange between programs costs.

Both decide how the sharded recurrence is built: which sizes cuDNN handles without a launch for each step, and which way
of waiting is the quickest. Needs a GPU; writes two CSV files beside the benchmark's results.
"""

import csv
import re
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ..kernels.rnn.exchange import exchange_probe_kernel
from ..models.training.checkpoint import atomic_path
from . import report
from .report import RESULTS
from .timing import measure

ROUNDS = 2000
STEPS = 256
GROUPS = (16, 32, 64, 128)
METHODS = ("assembly", "atomic", "flags")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HIDDEN = (128, 256, 384, 512, 1000, 1024, 2048)
BATCHES = (1, 16, 50, 64, 128)
FORMS = ((1, 1, False), (2, 1, False), (1, 2, False), (1, 1, True))  # layers, directions, packed

Rows = list[dict[str, str | float]]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def exchange_rows(repeats: int) -> Rows:
    """Microseconds that one exchange takes, by group size and method."""
    rows: Rows = []
    for group in GROUPS:
        if group > torch.cuda.get_device_properties(0).multi_processor_count:
            continue
        for method in METHODS:
            counters = torch.zeros(2, 256, dtype=torch.int32, device="cuda")

            def call(counters=counters, group=group, method=method):
                counters.zero_()
                options = {"METHOD": method, "GROUP": group, "num_warps": 4, "launch_cooperative_grid": True}
                exchange_probe_kernel[(group,)](counters[0], counters[1], ROUNDS, **options)

            timing = measure({"exchange": call}, repeats, graph=False)["exchange"]
            rows.append({"programs": group, "method": method, "us": 1e3 * timing.ms / ROUNDS})
    return rows


def cudnn_rows(repeats: int) -> Rows:
    """nn.RNN's microseconds a step, forward and in training, and the kernels that take most of the forward's time."""
    rows: Rows = []
    for dtype in DTYPES:
        for hidden in HIDDEN:
            for batch in BATCHES:
                for layers, directions, packed in FORMS:
                    module = nn.RNN(hidden, hidden, layers, bidirectional=directions == 2).to("cuda", dtype)
                    x = torch.randn(STEPS, batch, hidden, device="cuda", dtype=dtype)
                    if packed:
                        # Lengths from a quarter of the steps to all of them.
                        lengths = torch.linspace(STEPS, STEPS // 4, batch).long()
                        x = nn.utils.rnn.pack_padded_sequence(x, lengths)

                    def forward(module=module, x=x):
                        with torch.no_grad():
                            module(x)

                    def training(module=module, x=x):
                        module(x)[1].sum().backward()

                    timings = measure({"forward": forward, "training": training}, repeats, graph=False)
                    rows.append(
                        {
                            "dtype": str(dtype).removeprefix("torch."),
                            "hidden": hidden,
                            "batch": batch,
                            "layers": layers,
                            "directions": directions,
                            "packed": str(packed),
                            "forward_us_a_step": 1e3 * timings["forward"].ms / STEPS,
                            "training_us_a_step": 1e3 * timings["training"].ms / STEPS,
                            "kernels": kernel_names(forward),
                        }
                    )
    return rows


def kernel_names(call) -> str:
    """The two GPU kernels that take most of a call, with how often each runs."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return "; ".join(f"{event.count} x {event.key[:80]}" for event in events[:2])


def write(rows: Rows, path: Path) -> None:
    where = vars(report.environment())
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, [*where, *rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(where | row for row in rows)


def table(title: str, rows: Rows) -> Table:
    result = Table(*rows[0], title=title)
    for row in rows:
        result.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    return result


@app.command()
def main(repeats: int = 10) -> None:
    """Time the exchange and cuDNN's RNN on this GPU, and write bench/results/probe_*.csv."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("the probe times a GPU, and torch finds none here")
    gpu = re.sub(r"[^\w.+-]+", "-", torch.cuda.get_device_name()).lower()
    console = Console(width=150)
    for name, rows in (("exchange", exchange_rows(repeats)), ("cudnn_rnn", cudnn_rows(repeats))):
        path = RESULTS / f"probe_{name}_{gpu}.csv"
        write(rows, path)
        console.print(table(f"{name}: {path}", rows))


if __name__ == "__main__":
    app()
