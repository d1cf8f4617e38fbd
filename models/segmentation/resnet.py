"""ResNet: He, Zhang, Ren, Sun 2016, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), table 1, with
bottlenecks: the trunk of DeepLab v2 to v3+, PSPNet and ICNet."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from ..layers import BatchNorm2d, Conv2d, Ops, max_pool
from .output_stride import Paths, set_output_stride, spread_out
from .vgg import check_input, initialise, read_state_dict

RESNET50 = (3, 4, 6, 3)
RESNET101 = (3, 4, 23, 3)

StrideIn = Literal["1x1", "3x3"]


class Bottleneck(nn.Module):
    """x + f(x) with f a 1x1 convolution to `inner` channels, a 3x3 and a 1x1 to four times as many, each with batch
    normalisation: [N, before, H, W] -> [N, 4 inner, H', W']. ReLU follows the first two and the sum."""

    def __init__(self, before: int, inner: int, stride: int = 1, stride_in: StrideIn = "3x3", ops: Ops = "fused"):
        super().__init__()
        first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
        after = 4 * inner
        self.conv1 = Conv2d(before, inner, 1, stride=first, bias=False, ops=ops)
        self.bn1 = BatchNorm2d(inner, activation="relu", ops=ops)
        self.conv2 = Conv2d(inner, inner, 3, stride=second, padding=1, bias=False, ops=ops)
        self.bn2 = BatchNorm2d(inner, activation="relu", ops=ops)
        self.conv3 = Conv2d(inner, after, 1, bias=False, ops=ops)
        self.bn3 = BatchNorm2d(after, activation="relu", ops=ops)
        self.downsample = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(
                Conv2d(before, after, 1, stride=stride, bias=False, ops=ops), BatchNorm2d(after, ops=ops)
            )

    def forward(self, input: Tensor) -> Tensor:
        x = self.bn1(self.conv1(input))
        x = self.bn2(self.conv2(x))
        shortcut = input if self.downsample is None else self.downsample(input)
        return self.bn3(self.conv3(x), shortcut)

    def paths(self) -> Paths:
        shortcut = [] if self.downsample is None else [[self.downsample[0]]]
        return [[self.conv1, self.conv2, self.conv3], *shortcut]


class ResNet(nn.Module):
    """The features of ResNet: [N, in_channels, H, W] -> the outputs of its four stages, with 4, 8, 16 and 32 `width`
    channels on grids of 4, 8, 16 and 32 pixels, but none coarser than `output_stride`; sizes are rounded up.

    The state_dict is torchvision's, without `fc`.

    blocks: the number of bottlenecks in each stage: RESNET50 or RESNET101.
    width: 64 as published, the channels of the first convolution.
    multi_grid: factors of the dilations of the last stage's bottlenecks (DeepLab v3, section 3.2.1).
    stride_in: which convolution of a bottleneck has the stride: "1x1" as published, "3x3" as in torchvision. With "1x1"
        all 3x3 convolutions of a stage that lost its stride are dilated alike; with "3x3" the first one takes part only
        from the next finer grid on.
    deep_stem: three 3x3 convolutions in place of the first, 7x7 one, and twice the channels (PSPNet's trunk).
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        blocks: Sequence[int] = RESNET101,
        width: int = 64,
        output_stride: int = 32,
        multi_grid: Sequence[int] | None = None,
        stride_in: StrideIn = "3x3",
        deep_stem: bool = False,
        ops: Ops = "fused",
    ):
        super().__init__()
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"blocks={tuple(blocks)}: a ResNet has four stages of at least one block")
        if stride_in not in ("1x1", "3x3"):
            raise ValueError(f'stride_in={stride_in!r} is unknown: choose "1x1" or "3x3"')
        self.in_channels = in_channels
        self.deep_stem = deep_stem
        if deep_stem:
            self.conv1 = Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False, ops=ops)
            self.bn1 = BatchNorm2d(width, activation="relu", ops=ops)
            self.conv2 = Conv2d(width, width, 3, padding=1, bias=False, ops=ops)
            self.bn2 = BatchNorm2d(width, activation="relu", ops=ops)
            self.conv3 = Conv2d(width, 2 * width, 3, padding=1, bias=False, ops=ops)
            self.bn3 = BatchNorm2d(2 * width, activation="relu", ops=ops)
        else:
            self.conv1 = Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False, ops=ops)
            self.bn1 = BatchNorm2d(width, activation="relu", ops=ops)
        self.maxpool = max_pool(3, stride=2, padding=1, ops=ops)
        before = 2 * width if deep_stem else width
        stages = []
        for stage, count in enumerate(blocks):
            inner = width * 2**stage
            strides = [1 if stage == 0 else 2, *[1] * (count - 1)]
            bottlenecks = []
            for stride in strides:
                bottlenecks.append(Bottleneck(before, inner, stride, stride_in, ops))
                before = 4 * inner
            stages.append(nn.Sequential(*bottlenecks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.apply(initialise)
        if multi_grid is not None:
            if len(multi_grid) != blocks[3]:
                raise ValueError(f"multi_grid={tuple(multi_grid)}: give one factor for each of {blocks[3]} bottlenecks")
            for bottleneck, factor in zip(self.layer4, multi_grid, strict=True):
                spread_out(bottleneck.get_submodule("conv2"), factor)
        set_output_stride(self, output_stride)

    @property
    def stages(self) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential, nn.Sequential]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def stem(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> the first stage's input, on a grid of 4 pixels."""
        check_input(input, self.in_channels)
        x = self.bn1(self.conv1(input))
        if self.deep_stem:
            x = self.bn2(self.conv2(x))
            x = self.bn3(self.conv3(x))
        return self.maxpool(x)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(input)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return tuple(outputs)

    def paths(self) -> Iterator[Paths]:
        stem = [self.conv1, self.conv2, self.conv3] if self.deep_stem else [self.conv1]
        yield [[*stem, self.maxpool]]
        for stage in self.stages:
            for bottleneck in stage:
                assert isinstance(bottleneck, Bottleneck)
                yield bottleneck.paths()


def load_torchvision(network: nn.Module, path: str | Path) -> None:
    """Loads a state_dict in torchvision's format into a network of the same layout.

    network: a `ResNet` (files of resnet50 and resnet101; their classifier `fc` is left out) or a `DeepLabV3` of
        torchvision's form (files of deeplabv3_resnet50 and deeplabv3_resnet101; their auxiliary classifier is left out
        where the network has none).
    path: a .safetensors file, or any other file that torch.load reads.

    Raises ValueError that names the entries that don't fit, and changes nothing then.
    """
    tensors = read_state_dict(Path(path))
    own = network.state_dict()
    optional = ("fc.", "aux_classifier.")
    given = {name: tensor for name, tensor in tensors.items() if name in own or not name.startswith(optional)}
    # Files from before 2018 don't count batches.
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    unknown = [name for name in given if name not in own]
    other = [
        f"{name} is {list(tensor.shape)}, not {list(own[name].shape)}"
        for name, tensor in given.items()
        if name in own and tensor.shape != own[name].shape
    ]
    for problem, names in (("lacks", missing), ("also holds", unknown), ("has other shapes:", other)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path} doesn't fit {type(network).__name__}: it {problem} {', '.join(names[:3])}{more}")
    network.load_state_dict(given, strict=False)
