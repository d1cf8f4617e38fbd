"""The networks for scenes by the names under which `backstride train` and `backstride predict` know them.

One entry in NETWORKS registers a network: the command line, training, checkpoints and prediction need no more.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ..layers import Ops
from .deconvnet import DeconvNet
from .fcn import FCN
from .segnet import SegNet, SegNetBasic
from .vgg import VGG16_STAGES, Stages


class SceneNetwork(NamedTuple):
    """build: (number of classes, channels of the first stage, ops) -> a network that maps RGB images [N, 3, H, W] to
    logits [N, classes, H, W]. It may have an attribute `smallest`, the least height and width that it takes."""

    paper: str
    build: Callable[[int, int, Ops], nn.Module]


def narrowed(width: int) -> Stages:
    """VGG16's channels, all in the proportion width : 64."""
    return tuple(tuple(channels * width // 64 or 1 for channels in stage) for stage in VGG16_STAGES)


# fc6 and fc7 have 4096 channels for a first stage of 64.
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
}


def build_scene_network(name: str, num_classes: int, width: int, ops: Ops) -> nn.Module:
    """The network of that name; ValueError for an unknown name or a width below 1."""
    if name not in NETWORKS:
        raise ValueError(f"network={name!r} is unknown: choose {', '.join(NETWORKS)}")
    if width < 1:
        raise ValueError(f"width={width}: must be at least 1")
    return NETWORKS[name].build(num_classes, width, ops)
