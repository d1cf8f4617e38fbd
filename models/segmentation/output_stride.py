"""The grid on which a network sees the image, made finer without new weights: atrous convolution as Chen et al. 2015,
"Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs" (arXiv 1412.7062), section 3.1,
introduce it ("hole algorithm")."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import nn

Paths = Sequence[Sequence[nn.Module]]
"""The convolutions and pools of a part of a network: parallel ways, each in the order of its calls."""


@runtime_checkable
class Strided(Protocol):
    """A network that can be given another output stride."""

    def paths(self) -> Iterable[Paths]:
        """Its parts in the order of their calls. Parallel ways through a part have the same stride."""
        ...


def set_output_stride(network: nn.Module, output_stride: int) -> None:
    """Makes the grid of the network's features `output_stride` pixels wide, in place, and leaves all weights as they
    are.

    Strides are taken out from the end. Where a layer loses the stride s, it computes its values at every place instead
    of every s-th; all layers behind it take their inputs from s times as far apart (dilation and padding times s), so
    that they see the same values as before. With running statistics (eval) each value that there was before is there
    again, at s times its place, and there are new ones between.

    network: with `paths`: ResNet, Xception, DeepLabV2, DeepLabV3, DeepLabV3Plus. Image pooling (from v3 on) averages
        over more places than before, so what comes behind it is close to what it was, not equal.

    Raises TypeError for a network without `paths`, ValueError for a stride that the network can't have, and changes
    nothing then.
    """
    if not isinstance(network, Strided):
        raise TypeError(f"{type(network).__name__} has no paths(): its output stride can't be changed")
    parts = list(network.paths())
    possible = [1]
    for part in parts:
        for layer in part[0]:
            possible += [possible[-1] * _pair(layer.stride)[0]] if _pair(layer.stride)[0] > 1 else []
    if output_stride not in possible:
        raise ValueError(f"output_stride={output_stride}: this network can have {', '.join(map(str, possible))}")
    changes: list[tuple[nn.Module, int, bool]] = []
    stride = rate = 1
    for part in parts:
        ends = set()
        for path in part:
            here, spread = stride, rate
            for layer in path:
                step = _pair(layer.stride)[0]
                drop = here * step > output_stride
                changes.append((layer, spread, drop))
                here, spread = (here, spread * step) if drop else (here * step, spread)
            ends.add((here, spread))
        ((stride, rate),) = ends
    for layer, spread, _ in changes:
        if spread > 1 and isinstance(layer, nn.MaxPool2d):
            raise ValueError(f"output_stride={output_stride}: {layer} can't be spread out, torch bounds its padding")
    for layer, spread, drop in changes:
        if drop:
            assert isinstance(layer, nn.Conv2d | nn.MaxPool2d)
            layer.stride = (1, 1)
        spread_out(layer, spread)


def spread_out(layer: nn.Module, rate: int) -> None:
    """Lets a convolution take its inputs from `rate` times as far apart, in place; the output's size stays."""
    assert isinstance(layer, nn.Conv2d | nn.MaxPool2d)
    if rate > 1 and _pair(layer.kernel_size) != (1, 1):
        layer.dilation = _times(rate, layer.dilation)
        layer.padding = _times(rate, layer.padding)


def _pair(value) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _times(rate: int, value) -> tuple[int, int]:
    first, second = _pair(value)
    return rate * first, rate * second
