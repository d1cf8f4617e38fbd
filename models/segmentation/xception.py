"""Xception as DeepLab v3+ changes it: Chollet 2017, "Xception: Deep Learning with Depthwise Separable Convolutions"
(arXiv 1610.02357), and Chen et al. 2018 (arXiv 1802.02611), section 3.2 and figure 4."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..layers import BatchNorm2d, Conv2d, Ops
from .output_stride import Paths, set_output_stride
from .vgg import check_input, initialise


class SeparableConv2d(nn.Module):
    """A 3x3 depthwise convolution and a 1x1 convolution, each with batch normalisation, plus `residual` if one is
    given: [N, before, H, W] and a residual [N, after, H', W'] -> [N, after, H', W'].

    relu: ReLU follows each of the two (section 3.1; atrous where the dilation is above 1).
    relu_behind: ReLU follows the second, and the residual.
    """

    def __init__(
        self,
        before: int,
        after: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        relu: bool = False,
        relu_behind: bool = False,
        ops: Ops = "fused",
    ):
        super().__init__()
        self.depthwise = Conv2d(
            before, before, 3, stride=stride, padding=dilation, dilation=dilation, groups=before, bias=False, ops=ops
        )
        self.bn1 = BatchNorm2d(before, activation="relu" if relu else None, ops=ops)
        self.pointwise = Conv2d(before, after, 1, bias=False, ops=ops)
        self.bn2 = BatchNorm2d(after, activation="relu" if relu or relu_behind else None, ops=ops)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.bn1(self.depthwise(input))
        return self.bn2(self.pointwise(x), residual)

    def path(self) -> list[nn.Module]:
        return [self.depthwise, self.pointwise]


class Block(nn.Module):
    """x + f(x) with f three separable convolutions, ReLU before each, the stride in the last; with `relu` ReLU follows
    the sum. The shortcut is a 1x1 convolution with batch normalisation where `widths` or the stride ask for it."""

    def __init__(self, before: int, widths: Sequence[int], stride: int = 1, *, relu: bool = False, ops: Ops = "fused"):
        super().__init__()
        channels = [before, *widths]
        self.layers = nn.ModuleList(
            SeparableConv2d(
                channels[i],
                channels[i + 1],
                stride=stride if i == 2 else 1,
                relu_behind=relu or i < 2,  # behind the first two it is the one before the next
                ops=ops,
            )
            for i in range(3)
        )
        self.skip = None
        if stride > 1 or before != widths[-1]:
            self.skip = nn.Sequential(
                Conv2d(before, widths[-1], 1, stride=stride, bias=False, ops=ops), BatchNorm2d(widths[-1], ops=ops)
            )

    def forward(self, input: Tensor) -> Tensor:
        first, second, last = self.layers
        x = second(first(torch.relu(input)))
        return last(x, input if self.skip is None else self.skip(input))

    def paths(self) -> Paths:
        shortcut = [] if self.skip is None else [[self.skip[0]]]
        return [_joined(self.layers), *shortcut]


class Xception(nn.Module):
    """The features of Xception-65: [N, in_channels, H, W] -> (those behind the first block, 4 `width` channels on a
    grid of 4 pixels; the last ones, 64 `width` channels on a grid of `output_stride` pixels); sizes are rounded up.

    Max-pools are separable convolutions with a stride; the middle flow has 16 blocks.

    width: 32 as published, the channels of the first convolution. middle: the number of blocks of the middle flow.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        width: int = 32,
        middle: int = 16,
        output_stride: int = 32,
        ops: Ops = "fused",
    ):
        super().__init__()
        self.in_channels = in_channels
        first, second, third, fourth, fifth, sixth, last = (
            channels * width // 32 or 1 for channels in (64, 128, 256, 728, 1024, 1536, 2048)
        )
        self.conv1 = Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False, ops=ops)
        self.bn1 = BatchNorm2d(width, activation="relu", ops=ops)
        self.conv2 = Conv2d(width, first, 3, padding=1, bias=False, ops=ops)
        self.bn2 = BatchNorm2d(first, activation="relu", ops=ops)
        self.entry = nn.Sequential(
            Block(first, [second] * 3, 2, relu=True, ops=ops),  # the next block begins with it anyway
            Block(second, [third] * 3, 2, ops=ops),
            Block(third, [fourth] * 3, 2, ops=ops),
        )
        self.middle = nn.Sequential(*(Block(fourth, [fourth] * 3, ops=ops) for _ in range(middle)))
        self.exit = Block(fourth, [fourth, fifth, fifth], 2, relu=True, ops=ops)
        self.last = nn.Sequential(
            SeparableConv2d(fifth, sixth, relu=True, ops=ops),
            SeparableConv2d(sixth, sixth, relu=True, ops=ops),
            SeparableConv2d(sixth, last, relu=True, ops=ops),
        )
        self.apply(initialise)
        set_output_stride(self, output_stride)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        check_input(input, self.in_channels)
        x = self.bn1(self.conv1(input))
        x = self.bn2(self.conv2(x))
        low = self.entry[0](x)
        x = self.entry[2](self.entry[1](low))
        return low, self.last(self.exit(self.middle(x)))

    def paths(self) -> Iterator[Paths]:
        yield [[self.conv1, self.conv2]]
        for block in (*self.entry, *self.middle, self.exit):
            assert isinstance(block, Block)
            yield block.paths()
        yield [_joined(self.last)]


def _joined(layers: nn.ModuleList | nn.Sequential) -> list[nn.Module]:
    return [module for layer in layers if isinstance(layer, SeparableConv2d) for module in layer.path()]
