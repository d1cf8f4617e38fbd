"""Max-pooling and unpooling of published networks: bandwidth alone, so index bytes decide."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import fused_ops
from .case import Case, Compiled, dtypes


@dataclass(frozen=True)
class Layer:
    """A pooling with square windows, and the unpooling that takes its result back."""

    name: str
    batch: int
    channels: int
    size: tuple[int, ...]
    kernel: int = 2
    stride: int = 2
    padding: int = 0
    quick: bool = False  # also timed under --quick

    def tiny(self) -> Layer:
        """The same windows on a small image, for the interpreter."""
        return replace(self, batch=1, channels=3, size=tuple(min(n, 7) for n in self.size))

    @property
    def x(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.size)

    @property
    def y(self) -> tuple[int, ...]:
        out = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in self.size)
        return (self.batch, self.channels, *out)


LAYERS = [
    Layer("SegNet pool 1, CamVid", 4, 64, (360, 480), quick=True),
    Layer("SegNet pool 2, CamVid", 4, 128, (180, 240)),
    Layer("SegNet pool 3, CamVid", 4, 256, (90, 120)),
    Layer("SegNet pool 4, CamVid", 4, 512, (45, 60), quick=True),
    Layer("SegNet pool 5, CamVid", 4, 512, (22, 30)),
    Layer("U-Net pool 1, batch 16", 16, 64, (512, 512), quick=True),
    Layer("ENet downsampling 1", 8, 16, (256, 512)),
    Layer("ENet downsampling 2", 8, 64, (128, 256)),
    Layer("64 channels, 1024x2048", 1, 64, (1024, 2048)),
    Layer("DeconvNet pool 1, batch 16", 16, 64, (224, 224)),
    Layer("3-D SegNet", 2, 64, (64, 64, 64), quick=True),
    Layer("ResNet 3x3 s2", 32, 64, (112, 112), 3, 2, 1, quick=True),
]


def cases(quick: bool, tiny: bool) -> list[Case]:
    """Pooling with places, and pooling with the way back, by offsets against torch's indices; bf16 and fp32."""
    layers = [layer for layer in LAYERS if layer.quick or not quick]
    return [
        make(layer.tiny() if tiny else layer, dtype)
        for dtype in dtypes(quick, tiny)
        for layer in layers
        for make in (pool_case, round_trip_case)
    ]


def pool_case(layer: Layer, dtype: torch.dtype) -> Case:
    axes, windows = len(layer.size), (layer.kernel, layer.stride, layer.padding)
    ours = getattr(fused_ops, f"max_pool{axes}d_with_offsets")
    pool = partial(getattr(F, f"max_pool{axes}d"), return_indices=True)
    compiled = Compiled(lambda x: pool(x, *windows))  # returns the indices, or they would not be written
    return Case(
        f"max_pool{axes}d_with_offsets",
        "max-pooling with places",
        layer.name,
        f"{'x'.join(map(str, layer.x))} k{layer.kernel} s{layer.stride} p{layer.padding}",
        "forward",
        dtype,
        (layer.x,),
        flop=math.prod(layer.y) * layer.kernel**axes,
        bytes=dtype.itemsize * (math.prod(layer.x) + math.prod(layer.y)) + math.prod(layer.y),
        reduction=1,
        ours=lambda x: ours(x, *windows)[0],
        theirs=lambda x: pool(x, *windows)[0],
        compiled=lambda x: compiled(x)[0],
    )


def round_trip_case(layer: Layer, dtype: torch.dtype) -> Case:
    """Pool, and unpool to the same size: SegNet's encoder and decoder at one level."""
    axes, windows = len(layer.size), (layer.kernel, layer.stride, layer.padding)
    pool, unpool = (getattr(fused_ops, f"max_{name}{axes}d_with_offsets") for name in ("pool", "unpool"))
    torch_pool = partial(getattr(F, f"max_pool{axes}d"), return_indices=True)
    torch_unpool = partial(getattr(F, f"max_unpool{axes}d"), output_size=layer.size)
    # Each by itself: in a network other layers lie between them.
    compiled_pool = Compiled(lambda x: torch_pool(x, *windows))
    compiled_unpool = Compiled(lambda values, indices: torch_unpool(values, indices, *windows))

    def ours(x: Tensor) -> Tensor:
        values, offsets = pool(x, *windows)
        return unpool(values, offsets, layer.size, *windows)

    def theirs(x: Tensor) -> Tensor:
        return torch_unpool(*torch_pool(x, *windows), *windows)

    return Case(
        f"max_unpool{axes}d_with_offsets",
        "max-pooling and unpooling",
        layer.name,
        f"{'x'.join(map(str, layer.x))} k{layer.kernel} s{layer.stride} p{layer.padding}",
        "pool and unpool",
        dtype,
        (layer.x,),
        flop=2 * math.prod(layer.y) * layer.kernel**axes,
        bytes=2 * (dtype.itemsize * (math.prod(layer.x) + math.prod(layer.y)) + math.prod(layer.y)),
        reduction=1,
        ours=ours,
        theirs=theirs,
        compiled=lambda x: compiled_unpool(*compiled_pool(x)),
    )
