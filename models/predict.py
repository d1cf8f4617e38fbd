"""Prediction for images of any size: the overlap-tile strategy of the U-Net paper (its figure 2), and its like for
networks that pad with zeros."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .data.augment import mirror_pad
from .visual import Colour, class_map, overlay, probability_map, save_picture

SCENE_PIXELS = 1024 * 2048
"""The largest image that a scene network takes in one piece, if no tile is asked for."""
SCENE_TILE = 1024
_GRID = 32
"""Pixels between which a scene network's coarsest cells lie."""


class TileNetwork(Protocol):
    """What tiling needs to know of a segmentation network; `UNet` explains the names."""

    num_classes: int
    alignment: int
    context: int

    def fitting_size(self, at_least: int) -> int: ...

    def __call__(self, input: Tensor, /) -> Tensor: ...


@torch.no_grad()
def predict_logits(network: TileNetwork, image: Tensor, tile: int = 572) -> Tensor:
    """The network's logits for every pixel of an image of any size: [C, H, W] -> [K, H, W].

    The image is extended by mirroring, at least `network.context` pixels at each side, and cut into
    overlapping tiles of at most `tile` input pixels a side. From each tile's output only the pixels are used
    that see nothing beyond the tile. Neighbouring tiles start a multiple of `network.alignment` apart, so
    that their max-pools see the same grid: the paper's own step of 388 would not do (388 = 24 * 16 + 4).
    Therefore the result does not depend on `tile`: it equals the prediction of the whole extended image in
    one piece, but for the order in which the linear algebra library sums.

    A network with padding="same" is treated alike: the mirrored margin, not its zero padding, is what the
    image's border sees, and of each tile the `context` pixels that feel the zero padding are dropped.

    Puts the network into no mode: call network.eval() first. The image lies on the network's device.
    ValueError for an image that is not [C, H, W], and for a tile too small to leave anything.
    """
    if image.dim() != 3 or 0 in image.shape:
        raise ValueError(f"expected an image [C, H, W], got {list(image.shape)}")
    context, alignment = network.context, network.alignment
    height, width = image.shape[1:]
    smallest = network.fitting_size(2 * context + alignment)
    if tile < smallest:
        raise ValueError(f"tile={tile} is too small for this network: the smallest is {smallest}")

    def plan(size: int) -> tuple[int, list[int]]:
        """The tile's input size along one side and where the tiles' outputs start."""
        whole = network.fitting_size(size + 2 * context)
        if whole <= tile:
            return whole, [0]
        side = network.fitting_size(tile - alignment + 1)
        return side, list(range(0, size, (side - 2 * context) // alignment * alignment))

    (tile_height, tops), (tile_width, lefts) = plan(height), plan(width)
    bottom = tops[-1] + tile_height - context - height
    right = lefts[-1] + tile_width - context - width
    extended = mirror_pad(image, (context, right, context, bottom))
    kept_height, kept_width = tile_height - 2 * context, tile_width - 2 * context
    logits = image.new_empty(network.num_classes, height, width)
    for top in tops:
        for left in lefts:
            output = network(extended[None, :, top : top + tile_height, left : left + tile_width])[0]
            lost_y, lost_x = (output.shape[1] - kept_height) // 2, (output.shape[2] - kept_width) // 2
            kept = output[:, lost_y : lost_y + kept_height, lost_x : lost_x + kept_width]
            target = logits[:, top : top + kept_height, left : left + kept_width]
            target.copy_(kept[:, : target.shape[1], : target.shape[2]])
    return logits


def predict_probability(network: TileNetwork, image: Tensor, tile: int = 572, *, symmetries: bool = False) -> Tensor:
    """Class probabilities [K, H, W], float32, of an image [C, H, W] (see `predict_logits`).

    With `symmetries` the mean over the image's eight rotations and reflections (the paper averages seven
    rotations).
    """
    if not symmetries:
        return predict_logits(network, image, tile).float().softmax(0)
    total = torch.zeros((), device=image.device)
    for turns in range(4):
        for mirrored in (False, True):
            view = torch.rot90(image, turns, (1, 2))
            probability = predict_probability(network, view.flip(2) if mirrored else view, tile)
            probability = probability.flip(2) if mirrored else probability
            total = total + torch.rot90(probability, -turns, (1, 2))
    return total / 8


@torch.no_grad()
def predict_scene_logits(network: nn.Module, image: Tensor, tile: int = 0) -> Tensor:
    """Logits [K, H, W] of a network for scenes, for a normalised image [C, H, W] of any size.

    tile: 0 takes an image of up to 1024 x 2048 pixels in one piece, and tiles of 1024 for a larger one; any other
        number of at least 64 is the largest height and width in one piece.

    Tiles overlap by half: of each, the outer quarter is dropped, except at the image's own borders. They start at
    multiples of 32 pixels, so that max-pools see the same grid in all of them. Where a pixel's logits depend on nothing
    farther away than a quarter of the tile, the result is that of the whole image, but for the order of sums. Networks
    that look at the whole image at once see the tile in its place.

    An image smaller than `network.smallest`, if the network has that, is extended by mirroring. Puts the network into
    no mode: call network.eval() first. ValueError for an image that is not [C, H, W] and for a tile below 64.
    """
    if image.dim() != 3 or 0 in image.shape:
        raise ValueError(f"expected an image [C, H, W], got {list(image.shape)}")
    if tile != 0 and tile < 2 * _GRID:
        raise ValueError(f"tile={tile}: must be at least {2 * _GRID}, or 0 for one that fits")
    height, width = image.shape[1:]
    tile = tile or (max(height, width) if height * width <= SCENE_PIXELS else SCENE_TILE)
    smallest = getattr(network, "smallest", 1)
    rows = []
    for top, bottom, kept_y in _windows(height, tile):
        row = []
        for left, right, kept_x in _windows(width, tile):
            window = image[:, top:bottom, left:right]
            missing_y, missing_x = (max(smallest - size, 0) for size in window.shape[1:])
            row.append(network(mirror_pad(window, (0, missing_x, 0, missing_y))[None])[0][:, kept_y, kept_x])
        rows.append(torch.cat(row, 2))
    return torch.cat(rows, 1)


def _windows(size: int, tile: int) -> Iterator[tuple[int, int, slice]]:
    """Start and end of the tiles along one side of an image, and which part of each is kept."""
    step = tile // 2 // _GRID * _GRID if size > tile else size
    margin = (tile - step) // 2
    for start in range(0, max(size - tile, 0) + step, step):
        end = min(start + tile, size)
        yield start, end, slice(margin if start else 0, margin + step if end < size else end - start)


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(image - mean) / std for each channel of an image [C, H, W]."""
    return (image - image.new_tensor(mean)[:, None, None]) / image.new_tensor(std)[:, None, None]


@torch.no_grad()
def predict_scene(
    network: nn.Module,
    image: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    scale: int = 1,
    tile: int = 0,
    mirrored: bool = False,
) -> Tensor:
    """Class probabilities [K, H, W], float32, of an image [C, H, W] in [0, 1], as the network was trained to see it.

    mean, std: of the training's normalisation. scale: the image is made so many times smaller first, by averaging, and
    the probabilities are interpolated back. mirrored: average with the prediction for the mirror image. tile as in
    `predict_scene_logits`, in pixels of the smaller image.
    """
    height, width = image.shape[1:]
    small = normalise(F.avg_pool2d(image, scale, ceil_mode=True), mean, std)
    probability = predict_scene_logits(network, small, tile).float().softmax(0)
    if mirrored:
        turned = predict_scene_logits(network, small.flip(2), tile).float().softmax(0).flip(2)
        probability = (probability + turned) / 2
    if scale > 1:
        probability = F.interpolate(probability[None], scale_factor=scale, mode="bilinear")[0].clamp_max(1)
    return probability[:, :height, :width]


def read_image(path: Path, channels: int) -> Tensor:
    """A picture file as float32 [channels, H, W] in [0, 1], as grey (1 channel) or RGB (3).

    ValueError if the file is no picture, or if it would have to have another number of channels.
    """
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ValueError(f"a network with {channels} input channels takes no picture file: grey has 1, RGB has 3")
    try:
        with Image.open(path) as picture:
            if channels == 1 and picture.mode == "I;16":
                pixels = np.asarray(picture) / np.float32(65535)
            else:
                pixels = np.asarray(picture.convert(modes[channels])) / np.float32(255)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1).contiguous()


def save_prediction(
    probability: Tensor,
    image: Tensor,
    folder: Path,
    name: str,
    classes: Sequence[str] | None = None,
    colours: Sequence[Colour] = (),
) -> list[Path]:
    """Writes `name`_classes.png, `name`_probability.png and `name`_overlay.png into `folder`; returns their paths.

    probability: [K, H, W], image: [C, H, W] in [0, 1]; classes, colours: names for a legend of the overlay, and the
    classes' colours. The probability map shows class 1 if there are two classes, otherwise how probable the chosen
    class is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    confidence, chosen = probability.max(0)
    pictures = {
        "classes": class_map(chosen, colours),
        "probability": probability_map(probability[1] if len(probability) == 2 else confidence),
        "overlay": overlay(image, chosen, classes, colours),
    }
    paths = []
    for kind, picture in pictures.items():
        paths.append(folder / f"{name}_{kind}.png")
        save_picture(picture, paths[-1])
    return paths
