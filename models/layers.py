"""Layers with torch.nn's parameters whose forward is computed by `backstride.fused_ops` or by torch.

A network takes `ops="fused" | "torch"` and hands it to its layers. Both choices hold the same parameters
under the same names, so one state_dict serves both, and a whole network can be compared as well as a single
op.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import fused_ops
from ..fused_ops.dispatch import ATEN, kernel_path

Ops = Literal["fused", "torch"]
Activation = Literal["relu"] | None


def check_ops(ops: str) -> None:
    """Raises ValueError unless `ops` is "fused" or "torch"."""
    if ops not in ("fused", "torch"):
        raise ValueError(f'ops={ops!r} is unknown: choose "fused" (backstride.fused_ops) or "torch" (torch.nn)')


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d, plus `residual` if one is given, followed by `activation` (None or "relu").

    Takes torch.nn.Conv2d's arguments, but pads with zeros only; [N, C_in, H, W] and a residual [N, C_out, H', W'] ->
    [N, C_out, H', W']. When `ops` is "fused", they are computed with the products or, where cuDNN multiplies, together
    in one pass after. With biased=False the bias is left to what follows.
    """

    def __init__(self, *args, activation: Activation = None, ops: Ops = "fused", **kwargs):
        super().__init__(*args, **kwargs)
        check_ops(ops)
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode={self.padding_mode!r}: pad with torch.nn.functional.pad before this layer")
        self.activation: Activation = activation
        self.ops = ops

    def forward(self, input: Tensor, residual: Tensor | None = None, *, biased: bool = True) -> Tensor:  # pyright: ignore
        bias = self.bias if biased else None
        if self.ops == "fused":
            sizes = self.stride, self.padding, self.dilation, self.groups
            return fused_ops.conv2d(input, self.weight, bias, *sizes, activation=self.activation, residual=residual)
        return _finish(self._conv_forward(input, self.weight, bias), residual, self.activation)


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d, plus `residual` if one is given, followed by `activation` (None or "relu").

    Takes torch.nn.ConvTranspose2d's arguments; [N, C_in, h, w] and a residual [N, C_out, H, W] -> [N, C_out, H, W].
    When `ops` is "fused", they are computed with the products or, where cuDNN multiplies, together in one pass after.
    With biased=False the bias is left to what follows.
    """

    def __init__(self, *args, activation: Activation = None, ops: Ops = "fused", **kwargs):
        super().__init__(*args, **kwargs)
        check_ops(ops)
        self.activation: Activation = activation
        self.ops = ops

    def forward(self, input: Tensor, residual: Tensor | None = None, *, biased: bool = True) -> Tensor:  # pyright: ignore
        bias = self.bias if biased else None
        sizes: Any = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        if self.ops == "fused":
            return fused_ops.conv_transpose2d(
                input, self.weight, bias, *sizes, activation=self.activation, residual=residual
            )
        return _finish(F.conv_transpose2d(input, self.weight, bias, *sizes), residual, self.activation)


class UpConvConcat2d(nn.ConvTranspose2d):
    """A transposed convolution of `input`, concatenated behind `skip`: cat([skip, conv_transpose2d(input)],
    dim=1).

    Takes torch.nn.ConvTranspose2d's arguments. `input` is [N, C_in, h, w], `skip` is [N, C_skip, H, W] with
    the size that the transposed convolution gives, the result is [N, C_skip + C_out, H, W]. When `ops` is
    "fused" the up-convolution is written straight into its place beside the skip.
    """

    def __init__(self, *args, ops: Ops = "fused", **kwargs):
        super().__init__(*args, **kwargs)
        check_ops(ops)
        self.ops = ops

    def forward(self, input: Tensor, skip: Tensor) -> Tensor:  # pyright: ignore
        if self.ops == "fused":
            return fused_ops.conv_transpose2d_concat(
                input,
                skip,
                self.weight,
                self.bias,
                self.stride,
                self.padding,
                self.output_padding,
                self.groups,
                self.dilation,
            )
        return torch.cat([skip, super().forward(input)], dim=1)


class BatchNorm2d(fused_ops.BatchNorm2d):
    """torch.nn.BatchNorm2d, plus `residual` if one is given, followed by `activation` (None or "relu").

    [N, channels, H, W] and a residual of the same shape -> [N, channels, H, W]. When `ops` is "fused", they are
    computed in the pass that normalises. `input_bias` [channels]: what the layer before left for this one to add.
    """

    def __init__(self, channels: int, *, activation: Activation = None, ops: Ops = "fused"):
        super().__init__(channels)
        check_ops(ops)
        self.activation: Activation = activation
        self.ops = ops

    def forward(self, input: Tensor, residual: Tensor | None = None, input_bias: Tensor | None = None) -> Tensor:  # pyright: ignore
        if self.ops == "fused":
            return super().forward(input, activation=self.activation, residual=residual, input_bias=input_bias)
        input = input if input_bias is None else input + input_bias.view(-1, 1, 1)
        return _finish(nn.BatchNorm2d.forward(self, input), residual, self.activation)


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm, plus `residual` if one is given, followed by `activation` (None or "relu"): what
    `synchronised` puts in the place of a `BatchNorm2d`. Takes torch.nn.SyncBatchNorm's arguments."""

    def __init__(self, *args, activation: Activation = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.activation: Activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # pyright: ignore
        return _finish(super().forward(input), residual, self.activation)


def synchronised(network: nn.Module) -> nn.Module:
    """The network, changed in place so that batch normalisation in training sees the batches of all processes.

    Each `BatchNorm2d` becomes a `SyncBatchNorm2d`, where torch's `convert_sync_batchnorm` would drop the activation;
    any other batch normalisation becomes torch's SyncBatchNorm. The new layers hold the same parameters and buffers
    under the same names. Where the network is such a layer itself, the new one is returned.
    """
    new: dict[nn.Module, nn.Module] = {}
    # A module that has several names gets the same new one under all of them.
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if not isinstance(module, _BatchNorm) or isinstance(module, nn.SyncBatchNorm):
            continue
        if module not in new:
            new[module] = _synchronised(module)
        if module is not network:
            network.set_submodule(name, new[module])
    return new.get(network, network)


def _synchronised(norm: _BatchNorm) -> nn.Module:
    if not isinstance(norm, BatchNorm2d):
        return nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    layer = SyncBatchNorm2d(norm.num_features, norm.eps, norm.momentum, activation=norm.activation)
    layer.weight, layer.bias = norm.weight, norm.bias
    layer.running_mean, layer.running_var = norm.running_mean, norm.running_var
    layer.num_batches_tracked = norm.num_batches_tracked
    return layer.train(norm.training)


def _finish(output: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
    output = output if residual is None else output + residual
    return output if activation is None else torch.relu(output)


def max_pool(*args, ops: Ops = "fused", **kwargs) -> nn.MaxPool2d:
    """A torch.nn.MaxPool2d, computed by `ops`. Takes torch.nn.MaxPool2d's arguments."""
    check_ops(ops)
    return (fused_ops.MaxPool2d if ops == "fused" else nn.MaxPool2d)(*args, **kwargs)


class Stack(nn.Sequential):
    """Layers in order. Where kernels run, a convolution leaves its bias to the `BatchNorm2d` behind it, which takes it
    away again: three passes over the memory, with its gradient's, for nothing."""

    def forward(self, input: Tensor) -> Tensor:
        left = None
        layers = list(self)
        for layer, after in zip(layers, [*layers[1:], None], strict=True):
            if left is not None:
                input, left = layer(input, input_bias=left), None
            elif _leaves_bias(layer, after, input):
                input, left = layer(input, biased=False), layer.bias
            else:
                input = layer(input)
        return input


def _leaves_bias(layer: nn.Module, after: nn.Module | None, input: Tensor) -> bool:
    if not isinstance(layer, Conv2d | ConvTranspose2d) or not isinstance(after, BatchNorm2d):
        return False
    bare = layer.bias is not None and layer.activation is None
    return bare and layer.ops == after.ops == "fused" and kernel_path(input).name != ATEN


class ConvNorm(nn.Sequential):
    """A convolution, batch normalisation, plus `residual` if one is given, and ReLU if it was asked for; see
    `conv_norm`."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # pyright: ignore
        convolution, norm, *_ = self
        return norm(convolution(input), residual)


def conv_norm(
    before: int, after: int, size: int, *, stride: int = 1, dilation: int = 1, relu: bool = True, ops: Ops = "fused"
) -> ConvNorm:
    """A convolution without bias that keeps the size (but for `stride`), batch normalisation, and ReLU."""
    padding = dilation * (size // 2)
    convolution = Conv2d(before, after, size, stride=stride, padding=padding, dilation=dilation, bias=False, ops=ops)
    return ConvNorm(convolution, *(norm_relu(after, ops) if relu else [BatchNorm2d(after, ops=ops)]))


def norm_relu(channels: int, ops: Ops) -> list[nn.Module]:
    """Batch normalisation with ReLU, for an nn.Sequential."""
    # The names in a state_dict count an nn.Sequential's modules, and in files, torchvision's too, ReLU is one of them.
    return [BatchNorm2d(channels, activation="relu", ops=ops), nn.Identity()]


def resize(input: Tensor, size: Sequence[int], align_corners: bool = True) -> Tensor:
    """Bilinear interpolation of [N, C, h, w] to [N, C, *size].

    align_corners: the corner pixels of both grids coincide. So it is where a grid of every s-th pixel, as layers with
        a stride give it, covers an image of sn + 1 pixels.
    """
    if input.shape[2:] == torch.Size(size):
        return input
    return F.interpolate(input, tuple(size), mode="bilinear", align_corners=align_corners)


def halve(input: Tensor, ops: Ops) -> Tensor:
    """The maxima of 2x2 windows, stride 2: [N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)]. As in Caffe, the last
    row and column of an odd size have windows of their own."""
    pool = fused_ops.max_pool2d if ops == "fused" else F.max_pool2d
    return pool(input, 2, ceil_mode=True)


def halve_with_places(input: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
    """(what `halve` gives, where each maximum was, for `unpool` with the same `ops`)"""
    # Where no kernel runs, offsets would only be made from torch's indices and be turned into them again.
    if ops == "fused" and kernel_path(input).name != ATEN:
        return fused_ops.max_pool2d_with_offsets(input, 2, ceil_mode=True)
    return F.max_pool2d(input, 2, ceil_mode=True, return_indices=True)


def unpool(input: Tensor, places: Tensor, size: tuple[int, int], ops: Ops) -> Tensor:
    """Each value at the place that `halve_with_places` found it at, zeros elsewhere:
    [N, C, h, w] -> [N, C, *size]."""
    if ops == "fused" and places.dtype == torch.uint8:
        return fused_ops.max_unpool2d_with_offsets(input, places, size, 2)
    return F.max_unpool2d(input, places, (2, 2), output_size=size)


def rnn(*args, ops: Ops = "fused", **kwargs) -> nn.RNNBase:
    """A torch.nn.RNN, computed by `ops`. Takes torch.nn.RNN's arguments."""
    check_ops(ops)
    return (fused_ops.RNN if ops == "fused" else nn.RNN)(*args, **kwargs)
