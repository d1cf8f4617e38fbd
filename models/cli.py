"""The command line `backstride`."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .language.commands import sample_text, train_char_rnn
from .language.hello import show_hello
from .layers import Ops
from .options import DeviceOption, ResumeOption, console, find_device, given_settings
from .recurrent.bptt import show_bptt
from .segmentation.commands import predict, train_scenes
from .segmentation.networks import NETWORKS
from .segmentation.sliding_window import show_sliding_window
from .segmentation.speed import show_icnet
from .segmentation.unet import Padding
from .training import distributed
from .training.checkpoint import write_json
from .training.config import Optimizer, Schedule, SegmentationConfig
from .training.segmentation import SegmentationTask, evaluate, load_network, open_data
from .training.train import train

DEFAULT = SegmentationConfig()
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Networks on backstride's kernels: train them, use them, and see what runs on this machine.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train a network.")
app.add_typer(train_app, name="train")
train_app.command("char-rnn")(train_char_rnn)
for name, scene_network in NETWORKS.items():
    summary = f"Train {scene_network.paper} on scenes."
    details = " ".join((train_scenes.__doc__ or "").split())
    train_app.command(name, short_help=summary, help=f"{summary}\n\n{details}")(train_scenes)
app.command("predict")(predict)
app.command("sample")(sample_text)
show_app = typer.Typer(no_args_is_help=True, help="Show one idea of the networks in numbers.")
app.add_typer(show_app, name="show")


@train_app.command("unet")
def train_unet(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with image/ and label/ (or images/ and masks/), paired by file name. "
            "Without it: generated pictures of touching cells."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, curves and pictures.")] = Path("runs/unet"),
    resume: ResumeOption = False,
    val: Annotated[
        str,
        typer.Option(help="Held-out images by number from 0, e.g. 25-29 or 3,8,20-24. Default: the last tenth."),
    ] = "",
    steps: Annotated[int, typer.Option(help="Training steps.")] = DEFAULT.steps,
    batch_size: Annotated[int, typer.Option(help="Crops per step.")] = DEFAULT.batch_size,
    tile: Annotated[
        int, typer.Option(help="Input size of a crop: 16n+12 with valid convolutions, 16n with same.")
    ] = DEFAULT.tile,
    width: Annotated[int, typer.Option(help="Channels of the first layer.")] = DEFAULT.width,
    depth: Annotated[int, typer.Option(help="Number of max-pools.")] = DEFAULT.depth,
    padding: Annotated[Padding, typer.Option(help="valid as published, or zero padding.")] = DEFAULT.padding,
    dropout: Annotated[float, typer.Option(help="At the end of the contracting path.")] = DEFAULT.dropout,
    optimizer: Annotated[Optimizer, typer.Option(help="sgd has the paper's momentum of 0.99.")] = DEFAULT.optimizer,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = DEFAULT.lr,
    schedule: Annotated[
        Schedule, typer.Option(help="cosine, poly (to the power of 0.9): the rate falls to zero over --steps.")
    ] = DEFAULT.schedule,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="bf16 and fp16: mixed precision.")
    ] = DEFAULT.precision,
    elastic: Annotated[
        float, typer.Option(help="Standard deviation of the elastic deformation in pixels; 0: none.")
    ] = DEFAULT.elastic,
    border_weight: Annotated[float, typer.Option(help="w0 of the border weight map; 0: none.")] = DEFAULT.border_weight,
    border_sigma: Annotated[
        float, typer.Option(help="sigma of the border weight map in pixels.")
    ] = DEFAULT.border_sigma,
    every: Annotated[int, typer.Option(help="Steps between validations, with picture and checkpoint.")] = DEFAULT.every,
    seed: Annotated[int, typer.Option(help="Decides weights, order, augmentation and dropout.")] = DEFAULT.seed,
    ops: Annotated[Ops, typer.Option(help="Who computes: backstride.fused_ops or torch.nn.")] = DEFAULT.ops,
    device: DeviceOption = "auto",
) -> None:
    """Train U-Net (Ronneberger et al. 2015) to segment images.

    Writes best.safetensors, last.safetensors, config.json, history.json, metrics.json, loss.png and samples/
    into --out. A run that was stopped goes on with --resume, to the same losses as if it had not been.
    """
    given = given_settings(context, SegmentationConfig)
    if data is not None:
        given["data"] = str(data)
    if val:
        given["validation"] = parse_indices(val)
    config = replace(SegmentationConfig.read(out) if resume else DEFAULT, **given)
    where = distributed.join(find_device(device))
    training, validation, config = open_data(config)
    task = SegmentationTask(config, training, validation, where)
    train(task, config, out, resume=resume, console=console)
    if distributed.rank() > 0:
        return

    network, _ = load_network(out)
    network.to(task.device)
    metrics = {
        "one pass": evaluate(network, validation, config.tile),
        "mean of 8 symmetries": evaluate(network, validation, config.tile, symmetries=True),
    }
    write_json(metrics, out / "metrics.json")
    table = Table("held-out images", *metrics)
    for name in metrics["one pass"]:
        table.add_row(name, *(f"{column[name]:.4f}" for column in metrics.values()))
    console.print(table)
    console.print(
        f"The best network and all pictures are in {out}. Use it: "
        f"backstride predict --checkpoint {out} --out predictions IMAGE...",
        highlight=False,
    )


@show_app.command()
def hello() -> None:
    """Train a network of three units to spell "hello", and print what it thinks at each letter."""
    show_hello(console)


@show_app.command()
def bptt(
    out: Annotated[Path, typer.Option(help="PNG for the plot.")] = Path("runs/bptt.png"),
) -> None:
    """Compare backpropagation through time by hand, by autograd, by differences, and truncated; plot the error of
    truncation against the chunk length."""
    show_bptt(out, console)


@show_app.command()
def icnet(
    frames: Annotated[int, typer.Option(help="How many to time.")] = 100,
    device: DeviceOption = "auto",
) -> None:
    """Time ICNet on frames of 1024 x 2048 pixels on a GPU: frames per second, fused and by torch."""
    show_icnet(console, find_device(device), frames)


@show_app.command("sliding-window")
def sliding_window() -> None:
    """Turn a classifier's dense layers into convolutions: one pass gives the scores of all windows, and saves most
    multiply-adds."""
    show_sliding_window(console)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
) -> None:
    """Train a small U-Net on generated cells and a char-RNN on Python's own source, and show what they learn
    (about four minutes on two CPU cores)."""
    from .demo import run_demo

    run_demo(out, console)


@app.command()
def doctor() -> None:
    """Show versions, devices and, for every op, what runs here, and check each op against PyTorch."""
    from .doctor import run_doctor

    raise typer.Exit(run_doctor())


def parse_indices(text: str) -> tuple[int, ...]:
    """ "3,20-22" -> (3, 20, 21, 22)"""
    indices: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not numbers:
            raise ValueError(f"--val {text}: {part!r} is neither a number nor a range like 25-29")
        indices |= set(numbers)
    return tuple(sorted(indices))


def main() -> None:
    """Runs the command line; what a user can mend is told in one line, without a traceback."""
    try:
        app(prog_name="backstride")
    except (ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    finally:
        distributed.leave()


if __name__ == "__main__":
    main()
