"""ICNet: Zhao, Qi, Shen, Shi, Jia 2018, "ICNet for Real-Time Semantic Segmentation on High-Resolution Images" (arXiv
1704.08545)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Conv2d, Ops, conv_norm, resize
from .resnet import RESNET50, ResNet
from .vgg import check_input, initialise


class CascadeFusion(nn.Module):
    """Section 3.3, figure 3: features of a coarse grid, [N, coarse, h, w], and of one twice as fine,
    [N, fine, H, W] -> ([N, channels, H, W], the coarse features interpolated to H, W).

    The interpolated features through a 3x3 convolution with dilation 2, the fine ones through a 1x1 convolution, each
    with batch normalisation, are summed, and ReLU follows.
    """

    def __init__(self, coarse: int, fine: int, channels: int, ops: Ops):
        super().__init__()
        self.coarse = conv_norm(coarse, channels, 3, dilation=2, relu=False, ops=ops)
        self.fine = conv_norm(fine, channels, 1, ops=ops)

    def forward(self, coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
        coarse = resize(coarse, fine.shape[2:])
        return self.fine(fine, self.coarse(coarse)), coarse


class ICNet(nn.Module):
    """ICNet (figure 2): [N, in_channels, H, W] -> logits [N, num_classes, H, W], for any H and W.

    A cascade. The image at half its size goes through the first blocks of a ResNet-50 of half the width; from there,
    halved once more, through its remaining ones (dilated, so that the grid stays 32 pixels wide) and a pyramid of means
    that are summed. The image at full size goes through three 3x3 convolutions only. Two cascade feature fusions join
    the three, on grids of 16 and 8 pixels; the scores stand on one of 4 pixels and are interpolated. The published
    frames have 1025 x 2049 pixels.

    The layers are those of the network that the authors have published before they merged batch normalisation into the
    convolutions, the factor and shift of each input channel included.

    blocks, width: of the ResNet; width is 32 as published. bins: parts a side of the pyramid's levels.
    auxiliary: add classifiers behind the two coarser branches, for losses in training (section 3.4).
    ops: "fused" computes with backstride.fused_ops, "torch" with torch.nn.functional.
    """

    loss_weights = (1.0, 0.4, 0.16)

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 19,
        *,
        blocks: Sequence[int] = RESNET50,
        width: int = 32,
        bins: Sequence[int] = (1, 2, 3, 6),
        auxiliary: bool = False,
        ops: Ops = "fused",
    ):
        super().__init__()
        self.num_classes, self.in_channels, self.bins = num_classes, in_channels, tuple(bins)
        self.scale = nn.Parameter(torch.ones(in_channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(in_channels, 1, 1))
        self.backbone = ResNet(
            in_channels, blocks=blocks, width=width, output_stride=8, stride_in="1x1", deep_stem=True, ops=ops
        )
        self.top = conv_norm(32 * width, 8 * width, 1, ops=ops)
        self.light = nn.Sequential(
            conv_norm(in_channels, width, 3, stride=2, ops=ops),
            conv_norm(width, width, 3, stride=2, ops=ops),
            conv_norm(width, 2 * width, 3, stride=2, ops=ops),
        )
        self.fuse_middle = CascadeFusion(8 * width, 8 * width, 4 * width, ops)
        self.fuse_fine = CascadeFusion(4 * width, 2 * width, 4 * width, ops)
        self.classifier = Conv2d(4 * width, num_classes, 1, ops=ops)
        self.aux_classifiers = None
        if auxiliary:
            self.aux_classifiers = nn.ModuleList(
                Conv2d(channels * width, num_classes, 1, ops=ops) for channels in (4, 8)
            )
        self.apply(initialise)

    def forward(self, input: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, ...]:
        """With `auxiliary`: logits on grids of 4, 8 and 16 pixels, for losses with `loss_weights` (section 3.4)."""
        check_input(input, self.in_channels)
        x = input * self.scale + self.shift
        middle = self.backbone.layer1(self.backbone.stem(resize(x, _halved(x))))
        first, *others = self.backbone.layer2
        middle = first(middle)
        coarse = resize(middle, _halved(middle))
        for layer in (*others, self.backbone.layer3, self.backbone.layer4):
            coarse = layer(coarse)
        coarse = self.top(pyramid_sum(coarse, self.bins))
        middle, coarse = self.fuse_middle(coarse, middle)
        fine, middle = self.fuse_fine(middle, self.light(x))
        quarter = [(side - 1) // 4 + 1 for side in input.shape[2:]]
        scores = self.classifier(resize(fine, quarter))
        if not auxiliary:
            return resize(scores, input.shape[2:])
        if self.aux_classifiers is None:
            raise ValueError("this network has no auxiliary classifiers: build it with auxiliary=True")
        return scores, *(head(x) for head, x in zip(self.aux_classifiers, (middle, coarse), strict=True))


def _halved(x: Tensor) -> tuple[int, int]:
    """The size that a layer with stride 2 would give."""
    return (x.shape[2] - 1) // 2 + 1, (x.shape[3] - 1) // 2 + 1


def pyramid_sum(x: Tensor, bins: Sequence[int]) -> Tensor:
    """x plus, for each of `bins`, its means over bin x bin windows, interpolated to its size (section 3.2)."""
    size = (x.shape[2], x.shape[3])
    total = x
    for number in bins:
        kernel, stride = pooling_windows(size, number)
        total = total + resize(F.avg_pool2d(x, kernel, stride), size)
    return total


def pooling_windows(size: tuple[int, int], number: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(kernel, stride) of `number` x `number` equal windows that cover a map, overlapping where the number doesn't
    divide it; fewer where the map is smaller. At 33 x 65 they are the published ones."""
    short = min(size)
    number = min(number, short)
    if number == 1:
        return size, size
    step = max(1, (short - 1) // number)
    stride = tuple(min((side - 1) * step // (short - 1), side // number) for side in size)
    return (size[0] - (number - 1) * stride[0], size[1] - (number - 1) * stride[1]), (stride[0], stride[1])
