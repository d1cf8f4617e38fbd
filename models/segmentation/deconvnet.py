"""DeconvNet: Noh, Hong, Han 2015, "Learning Deconvolution Network for Semantic Segmentation" (arXiv 1505.04366)."""

from torch import Tensor, nn

from ..layers import Conv2d, Ops, Stack, halve_with_places, unpool
from .vgg import VGG16_STAGES, Stages, check_input, conv_relu, conv_stages, in_channels_of, initialise


class DeconvNet(nn.Module):
    """The network of figure 2 and table 2: [N, in_channels, H, W] -> logits [N, num_classes, H, W].

    VGG16 with its first two dense layers as convolutions (fc6 7x7, fc7 1x1), and the same mirrored: a 7x7 transposed
    convolution back from fc7, then five times max-unpooling to the places that the max-pools remembered and 3x3
    transposed convolutions with stride 1; a 1x1 convolution gives the logits. Batch normalisation and ReLU follow every
    convolution but the last.

    The published input is 224 x 224, where fc7 sees the whole image at once. Any other height and width of at least
    32 window - 31 (193) work too: the layers then slide. Batch normalisation of fc7 in training needs more than one
    value a channel: at 224 x 224 at least two images in a batch.

    stages, dense, window: VGG16's channels, the channels of fc6 and fc7, and the size of fc6's kernel; others than
        VGG16's are for narrow networks.
    ops: "fused" computes with backstride.fused_ops, "torch" with torch.nn.functional.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 21,
        *,
        stages: Stages = VGG16_STAGES,
        dense: int = 4096,
        window: int = 7,
        ops: Ops = "fused",
    ):
        super().__init__()
        self.num_classes = num_classes
        self.ops: Ops = ops
        self.stages = conv_stages(in_channels, stages, norm=True, ops=ops)
        self.smallest = (window - 1) * 2 ** len(stages) + 1
        top = stages[-1][-1]
        self.fc = Stack(
            *conv_relu(top, dense, window, norm=True, ops=ops), *conv_relu(dense, dense, 1, norm=True, ops=ops)
        )
        self.unfc = Stack(*conv_relu(dense, top, window, norm=True, transposed=True, ops=ops))
        self.decoder = nn.ModuleList()
        # The first stage gives its own width once more, to the classifier; the others the width below them.
        below = (stages[0][0], *(widths[-1] for widths in stages))
        for widths, after in reversed(list(zip(stages, below, strict=False))):
            layers: list[nn.Module] = []
            for before, wanted in zip([widths[-1]] * len(widths), [*widths[1:], after], strict=True):
                layers += conv_relu(before, wanted, 3, 1, norm=True, transposed=True, ops=ops)
            self.decoder.append(Stack(*layers))
        self.classifier = Conv2d(stages[0][0], num_classes, 1, ops=ops)
        self.apply(initialise)

    @property
    def fc6(self) -> nn.Module:
        """The convolution that was VGG16's first dense layer."""
        return self.fc[0]

    @property
    def fc7(self) -> nn.Module:
        """The convolution that was VGG16's second dense layer."""
        return self.fc[3]

    def forward(self, input: Tensor) -> Tensor:
        check_input(input, in_channels_of(self.stages), self.smallest)
        x = input
        pooled: list[tuple[Tensor, tuple[int, int]]] = []
        for stage in self.stages:
            x = stage(x)
            size = (x.shape[2], x.shape[3])
            x, places = halve_with_places(x, self.ops)
            pooled.append((places, size))
        x = self.unfc(self.fc(x))
        for stage in self.decoder:
            x = stage(unpool(x, *pooled.pop(), self.ops))
        return self.classifier(x)
