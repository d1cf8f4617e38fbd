"""The networks for scenes by the names under which `backstride train` and `backstride predict` know them.

One entry in NETWORKS registers a network: the command line, training, checkpoints and prediction need no more.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ..layers import Ops
from .deconvnet import DeconvNet
from .deeplab import DeepLabV2, DeepLabV3, DeepLabV3Plus
from .deeplab_vgg import DeepLabVGG
from .dilatednet import DilatedNet
from .fcn import FCN
from .icnet import ICNet
from .pspnet import PSPNet
from .segnet import SegNet, SegNetBasic
from .vgg import VGG16_STAGES, Stages


class SceneNetwork(NamedTuple):
    """build: (number of classes, channels of the first stage, ops) -> a network that maps RGB images [N, 3, H, W] to
    logits [N, classes, H, W]. It may have an attribute `smallest`, the least height and width that it takes, and
    `loss_weights`: then it takes `auxiliary=True` and returns several logits for training, in the weights' order."""

    paper: str
    build: Callable[[int, int, Ops], nn.Module]


def narrowed(width: int) -> Stages:
    """VGG16's channels, all in the proportion width : 64."""
    return tuple(tuple(channels * width // 64 or 1 for channels in stage) for stage in VGG16_STAGES)


# A width of 64 gives the published network: fc6 and fc7 of VGG16 then have 4096 channels (1024 in DeepLab v1), and the
# first convolutions of ICNet and Xception 32.
NETWORKS: dict[str, SceneNetwork] = {
    "segnet": SceneNetwork(
        "SegNet (Badrinarayanan, Kendall, Cipolla 2017)",
        lambda count, width, ops: SegNet(3, count, stages=narrowed(width), ops=ops),
    ),
    "segnet-basic": SceneNetwork(
        "SegNet-Basic (Badrinarayanan, Kendall, Cipolla 2017)",
        lambda count, width, ops: SegNetBasic(3, count, width=width, ops=ops),
    ),
    "deconvnet": SceneNetwork(
        "DeconvNet (Noh, Hong, Han 2015)",
        lambda count, width, ops: DeconvNet(3, count, stages=narrowed(width), dense=64 * width, ops=ops),
    ),
    "fcn": SceneNetwork(
        "FCN-8s (Long, Shelhamer, Darrell 2015)",
        lambda count, width, ops: FCN(3, count, stages=narrowed(width), dense=64 * width, ops=ops),
    ),
    "dilatednet": SceneNetwork(
        "DilatedNet with the basic context module (Yu, Koltun 2016)",
        lambda count, width, ops: DilatedNet(3, count, stages=narrowed(width), dense=64 * width, ops=ops),
    ),
    "deeplab-largefov": SceneNetwork(
        "DeepLab v1 with a large field of view (Chen et al. 2015)",
        lambda count, width, ops: DeepLabVGG(3, count, stages=narrowed(width), dense=16 * width, ops=ops),
    ),
    "deeplab-v2": SceneNetwork(
        "DeepLab v2 on ResNet-101 (Chen et al. 2016)",
        lambda count, width, ops: DeepLabV2(3, count, width=width, ops=ops),
    ),
    "deeplab-v3": SceneNetwork(
        "DeepLab v3 on ResNet-101 (Chen et al. 2017)",
        lambda count, width, ops: DeepLabV3(3, count, width=width, channels=4 * width, ops=ops),
    ),
    "deeplab-v3plus": SceneNetwork(
        "DeepLab v3+ on Xception-65 (Chen et al. 2018)",
        lambda count, width, ops: DeepLabV3Plus(
            3,
            count,
            backbone="xception",
            separable=True,
            width=width // 2 or 1,
            channels=4 * width,
            low_channels=48 * width // 64 or 1,
            ops=ops,
        ),
    ),
    "pspnet": SceneNetwork(
        "PSPNet on ResNet-101 (Zhao et al. 2017)",
        lambda count, width, ops: PSPNet(3, count, width=width, auxiliary=True, ops=ops),
    ),
    "icnet": SceneNetwork(
        "ICNet (Zhao et al. 2018)",
        lambda count, width, ops: ICNet(3, count, width=width // 2 or 1, auxiliary=True, ops=ops),
    ),
}


def build_scene_network(name: str, num_classes: int, width: int, ops: Ops) -> nn.Module:
    """The network of that name; ValueError for an unknown name or a width below 1."""
    if name not in NETWORKS:
        raise ValueError(f"network={name!r} is unknown: choose {', '.join(NETWORKS)}")
    if width < 1:
        raise ValueError(f"width={width}: must be at least 1")
    return NETWORKS[name].build(num_classes, width, ops)
