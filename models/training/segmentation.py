"""The task of training a segmentation network, for the loop in train.py."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Subset

from ..data.augment import elastic_deformation, mirror_pad, random_crop, random_flip_rotate
from ..data.cells import TouchingCells
from ..data.folder import FolderSegmentation
from ..losses import border_weight_map, class_weights, weighted_cross_entropy
from ..metrics import ConfusionMatrix, v_scores
from ..predict import predict_logits, predict_probability
from ..segmentation.unet import UNet
from ..visual import sample_sheet
from . import distributed
from .config import SegmentationConfig, TrainingConfig
from .task import Batch, Network, Task, make_generator, seed_everything
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


class PixelTask(Task[Network]):
    """What training has in common for all networks that name a class for every pixel."""

    score = "mean_iou"
    higher_is_better = True
    per = "pixel"
    counted = "img"
    sample_suffix = ".png"
    classes: Sequence[str] = ()
    """The classes' names, for a legend below pictures ..."""
    colours: Sequence[tuple[int, int, int]] = ()
    """... and their colours."""

    def __init__(
        self,
        config: TrainingConfig,
        network: Network,
        num_classes: int,
        training: Data,
        validation: Data,
        device: torch.device | str,
    ):
        self.network, self.num_classes, self.training, self.validation = network, num_classes, training, validation
        self.network.to(device)
        self.device = device
        self.seed = config.seed
        self.batch_size = config.batch_size
        self.counted_per_step = config.batch_size * distributed.size()
        self.drawn: list[list[Tensor]] = []

    @abstractmethod
    def sample(self, index: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Image [C, H, W], target [h, w] and weight of each pixel of the target, augmented, of a training item."""

    @abstractmethod
    def predict(self, image: Tensor) -> Tensor:
        """Logits [K, H, W] of an image [C, H, W] of any size that is on the network's device."""

    @abstractmethod
    def weights(self, mask: Tensor) -> Tensor:
        """The loss's weight of each pixel of a mask [H, W]."""

    @abstractmethod
    def scores(self, confusion: ConfusionMatrix) -> dict[str, float]:
        """The scores that a validation reports, "mean_iou" among them."""

    def batch(self, step: int) -> Batch:
        """(images [N, C, H, W], targets [N, h, w], weights [N, h, w]), h and w being the network's output size."""
        first = step * self.counted_per_step + distributed.rank() * self.batch_size
        samples = [self._numbered(first + i) for i in range(self.batch_size)]
        images, targets, weights = (torch.stack(part) for part in zip(*samples, strict=True))
        return images, targets, weights

    def _numbered(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The number-th sample of the run. An epoch shows every image once, in an order of its own."""
        count = len(self.training)
        order = torch.randperm(count, generator=make_generator(self.seed, 0, number // count))
        return self.sample(int(order[number % count]), make_generator(self.seed, 1, number))

    def loss(self, batch: Batch) -> Tensor:
        images, targets, weights = batch
        return weighted_cross_entropy(self.network(images), targets, weights)

    def mass(self, batch: Batch) -> Tensor:
        _, targets, weights = batch
        return (weights * (targets != IGNORE)).sum()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        confusion = ConfusionMatrix(self.num_classes)
        losses = []
        self.drawn = []
        for index in distributed.share(len(self.validation)):
            image, mask = self.validation[index]
            logits = self.predict(image.to(self.device)).cpu()
            losses.append(weighted_cross_entropy(logits[None], mask[None], self.weights(mask)[None]).item())
            confusion.update(logits.argmax(0), mask)
            if len(self.drawn) < 3:
                self.drawn.append([image, mask, logits.argmax(0)])
        parts = distributed.gather((losses, confusion.counts))
        confusion.counts = torch.stack([counts for _, counts in parts]).sum(0)
        mean = np.mean([loss for part, _ in parts for loss in part])
        return {"validation": float(mean)} | self.scores(confusion)

    def draw(self, path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        titles = ("image", "truth", "prediction")
        sample_sheet(self.drawn, path, titles, classes=self.classes, colours=self.colours)
        return ""


class SegmentationTask(PixelTask[UNet]):
    """Crops with the paper's augmentation, its weighted cross-entropy, and validation by overlapping tiles.

    Seeds the global random number generators with config.seed before it initialises the network. `config`
    must be the one that `open_data` returned with the data.
    """

    def __init__(
        self, config: SegmentationConfig, training: Data, validation: Data, device: torch.device | str = "cpu"
    ):
        seed_everything(config.seed)
        network = build_network(config)
        network.output_size(config.tile)  # says which tile would fit
        super().__init__(config, network, config.num_classes, training, validation, device)
        self.config = config
        self.class_weights = class_weights((mask for _, mask in items(training)), config.num_classes)
        self.example = lru_cache(maxsize=256)(self._example)

    def _example(self, index: int) -> tuple[Tensor, Tensor]:
        """(image with its weight map as a last channel, mask)"""
        image, mask = self.training[index]
        return torch.cat([image, self.weights(mask)[None]]), mask

    def weights(self, mask: Tensor) -> Tensor:
        c = self.config
        return border_weight_map(mask, c.num_classes, c.border_weight, c.border_sigma, IGNORE, self.class_weights)

    def sample(self, index: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        stack, mask = self.example(index)
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

    def predict(self, image: Tensor) -> Tensor:
        return predict_logits(self.network, image, self.config.tile)

    def scores(self, confusion: ConfusionMatrix) -> dict[str, float]:
        return {
            "pixel_accuracy": confusion.pixel_accuracy(),
            "mean_iou": confusion.mean_iou(),
            "mean_dice": confusion.mean_dice(),
        }


def evaluate(network: UNet, data: Data, tile: int, *, symmetries: bool = False) -> dict[str, float]:
    """Pixel accuracy, mean IoU and mean Dice over all pixels of `data`.

    For two classes, no ignored pixels and images of one size also the ISBI-2012 pair V_rand and V_info, with
    class 1 as the inside of the cells. `symmetries` as in `predict_probability`.
    """
    device = next(network.parameters()).device
    confusion = ConfusionMatrix(network.num_classes)
    probabilities, masks = [], []
    for image, mask in items(data):
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


def items(data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    for index in range(len(data)):
        yield data[index]
