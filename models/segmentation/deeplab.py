"""DeepLab on ResNet and Xception. v2: Chen et al. 2016 (arXiv 1606.00915). v3: Chen, Papandreou, Schroff, Adam 2017,
"Rethinking Atrous Convolution for Semantic Image Segmentation" (arXiv 1706.05587). v3+: Chen et al. 2018,
"Encoder-Decoder with Atrous Separable Convolution" (arXiv 1802.02611)."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..layers import Conv2d, Ops, conv_norm, resize
from .aspp import ASPP, Auxiliary, with_auxiliary
from .output_stride import Paths
from .resnet import RESNET101, ResNet
from .vgg import initialise
from .xception import SeparableConv2d, Xception

MULTI_GRID = (1, 2, 4)


class DeepLabV2(nn.Module):
    """DeepLab v2 on ResNet (section 4.1.2): [N, in_channels, H, W] -> logits [N, num_classes, H, W], any H and W.

    The trunk's grid is 8 pixels wide; four atrous 3x3 convolutions score the classes, and their scores are summed and
    interpolated bilinearly.

    blocks, width: of the ResNet (see there). rates: the dilations of the four convolutions.
    ops: "fused" computes with backstride.fused_ops, "torch" with torch.nn.functional.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 21,
        *,
        blocks: Sequence[int] = RESNET101,
        width: int = 64,
        output_stride: int = 8,
        rates: Sequence[int] = (6, 12, 18, 24),
        ops: Ops = "fused",
    ):
        super().__init__()
        self.num_classes = num_classes
        self.backbone = ResNet(
            in_channels, blocks=blocks, width=width, output_stride=output_stride, stride_in="1x1", ops=ops
        )
        self.classifier = nn.ModuleList(
            Conv2d(32 * width, num_classes, 3, padding=rate, dilation=rate, ops=ops) for rate in rates
        )
        for layer in self.classifier:
            nn.init.normal_(layer.get_parameter("weight"), std=0.01)
            nn.init.zeros_(layer.get_parameter("bias"))

    def score(self, input: Tensor) -> Tensor:
        """Logits on the trunk's grid."""
        features = self.backbone(input)[-1]
        total: Tensor | None = None
        for layer in self.classifier:
            total = layer(features, total)
        assert total is not None
        return total

    def forward(self, input: Tensor) -> Tensor:
        return resize(self.score(input), input.shape[2:])

    def paths(self) -> Iterator[Paths]:
        yield from self.backbone.paths()
        yield [[layer] for layer in self.classifier]


class DeepLabV3(nn.Module):
    """DeepLab v3 on ResNet (section 3): [N, in_channels, H, W] -> logits [N, num_classes, H, W], for any H and W.

    The trunk, atrous spatial pyramid pooling with image pooling, a 1x1 convolution for the scores, bilinear
    interpolation. In training it needs at least two images in a batch.

    form: "paper": output stride 16, dilations 2 * (1, 2, 4) in the last stage (multi-grid), the stride of a stage in
        its first 1x1 convolution. "torchvision": as that library defines the network, and with its state_dict (see
        `load_torchvision`): output stride 8, no multi-grid, the stride in a 3x3 convolution, one more 3x3 convolution
        before the scores, interpolation with align_corners=False.
    blocks, width: of the ResNet (see there), RESNET50 or RESNET101.
    output_stride: 8 or 16 in the paper, the width of the trunk's grid in pixels. `set_output_stride` changes it later,
        so that a network can be trained with 16 and used with 8 (section 4.1).
    rates: of the pyramid, (6, 12, 18) at output stride 16, twice as large at 8.
    auxiliary: add a second classifier, of the third stage's features, for a loss in training.
    ops: "fused" computes with backstride.fused_ops, "torch" with torch.nn.functional.
    """

    loss_weights = (1.0, 0.5)

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 21,
        *,
        form: Literal["paper", "torchvision"] = "paper",
        blocks: Sequence[int] = RESNET101,
        width: int = 64,
        output_stride: int | None = None,
        multi_grid: Sequence[int] | None = None,
        rates: Sequence[int] | None = None,
        channels: int = 256,
        auxiliary: bool = False,
        ops: Ops = "fused",
    ):
        super().__init__()
        if form not in ("paper", "torchvision"):
            raise ValueError(f'form={form!r} is unknown: choose "paper" or "torchvision"')
        paper = form == "paper"
        output_stride = output_stride or (16 if paper else 8)
        self.num_classes = num_classes
        self.align_corners = paper
        self.backbone = ResNet(
            in_channels,
            blocks=blocks,
            width=width,
            output_stride=output_stride,
            multi_grid=multi_grid or (MULTI_GRID if paper else None),
            stride_in="1x1" if paper else "3x3",
            ops=ops,
        )
        head = ASPP(32 * width, rates or pyramid_rates(output_stride), channels, dropout=0.1 if paper else 0.5, ops=ops)
        between = [] if paper else conv_norm(channels, channels, 3, ops=ops)
        self.classifier = nn.Sequential(head, *between, Conv2d(channels, num_classes, 1, ops=ops))
        self.aux_classifier = Auxiliary(16 * width, num_classes, ops) if auxiliary else None
        self.apply(initialise)

    def score(self, input: Tensor) -> Tensor:
        """Logits on the trunk's grid."""
        return self.classifier(self.backbone(input)[-1])

    def forward(self, input: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, ...]:
        """With `auxiliary`: (logits, logits of the auxiliary classifier), for losses with `loss_weights`."""
        if not auxiliary:
            return resize(self.score(input), input.shape[2:], self.align_corners)
        *_, third, last = self.backbone(input)
        return with_auxiliary(self.classifier(last), third, self.aux_classifier, input, self.align_corners)

    def paths(self) -> Iterator[Paths]:
        yield from self.backbone.paths()
        head, *behind = self.classifier
        assert isinstance(head, ASPP)
        yield head.paths()
        yield [[layer for layer in behind if isinstance(layer, nn.Conv2d)]]


class DeepLabV3Plus(nn.Module):
    """DeepLab v3+ (section 3): [N, in_channels, H, W] -> logits [N, num_classes, H, W], for any H and W.

    DeepLab v3's trunk and pyramid, and a decoder: the pyramid's features are interpolated to a grid of 4 pixels and
    joined with the trunk's features there, which a 1x1 convolution brings to `low_channels`; two 3x3 convolutions and a
    1x1 convolution give the scores, which are interpolated once more. In training it needs at least two images in a
    batch.

    backbone: "resnet" (with `blocks`, as in DeepLabV3's paper form) or "xception".
    width: the channels of the first convolution, 64 of the ResNet or 32 of the Xception as published.
    middle: the number of blocks of Xception's middle flow.
    output_stride, rates: as in DeepLabV3.
    separable: atrous separable convolutions in pyramid and decoder (section 3.1), not in the trunk alone.
    ops: "fused" computes with backstride.fused_ops, "torch" with torch.nn.functional.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 21,
        *,
        backbone: Literal["resnet", "xception"] = "resnet",
        blocks: Sequence[int] = RESNET101,
        middle: int = 16,
        width: int | None = None,
        output_stride: int = 16,
        multi_grid: Sequence[int] = MULTI_GRID,
        rates: Sequence[int] | None = None,
        separable: bool = False,
        channels: int = 256,
        low_channels: int = 48,
        ops: Ops = "fused",
    ):
        super().__init__()
        self.num_classes = num_classes
        if backbone == "resnet":
            width = width or 64
            self.backbone: ResNet | Xception = ResNet(
                in_channels,
                blocks=blocks,
                width=width,
                output_stride=output_stride,
                multi_grid=multi_grid,
                stride_in="1x1",
                ops=ops,
            )
            low, high = 4 * width, 32 * width
        elif backbone == "xception":
            width = width or 32
            self.backbone = Xception(in_channels, width=width, middle=middle, output_stride=output_stride, ops=ops)
            low, high = 4 * width, 64 * width
        else:
            raise ValueError(f'backbone={backbone!r} is unknown: choose "resnet" or "xception"')
        self.aspp = ASPP(
            high, rates or pyramid_rates(output_stride), channels, separable=separable, dropout=0.5, ops=ops
        )
        self.low = conv_norm(low, low_channels, 1, ops=ops)
        self.decoder = nn.Sequential(
            _refinement(channels + low_channels, channels, separable, ops),
            nn.Dropout(0.5),
            _refinement(channels, channels, separable, ops),
            nn.Dropout(0.1),
            Conv2d(channels, num_classes, 1, ops=ops),
        )
        self.apply(initialise)

    def forward(self, input: Tensor) -> Tensor:
        low, *_, high = self.backbone(input)
        low = self.low(low)
        high = resize(self.aspp(high), low.shape[2:])
        return resize(self.decoder(torch.cat([high, low], 1)), input.shape[2:])

    def paths(self) -> Iterator[Paths]:
        """Up to the decoder, which works on a grid of its own."""
        yield from self.backbone.paths()
        yield self.aspp.paths()


def pyramid_rates(output_stride: int) -> tuple[int, ...]:
    """Section 4.1 of DeepLab v3: 6, 12, 18 on a grid of 16 pixels, and as many pixels of the image on others."""
    return tuple(rate * 16 // output_stride for rate in (6, 12, 18))


def _refinement(before: int, after: int, separable: bool, ops: Ops) -> nn.Module:
    return SeparableConv2d(before, after, relu=True, ops=ops) if separable else conv_norm(before, after, 3, ops=ops)
