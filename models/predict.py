"""Prediction for images of any size: the overlap-tile strategy of the U-Net paper (its figure 2)."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data.augment import mirror_pad
from .visual import class_map, overlay, probability_map, save_picture


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


def save_prediction(probability: Tensor, image: Tensor, folder: Path, name: str) -> list[Path]:
    """Writes `name`_classes.png, `name`_probability.png and `name`_overlay.png into `folder`; returns their paths.

    probability: [K, H, W], image: [C, H, W] in [0, 1]. The probability map shows class 1 if there are two
    classes, otherwise how probable the chosen class is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    confidence, classes = probability.max(0)
    pictures = {
        "classes": class_map(classes),
        "probability": probability_map(probability[1] if len(probability) == 2 else confidence),
        "overlay": overlay(image, classes),
    }
    paths = []
    for kind, picture in pictures.items():
        paths.append(folder / f"{name}_{kind}.png")
        save_picture(picture, paths[-1])
    return paths
