"""Atrous spatial pyramid pooling: parallel atrous convolutions of several rates over one input. Chen et al. 2016,
"DeepLab" (arXiv 1606.00915), section 3.2; Chen et al. 2017, "Rethinking Atrous Convolution" (arXiv 1706.05587), section
3.3."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ... import fused_ops
from ..layers import Conv2d, Ops, conv_norm, resize
from .xception import SeparableConv2d


def branches(convolutions: Sequence[Conv2d], input: Tensor) -> list[Tensor]:
    """What each of `convolutions`, which keep the size, makes of `input`, in one launch where "fused" computes them.

    They are alike but for kernel and dilation: all with or without bias and ReLU, and with an odd kernel or an even
    dilation.
    """
    first = convolutions[0]
    if first.ops == "torch" or len(convolutions) == 1:
        return [convolution(input) for convolution in convolutions]
    biases = [convolution.bias for convolution in convolutions if convolution.bias is not None]
    result = fused_ops.atrous_pyramid(
        input,
        [convolution.weight for convolution in convolutions],
        biases or None,
        [convolution.dilation for convolution in convolutions],
        activation=first.activation,
    )
    return list(result.split([convolution.out_channels for convolution in convolutions], 1))


class ImagePooling(nn.Sequential):
    """The mean over all pixels, a 1x1 convolution, batch normalisation, ReLU, and the result at every pixel."""

    def __init__(self, in_channels: int, channels: int, ops: Ops):
        super().__init__(nn.AdaptiveAvgPool2d(1), *conv_norm(in_channels, channels, 1, ops=ops))

    def forward(self, input: Tensor) -> Tensor:
        check_batch(self, input)
        return super().forward(input).expand(-1, -1, *input.shape[2:])


class ASPP(nn.Module):
    """The head of DeepLab v3: [N, in_channels, H, W] -> [N, channels, H, W].

    A 1x1 convolution, a 3x3 one for each rate, and image pooling side by side, each with batch normalisation and ReLU;
    another 1x1 convolution with both joins them. In training image pooling needs at least two images in a batch.

    separable: make the 3x3 convolutions atrous separable ones (DeepLab v3+, section 3.1).
    The state_dict is torchvision's.
    """

    def __init__(
        self,
        in_channels: int,
        rates: Sequence[int],
        channels: int = 256,
        *,
        separable: bool = False,
        dropout: float = 0.5,
        ops: Ops = "fused",
    ):
        super().__init__()
        self.convs = nn.ModuleList([conv_norm(in_channels, channels, 1, ops=ops)])
        for rate in rates:
            self.convs.append(
                SeparableConv2d(in_channels, channels, dilation=rate, relu=True, ops=ops)
                if separable
                else conv_norm(in_channels, channels, 3, dilation=rate, ops=ops)
            )
        self.convs.append(ImagePooling(in_channels, channels, ops))
        self.project = nn.Sequential(*conv_norm((len(rates) + 2) * channels, channels, 1, ops=ops), nn.Dropout(dropout))

    def forward(self, input: Tensor) -> Tensor:
        *atrous, pooling = self.convs
        plain = [branch for branch in atrous if isinstance(branch, nn.Sequential)]
        results = branches([conv for branch in plain for conv in branch if isinstance(conv, Conv2d)], input)
        parts = [branch[1](result) for branch, result in zip(plain, results, strict=True)]
        parts += [branch(input) for branch in atrous if isinstance(branch, SeparableConv2d)]
        return self.project(torch.cat([*parts, pooling(input)], 1))

    def paths(self) -> list[list[nn.Module]]:
        """For `set_output_stride`."""
        return [
            branch.path() if isinstance(branch, SeparableConv2d) else [branch[0]]
            for branch in self.convs
            if isinstance(branch, SeparableConv2d | nn.Sequential) and not isinstance(branch, ImagePooling)
        ]


def check_batch(module: nn.Module, input: Tensor) -> None:
    """ValueError where batch normalisation would have one value a channel to train on."""
    alone = any(isinstance(part, nn.BatchNorm2d) for part in module.modules())  # SyncBatchNorm is not
    if module.training and alone and input.shape[0] == 1:
        raise ValueError(
            "one image is too few to train on: batch normalisation of what was averaged over the whole image has one "
            "value a channel. Take a batch of at least 2, or network.eval()"
        )


class Auxiliary(nn.Sequential):
    """The scores on which an auxiliary loss is taken in training: a 3x3 convolution to a quarter of the channels, batch
    normalisation, ReLU, dropout and a 1x1 convolution. The state_dict is torchvision's."""

    def __init__(self, in_channels: int, num_classes: int, ops: Ops):
        inner = in_channels // 4
        super().__init__(
            *conv_norm(in_channels, inner, 3, ops=ops), nn.Dropout(0.1), Conv2d(inner, num_classes, 1, ops=ops)
        )


def with_auxiliary(
    scores: Tensor, features: Tensor, head: nn.Module | None, input: Tensor, align_corners: bool
) -> tuple[Tensor, ...]:
    """(scores, the auxiliary head's scores of `features`), both at the input's size."""
    if head is None:
        raise ValueError("this network has no auxiliary classifier: build it with auxiliary=True")
    size = input.shape[2:]
    return resize(scores, size, align_corners), resize(head(features), size, align_corners)
