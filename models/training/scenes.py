"""The task of training SegNet, DeconvNet or FCN on driving scenes, for the loop in train.py."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from ..data.camvid import CLASSES, CamVid
from ..losses import median_frequency_weights
from ..metrics import ConfusionMatrix
from ..segmentation.deconvnet import DeconvNet
from ..segmentation.fcn import FCN
from ..segmentation.segnet import SegNet, SegNetBasic
from ..segmentation.vgg import VGG16_STAGES, Stages
from .config import SceneConfig
from .segmentation import IGNORE, Data, PixelTask, items
from .task import seed_everything
from .train import load_trained


def build_scene_network(config: SceneConfig) -> nn.Module:
    """The network with `config.width` channels in its first stage; fc6 and fc7 are narrowed alike."""
    if config.width < 1:
        raise ValueError(f"width={config.width}: must be at least 1")
    stages: Stages = tuple(tuple(width * config.width // 64 or 1 for width in widths) for widths in VGG16_STAGES)
    dense = 64 * config.width
    count, ops = len(CLASSES), config.ops
    if config.network == "segnet":
        return SegNet(3, count, stages=stages, ops=ops)
    if config.network == "segnet-basic":
        return SegNetBasic(3, count, width=config.width, ops=ops)
    if config.network == "deconvnet":
        return DeconvNet(3, count, stages=stages, dense=dense, ops=ops)
    return FCN(3, count, stages=stages, dense=dense, ops=ops)


def load_scene_network(folder: Path) -> tuple[nn.Module, SceneConfig]:
    """The best network of a training run, ready to predict, on the CPU."""
    config = SceneConfig.read(folder)
    network = build_scene_network(config)
    load_trained(network, folder)
    return network, config


class SceneTask(PixelTask[nn.Module]):
    """Whole images, half of them mirrored, and cross-entropy with SegNet's median-frequency weights.

    Seeds the global random number generators with config.seed before it initialises the network.
    """

    colours: Sequence[tuple[int, int, int]] = tuple(CLASSES.values())

    def __init__(self, config: SceneConfig, training: Data, validation: Data, device: torch.device | str = "cpu"):
        seed_everything(config.seed)
        super().__init__(config, build_scene_network(config), len(CLASSES), training, validation, device)
        masks = (mask for _, mask in items(training))
        self.class_weights = median_frequency_weights(masks, self.num_classes, IGNORE)

    def weights(self, mask: Tensor) -> Tensor:
        return self.class_weights[torch.where(mask == IGNORE, 0, mask)] * (mask != IGNORE)

    def sample(self, index: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        image, mask = self.training[index]
        if torch.randint(2, (), generator=generator):
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask, self.weights(mask)

    def predict(self, image: Tensor) -> Tensor:
        return self.network(image[None])[0]

    def scores(self, confusion: ConfusionMatrix) -> dict[str, float]:
        return confusion.fcn_scores()


def open_scenes(config: SceneConfig) -> tuple[CamVid, CamVid]:
    return CamVid(config.data, "train", config.scale), CamVid(config.data, "val", config.scale)


@torch.no_grad()
def evaluate_scenes(network: nn.Module, data: Data) -> dict[str, float]:
    """The scores of FCN's section 5 over all pixels of `data` that are not void, the IoU of each class that occurs, and
    the pixel accuracy of always answering the commonest class."""
    device = next(network.parameters()).device
    confusion = ConfusionMatrix(len(CLASSES))
    for image, mask in items(data):
        confusion.update(network(image[None].to(device))[0].argmax(0).cpu(), mask)
    shares = confusion.counts.sum(1) / confusion.counts.sum()
    ious = zip(CLASSES, confusion.iou().tolist(), strict=True)
    classes = {f"iou_{name}": value for name, value in ious if not math.isnan(value)}
    return confusion.fcn_scores() | classes | {"commonest_class": shares.max().item()}
