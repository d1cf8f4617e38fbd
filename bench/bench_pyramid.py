"""Parallel atrous convolutions over one input into one concatenation (ASPP), forward and in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import fused_ops
from . import bench_conv
from .case import Call, Case, Compiled, dtypes

DIRECTIONS = ("forward", "forward and backward")


@dataclass(frozen=True)
class Pyramid:
    """Branches of `out_channels` each: one of 3x3 for each dilation, and with `pointwise` a 1x1 one before them."""

    name: str
    batch: int
    channels: int
    out_channels: int
    size: tuple[int, int]
    dilations: tuple[int, ...]
    pointwise: bool = True
    bias: bool = False  # where batch normalisation follows there is none
    quick: bool = False  # also timed under --quick

    def tiny(self) -> Pyramid:
        """The same branches on a small image, for the interpreter."""
        dilations = tuple(d // 6 for d in self.dilations)
        return replace(
            self, batch=1, channels=5, out_channels=min(self.out_channels, 4), size=(5, 6), dilations=dilations
        )

    @property
    def branches(self) -> list[bench_conv.Layer]:
        """Each as a convolution of its own."""
        kernels = [(1, 1)] * self.pointwise + [(3, d) for d in self.dilations]
        return [
            bench_conv.Layer(
                self.name, self.batch, self.channels, self.out_channels, self.size, k, 1, d * (k - 1) // 2, d
            )
            for k, d in kernels
        ]


# The heads of DeepLab on crops of 513 pixels (33: output stride 16, 65: 8) and of DeepLab v2 on crops of 321.
PYRAMIDS = [
    Pyramid("DeepLabv3 ASPP, output stride 16", 8, 2048, 256, (33, 33), (6, 12, 18), quick=True),
    Pyramid("DeepLabv3 ASPP, output stride 8", 8, 2048, 256, (65, 65), (12, 24, 36)),
    Pyramid("DeepLabv2 ASPP, ResNet-101", 8, 2048, 21, (41, 41), (6, 12, 18, 24), pointwise=False, bias=True),
    Pyramid("DeepLabv2 ASPP, VGG-16 fc6", 8, 512, 1024, (41, 41), (6, 12, 18, 24), pointwise=False, bias=True),
]


def _forward(pyramid: Pyramid) -> tuple[Call, Call]:
    """Both take (x, a weight for each branch, a bias for each branch, where there are any)."""
    branches = pyramid.branches
    count, dilations = len(branches), [branch.dilation for branch in branches]

    def ours(x: Tensor, *tensors: Tensor) -> Tensor:
        return fused_ops.atrous_pyramid(x, tensors[:count], tensors[count:] or None, dilations)

    def theirs(x: Tensor, *tensors: Tensor) -> Tensor:
        biases: Sequence[Tensor | None] = tensors[count:] or [None] * count
        parts = [
            F.conv2d(x, weight, bias, 1, branch.padding, branch.dilation)
            for weight, bias, branch in zip(tensors[:count], biases, branches, strict=True)
        ]
        return torch.cat(parts, dim=1)

    return ours, theirs


def _training(forward: Call) -> Call:
    """Takes forward's arguments and the gradient by its result; returns the gradients by all arguments."""

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        *arguments, grad = tensors
        arguments = [argument.detach().requires_grad_() for argument in arguments]
        return torch.autograd.grad(forward(*arguments), arguments, grad)

    return call


def case(pyramid: Pyramid, direction: str, dtype: torch.dtype) -> Case:
    branches = pyramid.branches
    train = direction != "forward"
    x, channels = branches[0].x, len(branches) * pyramid.out_channels
    y = (pyramid.batch, channels, *pyramid.size)
    weights = [branch.weight for branch in branches]
    biases = [(pyramid.out_channels,)] * len(branches) if pyramid.bias else []
    numbers = math.prod(x) + sum(map(math.prod, weights)) + math.prod(y)
    ours, theirs = _forward(pyramid)
    compiled: Call = Compiled(theirs)
    if train:
        ours, theirs, compiled = map(_training, (ours, theirs, compiled))
    rates = "+".join([*["1x1"] * pyramid.pointwise, *(f"d{d}" for d in pyramid.dilations)])
    return Case(
        "atrous_pyramid",
        "atrous pyramid into the concatenation",
        pyramid.name,
        f"{'x'.join(map(str, x))} -> {'x'.join(map(str, y))} {rates}{' bias' if pyramid.bias else ''}",
        direction,
        dtype,
        (x, *weights, *biases, *([y] if train else [])),
        # Backward: the gradients by input and weights are as much work each. Every tensor has a gradient.
        flop=sum(map(bench_conv.flop, branches)) * (3 if train else 1),
        bytes=dtype.itemsize * numbers * (2 if train else 1),
        reduction=None if train else max(bench_conv.reduction(branch, "forward") for branch in branches),
        ours=ours,
        theirs=theirs,
        compiled=compiled,
    )


def cases(quick: bool, tiny: bool) -> list[Case]:
    """Every pyramid forward and in training, in bf16 and fp32; `quick`: one of them, in bf16."""
    pyramids = [pyramid for pyramid in PYRAMIDS if pyramid.quick or not quick]
    return [
        case(pyramid.tiny() if tiny else pyramid, direction, dtype)
        for dtype in dtypes(quick, tiny)
        for pyramid in pyramids
        for direction in DIRECTIONS
    ]
