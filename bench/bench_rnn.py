"""The vanilla RNN over whole sequences, forward and training, against cuDNN."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import fused_ops
from .case import Case


@dataclass(frozen=True)
class Layer:
    """A network: T steps of B sequences, I inputs, H hidden units. `packed`: lengths from T / 4 to T."""

    name: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int = 1
    directions: int = 1
    packed: bool = False
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

    @property
    def batch_sizes(self) -> Tensor:
        """Sequences that are still going on at each step."""
        if not self.packed:
            return torch.full((self.steps,), self.batch)
        lengths = torch.linspace(self.steps, max(self.steps // 4, 1), self.batch).long()
        return (lengths > torch.arange(self.steps)[:, None]).sum(1)

    @property
    def rows(self) -> int:
        """Steps of all sequences together."""
        return int(self.batch_sizes.sum())

    @property
    def regime(self) -> str:
        if self.packed or self.directions == 2 or self.layers > 1:
            return "vanilla RNN, several layers, both directions or packed"
        return f"vanilla RNN, H {'≤ 256' if self.hidden <= 256 else '≤ 1024' if self.hidden <= 1024 else '> 1024'}"


# char-rnn, torch-rnn, PyTorch's word language model, AWD-LSTM's sizes, KernelBench level 3 no. 33, TorchRL's and
# FlashRNN's sizes; what cuDNN's fast paths leave out; DeepBench's training and device sizes.
NAMED = [
    Layer("char-rnn, 2 layers", 50, 50, 65, 128, layers=2, quick=True),
    Layer("torch-rnn, 2 layers", 50, 50, 64, 128, layers=2),
    Layer("word language model, 2 layers", 35, 20, 200, 200, layers=2),
    Layer("AWD", 70, 80, 400, 1150),
    Layer("KernelBench", 256, 8, 1024, 256, quick=True),
    Layer("TorchRL", 128, 256, 32, 512),
    Layer("FlashRNN's size", 1024, 16, 768, 768),
    Layer("512, both directions", 512, 64, 512, 512, directions=2, quick=True),
    Layer("512, 2 layers", 512, 64, 512, 512, layers=2),
    Layer("256, packed", 512, 64, 256, 256, packed=True),
    Layer("512, packed", 512, 64, 512, 512, packed=True, quick=True),
    Layer("512, both directions, packed", 512, 64, 512, 512, directions=2, packed=True),
    Layer("200, batch 50: odd sizes", 512, 50, 65, 200),
    Layer("1000, batch 50: odd sizes", 512, 50, 65, 1000, quick=True),
    *(
        Layer(f"DeepBench {hidden}, batch {batch}", 50, batch, hidden, hidden, quick=(hidden, batch) == (1760, 16))
        for hidden in (1760, 2048, 2560)
        for batch in (16, 32, 64, 128)
    ),
    Layer("DeepBench device, 32", 672, 1, 32, 32),
    Layer("DeepBench device, 64", 96, 1, 64, 64),
]
# What decides cuDNN's algorithm: hidden units, batch and dtype. The number of steps matters at one batch only.
GRID = [
    Layer(f"{hidden}, batch {batch}, {steps} steps", steps, batch, hidden, hidden, quick=steps == 512 and batch == 64)
    for hidden in (128, 256, 384, 512, 768, 1024)
    for batch, steps in (
        *((batch, 512) for batch in (1, 16, 32, 64, 128, 256)),
        *((64, steps) for steps in (50, 128, 1024)),
    )
]
LAYERS = NAMED + GRID


class Torch:
    """torch.nn.RNN with given weights. `flat`: in the one buffer that spares cuDNN a copy in every call. `loop`: by
    torch's own loop over the steps, without cuDNN."""

    def __init__(self, layer: Layer, train: bool, flat: bool = True, loop: bool = False) -> None:
        self.layer, self.flat, self.loop, self.train = layer, flat, loop, train
        self.modules: dict[torch.dtype, nn.RNN] = {}

    def __call__(self, x: Tensor, hx: Tensor, *params: Tensor) -> Tensor:
        if x.dtype not in self.modules:
            self.modules[x.dtype] = self.build(params)
        module = self.modules[x.dtype]
        if not self.loop:
            return run(self.layer, module, x, hx, self.train)
        with torch.backends.cudnn.flags(enabled=False):
            return run(self.layer, module, x, hx, self.train)

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
        return run(self.layer, self.module, x, hx, self.train)


def scaled(weight: Tensor, layer: Layer) -> Tensor:
    """Standard normal numbers to the spread of nn.RNN's initialisation, which keeps the recurrence from saturating."""
    return weight / (3 * layer.hidden) ** 0.5


def run(layer: Layer, module: nn.RNNBase, x: Tensor, hx: Tensor, train: bool) -> Tensor:
    """The outputs, or after a backward the gradient of the first layer's recurrent weights, which sums over all."""
    input = PackedSequence(x, layer.batch_sizes) if layer.packed else x
    with torch.set_grad_enabled(train):
        output = module(input, hx)[0]
        output = output.data if isinstance(output, PackedSequence) else output
    if not train:
        return output
    return torch.autograd.grad(output, list(module.parameters()), torch.ones_like(output))[1]


def case(layer: Layer, train: bool, dtype: torch.dtype) -> Case:
    rows = layer.rows
    x = (rows, layer.inputs) if layer.packed else (layer.steps, layer.batch, layer.inputs)
    hx = (layer.layers * layer.directions, layer.batch, layer.hidden)
    products = sum(a * b[0] for a, *b in layer.weights if b)
    parameters = sum(a * (b[0] if b else 1) for a, *b in layer.weights)
    numbers = rows * layer.inputs + parameters + rows * layer.hidden * layer.directions
    # Backward: the gradients by inputs and weights are as much work each, and read the outputs again.
    passes = 3 if train else 1
    packed = " packed" if layer.packed else ""
    return Case(
        "rnn_tanh",
        layer.regime,
        layer.name,
        f"T{layer.steps} B{layer.batch} I{layer.inputs} H{layer.hidden} L{layer.layers} D{layer.directions}{packed}",
        "forward and backward" if train else "forward",
        dtype,
        (x, hx, *layer.weights),
        flop=2 * rows * products * passes,
        bytes=dtype.itemsize * numbers * passes,
        reduction=rows if train else 1,
        ours=Ours(layer, train),
        theirs=Torch(layer, train),
        rivals={
            "torch, weights apart": Torch(layer, train, flat=False),
            # Tens of thousands of launches, 5 to 80 times slower than the kernels: to be seen, but not everywhere.
            **({"torch, step by step": Torch(layer, train, loop=True)} if layer.quick else {}),
        },
    )


def cases(quick: bool, tiny: bool) -> list[Case]:
    """Every network, forward and in training, in bf16, fp32 and, but for most of the grid, fp16; `quick`: some of them,
    in bf16 only; `tiny`: one of each kind, the grid being all of one."""
    every = NAMED if tiny else LAYERS
    layers = [layer for layer in every if layer.quick or not quick]
    dtypes = [torch.bfloat16] if quick else [torch.bfloat16, torch.float32, torch.float16]
    return [
        case(layer.tiny() if tiny else layer, train, dtype)
        for dtype in ([torch.float32] if tiny else dtypes)
        for layer in layers
        if dtype != torch.float16 or layer.quick or layer in NAMED
        for train in (False, True)
    ]
