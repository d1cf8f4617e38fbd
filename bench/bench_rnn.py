"""The vanilla RNN over whole sequences, forward and training, against cuDNN."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import fused_ops
from .case import Call, Case


@dataclass(frozen=True)
class Layer:
    """A network: T steps of B sequences, I inputs, H hidden units."""

    name: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int = 1
    directions: int = 1
    quick: bool = False  # also timed under --quick

    def tiny(self) -> Layer:
        """The same kind of network, for the interpreter."""
        return replace(self, steps=3, batch=2, inputs=5, hidden=min(self.hidden, 19))

    @property
    def weights(self) -> list[tuple[int, ...]]:
        """Shapes in torch.rnn_tanh's order."""
        shapes: list[tuple[int, ...]] = []
        for layer in range(self.layers):
            size = self.inputs if layer == 0 else self.hidden * self.directions
            shapes += [
                (self.hidden, size),
                (self.hidden, self.hidden),
                (self.hidden,),
                (self.hidden,),
            ] * self.directions
        return shapes


# char-rnn and torch-rnn's defaults, PyTorch's word language model, KernelBench level 3 no. 33, FlashRNN's size,
# DeepBench's training sizes; between them, a grid over what decides cuDNN's algorithm.
LAYERS = [
    Layer("char-rnn, 2 layers", 50, 50, 65, 128, layers=2, quick=True),
    Layer("word language model, 2 layers", 35, 20, 200, 200, layers=2),
    Layer("KernelBench", 256, 8, 1024, 256, quick=True),
    Layer("FlashRNN's size", 1024, 16, 768, 768),
    Layer("DeepBench 1760", 50, 16, 1760, 1760, quick=True),
    Layer("DeepBench 2560", 50, 64, 2560, 2560),
    Layer("128, batch 64", 512, 64, 128, 128, quick=True),
    Layer("256, batch 64", 512, 64, 256, 256),
    Layer("384, batch 64", 512, 64, 384, 384),
    Layer("512, batch 1", 512, 1, 512, 512),
    Layer("512, batch 64", 512, 64, 512, 512, quick=True),
    Layer("512, both directions", 512, 64, 512, 512, directions=2),
    Layer("1024, batch 16", 512, 16, 1024, 1024),
    Layer("1024, batch 64", 512, 64, 1024, 1024, quick=True),
    Layer("1024, batch 256", 128, 256, 1024, 1024),
    Layer("1000, batch 50: odd sizes", 512, 50, 65, 1000),
]


class Torch:
    """torch.nn.RNN with given weights; `flat`: in the one buffer that spares cuDNN a copy in every call."""

    def __init__(self, layer: Layer, flat: bool, train: bool) -> None:
        self.layer, self.flat, self.train = layer, flat, train
        self.modules: dict[torch.dtype, nn.RNN] = {}

    def __call__(self, x: Tensor, hx: Tensor, *params: Tensor) -> Tensor:
        if x.dtype not in self.modules:
            self.modules[x.dtype] = self.build(params)
        module = self.modules[x.dtype]
        return run(module, x, hx, module.parameters(), self.train)

    def build(self, params: tuple[Tensor, ...]) -> nn.RNN:
        layer = self.layer
        module = nn.RNN(layer.inputs, layer.hidden, layer.layers, bidirectional=layer.directions == 2)
        module.to(params[0])
        with torch.no_grad():
            for mine, given in zip(module.parameters(), params, strict=True):
                mine.copy_(scaled(given, layer))
            # flatten_parameters passes over bf16, although cuDNN takes it.
            if self.flat and params[0].is_cuda and params[0].dtype != torch.float64:
                mode = torch.backends.cudnn.rnn.get_cudnn_mode("RNN_TANH")  # pyright: ignore[reportAttributeAccessIssue]
                torch._cudnn_rnn_flatten_weight(  # pyright: ignore[reportPrivateImportUsage]
                    list(module.parameters()),
                    4,
                    layer.inputs,
                    mode,
                    layer.hidden,
                    0,
                    layer.layers,
                    False,
                    layer.directions == 2,
                )
        return module


class Ours:
    """fused_ops.RNN with given weights."""

    def __init__(self, layer: Layer, train: bool) -> None:
        self.layer, self.train = layer, train
        self.module: fused_ops.RNN | None = None

    def __call__(self, x: Tensor, hx: Tensor, *params: Tensor) -> Tensor:
        if self.module is None:
            layer = self.layer
            self.module = fused_ops.RNN(
                layer.inputs, layer.hidden, layer.layers, bidirectional=layer.directions == 2
            ).to(params[0])
            with torch.no_grad():
                for mine, given in zip(self.module.parameters(), params, strict=True):
                    mine.copy_(scaled(given, layer))
        return run(self.module, x, hx, self.module.parameters(), self.train)


def scaled(weight: Tensor, layer: Layer) -> Tensor:
    """Standard normal numbers to the spread of nn.RNN's initialisation, which keeps the recurrence from saturating."""
    return weight / (3 * layer.hidden) ** 0.5


def run(module, x: Tensor, hx: Tensor, params, train: bool) -> Tensor:
    """The outputs, or after a backward the gradient of the first layer's recurrent weights, which sums over all."""
    if not train:
        with torch.no_grad():
            return module(x, hx)[0]
    output, _ = module(x, hx)
    return torch.autograd.grad(output, list(params), torch.ones_like(output))[1]


def case(layer: Layer, train: bool, dtype: torch.dtype) -> Case:
    x, hx = (layer.steps, layer.batch, layer.inputs), (layer.layers * layer.directions, layer.batch, layer.hidden)
    y = layer.steps * layer.batch * layer.hidden * layer.directions
    products = sum(a * b[0] for a, *b in layer.weights if b)
    numbers = layer.steps * layer.batch * layer.inputs + sum(a * (b[0] if b else 1) for a, *b in layer.weights) + y
    # Backward: the gradients by inputs and weights are as much work each, and read the outputs again.
    passes = 3 if train else 1
    theirs: Call = Torch(layer, flat=True, train=train)
    return Case(
        "rnn_tanh",
        layer.name,
        f"T{layer.steps} B{layer.batch} I{layer.inputs} H{layer.hidden} L{layer.layers} D{layer.directions}",
        "forward and backward" if train else "forward",
        dtype,
        (x, hx, *layer.weights),
        flop=2 * layer.steps * layer.batch * products * passes,
        bytes=dtype.itemsize * numbers * passes,
        reduction=layer.steps * layer.batch if train else 1,
        ours=Ours(layer, train),
        theirs=theirs,
        rivals={"torch, weights apart": Torch(layer, flat=False, train=train)},
        compilable=False,
    )


def cases(quick: bool, tiny: bool) -> list[Case]:
    """Every network, forward and in training, in bf16, fp16 and fp32; `quick`: a third of them, in bf16 only."""
    layers = [layer for layer in LAYERS if layer.quick or not quick]
    dtypes = [torch.bfloat16] if quick else [torch.bfloat16, torch.float16, torch.float32]
    return [
        case(layer.tiny() if tiny else layer, train, dtype)
        for dtype in ([torch.float32] if tiny else dtypes)
        for layer in layers
        for train in (False, True)
    ]
