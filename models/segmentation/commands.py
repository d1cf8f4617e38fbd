"""The commands that train networks for scenes, and segment pictures with any network."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from ..data.sets import SETS
from ..layers import Ops
from ..options import DeviceOption, ResumeOption, console, find_device, given_settings
from ..predict import predict_probability, predict_scene, read_image, save_prediction
from ..training import distributed
from ..training.checkpoint import write_json
from ..training.config import ClassWeights, Optimizer, SceneConfig, Schedule, read_config
from ..training.scenes import SceneTask, evaluate_scenes, load_scene_network, open_scenes, open_scored
from ..training.segmentation import load_network
from ..training.train import load_trained, train
from ..visual import sample_sheet

DEFAULT = SceneConfig(data="")
LAYOUTS = "; ".join(f"{name}: {kind.layout}" for name, kind in SETS.items())


def train_scenes(
    context: typer.Context,
    data: Annotated[Path | None, typer.Option(help=f"Folder of a data set. {LAYOUTS}.")] = None,
    dataset: Annotated[
        Literal["auto", "camvid", "voc", "cityscapes", "folder"],
        typer.Option(help="Which set --data is; auto finds out from the folder."),
    ] = "auto",
    split: Annotated[
        str, typer.Option(help="What to train on; of Pascal VOC any list in ImageSets/Segmentation.")
    ] = DEFAULT.split,
    out: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints, curves and pictures. Default: runs/ and the name.")
    ] = None,
    resume: ResumeOption = False,
    width: Annotated[int, typer.Option(help="Channels of the first stage; 64: the published network.")] = DEFAULT.width,
    scale: Annotated[int, typer.Option(help="Divides the images' height and width.")] = DEFAULT.scale,
    crop: Annotated[
        int, typer.Option(help="Train on random windows of this height and width; 0: on whole images.")
    ] = DEFAULT.crop,
    class_weights: Annotated[ClassWeights, typer.Option(help="How the loss weighs classes.")] = DEFAULT.class_weights,
    auxiliary: Annotated[
        float, typer.Option(help="Factor of the auxiliary losses of PSPNet and ICNet; 0: none.")
    ] = DEFAULT.auxiliary,
    steps: Annotated[int, typer.Option(help="Training steps.")] = DEFAULT.steps,
    batch_size: Annotated[int, typer.Option(help="Images per step, in each process.")] = DEFAULT.batch_size,
    optimizer: Annotated[Optimizer, typer.Option(help="sgd has a momentum of 0.9.")] = DEFAULT.optimizer,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = DEFAULT.lr,
    schedule: Annotated[
        Schedule, typer.Option(help="cosine, poly (to the power of 0.9): the rate falls to zero over --steps.")
    ] = DEFAULT.schedule,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="bf16 and fp16: mixed precision.")
    ] = DEFAULT.precision,
    every: Annotated[int, typer.Option(help="Steps between validations, with picture and checkpoint.")] = DEFAULT.every,
    seed: Annotated[int, typer.Option(help="Decides weights, order, augmentation and dropout.")] = DEFAULT.seed,
    ops: Annotated[Ops, typer.Option(help="Who computes: backstride.fused_ops or torch.nn.")] = DEFAULT.ops,
    device: DeviceOption = "auto",
) -> None:
    """Writes best.safetensors, last.safetensors, config.json, history.json, loss.png and samples/ into --out, and of
    the scored split (test, or val where the masks of test are not public) metrics.json and overlay.png. A run that was
    stopped goes on with --resume.
    """
    name = context.info_name or ""
    folder = out or Path("runs") / name
    given = given_settings(context, SceneConfig) | {"network": name}
    if data is not None:
        given["data"] = str(data)
    config = replace(SceneConfig.read(folder) if resume else DEFAULT, **given)
    if not config.data:
        raise ValueError(f"--data is missing: give the folder of a data set ({LAYOUTS})")
    where = distributed.join(find_device(device))
    training, validation, config = open_scenes(config)
    task = SceneTask(config, training, validation, where)
    train(task, config, folder, resume=resume, console=console)
    if distributed.rank() > 0:
        return

    load_trained(task.network, folder)
    scored, test = open_scored(config)
    metrics = evaluate_scenes(task, test)
    write_json(metrics, folder / "metrics.json")
    rows = []
    for index in sorted({0, len(test) // 2, len(test) - 1}):
        image, mask = test[index]
        rows.append([image, mask, task.predict(image.to(where)).argmax(0).cpu()])
    sheet = folder / "overlay.png"
    sample_sheet(rows, sheet, ("image", "truth", "prediction"), classes=task.classes, colours=task.colours)
    table = Table(f"{scored} split", "")
    for metric, value in metrics.items():
        table.add_row(metric, f"{value:.4f}")
    console.print(table)
    console.print(
        f"The best network and all pictures are in {folder}. Use it: "
        f"backstride predict --checkpoint {folder} --out predictions IMAGE...",
        highlight=False,
    )


def predict(
    images: Annotated[list[Path], typer.Argument(help="Pictures of any size.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder of a training run.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("predictions"),
    tile: Annotated[
        int,
        typer.Option(
            help="Input size of a tile. 0: for U-Net as in training; for other networks the whole picture, or 1024 "
            "where it has more than 1024 x 2048 pixels."
        ),
    ] = 0,
    average: Annotated[
        bool,
        typer.Option(
            "--average",
            help="Average over rotations and reflections: all eight for U-Net, the mirror image for other networks.",
        ),
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Segment images with a trained network.

    For each image it writes a class map, a probability map and an overlay as PNG, all of the picture's size.
    """
    for name, count in Counter(path.stem for path in images).items():
        if count > 1:
            raise ValueError(f"{count} images are named {name}: their results would overwrite each other")
    where = find_device(device)
    classes, colours = None, ()
    if isinstance(read_config(checkpoint), SceneConfig):
        scene_network, config = load_scene_network(checkpoint)
        scene_network.to(where)
        channels, classes, colours = 3, config.classes, config.colours

        def segment(image):
            return predict_scene(
                scene_network, image, config.mean, config.std, scale=config.scale, tile=tile, mirrored=average
            )

    else:
        network, settings = load_network(checkpoint)
        network.to(where)
        channels = network.in_channels

        def segment(image):
            return predict_probability(network, image, tile or settings.tile, symmetries=average)

    for path in images:
        image = read_image(path, channels)
        probability = segment(image.to(where)).cpu()
        written = save_prediction(probability, image, out, path.stem, classes, colours)
        names = ", ".join(file.name for file in written)
        console.print(f"{path} -> {out}: {names}", highlight=False, soft_wrap=True, markup=False)
