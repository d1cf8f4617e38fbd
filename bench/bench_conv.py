"""Convolutions and transposed convolutions of published networks, in all three directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import fused_ops
from ..fused_ops.conv import ops
from ..kernels.conv.zones import meetings
from .case import Call, Case, Compiled, dtypes, results_of

CONCAT = "conv_transpose2d_concat"
DENSE = "convolution, dense"


@dataclass(frozen=True)
class Layer:
    """A layer; geometry is the same along every axis. `skip`: channels of what the output is concatenated to; with
    `in_place` they lie before the output's already, in the tensor that both are slices of."""

    name: str
    batch: int
    channels: int
    out_channels: int
    size: tuple[int, ...]
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    output_padding: int = 0
    transposed: bool = False
    skip: int = 0
    in_place: bool = False
    quick: bool = False  # also timed under --quick

    @property
    def op(self) -> str:
        return (
            CONCAT
            if self.skip and not self.in_place
            else f"conv{'_transpose' if self.transposed else ''}{len(self.size)}d"
        )

    @property
    def regime(self) -> str:
        if self.skip:
            return f"up-convolution into the concatenation, skip {'in place' if self.in_place else 'copied'}"
        if self.groups > 1:
            kind = "depthwise" if self.groups == self.channels else "grouped"
            return f"{'transposed ' if self.transposed else ''}convolution, {kind}"
        if self.transposed:
            return f"transposed convolution, kernel {'=' if self.kernel == self.stride else '>'} stride"
        return "convolution, dilated" if self.dilation > 1 else DENSE

    @property
    def relu(self) -> bool:
        """Whether ReLU follows in the forward: behind a dense convolution, whose products are cuDNN's on both sides."""
        return self.regime == DENSE

    @property
    def out_size(self) -> tuple[int, ...]:
        span = self.dilation * (self.kernel - 1) + 1
        if self.transposed:
            extra = span + self.output_padding - 2 * self.padding
            return tuple((i - 1) * self.stride + extra for i in self.size)
        return tuple((i + 2 * self.padding - span) // self.stride + 1 for i in self.size)

    @property
    def x(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.size)

    @property
    def y(self) -> tuple[int, ...]:
        return (self.batch, self.out_channels, *self.out_size)

    @property
    def weight(self) -> tuple[int, ...]:
        a, b = (self.channels, self.out_channels) if self.transposed else (self.out_channels, self.channels)
        return (a, b // self.groups, *[self.kernel] * len(self.size))

    def tiny(self) -> Layer:
        """The same kind of geometry on few pixels and channels, with stride at most 4, for the interpreter."""
        scale = max(1, self.stride // 4)
        groups = min(self.groups, 3)
        channels, out_channels = (groups * min(c // self.groups, 5) for c in (self.channels, self.out_channels))
        least = 2 if self.transposed else max(3, self.dilation * (self.kernel - 1) + 2 - 2 * self.padding)
        size = tuple(min(i, least) for i in self.size)
        skip = min(self.skip, 3)
        return replace(
            self,
            batch=1,
            channels=channels,
            out_channels=out_channels,
            size=size,
            kernel=self.kernel // scale,
            stride=self.stride // scale,
            padding=self.padding // scale,
            groups=groups,
            skip=skip,
        )


Up = partial(Layer, transposed=True)

# Sizes as in the papers or the networks' code; "valid" is U-Net as published, on 572x572; ASPP on crops of 513 pixels
# (33: output stride 16, 65: 8).
LAYERS = [
    Layer("FCN fc6", 1, 512, 4096, (22, 22), 7, quick=True),
    Up("FCN upscore2", 1, 21, 21, (16, 16), 4, 2),
    Up("FCN upscore_pool4", 1, 21, 21, (34, 34), 4, 2),
    Up("FCN-8s upscore8", 1, 21, 21, (70, 70), 16, 8),
    Up("FCN-32s upscore32", 1, 21, 21, (16, 16), 64, 32),
    Up("FCN-8s upscore8, batch 16, depthwise", 16, 21, 21, (70, 70), 16, 8, groups=21),
    Up("FCN-8s upscore8, batch 16", 16, 21, 21, (70, 70), 16, 8, quick=True),
    Up("bilinear x2, depthwise", 16, 256, 256, (64, 64), 4, 2, 1, groups=256),
    Up("U-Net up 1024, valid", 1, 1024, 512, (28, 28), 2, 2, quick=True),
    Up("U-Net up 512, valid", 1, 512, 256, (52, 52), 2, 2),
    Up("U-Net up 256, valid", 1, 256, 128, (100, 100), 2, 2),
    Up("U-Net up 128, valid", 1, 128, 64, (196, 196), 2, 2),
    Up("U-Net up 1024, batch 16", 16, 1024, 512, (32, 32), 2, 2),
    Up("U-Net up 512, batch 16", 16, 512, 256, (64, 64), 2, 2),
    Up("U-Net up 256, batch 16", 16, 256, 128, (128, 128), 2, 2),
    Up("U-Net up 128, batch 16", 16, 128, 64, (256, 256), 2, 2, quick=True),
    Layer("U-Net decoder 1024, valid", 1, 1024, 512, (56, 56), 3),
    Layer("U-Net decoder 128, batch 16", 16, 128, 64, (512, 512), 3, 1, 1),
    Layer("U-Net encoder 64, valid", 1, 64, 64, (570, 570), 3, quick=True),
    Up("k3 s2 up 512", 1, 512, 256, (128, 128), 3, 2, 1, output_padding=1),
    Up("DCGAN 512", 64, 512, 256, (8, 8), 4, 2, 1, quick=True),
    Up("DCGAN 128", 64, 128, 64, (32, 32), 4, 2, 1),
    Up("CycleGAN up 256", 8, 256, 128, (64, 64), 3, 2, 1, output_padding=1, quick=True),
    Layer("DilatedNet conv5", 1, 512, 512, (66, 66), 3, 1, 2, 2),
    Layer("DilatedNet fc6", 1, 512, 4096, (90, 90), 7, 1, 0, 4),
    Layer("DilatedNet context, 21 channels", 1, 21, 21, (96, 96), 3, 1, 16, 16),
    Layer("DilatedNet context, large", 1, 168, 336, (96, 96), 3, 1, 16, 16),
    Layer("DeepLab-LargeFOV fc6", 8, 512, 1024, (41, 41), 3, 1, 12, 12),
    Layer("DeepLabv2 ASPP d24", 8, 2048, 21, (41, 41), 3, 1, 24, 24),
    Layer("DeepLabv3 ASPP d6", 8, 2048, 256, (33, 33), 3, 1, 6, 6),
    Layer("DeepLabv3 ASPP d12", 8, 2048, 256, (33, 33), 3, 1, 12, 12, quick=True),
    Layer("DeepLabv3 ASPP d18", 8, 2048, 256, (33, 33), 3, 1, 18, 18),
    Layer("DeepLabv3 ASPP d36", 8, 2048, 256, (65, 65), 3, 1, 36, 36),
    Layer("ResNet-101 layer 3, d2", 8, 256, 256, (65, 65), 3, 1, 2, 2),
    Layer("ResNet-101 layer 4, d4", 8, 512, 512, (65, 65), 3, 1, 4, 4),
    Layer("DeepLabv3+ ASPP d12, depthwise", 8, 2048, 2048, (33, 33), 3, 1, 12, 12, groups=2048, quick=True),
    Layer("DeepLabv3+ Xception d2, depthwise", 8, 728, 728, (33, 33), 3, 1, 2, 2, groups=728),
    Layer("DeepLabv3+ decoder, depthwise", 8, 304, 304, (129, 129), 3, 1, 1, groups=304),
    Layer("DeepLabv3+ decoder 1x1", 8, 304, 256, (129, 129), 1),
    Layer("PSPNet head", 8, 4096, 512, (60, 60), 3, 1, 1),
    Layer("ICNet sub1, stride 2", 1, 3, 32, (1024, 2048), 3, 2, 1),
    Layer("ICNet fusion d2", 1, 256, 128, (128, 256), 3, 1, 2, 2),
    Layer("ICNet layer 4, d4", 1, 256, 256, (32, 64), 3, 1, 4, 4),
    Up("HiFi-GAN up 512", 16, 512, 256, (32,), 16, 8, 4, quick=True),
    Up("HiFi-GAN up 64", 16, 64, 32, (4096,), 4, 2, 1),
    Layer("HiFi-GAN residual k11 d5", 16, 64, 64, (8192,), 11, 1, 25, 5, quick=True),
    Up("Oobleck up 1024", 1, 1024, 512, (2048,), 12, 6, 3),
    *[
        Layer(f"ResNeXt-50 32x4d, groups of {c}", 32, 32 * c, 32 * c, (size, size), 3, 1, 1, groups=32, quick=c == 4)
        for c, size in ((4, 56), (8, 28), (16, 14), (32, 7))
    ],
    Layer("short convolution k4, depthwise", 1, 12288, 12288, (16387,), 4, groups=12288),
    Up("nnU-Net up 320", 2, 320, 256, (8, 8, 8), 2, 2),
    Up("nnU-Net up 128", 2, 128, 64, (32, 32, 32), 2, 2, quick=True),
    Up("nnU-Net up 64", 2, 64, 32, (64, 64, 64), 2, 2),
    Layer("ASPP d6 in 3-D", 1, 256, 256, (8, 16, 16), 3, 1, 6, 6),
    Layer("nnU-Net decoder 64", 2, 64, 32, (128, 128, 128), 3, 1, 1),
    Up("U-Net up 1024 + skip, batch 16", 16, 1024, 512, (32, 32), 2, 2, skip=512),
    Up("U-Net up 128 + skip, valid", 1, 128, 64, (196, 196), 2, 2, skip=64),
    Up("U-Net up 128 + skip, batch 16", 16, 128, 64, (256, 256), 2, 2, skip=64, quick=True),
    Up("U-Net up 1024 + skip in place, batch 16", 16, 1024, 512, (32, 32), 2, 2, skip=512, in_place=True),
    Up("U-Net up 128 + skip in place, valid", 1, 128, 64, (196, 196), 2, 2, skip=64, in_place=True),
    Up("U-Net up 128 + skip in place, batch 16", 16, 128, 64, (256, 256), 2, 2, skip=64, in_place=True, quick=True),
]


def conv_flop(
    x: Sequence[int],
    y: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
) -> int:
    """2 x multiply-adds of a convolution from shape `x` to `y`, alike in all directions: each weight element meets each
    pixel of the narrow side once, but for those that would meet padding, which are not needed."""
    narrow, wide = (x, y) if transposed else (y, x)
    axes = zip(narrow[2:], wide[2:], weight[2:], stride, padding, dilation, strict=True)
    return 2 * x[0] * math.prod(weight[:2]) * math.prod(meetings(*axis) for axis in axes)


def flop(layer: Layer) -> int:
    stride, padding, dilation = ([value] * len(layer.size) for value in (layer.stride, layer.padding, layer.dilation))
    return conv_flop(layer.x, layer.y, layer.weight, stride, padding, dilation, layer.transposed)


def byte_count(layer: Layer, dtype: torch.dtype) -> int:
    """Input, weight and output once each; a skip connection is read and written, but for one in place."""
    skip = 0 if layer.in_place else 2 * layer.batch * layer.skip * math.prod(layer.out_size)
    return dtype.itemsize * (math.prod(layer.x) + math.prod(layer.weight) + math.prod(layer.y) + skip)


def reduction(layer: Layer, direction: str) -> int:
    """Terms in one sum: a pixel of the wide side is reached by every stride-th tap only."""
    if direction == "weight gradient":
        return layer.batch * math.prod(layer.size if layer.transposed else layer.out_size)
    spread = layer.transposed == (direction == "forward")
    taps = math.ceil(layer.kernel / layer.stride) if spread else layer.kernel
    channels = layer.channels if direction == "forward" else layer.out_channels
    return channels // layer.groups * taps ** len(layer.size)


class InPlace:
    """`up` into what `concatenate` gives, behind the skip that lies there: from its second call on, as when an encoder
    wrote the skip there, that is all it does. The inputs are the same in every call."""

    def __init__(self, up: Call, concatenate: Call) -> None:
        self.up, self.concatenate = up, concatenate
        self.results: dict[Any, Tensor] = {}

    def __call__(self, x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        key = x.dtype, x.shape, x.stride(), x.device
        # Where memory is poisoned, what an earlier call wrote must not hide what this one leaves out.
        if key not in self.results or torch.are_deterministic_algorithms_enabled():
            (self.results[key],) = results_of(self.concatenate(x, skip, weight, bias))
            self.results[key][:, skip.shape[1] :] = math.nan
        result = self.results[key]
        self.up(x, weight, bias, out=result[:, skip.shape[1] :])
        return result


def _forward(layer: Layer) -> tuple[Call, Call]:
    names = ("stride", "padding", "dilation", "groups", *(["output_padding"] if layer.transposed else []))
    options = {name: getattr(layer, name) for name in names}
    ours = partial(getattr(fused_ops, layer.op), **options)
    if layer.skip:
        up = partial(F.conv_transpose2d, **options)

        def theirs(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.cat([skip, up(x, weight, bias)], dim=1)

        return InPlace(ours, theirs) if layer.in_place else ours, theirs
    theirs = partial(getattr(F, layer.op), **options)
    if layer.relu:
        return partial(ours, activation="relu"), lambda *tensors: F.relu(theirs(*tensors))
    return ours, theirs


def _gradient(layer: Layer, direction: str) -> tuple[Call, Call]:
    """Both take (x, weight, gradient by y) and compute one gradient, without the forward."""
    axes = len(layer.size)
    stride, padding, dilation = [layer.stride] * axes, [layer.padding] * axes, [layer.dilation] * axes
    geometry = (stride, padding, dilation, layer.groups)
    extra = [layer.output_padding] * axes
    by_input = direction == "input gradient"

    def ours(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        if by_input:
            op = ops.conv if layer.transposed else ops.conv_transpose
            return op(grad, weight, None, None, layer.size, *geometry, False)
        wide, narrow = (grad, x) if layer.transposed else (x, grad)
        return ops.conv_weight_grad(wide, narrow, weight.shape[2:], *geometry)

    def theirs(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        arguments = (stride, padding, dilation, layer.transposed, extra, layer.groups)
        wanted = [by_input, not by_input, False]
        gradients = torch.ops.aten.convolution_backward(grad, x, weight, None, *arguments, wanted)
        return gradients[0 if by_input else 1]

    return ours, theirs


def case(layer: Layer, direction: str, dtype: torch.dtype) -> Case:
    if direction == "forward":
        ours, theirs = _forward(layer)
        skip = [(layer.batch, layer.skip, *layer.out_size)] if layer.skip else []
        shapes = (layer.x, *skip, layer.weight, (layer.out_channels,))
    else:
        ours, theirs = _gradient(layer, direction)
        shapes = (layer.x, layer.weight, layer.y)
    x, y = ("x".join(map(str, shape)) for shape in (layer.x, layer.y))
    geometry = f"k{layer.kernel} s{layer.stride} p{layer.padding} d{layer.dilation} g{layer.groups}"
    work = flop(layer), byte_count(layer, dtype), reduction(layer, direction)
    return Case(
        layer.op,
        layer.regime,
        layer.name,
        f"{x} -> {y} {geometry}{' ReLU' if layer.relu and direction == 'forward' else ''}",
        direction,
        dtype,
        shapes,
        *work,
        ours=ours,
        theirs=theirs,
        compiled=Compiled(theirs),
    )


def cases(quick: bool, tiny: bool) -> list[Case]:
    """Every layer in every direction, in bf16 and fp32; `quick`: a third of the layers, in bf16 only.

    `tiny` cases are in fp32 only: Triton's interpreter rounds to bf16 towards zero, which doubles its error.
    """
    layers = [layer for layer in LAYERS if layer.quick or not quick]
    return [
        case(layer.tiny() if tiny else layer, direction, dtype)
        for dtype in dtypes(quick, tiny)
        for layer in layers
        # Behind a concatenation the gradients are those of the transposed convolution alone.
        for direction in (["forward"] if layer.skip else ["forward", "input gradient", "weight gradient"])
    ]
