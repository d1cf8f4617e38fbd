"""U-Net: Ronneberger, Fischer, Brox 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation"."""

import math
from typing import Literal

from torch import Tensor, nn

from ..layers import Conv2d, Ops, UpConvConcat2d, halve

Padding = Literal["valid", "same"]


class UNet(nn.Module):
    """The network of figure 1 (arXiv 1505.04597): [N, in_channels, s, s] -> logits [N, num_classes, s - 184, s - 184].

    `depth` times two 3x3 convolutions with ReLU and a 2x2 max-pool, doubling the channels from `width`; two
    more convolutions at the bottom; then `depth` times a 2x2 up-convolution with stride 2 that halves the
    channels, the concatenation with the centre of the contracting path's features (skip first), and two 3x3
    convolutions with ReLU; a 1x1 convolution gives the logits. Dropout stands at the end of the contracting
    path: after the last two pairs of convolutions, as in the authors' own Caffe network.

    padding: "valid" as published, for any height and width of the form s = 16n + 12 (188, ..., 572 -> 388).
        "same" pads each 3x3 convolution with zeros: the output is as large as the input, a multiple of 16.
    depth: 4 as published; in general the multiple above is 2^depth.
    ops: "fused" computes convolutions and max-pools with backstride.fused_ops, "torch" with torch.nn.functional.

    A size that does not fit raises ValueError naming the next smaller and larger ones that do.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        width: int = 64,
        depth: int = 4,
        padding: Padding = "valid",
        dropout: float = 0.5,
        ops: Ops = "fused",
    ):
        super().__init__()
        for name, value in {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "width": width,
            "depth": depth,
        }.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if padding not in ("valid", "same"):
            raise ValueError(f'padding={padding!r} is unknown: choose "valid" or "same"')
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.depth = depth
        self.ops: Ops = ops
        self.padding: Padding = padding
        self.alignment = 2**depth
        """Input windows that are shifted by a multiple of this see the max-pools on the same grid."""
        self.context = _context(depth, padding)
        """Pixels at each border of an input that have no output or, with "same", feel the zero padding."""
        # Followed backwards from the output, all sizes on the way are even if the output's is 4 modulo the alignment.
        smallest_output = 4 % self.alignment or self.alignment
        self.smallest_size = self.alignment if padding == "same" else smallest_output + 2 * self.context

        widths = [width * 2**level for level in range(depth + 1)]
        self.contracting = nn.ModuleList(
            _double_conv(before, after, padding, ops)
            for before, after in zip([in_channels, *widths], widths, strict=False)
        )
        self.dropout = nn.Dropout(dropout)
        self.up = nn.ModuleList(UpConvConcat2d(2 * w, w, 2, stride=2, ops=ops) for w in reversed(widths[:-1]))
        self.expanding = nn.ModuleList(_double_conv(2 * w, w, padding, ops) for w in reversed(widths[:-1]))
        self.classifier = Conv2d(width, num_classes, 1, ops=ops)
        self.apply(_initialise)

    def output_size(self, size: int) -> int:
        """The output's height (or width) for an input's; ValueError if no input may have that size."""
        above = self.fitting_size(size)
        if above != size:
            below = above - self.alignment
            nearest = f"{below} or {above}" if below >= self.smallest_size else f"{above}, the smallest"
            raise ValueError(
                f'an input size of {size} does not fit (depth {self.depth}, padding "{self.padding}"): '
                f"its max-pools need even sizes. The nearest size that fits: {nearest}"
            )
        return size if self.padding == "same" else size - 2 * self.context

    def fitting_size(self, at_least: int) -> int:
        """The smallest input size of at least `at_least` pixels that fits."""
        excess = max(0, at_least - self.smallest_size)
        return self.smallest_size + math.ceil(excess / self.alignment) * self.alignment

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        x = input
        skips: list[Tensor] = []
        for level, convolutions in enumerate(self.contracting):
            if level > 0:
                x = halve(x, self.ops)
            x = convolutions(x)
            if level >= self.depth - 1:
                x = self.dropout(x)
            skips.append(x)
        skips.pop()  # the bottom level goes up, not across
        for up, convolutions in zip(self.up, self.expanding, strict=True):
            x = convolutions(up(x, _centre(skips.pop(), 2 * x.shape[-2], 2 * x.shape[-1])))
        return self.classifier(x)

    def _check(self, input: Tensor) -> None:
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            raise ValueError(f"expected an input [N, {self.in_channels}, H, W], got {list(input.shape)}")
        self.output_size(input.shape[2])
        self.output_size(input.shape[3])


def _context(depth: int, padding: Padding) -> int:
    """The pixels lost (or spoilt by zero padding) at a border: each pair of convolutions adds two, each max-pool
    halves them, each up-convolution doubles them."""
    lost = 2
    for _ in range(depth):
        # "same" rounds up: a pooled pixel that mixes a spoilt one and a good one is spoilt.
        lost = math.ceil(lost / 2) + 2 if padding == "same" else lost / 2 + 2
    for _ in range(depth):
        lost = 2 * lost + 2
    return math.ceil(lost)


def _double_conv(in_channels: int, out_channels: int, padding: Padding, ops: Ops) -> nn.Sequential:
    pad = 1 if padding == "same" else 0
    return nn.Sequential(
        Conv2d(in_channels, out_channels, 3, padding=pad, activation="relu", ops=ops),
        Conv2d(out_channels, out_channels, 3, padding=pad, activation="relu", ops=ops),
    )


def _initialise(module: nn.Module) -> None:
    """N(0, sqrt(2/N)) with N the number of values that one output value sums; zero biases."""
    if isinstance(module, Conv2d):
        fan_in = module.weight[0].numel()
    elif isinstance(module, UpConvConcat2d):
        fan_in = module.in_channels  # stride = kernel size: each output pixel is reached by one tap
    else:
        return
    nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in))
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _centre(x: Tensor, height: int, width: int) -> Tensor:
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]
