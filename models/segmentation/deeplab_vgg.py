"""DeepLab on VGG16. v1: Chen, Papandreou, Kokkinos, Murphy, Yuille 2015, "Semantic Image Segmentation with Deep
Convolutional Nets and Fully Connected CRFs" (arXiv 1412.7062). v2: the same authors 2016, "DeepLab" (arXiv
1606.00915)."""

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Conv2d, Ops, max_pool, resize
from .aspp import branches
from .output_stride import spread_out
from .vgg import VGG16_STAGES, Stages, check_input, conv_stages, in_channels_of, initialise

Variant = Literal["largefov", "4x4", "7x7", "aspp-s", "aspp-l"]


class Field(NamedTuple):
    """The first dense layer as an atrous convolution."""

    kernel: int
    rates: tuple[int, ...]
    dense: int
    average: bool = False


FIELDS: dict[Variant, Field] = {
    # v1, table 2
    "7x7": Field(7, (4,), 4096),
    "4x4": Field(4, (4,), 4096),
    "largefov": Field(3, (12,), 1024, average=True),
    # v2, section 4.1.2
    "aspp-s": Field(3, (2, 4, 8, 12), 1024),
    "aspp-l": Field(3, (6, 12, 18, 24), 1024),
}


class DeepLabVGG(nn.Module):
    """DeepLab v1 and v2 on VGG16: [N, in_channels, H, W] -> logits [N, num_classes, H, W], for any H and W.

    VGG16 with max-pools of 3x3; the last two have no stride, so that the grid is 8 pixels wide, and the convolutions
    behind them are dilated. VGG16's dense layers are convolutions: fc6 dilated, fc7 and the scores 1x1. The scores are
    interpolated bilinearly. The papers' inputs have 8n + 1 pixels (321, 513): then interpolation is exact at every
    eighth pixel.

    variant: what fc6 looks at. "7x7" and "4x4" with dilation 4 and 4096 channels; "largefov" 3x3 with dilation 12 and
        1024 channels, the network that is known as DeepLab v1; "aspp-s" and "aspp-l" (v2) four such ways side by side,
        with the dilations 2, 4, 8, 12 and 6, 12, 18, 24, each with layers of its own up to the scores, which are
        summed.
    stages, dense: VGG16's channels and those of fc6 and fc7; others than the published are for narrow networks.
    ops: "fused" computes with backstride.fused_ops, "torch" with torch.nn.functional.

    `load_vgg16` loads the convolutions.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 21,
        *,
        variant: Variant = "largefov",
        stages: Stages = VGG16_STAGES,
        dense: int | None = None,
        dropout: float = 0.5,
        ops: Ops = "fused",
    ):
        super().__init__()
        if variant not in FIELDS:
            raise ValueError(f"variant={variant!r} is unknown: choose {', '.join(FIELDS)}")
        if len(stages) != 5:
            raise ValueError(f"stages={stages}: DeepLab has five stages, as VGG16")
        field = FIELDS[variant]
        dense = dense or field.dense
        self.num_classes = num_classes
        self.average = field.average
        self.stages = conv_stages(in_channels, stages, ops=ops)
        for layer in self.stages[4].children():
            spread_out(layer, 2)
        self.pools = nn.ModuleList(max_pool(3, stride=stride, padding=1, ops=ops) for stride in (2, 2, 2, 1, 1))
        top = stages[4][-1]
        self.first = nn.ModuleList()
        for rate in field.rates:
            padding = (field.kernel - 1) * rate // 2
            self.first.append(
                Conv2d(top, dense, field.kernel, padding=padding, dilation=rate, activation="relu", ops=ops)
            )
        self.second = nn.ModuleList(Conv2d(dense, dense, 1, activation="relu", ops=ops) for _ in field.rates)
        self.scores = nn.ModuleList(Conv2d(dense, num_classes, 1, ops=ops) for _ in field.rates)
        self.dropout = nn.Dropout(dropout)
        self.apply(initialise)
        for layer in self.scores:
            nn.init.normal_(layer.get_parameter("weight"), std=0.01)

    def score(self, input: Tensor) -> Tensor:
        """Logits on a grid of 8 pixels."""
        check_input(input, in_channels_of(self.stages))
        x = input
        for stage, pool in zip(self.stages, self.pools, strict=True):
            x = pool(stage(x))
        if self.average:
            x = F.avg_pool2d(x, 3, stride=1, padding=1)
        first = [layer for layer in self.first if isinstance(layer, Conv2d)]
        total: Tensor | None = None
        for part, second, score in zip(branches(first, x), self.second, self.scores, strict=True):
            total = score(self.dropout(second(self.dropout(part))), total)
        assert total is not None
        return total

    def forward(self, input: Tensor) -> Tensor:
        return resize(self.score(input), input.shape[2:])
