"""What the commands of the command line share."""

from dataclasses import fields
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

from .training.config import TrainingConfig

Device = Literal["auto", "cpu", "cuda"]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes the GPU if there is one.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, with its own settings.")]

console = Console()


def given_settings(context: typer.Context, config: type[TrainingConfig]) -> dict[str, Any]:
    """The options of a command that were given on the command line and are settings of `config`."""
    given = {}
    for field in fields(config):
        source = context.get_parameter_source(field.name)
        if source is not None and source.name == "COMMANDLINE":
            given[field.name] = context.params[field.name]
    return given


def find_device(device: Device) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here (backstride doctor says more); use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
