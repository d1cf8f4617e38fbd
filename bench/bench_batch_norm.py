"""Batch normalisation with ReLU, and with the residual before it, as networks have them: bandwidth alone.

Where a gradient moves little data (`fused_ops.dispatch.SHORT`), both sides are torch's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import fused_ops
from .case import Call, Case, Compiled, Output, dtypes

FORWARD = "forward"
DIRECTIONS = (FORWARD, "forward and backward")


@dataclass(frozen=True)
class Layer:
    """Batch normalisation of (N, C, *size), by the batch's own statistics or, without `training`, by running ones."""

    name: str
    batch: int
    channels: int
    size: tuple[int, ...]
    residual: bool = False
    training: bool = True
    quick: bool = False  # also timed under --quick

    def tiny(self) -> Layer:
        """The same on a small image, for the interpreter."""
        return replace(self, batch=min(self.batch, 4), channels=5, size=tuple(min(n, 6) for n in self.size))

    @property
    def x(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.size)

    @property
    def regime(self) -> str:
        if not self.training:
            return "batch normalisation in evaluation"
        return f"batch normalisation{', residual' * self.residual} and ReLU"

    def work(self, direction: str) -> tuple[int, int]:
        """How often a tensor as large as x is read, and written; a few numbers for each channel don't count.

        The statistics take all of x before there is a first y, so training reads it twice; so does the backward x and
        the gradient, once for the sums and once for the result. Behind a residual y says what ReLU let through, and the
        residual's gradient, written with the sums, is the one that is read again. Where all of it stays in L2 between
        the two, a time can be below this floor.
        """
        reads, writes = 1 + self.training + self.residual, 1
        if direction != FORWARD:
            reads, writes = reads + 4 + self.residual, writes + 1 + self.residual
        return reads, writes


# SegNet on CamVid, ResNet-101 in DeepLab on crops of 513 pixels at output stride 8, U-Net's largest with the
# normalisation that it had not as published.
LAYERS = [
    Layer("SegNet 64, CamVid", 4, 64, (360, 480), quick=True),
    Layer("SegNet 128, CamVid", 4, 128, (180, 240)),
    Layer("SegNet 256, CamVid", 4, 256, (90, 120)),
    Layer("SegNet 512, CamVid", 4, 512, (45, 60), quick=True),
    Layer("SegNet 512, CamVid, last", 4, 512, (22, 30)),
    Layer("ResNet-101 stem", 8, 64, (257, 257)),
    Layer("ResNet-101 layer 3", 8, 256, (65, 65)),
    Layer("ResNet-101 layer 4", 8, 512, (65, 65)),
    Layer("ResNet-101 layer 4, end of a block", 8, 2048, (65, 65), residual=True, quick=True),
    Layer("U-Net 64, batch 16", 16, 64, (512, 512), quick=True),
    Layer("1024 features", 4096, 1024, ()),
    Layer("3-D U-Net 32", 2, 32, (64, 64, 64)),
    Layer("SegNet 64, CamVid, evaluation", 4, 64, (360, 480), training=False, quick=True),
    Layer("ResNet-101 layer 4, end of a block, evaluation", 8, 2048, (65, 65), residual=True, training=False),
]


class WithParameters:
    """`call` with running statistics, weight and bias behind its first argument: in fp32 where that is in 16 bits, as
    autocast leaves a network's."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.made: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}

    def __call__(self, x: Tensor, *others: Tensor) -> Output:
        key = x.dtype, x.device
        if key not in self.made:
            self.made[key] = self.make(x)
        return self.call(x, *self.made[key], *others)

    @staticmethod
    def make(x: Tensor) -> list[Tensor]:
        """The same numbers for every dtype and device."""
        generator = torch.Generator().manual_seed(0)
        mean, var, weight, bias = (torch.randn(x.shape[1], generator=generator) for _ in range(4))
        dtype = torch.promote_types(x.dtype, torch.float32)
        return [vector.to(x.device, dtype) for vector in (mean, var.abs() + 0.5, weight, bias)]


def _forward(training: bool) -> tuple[Call, Call]:
    def ours(
        x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        return fused_ops.batch_norm(x, mean, var, weight, bias, training, activation="relu", residual=residual)

    def theirs(
        x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        y = F.batch_norm(x, mean, var, weight, bias, training)
        return F.relu(y if residual is None else y + residual)

    return ours, theirs


def _training(forward: Call) -> Call:
    """Takes forward's arguments and the gradient by its result; returns those by all but the running statistics."""

    def call(x: Tensor, mean: Tensor, var: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        *others, grad = tensors
        x, *others = (tensor.detach().requires_grad_() for tensor in (x, *others))
        return torch.autograd.grad(forward(x, mean, var, *others), [x, *others], grad)

    return call


def case(layer: Layer, direction: str, dtype: torch.dtype) -> Case:
    train = direction != FORWARD
    ours, theirs = _forward(layer.training)
    compiled: Call = Compiled(theirs)
    if train:
        ours, theirs, compiled = map(_training, (ours, theirs, compiled))
    reads, writes = layer.work(direction)
    numbers = math.prod(layer.x)
    return Case(
        "batch_norm",
        layer.regime,
        layer.name,
        f"{'x'.join(map(str, layer.x))}{' + residual' * layer.residual} ReLU",
        direction,
        dtype,
        (layer.x,) * (1 + layer.residual + train),
        flop=2 * reads * numbers,  # a multiply-add with each number that is read
        bytes=dtype.itemsize * (reads + writes) * numbers,
        # Of gradients the norm: where y is nearly 0, a last bit decides whether ReLU lets them through.
        reduction=None if train else 1,
        ours=WithParameters(ours),
        theirs=WithParameters(theirs),
        compiled=WithParameters(compiled),
    )


def cases(quick: bool, tiny: bool) -> list[Case]:
    """Every layer forward, and those in training with their gradients, in bf16 and fp32; `quick`: some, in bf16."""
    layers = [layer for layer in LAYERS if layer.quick or not quick]
    return [
        case(layer.tiny() if tiny else layer, direction, dtype)
        for dtype in dtypes(quick, tiny)
        for layer in layers
        for direction in (DIRECTIONS if layer.training else DIRECTIONS[:1])
    ]
