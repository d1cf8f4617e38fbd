"""Whole networks: forward, loss and backward of one training step, fused against torch.

Each as Python launches it, and again as a CUDA graph: where a network's layers are short, the first is the host's time,
and only the second the GPU's.

The optimiser's step, alike in both, is left out. fp32 weights throughout; bf16 means autocast, as one trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.language.char_rnn import CharRNN
from ..models.layers import Ops
from ..models.segmentation.deeplab import DeepLabV3, DeepLabV3Plus
from ..models.segmentation.segnet import SegNet, SegNetBasic
from ..models.segmentation.unet import UNet
from .bench_conv import conv_flop
from .case import Case, dtypes

VOCABULARY = 65  # characters in tinyshakespeare
# Of the gradients' norm: one number near 0 that ReLU lets through or not, by its last bit, changes those of all layers
# before it. In fp32, on the CPU, that comes to 0.0001 in U-Net and 0.016 in SegNet.
FLIPS = 0.05


@dataclass(frozen=True)
class Network:
    """`build(ops=...)` makes the network; `size` is its input's shape (N, C, H, W), or (T, N) for text."""

    name: str
    build: Callable[..., nn.Module]
    size: tuple[int, ...]
    check: tuple[int, ...]  # a size on which it is compared with fp64
    tiny_build: Callable[..., nn.Module] | None = None  # for the interpreter; None: another stands for it
    tiny_size: tuple[int, ...] = ()
    quick: bool = False  # also timed under --quick
    # What is compared. A hundred layers deep, gradients at the input are as much rounding as anything else.
    check_build: Callable[..., nn.Module] | None = None

    def tiny(self) -> Network:
        build = self.tiny_build or self.build
        return replace(self, build=build, size=self.tiny_size, check=self.tiny_size)


def without_dropout(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    network = build(**options)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


NETWORKS = [
    Network(
        "U-Net",
        partial(UNet, 3, 2, padding="same", dropout=0.0),
        (16, 3, 512, 512),
        (1, 3, 64, 64),
        partial(UNet, 3, 2, width=4, depth=1, padding="same", dropout=0.0),
        (1, 3, 8, 8),
        quick=True,
    ),
    Network(
        "U-Net, valid",
        partial(UNet, 3, 2, dropout=0.0),
        (1, 3, 572, 572),
        (1, 3, 188, 188),
    ),
    Network(
        "SegNet",
        SegNet,
        (4, 3, 360, 480),
        (2, 3, 64, 96),
        partial(SegNet, stages=((4,), (6,))),
        (2, 3, 9, 8),
        quick=True,
    ),
    Network("SegNet-Basic", SegNetBasic, (8, 3, 360, 480), (2, 3, 64, 96)),
    Network(
        "DeepLab v3, ResNet-101",
        partial(without_dropout, DeepLabV3),
        (8, 3, 513, 513),
        (4, 3, 65, 65),
        check_build=partial(without_dropout, DeepLabV3, blocks=(1, 1, 1, 3)),
    ),
    Network(
        "DeepLab v3+, Xception-65",
        partial(without_dropout, DeepLabV3Plus, backbone="xception"),
        (8, 3, 513, 513),
        (4, 3, 65, 65),
        check_build=partial(without_dropout, DeepLabV3Plus, backbone="xception", middle=1),
    ),
    Network(
        "char-RNN",
        partial(CharRNN, VOCABULARY),
        (50, 50),
        (50, 50),
        partial(CharRNN, VOCABULARY, width=16),
        (4, 2),
        quick=True,
    ),
]


class Step:
    """Forward, mean cross-entropy and backward of one network with weights and targets from a fixed seed.

    Called with x, it returns the gradients by all parameters, `joined` in one vector: what is compared then is an error
    relative to all of them, where some are zero but for rounding. Text networks read characters made from x.
    """

    def __init__(self, build: Callable[..., nn.Module], ops: Ops, joined: bool, compiled: bool = False) -> None:
        self.build, self.ops, self.joined, self.compiled = build, ops, joined, compiled
        self.state: dict[Any, tuple[Callable[..., Any], list[nn.Parameter], Tensor, Tensor]] = {}

    def prepare(self, x: Tensor) -> tuple[Callable[..., Any], list[nn.Parameter], Tensor, Tensor]:
        generator_state = torch.get_rng_state()
        torch.manual_seed(0)
        module = self.build(ops=self.ops)
        torch.set_rng_state(generator_state)
        module.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        text = x.dim() == 2
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        # Random thousandths: the same in every dtype that x may come in.
        data = (x.double().abs() * 1e3).long() % VOCABULARY if text else x
        with torch.no_grad():
            logits = _logits(module(data.float() if not text and x.dtype != torch.float64 else data))
        classes = logits.shape[1]
        shape = (logits.shape[0], *logits.shape[2:])
        targets = (torch.arange(prod(shape), device=x.device) * 7 // 3 % classes).view(shape)
        function = module
        if self.compiled:
            if not self.state:  # a reset would also drop what was compiled for another layout
                torch._dynamo.reset()
            function = torch.compile(module, mode="max-autotune-no-cudagraphs", dynamic=False)
        return function, list(module.parameters()), data, targets

    def _run(self, x: Tensor) -> tuple[Tensor, list[nn.Parameter], Tensor]:
        """Logits, parameters and targets."""
        key = x.dtype, x.shape, x.stride(), x.device
        if key not in self.state:
            self.state[key] = self.prepare(x)
        function, parameters, data, targets = self.state[key]
        low = x.dtype in (torch.bfloat16, torch.float16)
        data = data.float() if low and data.is_floating_point() else data
        with torch.autocast(x.device.type, x.dtype if low else torch.bfloat16, enabled=low):
            return _logits(function(data)), parameters, targets

    def logits(self, x: Tensor) -> Tensor:
        return self._run(x)[0].detach()

    def __call__(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        logits, parameters, targets = self._run(x)
        loss = F.cross_entropy(logits if x.dtype == torch.float64 else logits.float(), targets)
        gradients = torch.autograd.grad(loss, parameters)
        return torch.cat([g.flatten() for g in gradients]) if self.joined else gradients


def _logits(output: Any) -> Tensor:
    """Logits with the classes on axis 1, from a network for images, or from one for text with its state."""
    return output[0].flatten(0, 1) if isinstance(output, tuple) else output


def _conv_flop(x, weight, bias, stride, padding, dilation, transposed, *_: Any, out_shape: Any) -> int:
    return conv_flop(x, out_shape, weight, stride, padding, dilation, transposed)


def _conv_backward_flop(grad, x, weight, bias, *geometry: Any, out_shape: Any) -> int:
    """As much again for each of the gradients by input and weight that is wanted."""
    *options, wanted = geometry
    return sum(wanted[:2]) * _conv_flop(x, weight, bias, *options, out_shape=grad)


FLOP = {torch.ops.aten.convolution: _conv_flop, torch.ops.aten.convolution_backward: _conv_backward_flop}


@lru_cache
def flop(network: Network) -> int:
    """Of one training step of torch's network, counted on tensors without data."""
    with torch.device("meta"):
        module = network.build(ops="torch")
        text = len(network.size) == 2
        x = torch.zeros(network.size, dtype=torch.long) if text else torch.zeros(network.size)
        with FlopCounterMode(display=False, custom_mapping=FLOP) as counter:
            _logits(module(x)).sum().backward()
    return counter.get_total_flops()


def case(network: Network, dtype: torch.dtype, replayed: bool = False) -> Case:
    step = Case(
        "network",
        "whole networks, training step" + (" replayed" if replayed else ""),
        network.name + (", replayed" if replayed else ""),
        "x".join(map(str, network.size)),
        "forward and backward",
        dtype,
        (network.size,),
        flop=flop(network),
        # The floor is that of the products alone: what has to pass through memory depends on what is fused.
        bytes=0,
        reduction=None,
        ours=Step(network.build, "fused", joined=False),
        theirs=Step(network.build, "torch", joined=False),
        compiled=Step(network.build, "torch", joined=False, compiled=True),
        replayed=replayed,
    )
    build = network.check_build or network.build
    ours, theirs = (Step(build, ops, joined=True).logits for ops in ("fused", "torch"))
    logits = replace(step, shapes=(network.check,), ours=ours, theirs=theirs, compiled=None)
    ours, theirs = (Step(build, ops, joined=True) for ops in ("fused", "torch"))
    # In 16 bits torch's own gradients are off by as much as they are large, SegNet's by 1.3 of their norm: anything
    # would pass.
    gradients = replace(logits, dtype=torch.float32, ours=ours, theirs=theirs, full_precision=True, slack=FLIPS)
    return replace(step, checks=(logits, gradients))


def cases(quick: bool, tiny: bool) -> list[Case]:
    """Every network in bf16 (autocast) and fp32, launched and replayed; `quick`: some, in bf16; `tiny`: launched."""
    networks = [n for n in NETWORKS if (n.quick or not quick) and (n.tiny_build or not tiny)]
    return [
        case(network.tiny() if tiny else network, dtype, replayed)
        for dtype in dtypes(quick, tiny)
        for network in networks
        for replayed in ((False,) if tiny else (False, True))
    ]
