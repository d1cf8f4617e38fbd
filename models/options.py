"""What the commands of the command line share."""

import os
from dataclasses import fields
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

from .training.config import TrainingConfig

Device = Literal["auto", "cpu", "cuda"]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes the GPU if there is one.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, with its own settings.")]

console = Console(quiet=os.environ.get("RANK", "0") != "0")  # torchrun's number for this process


def given_settings(context: typer.Context, config: type[TrainingConfig]) -> dict[str, Any]:
    """The options of a command that were given on the command line and are settings of `config`."""
    given = {}
    for field in fields(config):
        source = context.get_parameter_source(field.name)
        if source is not None and source.name == "COMMANDLINE":
            given[field.name] = context.params[field.name]
    return given


def find_device(device: Device) -> torch.device:
    """The device of that name; of several GPUs the one that torchrun has given this process."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here (backstride doctor says more); use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"torchrun started process {number}, counted from 0, but PyTorch finds {torch.cuda.device_count()} GPUs: "
            "start as many processes as there are GPUs"
        )
    return torch.device("cuda", number)
