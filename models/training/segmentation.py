"""The task of training a segmentation network, for the loop in train.py."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from ..data.augment import elastic_deformation, mirror_pad, random_crop, random_flip_rotate
from ..data.cells import TouchingCells
from ..data.folder import FolderSegmentation
from ..losses import border_weight_map, class_weights, weighted_cross_entropy
from ..metrics import ConfusionMatrix, v_scores
from ..predict import predict_logits, predict_probability
from ..segmentation.unet import UNet
from ..visual import sample_sheet
from .config import SegmentationConfig
from .task import Batch, Task, make_generator, seed_everything
from .train import load_trained

IGNORE = 255
CELLS_TRAINING, CELLS_VALIDATION, CELLS_SIZE = 32, 4, 256


class Data(Protocol):
    """Items: image float32 [C, H, W] in [0, 1]; mask int64 [H, W], 255 where ignored."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]: ...


def build_network(config: SegmentationConfig) -> UNet:
    return UNet(
        config.in_channels,
        config.num_classes,
        width=config.width,
        depth=config.depth,
        padding=config.padding,
        dropout=config.dropout,
        ops=config.ops,
    )


def load_network(folder: Path) -> tuple[UNet, SegmentationConfig]:
    """The best network of a training run, ready to predict, on the CPU.

    ValueError if `folder` holds no run, or one that has saved no checkpoint yet.
    """
    config = SegmentationConfig.read(folder)
    network = build_network(config)
    load_trained(network, folder)
    return network, config


def open_data(config: SegmentationConfig) -> tuple[Data, Data, SegmentationConfig]:
    """(training data, held-out data, the settings with what only the data can tell filled in).

    Without config.validation the last tenth of a folder's images is held out. ValueError if that leaves
    nothing to train on, or if an index is not in the folder.
    """
    if config.data is None:
        training = TouchingCells(CELLS_TRAINING, CELLS_SIZE, seed=2 * config.seed)
        return training, TouchingCells(CELLS_VALIDATION, CELLS_SIZE, seed=2 * config.seed + 1), config
    data = FolderSegmentation(config.data)
    held_out = config.validation or tuple(range(len(data) - max(1, len(data) // 10), len(data)))
    if outside := [index for index in held_out if index not in range(len(data))]:
        raise ValueError(f"validation image {outside[0]} does not exist: {config.data} holds 0 ... {len(data) - 1}")
    training = [index for index in range(len(data)) if index not in held_out]
    if not training:
        raise ValueError(f"{config.data} holds {len(data)} images and all are held out: none is left to train on")
    config = replace(config, validation=held_out, in_channels=data.in_channels, num_classes=data.num_classes)
    return Subset(data, training), Subset(data, held_out), config


class SegmentationTask(Task[UNet]):
    """Crops with the paper's augmentation, its weighted cross-entropy, and validation by overlapping tiles.

    Seeds the global random number generators with config.seed before it initialises the network. `config`
    must be the one that `open_data` returned with the data.
    """

    score = "mean_iou"
    higher_is_better = True
    per = "pixel"
    counted = "img"
    sample_suffix = ".png"

    def __init__(
        self, config: SegmentationConfig, training: Data, validation: Data, device: torch.device | str = "cpu"
    ):
        self.config, self.training, self.validation = config, training, validation
        seed_everything(config.seed)
        self.network = build_network(config)
        self.network.output_size(config.tile)  # says which tile would fit
        self.network.to(device)
        self.device = device
        self.counted_per_step = config.batch_size
        self.class_weights = class_weights((mask for _, mask in _items(training)), config.num_classes)
        self.example = lru_cache(maxsize=256)(self._example)
        self.drawn: list[list[Tensor]] = []

    def _example(self, index: int) -> tuple[Tensor, Tensor]:
        """(image with its weight map as a last channel, mask)"""
        image, mask = self.training[index]
        return torch.cat([image, self._weights(mask)[None]]), mask

    def _weights(self, mask: Tensor) -> Tensor:
        c = self.config
        return border_weight_map(mask, c.num_classes, c.border_weight, c.border_sigma, IGNORE, self.class_weights)

    def batch(self, step: int) -> Batch:
        """(images [N, C, tile, tile], targets [N, s, s], weights [N, s, s]), s being the network's output size."""
        samples = [self._sample(step * self.config.batch_size + i) for i in range(self.config.batch_size)]
        images, targets, weights = (torch.stack(part) for part in zip(*samples, strict=True))
        return images, targets, weights

    def _sample(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The number-th crop of the run. An epoch shows every image once, in an order of its own."""
        c = self.config
        count = len(self.training)
        order = torch.randperm(count, generator=make_generator(c.seed, 0, number // count))
        generator = make_generator(c.seed, 1, number)
        stack, mask = self.example(int(order[number % count]))
        stack, mask = random_flip_rotate(stack, mask, generator)
        if c.elastic > 0:
            stack, mask = elastic_deformation(stack, mask, generator, sigma=c.elastic)
        # The target of a valid network is smaller than its input: mirror the image, so that its borders are
        # targets too.
        border = (c.tile - self.network.output_size(c.tile)) // 2
        pads = (border, border, border, border)
        stack, mask = random_crop(mirror_pad(stack, pads), mirror_pad(mask, pads), c.tile, generator)
        inner = slice(border, c.tile - border)
        return stack[:-1], mask[inner, inner], stack[-1, inner, inner]

    def loss(self, batch: Batch) -> Tensor:
        images, targets, weights = batch
        return weighted_cross_entropy(self.network(images), targets, weights)

    def validate(self) -> dict[str, float]:
        confusion = ConfusionMatrix(self.config.num_classes)
        losses = []
        self.drawn = []
        for image, mask in _items(self.validation):
            logits = predict_logits(self.network, image.to(self.device), self.config.tile).cpu()
            losses.append(weighted_cross_entropy(logits[None], mask[None], self._weights(mask)[None]).item())
            confusion.update(logits.argmax(0), mask)
            if len(self.drawn) < 3:
                self.drawn.append([image, mask, logits.argmax(0)])
        return {
            "validation": float(np.mean(losses)),
            "pixel_accuracy": confusion.pixel_accuracy(),
            "mean_iou": confusion.mean_iou(),
            "mean_dice": confusion.mean_dice(),
        }

    def draw(self, path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_sheet(self.drawn, path, ("image", "truth", "prediction"))
        return ""


def evaluate(network: UNet, data: Data, tile: int, *, symmetries: bool = False) -> dict[str, float]:
    """Pixel accuracy, mean IoU and mean Dice over all pixels of `data`.

    For two classes, no ignored pixels and images of one size also the ISBI-2012 pair V_rand and V_info, with
    class 1 as the inside of the cells. `symmetries` as in `predict_probability`.
    """
    device = next(network.parameters()).device
    confusion = ConfusionMatrix(network.num_classes)
    probabilities, masks = [], []
    for image, mask in _items(data):
        probability = predict_probability(network, image.to(device), tile, symmetries=symmetries).cpu()
        confusion.update(probability.argmax(0), mask)
        probabilities.append(probability)
        masks.append(mask)
    metrics = {
        "pixel_accuracy": confusion.pixel_accuracy(),
        "mean_iou": confusion.mean_iou(),
        "mean_dice": confusion.mean_dice(),
    }
    one_size = len({mask.shape for mask in masks}) == 1
    if network.num_classes == 2 and one_size and all((mask != IGNORE).all() for mask in masks):
        inside, truth = torch.stack([probability[1] for probability in probabilities]), torch.stack(masks)
        metrics["v_rand"], metrics["v_info"] = v_scores(inside, truth)
    return metrics


def _items(data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    for index in range(len(data)):
        yield data[index]
