"""Pictures of images, masks, probabilities and losses. Every file is written whole or not at all."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from skimage.measure import label
from torch import Tensor

from .metrics import ConfusionMatrix

IGNORE = 255
Colour = tuple[int, int, int]

# Okabe and Ito's colours, told apart by colour-blind readers too. Class 0 is left untinted.
_COLOURS = [
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
]
_INK = (34, 34, 34)
_GREY = (150, 150, 150)
_VOC_VOID = (224, 224, 192)
_TINT = 0.38
_FONT_SIZE = 15


def palette() -> np.ndarray:
    """uint8 [256, 3]: black for class 0, grey for 255, and the same seven hues, ever darker, between."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    for number in range(1, 255):
        cycle, hue = divmod(number - 1, len(_COLOURS))
        colours[number] = [round(part * 0.7**cycle) for part in _COLOURS[hue]]
    colours[IGNORE] = _GREY
    return colours


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Writes a PNG beside `path` and then moves it there."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    _write(buffer.getvalue(), Path(path))


def save_figure(figure: Figure, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    _write(buffer.getvalue(), Path(path))


def _write(data: bytes, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def class_map(mask: Tensor, colours: Sequence[Colour] = ()) -> Image.Image:
    """[H, W] classes -> a palette picture whose pixel values are the classes (255 = ignored), in `colours` if given."""
    picture = Image.fromarray(_classes(mask), mode="P")
    picture.putpalette(_with_own(colours).tobytes())
    return picture


def probability_map(probability: Tensor) -> Image.Image:
    """[H, W] in [0, 1] -> a grey picture of round(255 p): black for 0, white for 1."""
    if probability.ndim != 2 or not 0 <= probability.min() <= probability.max() <= 1:
        raise ValueError(
            f"expected probabilities [H, W] in [0, 1], but got the shape {list(probability.shape)} "
            f"with values from {probability.min():.4g} to {probability.max():.4g}"
        )
    return Image.fromarray((255 * probability.float()).round().byte().cpu().numpy())


def overlay(
    image: Tensor, mask: Tensor, names: Sequence[str] | None = None, colours: Sequence[Colour] = ()
) -> Image.Image:
    """The image with each class's regions tinted and outlined; class 0 stays as it is, ignored pixels grey.

    With `colours` (RGB, one for each class in order) class 0 is tinted like the others, unless its colour is black, and
    ignored pixels are cream.

    image: float [C, H, W] in [0, 1], one or three channels; mask: [H, W]; names: class names in order, for
    a legend below the picture of those that occur. Returns an RGB picture. Raises ValueError for shapes that do not
    fit.
    """
    pixels, classes = _rgb(image), _classes(mask)
    if pixels.shape[:2] != classes.shape:
        raise ValueError(f"image {list(image.shape)} and mask {list(mask.shape)} differ in size")
    hues = _with_own(colours)
    shown = hues[classes]
    tinted_classes = np.any(shown, axis=-1)
    tinted = np.where(tinted_classes[..., None], (1 - _TINT) * pixels + _TINT * shown, pixels)
    outlined = np.where((_outline(classes) & tinted_classes)[..., None], shown, tinted)
    picture = Image.fromarray(outlined.round().astype(np.uint8))
    if names is None:
        return picture
    occurring = [number for number in range(len(names)) if number in classes]
    return _with_legend(picture, [names[number] for number in occurring], hues[occurring])


def _with_own(colours: Sequence[Colour]) -> np.ndarray:
    """`palette()` with the first colours replaced. Then ignored pixels, too, have Pascal VOC's colour: grey is CamVid's
    sky."""
    hues = palette()
    if len(colours):
        hues[IGNORE] = _VOC_VOID
    hues[: len(colours)] = np.reshape(colours, (-1, 3))
    return hues


def _rgb(image: Tensor) -> np.ndarray:
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected an image [1, H, W] or [3, H, W], but its shape is {list(image.shape)}")
    channels_last = image.detach().float().clamp(0, 1).cpu().expand(3, -1, -1).permute(1, 2, 0)
    return 255 * channels_last.numpy()


def _classes(mask: Tensor) -> np.ndarray:
    if mask.ndim != 2 or mask.is_floating_point() or not 0 <= int(mask.min()) <= int(mask.max()) <= 255:
        raise ValueError(
            f"expected classes [H, W] from 0 to 255, but got {mask.dtype} {list(mask.shape)} "
            f"from {mask.min()} to {mask.max()}"
        )
    return mask.cpu().numpy().astype(np.uint8)


def _outline(classes: np.ndarray) -> np.ndarray:
    """True on the pixels that touch a pixel of another class."""
    edge = np.zeros(classes.shape, dtype=bool)
    across = classes[:, 1:] != classes[:, :-1]
    down = classes[1:] != classes[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge


def _with_legend(picture: Image.Image, names: Sequence[str], colours: np.ndarray) -> Image.Image:
    """Adds a strip of swatches and names, in as many lines as the picture's width asks for."""
    font = ImageFont.load_default(_FONT_SIZE)
    swatch, gap, line = _FONT_SIZE, 8, _FONT_SIZE + 10
    places, x, y, widest = [], gap, picture.height + 5, 0
    for name in names:
        width = swatch + gap + math.ceil(font.getlength(name)) + 2 * gap
        if x > gap and x + width > picture.width:
            x, y = gap, y + line
        widest = max(widest, x + width)
        places.append((x, y))
        x += width
    sheet = Image.new("RGB", (max(picture.width, widest), y + line), "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    for (x, y), name, colour in zip(places, names, colours.tolist(), strict=False):
        # Class 0 is not tinted in the picture, so its swatch is empty.
        fill = tuple(colour) if any(colour) else "white"
        draw.rectangle((x, y + 2, x + swatch, y + 2 + swatch), fill=fill, outline=_GREY)
        draw.text((x + swatch + gap, y), name, fill=_INK, font=font)
    return sheet


def loss_curve(
    history: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    title: str = "Loss during training",
    ylabel: str = "cross-entropy (nats per pixel)",
) -> None:
    """Draws curves such as "train" and "validation", each given as (step, loss) pairs, into a PNG.

    A curve of more than 50 points is drawn thin, with its running mean over a twentieth of its length on top.
    The axis is logarithmic when the losses span more than a factor of 50.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    values = np.array([loss for curve in history.values() for _, loss in curve])
    positive = values[values > 0]
    if positive.size and positive.max() > 50 * positive.min():
        axes.set_yscale("log")
    for (name, curve), colour in zip(history.items(), _COLOURS * len(history), strict=False):
        if not curve:
            continue
        shade = [part / 255 for part in colour]
        steps, losses = np.array(curve, dtype=float).T
        if len(steps) > 50:
            axes.plot(steps, losses, color=shade, alpha=0.25, linewidth=0.8)
            window = len(steps) // 20
            losses = np.convolve(losses, np.ones(window) / window, mode="valid")
            steps = steps[window // 2 :][: len(losses)]
            axes.plot(steps, losses, color=shade, linewidth=2, label=f"{name} (mean over {window} steps)")
        else:
            axes.plot(steps, losses, color=shade, linewidth=2, marker="o", markersize=4, label=name)
    axes.set(title=title, xlabel="training step", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    save_figure(figure, path)


def sample_sheet(
    rows: Sequence[Sequence[Tensor]],
    path: str | Path,
    columns: Sequence[str] = ("image", "truth", "before", "after"),
    names: Sequence[str] | None = None,
    classes: Sequence[str] = (),
    colours: Sequence[Colour] = (),
) -> None:
    """Draws a table of pictures into a PNG: in each row an image and masks laid over it.

    Where the classes have no names, and two occur, every connected region gets a colour of its own, so that merged and
    split regions show. Masks after the truth carry their mean IoU.

    rows: each an image [C, H, W], its truth [H, W] and further masks [H, W], one entry for each column;
    names: a caption for each row; classes: their names, for a legend; colours: as in `overlay`. Raises ValueError if a
    row and the columns differ in number.
    """
    names = [""] * len(rows) if names is None else names
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} pictures does not fit the {len(columns)} columns {columns}")
    tallest = max(image.shape[1] / image.shape[2] for image, *_ in rows)
    legend = _legend([mask for _, *masks in rows for mask in masks], classes, colours)
    lines = math.ceil(len(legend) / (per_line := 2 * len(columns)))
    height = (2.75 * tallest + 0.35) * len(rows) + 0.3 + 0.22 * lines
    figure = Figure(figsize=(2.9 * len(columns), height), dpi=120, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for number, ((image, truth, *masks), name) in enumerate(zip(rows, names, strict=True)):
        num_classes = 1 + max(int(torch.where(mask == IGNORE, 0, mask).max()) for mask in (truth, *masks))
        cells = grid[number]
        cells[0].imshow(_rgb(image).astype(np.uint8))
        cells[0].set_ylabel(name)
        for axes, mask in zip(cells[1:], (truth, *masks), strict=True):
            axes.imshow(overlay(image, mask if num_classes != 2 or classes else _regions(mask), colours=colours))
        for axes, mask in zip(cells[2:], masks, strict=True):
            scores = ConfusionMatrix(num_classes)
            scores.update(mask, truth)
            axes.set_xlabel(f"mean IoU {scores.mean_iou():.3f}")
        for axes in cells:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column)
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=per_line, frameon=False)
    save_figure(figure, path)


def _legend(masks: Sequence[Tensor], classes: Sequence[str], colours: Sequence[Colour]) -> list[Patch]:
    """A patch for each class with a name that occurs in `masks`, and for the pixels that don't count."""
    names = {**dict(enumerate(classes)), IGNORE: "not counted"} if classes else {}
    occurring = sorted({int(number) for mask in masks for number in mask.unique()} & names.keys())
    hues = _with_own(colours) / 255
    return [Patch(facecolor=hues[n] if hues[n].any() else "white", edgecolor="grey", label=names[n]) for n in occurring]


def _regions(mask: Tensor) -> Tensor:
    """Numbers the 4-connected regions of class 1 by the palette's first hues, in turn."""
    numbers = torch.from_numpy(np.asarray(label((mask == 1).cpu().numpy(), connectivity=1)))
    return torch.where(mask.cpu() == IGNORE, IGNORE, torch.where(numbers > 0, (numbers - 1) % len(_COLOURS) + 1, 0))
