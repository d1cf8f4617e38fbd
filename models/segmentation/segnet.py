"""SegNet: Badrinarayanan, Kendall, Cipolla 2017, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation" (arXiv 1511.00561)."""

from torch import Tensor, nn

from ..layers import BatchNorm2d, Conv2d, Ops, Stack, halve_with_places, unpool
from .vgg import VGG16_STAGES, Stages, check_input, conv_relu, conv_stages, in_channels_of, initialise


class SegNet(nn.Module):
    """The network of figure 2: [N, in_channels, H, W] -> logits [N, num_classes, H, W], for any H and W.

    Encoder: the convolutions of VGG16, each with batch normalisation and ReLU; each max-pool remembers where its
    maxima were. Decoder: for each max-pool, the values go back to those places, zeros between them, and the stage's
    convolutions follow in reverse order; the last of them gives the logits. An odd size is pooled as in Caffe, rounding
    up, and unpooled to what it was.

    stages: VGG16's channels; others are for narrow networks.
    ops: "fused" computes with backstride.fused_ops, "torch" with torch.nn.functional.
    """

    def __init__(
        self, in_channels: int = 3, num_classes: int = 11, *, stages: Stages = VGG16_STAGES, ops: Ops = "fused"
    ):
        super().__init__()
        self.num_classes = num_classes
        self.ops: Ops = ops
        self.stages = conv_stages(in_channels, stages, norm=True, ops=ops)
        self.decoder = nn.ModuleList()
        above = (num_classes, *(widths[-1] for widths in stages))
        for widths, after in reversed(list(zip(stages, above, strict=False))):
            *inner, before = widths
            layers: list[nn.Module] = []
            for _ in inner:
                layers += conv_relu(before, before, 3, 1, norm=True, ops=ops)
            last = conv_relu(before, after, 3, 1, norm=True, ops=ops)
            # The logits are the first stage's last convolution, bare.
            layers += last if len(self.decoder) + 1 < len(stages) else last[:1]
            self.decoder.append(Stack(*layers))
        self.apply(initialise)

    def forward(self, input: Tensor) -> Tensor:
        check_input(input, in_channels_of(self.stages))
        return encode_decode(input, self.stages, self.decoder, self.ops)


class SegNetBasic(nn.Module):
    """The small network of section 3.1: [N, in_channels, H, W] -> logits [N, num_classes, H, W], for any H and W.

    Local response normalisation of the input; four 7x7 convolutions with batch normalisation and ReLU, each followed
    by a max-pool; four unpoolings, each followed by a 7x7 convolution with batch normalisation, without ReLU; a 1x1
    convolution gives the logits.

    width: 64 as published, the channels of all layers.
    """

    def __init__(
        self, in_channels: int = 3, num_classes: int = 11, *, width: int = 64, kernel: int = 7, ops: Ops = "fused"
    ):
        super().__init__()
        self.num_classes = num_classes
        self.ops: Ops = ops
        # Caffe's layer in the authors' training file: local_size 5, alpha 1e-4, beta 0.75.
        self.normalise = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        channels = (in_channels, width, width, width)
        self.stages = nn.ModuleList(
            Stack(*conv_relu(before, width, kernel, kernel // 2, norm=True, ops=ops)) for before in channels
        )
        self.decoder = nn.ModuleList(
            Stack(Conv2d(width, width, kernel, padding=kernel // 2, ops=ops), BatchNorm2d(width, ops=ops))
            for _ in channels
        )
        self.classifier = Conv2d(width, num_classes, 1, ops=ops)
        self.apply(initialise)

    def forward(self, input: Tensor) -> Tensor:
        check_input(input, in_channels_of(self.stages))
        return self.classifier(encode_decode(self.normalise(input), self.stages, self.decoder, self.ops))


def encode_decode(x: Tensor, encoder: nn.ModuleList, decoder: nn.ModuleList, ops: Ops) -> Tensor:
    """Each stage of the encoder followed by a max-pool, then each of the decoder after the matching unpooling."""
    pooled: list[tuple[Tensor, tuple[int, int]]] = []
    for stage in encoder:
        x = stage(x)
        size = (x.shape[2], x.shape[3])
        x, places = halve_with_places(x, ops)
        pooled.append((places, size))
    for stage in decoder:
        x = stage(unpool(x, *pooled.pop(), ops))
    return x
