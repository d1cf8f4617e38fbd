"""DilatedNet: Yu, Koltun 2016, "Multi-Scale Context Aggregation by Dilated Convolutions" (arXiv 1511.07122)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.augment import mirror_pad
from ..layers import Conv2d, Ops, halve
from .vgg import VGG16_STAGES, Stages, check_input, conv_stages, in_channels_of, initialise

DILATIONS = (1, 1, 2, 4, 8, 16, 1)
"""Of the context module's 3x3 convolutions; each output value sees 67 x 67 of its input (table 1)."""
MULTIPLIERS = {"basic": (1, 1, 1, 1, 1, 1, 1), "large": (2, 2, 4, 8, 16, 32, 32)}
"""How many times the number of classes each of them has channels; the last layer, 1x1, has it once."""


def context_module(
    num_classes: int, size: Literal["basic", "large"] = "basic", sigma: float = 0.01, ops: Ops = "fused"
) -> nn.Sequential:
    """Section 3, table 1: [N, C, H, W] -> [N, C, H, W]. Seven 3x3 convolutions with growing dilation and ReLU, zero
    padded, and a 1x1 convolution.

    It begins as the identity of values above zero. "basic": each channel is handed on (equation 4). "large": each is
    spread over the channels that stand for it, and their other weights are drawn from N(0, sigma) (equation 5).

    sigma: 0.01, as in the authors' training, divided by how many times as many channels the layer has.
    """
    if size not in MULTIPLIERS:
        raise ValueError(f'context={size!r} is unknown: choose "basic" or "large"')
    layers, before = [], num_classes
    for dilation, multiplier in zip(DILATIONS, MULTIPLIERS[size], strict=True):
        after = num_classes * multiplier
        layers.append(Conv2d(before, after, 3, padding=dilation, dilation=dilation, activation="relu", ops=ops))
        before = after
    layers.append(Conv2d(before, num_classes, 1, ops=ops))
    for layer in layers:
        identity_(layer, num_classes, 0.0 if size == "basic" else sigma * num_classes / layer.out_channels)
    return nn.Sequential(*layers)


@torch.no_grad()
def identity_(layer: Conv2d, groups: int, sigma: float) -> None:
    """Makes a convolution hand on its input (equations 4 and 5). Its C_in and C_out channels are both divided into
    `groups`; each output channel gets its group's inputs, groups / C_out times. Other weights: N(0, sigma)."""
    after, before, *kernel = layer.weight.shape
    nn.init.normal_(layer.weight, std=sigma)
    same = torch.arange(after)[:, None] * groups // after == torch.arange(before) * groups // before
    centre = layer.weight[:, :, kernel[0] // 2, kernel[1] // 2]
    centre.copy_(torch.where(same.to(centre.device), groups / after, centre))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class DilatedNet(nn.Module):
    """The front end of section 4 with a context module: [N, in_channels, H, W] -> logits [N, num_classes, H, W], for
    any H and W.

    VGG16 without its last two max-pools, the convolutions behind them dilated in their place (2, and 4 for fc6), so
    that the grid is 8 pixels wide. Nothing is padded: the image is, by reflection, 186 pixels on each side. The scores
    go through the context module and are interpolated bilinearly.

    context: "basic", "large", or None for the front end alone.
    stages, dense, window: VGG16's channels, the channels of fc6 and fc7, and the size of fc6's kernel; others than
        VGG16's are for narrow networks.
    ops: "fused" computes with backstride.fused_ops, "torch" with torch.nn.functional.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 21,
        *,
        context: Literal["basic", "large"] | None = "basic",
        stages: Stages = VGG16_STAGES,
        dense: int = 4096,
        window: int = 7,
        dropout: float = 0.5,
        ops: Ops = "fused",
    ):
        super().__init__()
        if len(stages) != 5:
            raise ValueError(f"stages={stages}: DilatedNet has five stages, as VGG16")
        if window % 2 == 0:
            raise ValueError(f"window={window}: must be odd, or no pixel is at its centre")
        self.num_classes = num_classes
        self.ops: Ops = ops
        self.stages = conv_stages(in_channels, stages, ops=ops)
        lost = 0  # by all convolutions, in pixels of the image
        for stage, grid in zip(self.stages, (1, 2, 4, 8, 16), strict=True):
            for layer in stage.children():
                assert isinstance(layer, Conv2d)
                layer.padding = (0, 0)
                layer.dilation = (2, 2) if grid == 16 else (1, 1)
                lost += 2 * grid
        self.fc6 = Conv2d(stages[4][-1], dense, window, dilation=4, activation="relu", ops=ops)
        self.fc7 = Conv2d(dense, dense, 1, activation="relu", ops=ops)
        self.final = Conv2d(dense, num_classes, 1, ops=ops)
        self.dropout = nn.Dropout(dropout)
        self.margin = (lost + 32 * (window - 1)) // 2
        self.apply(initialise)
        nn.init.normal_(self.final.weight, std=0.001)
        self.context = nn.Identity() if context is None else context_module(num_classes, context, ops=ops)

    def front_end(self, input: Tensor) -> Tensor:
        """[N, in_channels, 8 h + 2 margin, 8 w + 2 margin] -> scores [N, num_classes, h, w], with no padding: each from
        the pixels that it stands for and the `margin` (186 as published) around them."""
        x = input
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number < 3:
                x = halve(x, self.ops)
        x = self.dropout(self.fc6(x))
        return self.final(self.dropout(self.fc7(x)))

    def forward(self, input: Tensor) -> Tensor:
        check_input(input, in_channels_of(self.stages))
        height, width = input.shape[2:]
        below, right = (self.margin + -side % 8 for side in (height, width))
        x = self.front_end(mirror_pad(input, (self.margin, right, self.margin, below)))
        x = F.interpolate(self.context(x), scale_factor=8, mode="bilinear", align_corners=False)
        return x[:, :, :height, :width]
