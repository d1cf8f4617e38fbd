"""FCN: Long, Shelhamer, Darrell 2015, "Fully Convolutional Networks for Semantic Segmentation" (arXiv 1411.4038)."""

from typing import Literal

import torch
from torch import Tensor, nn

from ..layers import Conv2d, ConvTranspose2d, Ops, halve
from .vgg import VGG16_STAGES, Stages, check_input, conv_stages, in_channels_of, initialise


class FCN(nn.Module):
    """FCN-32s, FCN-16s and FCN-8s on VGG16 (section 4, figure 3): [N, in_channels, H, W] -> logits
    [N, num_classes, H, W], for any H and W.

    The first convolution pads 100 pixels, so that the 7x7 convolution that was VGG16's first dense layer (fc6) fits
    images of any size; max-pools round up. A 1x1 convolution scores the classes on a grid of 32 pixels. "16s" upsamples
    that twofold and adds the scores of pool4, "8s" does so again with pool3; a last transposed convolution gives every
    pixel a score. Score layers start at zero; upsampling starts as bilinear interpolation and is learnt, except the
    last one, which stays (section 4.3).

    stride: 32, 16 or 8, the grid that the last transposed convolution upsamples.
    at_once: multiply pool4 by 0.01 and pool3 by 0.0001 before they are scored, as the authors' "at-once" networks do;
        VGG16's features grow so small only with depth. Without it the networks are trained in stages: FCN-16s starts
        with `load_state_dict(fcn_32s.state_dict(), strict=False)`, FCN-8s with FCN-16s's.
    stages, dense, window: VGG16's channels, the channels of fc6 and fc7, and the size of fc6's kernel; others than
        VGG16's are for narrow networks. The first convolution pads 16 window - 12 pixels.
    ops: "fused" computes the convolutions with backstride.fused_ops, "torch" with torch.nn.functional.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 21,
        *,
        stride: Literal[32, 16, 8] = 8,
        at_once: bool = False,
        stages: Stages = VGG16_STAGES,
        dense: int = 4096,
        window: int = 7,
        dropout: float = 0.5,
        ops: Ops = "fused",
    ):
        super().__init__()
        if stride not in (32, 16, 8):
            raise ValueError(f"stride={stride}: choose 32, 16 or 8")
        if len(stages) != 5:
            raise ValueError(f"stages={stages}: FCN has five stages, as VGG16")
        if window < 5 or window % 2 == 0:
            raise ValueError(f"window={window}: must be odd and at least 5, or the skips are too small")
        self.num_classes = num_classes
        self.stride, self.window = stride, window
        self.ops: Ops = ops
        self.scales = (0.01, 0.0001) if at_once else (1.0, 1.0)
        self.stages = conv_stages(in_channels, stages, first_padding=16 * window - 12, ops=ops)
        self.fc6 = Conv2d(stages[4][-1], dense, window, activation="relu", ops=ops)
        self.fc7 = Conv2d(dense, dense, 1, activation="relu", ops=ops)
        self.dropout = nn.Dropout(dropout)
        self.score = Conv2d(dense, num_classes, 1, ops=ops)
        skips = {32: (), 16: (3,), 8: (3, 2)}[stride]
        self.skip_scores = nn.ModuleList(Conv2d(stages[stage][-1], num_classes, 1, ops=ops) for stage in skips)
        self.up = nn.ModuleList(
            ConvTranspose2d(num_classes, num_classes, 4, stride=2, bias=False, ops=ops) for _ in skips
        )
        self.upsample = nn.ModuleDict(
            {f"{stride}s": ConvTranspose2d(num_classes, num_classes, 2 * stride, stride=stride, bias=False, ops=ops)}
        )
        self.apply(initialise)
        for layer in (self.score, *self.skip_scores):
            nn.init.zeros_(layer.get_parameter("weight"))
        for layer in (*self.up.modules(), *self.upsample.modules()):
            if isinstance(layer, ConvTranspose2d):
                layer.weight.data = bilinear(num_classes, layer.kernel_size[0]).to(layer.weight)
        self.upsample.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        check_input(input, in_channels_of(self.stages))
        x = input
        pools = []
        for stage in self.stages:
            x = halve(stage(x), self.ops)
            pools.append(x)
        x = self.dropout(self.fc6(x))
        x = self.dropout(self.fc7(x))
        score = self.score(x)
        # Half the cells that fc6 has cut off, counted on the skip's grid, less the one by which `up` is larger.
        offset = (self.window - 1) // 2
        for up, skip_score, pool, scale in zip(
            self.up, self.skip_scores, (pools[3], pools[2]), self.scales, strict=False
        ):
            offset = 2 * offset - 1
            size = (2 * score.shape[2] + 2, 2 * score.shape[3] + 2)
            score = up(score, _crop(skip_score(pool * scale), offset, size))
        (upsample,) = self.upsample.values()
        return _crop(upsample(score), {32: 19, 16: 27, 8: 31}[self.stride], input.shape[2:])


def bilinear(channels: int, size: int) -> Tensor:
    """The weight [channels, channels, size, size] of a transposed convolution with stride size / 2 that interpolates
    each channel bilinearly (section 3.3)."""
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 else factor - 0.5
    line = 1 - (torch.arange(size) - centre).abs() / factor
    return torch.eye(channels)[:, :, None, None] * (line[:, None] * line)


def _crop(x: Tensor, offset: int, size: tuple[int, ...]) -> Tensor:
    return x[:, :, offset : offset + size[0], offset : offset + size[1]]
