"""PSPNet: Zhao, Shi, Qi, Wang, Jia 2017, "Pyramid Scene Parsing Network" (arXiv 1612.01105)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import Conv2d, Ops, conv_norm, resize
from .aspp import Auxiliary, check_batch, with_auxiliary
from .resnet import RESNET101, ResNet
from .vgg import initialise


class PyramidPooling(nn.Module):
    """Section 3.2: [N, C, H, W] -> [N, 2 C, H, W]: the input, and its means over 1x1, 2x2, ... equal parts of the
    image, each brought to C / len(bins) channels and interpolated to every pixel."""

    def __init__(self, in_channels: int, bins: Sequence[int], ops: Ops):
        super().__init__()
        if in_channels % len(bins):
            raise ValueError(f"bins={tuple(bins)}: their number must divide the trunk's {in_channels} channels")
        self.features = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), *conv_norm(in_channels, in_channels // len(bins), 1, ops=ops))
            for size in bins
        )

    def forward(self, input: Tensor) -> Tensor:
        check_batch(self, input)
        return torch.cat([input, *(resize(feature(input), input.shape[2:]) for feature in self.features)], 1)


class PSPNet(nn.Module):
    """PSPNet (figure 3): [N, in_channels, H, W] -> logits [N, num_classes, H, W], for any H and W.

    A dilated ResNet with a grid of 8 pixels and three 3x3 convolutions at its beginning, pyramid pooling, a 3x3 and a
    1x1 convolution, and bilinear interpolation. The paper's inputs have 8n + 1 pixels (473, 713). In training it needs
    at least two images in a batch.

    blocks, width: of the ResNet (see there), RESNET50 or RESNET101. bins: parts a side of the pyramid's levels.
    auxiliary: add a second classifier, of the third stage's features, for a loss in training (section 3.3).
    ops: "fused" computes with backstride.fused_ops, "torch" with torch.nn.functional.
    """

    loss_weights = (1.0, 0.4)

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 21,
        *,
        blocks: Sequence[int] = RESNET101,
        width: int = 64,
        bins: Sequence[int] = (1, 2, 3, 6),
        auxiliary: bool = False,
        ops: Ops = "fused",
    ):
        super().__init__()
        self.num_classes = num_classes
        self.backbone = ResNet(
            in_channels, blocks=blocks, width=width, output_stride=8, stride_in="1x1", deep_stem=True, ops=ops
        )
        self.pyramid = PyramidPooling(32 * width, bins, ops)
        self.classifier = nn.Sequential(
            *conv_norm(64 * width, 8 * width, 3, ops=ops), nn.Dropout(0.1), Conv2d(8 * width, num_classes, 1, ops=ops)
        )
        self.aux_classifier = Auxiliary(16 * width, num_classes, ops) if auxiliary else None
        self.apply(initialise)

    def forward(self, input: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, ...]:
        """With `auxiliary`: (logits, logits of the auxiliary classifier), for losses with `loss_weights`."""
        *_, third, last = self.backbone(input)
        scores = self.classifier(self.pyramid(last))
        if not auxiliary:
            return resize(scores, input.shape[2:])
        return with_auxiliary(scores, third, self.aux_classifier, input, align_corners=True)
