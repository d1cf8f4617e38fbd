"""The task of training a network for scenes (see segmentation/networks.py), for the loop in train.py."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from ..data.augment import random_crop
from ..data.scenes import SceneData
from ..data.sets import SETS, detect, open_split
from ..losses import auxiliary_cross_entropy, median_frequency_weights
from ..metrics import ConfusionMatrix
from ..predict import normalise, predict_scene_logits
from ..segmentation.networks import build_scene_network
from .config import SceneConfig
from .segmentation import IGNORE, PixelTask, items
from .task import Batch, seed_everything
from .train import load_trained


def open_scenes(config: SceneConfig) -> tuple[SceneData, SceneData, SceneConfig]:
    """(training data, held-out data, the settings with what only the data can tell filled in)"""
    root = Path(config.data)
    name = detect(root) if config.dataset == "auto" else config.dataset
    training = open_split(name, root, config.split, config.scale)
    validation = open_split(name, root, "val", config.scale)
    return training, validation, replace(config, dataset=name, classes=training.classes, colours=training.colours)


def open_scored(config: SceneConfig) -> tuple[str, SceneData]:
    """(the split that final scores are of, its data)"""
    split = SETS[config.dataset].scored_split(Path(config.data))
    return split, open_split(config.dataset, Path(config.data), split, config.scale)


def load_scene_network(folder: Path) -> tuple[nn.Module, SceneConfig]:
    """The best network of a training run, ready to predict, on the CPU."""
    config = SceneConfig.read(folder)
    network = _build(config)
    load_trained(network, folder)
    return network, config


def _build(config: SceneConfig) -> nn.Module:
    return build_scene_network(config.network, len(config.classes), config.width, config.ops)


class SceneTask(PixelTask[nn.Module]):
    """Whole images or windows of them, half of them mirrored, and cross-entropy, by default with SegNet's
    median-frequency weights.

    Seeds the global random number generators with config.seed before it initialises the network. `config` must be the
    one that `open_scenes` returned with the data.
    """

    def __init__(
        self, config: SceneConfig, training: SceneData, validation: SceneData, device: torch.device | str = "cpu"
    ):
        seed_everything(config.seed)
        super().__init__(config, _build(config), len(config.classes), training, validation, device)
        self.config, self.classes, self.colours = config, config.classes, config.colours
        if config.batch_size > 1 and not config.crop and len(sizes := sorted(set(training.sizes))) > 1:
            raise ValueError(
                f"the images have {len(sizes)} sizes, from {_shown(sizes[0])} to {_shown(sizes[-1])} pixels, and a "
                f"batch needs one: train on windows (--crop 321) or with --batch-size 1"
            )
        self.class_weights = torch.ones(self.num_classes)
        if config.class_weights == "median-frequency":
            masks = (training.mask(index) for index in range(len(training)))
            self.class_weights = median_frequency_weights(masks, self.num_classes, IGNORE)

    def weights(self, mask: Tensor) -> Tensor:
        return self.class_weights[torch.where(mask == IGNORE, 0, mask)] * (mask != IGNORE)

    def sample(self, index: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        image, mask = self.training[index]
        if torch.randint(2, (), generator=generator):
            image, mask = image.flip(-1), mask.flip(-1)
        if self.config.crop:
            image, mask = random_crop(image, mask, self.config.crop, generator)
        return normalise(image, self.config.mean, self.config.std), mask, self.weights(mask)

    def loss(self, batch: Batch) -> Tensor:
        """Of a network with `loss_weights` the auxiliary losses are added. (Several processes weigh them by the pixels
        of the whole targets, which is a little off for coarser ones.)"""
        main, *others = getattr(self.network, "loss_weights", (1.0,))
        if not others:
            return super().loss(batch)
        images, targets, weights = batch
        shares = [main, *(self.config.auxiliary * other for other in others)]
        return auxiliary_cross_entropy(self.network(images, auxiliary=True), shares, targets, weights)

    def predict(self, image: Tensor) -> Tensor:
        return predict_scene_logits(self.network, normalise(image, self.config.mean, self.config.std))

    def scores(self, confusion: ConfusionMatrix) -> dict[str, float]:
        return confusion.fcn_scores()


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


@torch.no_grad()
def evaluate_scenes(task: SceneTask, data: SceneData) -> dict[str, float]:
    """The scores of FCN's section 5 over all pixels of `data` that are not void, the IoU of each class that occurs, and
    the pixel accuracy of always answering the commonest class."""
    confusion = ConfusionMatrix(task.num_classes)
    for image, mask in items(data):
        confusion.update(task.predict(image.to(task.device)).argmax(0).cpu(), mask)
    shares = confusion.counts.sum(1) / confusion.counts.sum()
    ious = zip(task.classes, confusion.iou().tolist(), strict=True)
    classes = {f"iou_{name}": value for name, value in ious if not math.isnan(value)}
    return confusion.fcn_scores() | classes | {"commonest_class": shares.max().item()}
