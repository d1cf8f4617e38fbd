"""VGG16: Simonyan, Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (arXiv
1409.1556), table 1, column D: the trunk of FCN, SegNet and DeconvNet."""

import copy
import math
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..layers import Conv2d, ConvTranspose2d, Ops, Stack, halve, norm_relu

Stages = tuple[tuple[int, ...], ...]
"""The channels of the convolutions between two max-pools, stage for stage."""

VGG16_STAGES: Stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """The classification network: [N, in_channels, s, s] -> logits [N, num_classes].

    s is 32 `window`, so 224 as published. After each stage of 3x3 convolutions with ReLU a 2x2 max-pool; then three
    dense layers with ReLU and dropout between. `convolutionalize` turns the dense layers into convolutions.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        *,
        stages: Stages = VGG16_STAGES,
        dense: int = 4096,
        window: int = 7,
        ops: Ops = "fused",
    ):
        super().__init__()
        self.ops: Ops = ops
        self.stages = conv_stages(in_channels, stages, ops=ops)
        self.size = window * 2 ** len(stages)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(stages[-1][-1] * window**2, dense),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(dense, dense),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(dense, num_classes),
        )
        self.apply(initialise)

    def features(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, C, ceil(H / 32), ceil(W / 32)]"""
        for stage in self.stages:
            input = halve(stage(input), self.ops)
        return input

    def forward(self, input: Tensor) -> Tensor:
        check_input(input, in_channels_of(self.stages))
        if input.shape[2:] != (self.size, self.size):
            raise ValueError(
                f"the dense layers take images of {self.size} x {self.size} pixels only, got {list(input.shape)}: "
                f"scale them, or use convolutionalize(network.classifier, ...)"
            )
        return self.classifier(self.features(input))


def conv_stages(
    in_channels: int, stages: Stages, *, norm: bool = False, first_padding: int = 1, ops: Ops = "fused"
) -> nn.ModuleList:
    """One `Stack` of 3x3 convolutions with ReLU (and batch normalisation before it) for each stage."""
    if not stages or not all(stages) or min(map(min, stages)) < 1:
        raise ValueError(f"stages={stages}: every stage needs at least one convolution with at least one channel")
    modules = nn.ModuleList()
    before, padding = in_channels, first_padding
    for widths in stages:
        layers: list[nn.Module] = []
        for width in widths:
            layers += conv_relu(before, width, 3, padding, norm=norm, ops=ops)
            before, padding = width, 1
        modules.append(Stack(*layers))
    return modules


def conv_relu(
    before: int, after: int, size: int, padding: int = 0, *, norm: bool, transposed: bool = False, ops: Ops
) -> list[nn.Module]:
    """A convolution, with `norm` batch normalisation, and ReLU."""
    convolution = ConvTranspose2d if transposed else Conv2d
    if not norm:
        return [convolution(before, after, size, padding=padding, activation="relu", ops=ops)]
    return [convolution(before, after, size, padding=padding, ops=ops), *norm_relu(after, ops)]


def initialise(module: nn.Module) -> None:
    """For `nn.Module.apply`: N(0, sqrt(2 / N)) with N the number of values that one output value sums (He et al.
    2015, "msra" in SegNet's training files), zero biases."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        channels = module.in_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / (channels * math.prod(module.kernel_size))))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def in_channels_of(stages: nn.ModuleList) -> int:
    return next(_convolutions(stages)).in_channels


def check_input(input: Tensor, in_channels: int, smallest: int = 1) -> None:
    """ValueError unless `input` is [N, in_channels, H, W] with H and W of at least `smallest`."""
    if input.dim() != 4 or input.shape[1] != in_channels:
        raise ValueError(f"expected an input [N, {in_channels}, H, W], got {list(input.shape)}")
    if min(input.shape[2:]) < smallest:
        raise ValueError(
            f"an input of {input.shape[2]} x {input.shape[3]} pixels is too small for this network: "
            f"it needs at least {smallest} in each direction; scale or pad the image"
        )


def convolutionalize(dense: nn.Sequential, channels: int, ops: Ops = "fused") -> nn.Sequential:
    """Turns the dense layers of a classification network into convolutions (Long et al. 2015, section 3.1, figure 2).

    dense: layers as in `VGG16.classifier`: an optional nn.Flatten, then nn.Linear with element-wise layers between.
        The first nn.Linear reads a square map of `channels` channels.

    Returns layers that hold copies of the same weights: the first nn.Linear becomes a k x k convolution, k x k being
    the map it read, the others become 1x1. [N, channels, k, k] -> [N, num_classes, 1, 1], the numbers of `dense`;
    [N, channels, H, W] -> [N, num_classes, H - k + 1, W - k + 1], those of `dense` on each k x k window. Where the
    layers before pad nothing, that is the whole network, applied to each window of the image.

    Raises TypeError for any other layer, ValueError if the map isn't square.
    """
    layers: list[nn.Module] = []
    size = None
    for layer in dense:
        if isinstance(layer, nn.Linear):
            size = math.isqrt(layer.in_features // channels) if size is None else 1
            if channels * size**2 != layer.in_features:
                raise ValueError(f"{layer} reads no square map of {channels} channels: pass the last map's channels")
            convolution = Conv2d(channels, layer.out_features, size, bias=layer.bias is not None, ops=ops)
            weight = layer.weight.detach().reshape(convolution.weight.shape)
            convolution.weight = nn.Parameter(weight.clone())
            if layer.bias is not None:
                convolution.bias = nn.Parameter(layer.bias.detach().clone())
            layers.append(convolution)
            channels = layer.out_features
        elif isinstance(layer, nn.Dropout | nn.ReLU):
            layers.append(copy.deepcopy(layer))
        elif not isinstance(layer, nn.Flatten):
            raise TypeError(f"{layer} can't become a convolution: only Flatten, Linear, ReLU and Dropout are known")
    return nn.Sequential(*layers)


def load_vgg16(network: nn.Module, path: str | Path) -> None:
    """Loads ImageNet weights of VGG16 into a network of this folder, from a state_dict in torchvision's format.

    path: a .safetensors file, or any other file that torch.load reads, with `features.N.weight` and
    `classifier.N.weight` (models vgg16 and, for networks with batch normalisation, vgg16_bn). The convolutions are
    loaded, with them the batch normalisation if the file has it, and the dense layers as fc6 and fc7 or, in `VGG16`,
    as they are; the rest of the network stays as it is. These weights want RGB images that are normalised with the
    mean (0.485, 0.456, 0.406) and the standard deviation (0.229, 0.224, 0.225).

    Raises ValueError that names the layer if the file doesn't hold VGG16 or the network has other widths.
    """
    tensors = read_state_dict(Path(path))
    convolutions = list(_convolutions(network.get_submodule("stages")))
    layers = list(_layers(tensors, "features."))
    _copy_all([layer for layer in layers if tensors[f"{layer}.weight"].dim() == 4], convolutions, tensors, path)
    if norms := [layer for layer in layers if tensors[f"{layer}.weight"].dim() == 1]:
        own = [module for module in network.get_submodule("stages").modules() if isinstance(module, nn.BatchNorm2d)]
        _copy_all(norms, own, tensors, path)
    if isinstance(network, VGG16):
        dense = [module for module in network.classifier if isinstance(module, nn.Linear)]
    else:
        dense = [getattr(network, name) for name in ("fc6", "fc7") if hasattr(network, name)]
    _copy_all(list(_layers(tensors, "classifier."))[: len(dense)], dense, tensors, path)


def _convolutions(stages: nn.Module) -> Iterator[Conv2d]:
    return (module for module in stages.modules() if isinstance(module, Conv2d))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} can't be read as a state_dict ({type(error).__name__}): save it again") from error


def _layers(tensors: dict[str, Tensor], prefix: str) -> Iterator[str]:
    """The layers below `prefix` that have a weight, in the order of their numbers."""
    names = [name.removesuffix(".weight") for name in tensors if name.startswith(prefix) and name.endswith(".weight")]
    return iter(sorted(names, key=lambda name: int(name.removeprefix(prefix))))


def _copy_all(names: list[str], modules: Sequence[nn.Module], tensors: dict[str, Tensor], path: str | Path) -> None:
    kind = type(modules[0]).__name__ if modules else "BatchNorm2d"
    if len(names) != len(modules):
        raise ValueError(f"{path} holds {len(names)} layers for the network's {len(modules)} of type {kind}")
    for name, module in zip(names, modules, strict=True):
        for key, own in module.state_dict().items():
            if key == "num_batches_tracked":  # files from before 2018 don't have it
                continue
            given = tensors.get(f"{name}.{key}")
            if given is None:
                raise ValueError(f"{path} has no {name}.{key}: it is no state_dict of VGG16 in torchvision's format")
            if given.numel() != own.numel() or given.shape[:1] != own.shape[:1]:
                raise ValueError(
                    f"{path}: {name}.{key} has the shape {list(given.shape)}, but the network's is {list(own.shape)}: "
                    f"only a network with VGG16's widths can take these weights"
                )
            own.copy_(given.reshape(own.shape))
