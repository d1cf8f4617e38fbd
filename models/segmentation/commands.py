"""The commands that train SegNet, DeconvNet and FCN."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from ..data.camvid import CLASSES, CamVid
from ..layers import Ops
from ..options import DeviceOption, ResumeOption, console, find_device, given_settings
from ..training.checkpoint import write_json
from ..training.config import Optimizer, SceneConfig
from ..training.scenes import SceneTask, evaluate_scenes, load_scene_network, open_scenes
from ..training.train import train
from ..visual import overlay, save_picture

DEFAULT = SceneConfig(data="")


def train_scenes(
    context: typer.Context,
    data: Annotated[Path | None, typer.Option(help="Folder of CamVid, with train/, trainannot/ and so on.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints, curves and pictures. Default: runs/ and the name.")
    ] = None,
    resume: ResumeOption = False,
    width: Annotated[int, typer.Option(help="Channels of the first stage.")] = DEFAULT.width,
    scale: Annotated[int, typer.Option(help="Divides the images' height and width.")] = DEFAULT.scale,
    steps: Annotated[int, typer.Option(help="Training steps.")] = DEFAULT.steps,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = DEFAULT.batch_size,
    optimizer: Annotated[Optimizer, typer.Option(help="sgd has a momentum of 0.9.")] = DEFAULT.optimizer,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = DEFAULT.lr,
    schedule: Annotated[
        Literal["constant", "cosine"], typer.Option(help="cosine: the rate falls to zero over --steps.")
    ] = DEFAULT.schedule,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="bf16 and fp16: mixed precision.")
    ] = DEFAULT.precision,
    every: Annotated[int, typer.Option(help="Steps between validations, with picture and checkpoint.")] = DEFAULT.every,
    seed: Annotated[int, typer.Option(help="Decides weights, order, augmentation and dropout.")] = DEFAULT.seed,
    ops: Annotated[Ops, typer.Option(help="Who computes: backstride.fused_ops or torch.nn.")] = DEFAULT.ops,
    device: DeviceOption = "auto",
) -> None:
    """Train a network on CamVid's driving scenes, from scratch.

    Writes best.safetensors, last.safetensors, config.json, history.json, loss.png and samples/ into --out, and of the
    test split metrics.json and overlay.png. A run that was stopped goes on with --resume.
    """
    name = context.info_name or ""
    folder = out or Path("runs") / name
    given = given_settings(context, SceneConfig) | {"network": name}
    if data is not None:
        given["data"] = str(data)
    config = replace(SceneConfig.read(folder) if resume else DEFAULT, **given)
    if not config.data:
        raise ValueError("--data is missing: give the folder of CamVid (SegNet's authors distribute it)")
    task = SceneTask(config, *open_scenes(config), find_device(device))
    train(task, config, folder, resume=resume, console=console)

    network, _ = load_scene_network(folder)
    network.to(task.device)
    test = CamVid(config.data, "test", config.scale)
    metrics = evaluate_scenes(network, test)
    write_json(metrics, folder / "metrics.json")
    image, _ = test[0]
    classes = network(image[None].to(task.device))[0].argmax(0).cpu()
    save_picture(overlay(image, classes, list(CLASSES), task.colours), folder / "overlay.png")
    table = Table("test split", "")
    for metric, value in metrics.items():
        table.add_row(metric, f"{value:.4f}")
    console.print(table)
    console.print(f"The best network and all pictures are in {folder}.", highlight=False)
