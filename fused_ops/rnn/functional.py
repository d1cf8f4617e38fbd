"""The vanilla RNN as in torch.rnn_tanh and torch.rnn_relu: layers, directions, dropout, packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import ATEN, REFUSED, Path, autocast, autocast_dtype, autocasts, explained_by, kernel_path
from ..registration import cast_all
from . import ops
from .rows import first_rows, offsets_of

TORCH = {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu}


class Call(NamedTuple):
    """Arguments of torch.rnn_tanh in either form; hx=None stands for zeros, batch_sizes=None for the dense form."""

    input: Tensor
    batch_sizes: Tensor | None
    hx: Tensor | None
    params: list[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def time_axis(self) -> int:
        return 1 if self.batch_first else 0


def _dense(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first) -> Call:
    return Call(input, None, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)


def _packed(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional) -> Call:
    return Call(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional, False)


def _bind(input: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Call:
    """The call in either form: torch tells them apart by the type of the third argument."""
    packed = "batch_sizes" in keywords or (len(arguments) > 1 and isinstance(arguments[1], Tensor))
    return (_packed if packed else _dense)(input, *arguments, **keywords)


def _shapes_fit(call: Call, batch: int) -> bool:
    """Whether all is as torch asks: otherwise its own function is called, and raises its own error."""
    input, hx, params, layers = call.input, call.hx, call.params, call.num_layers
    if layers < 1 or not params or not 0 <= call.dropout <= 1:
        return False
    hidden, directions = params[0].shape[0], 2 if call.bidirectional else 1
    common: list[tuple[int, ...]] = [(hidden, hidden), (hidden,), (hidden,)] if call.has_biases else [(hidden, hidden)]
    shapes = [(hidden, input.shape[-1]), *common]
    if directions > 1:
        shapes *= 2
    if layers > 1:
        shapes += [(hidden, hidden * directions), *common] * (directions * (layers - 1))
    tensors = params
    if hx is not None:
        shapes.append((layers * directions, batch, hidden))
        tensors = [*params, hx]
    if len(tensors) != len(shapes):
        return False
    dtype, device = input.dtype, input.device
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            return False
    return True


def _parameters(call: Call, layer: int, direction: int) -> Sequence[Tensor]:
    """w_ih, w_hh and, with biases, b_ih, b_hh."""
    count = 4 if call.has_biases else 2
    start = (layer * call.directions + direction) * count
    return call.params[start : start + count]


def _refused(call: Call) -> bool:
    """Whether the call is for torch's own function, to raise its own error."""
    if not isinstance(call.input, Tensor) or call.input.dim() != (3 if call.batch_sizes is None else 2):
        return True
    if call.batch_sizes is None:
        steps = call.input.shape[call.time_axis] > 0
    else:
        steps = _is_packed(call.batch_sizes, call.input.shape[0])
    return not steps or not _shapes_fit(call, _batch(call))


def _is_packed(batch_sizes: Tensor, rows: int) -> bool:
    """Whether these are the sizes of steps that together have so many rows, none of them larger than the one before: a
    kernel would go where no row is. Raises ValueError where there is no step."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu:
        return False
    if batch_sizes.numel() == 0:
        raise ValueError("batch_sizes is empty: a packed batch has at least one step")
    if torch.compiler.is_compiling() or type(batch_sizes) is not Tensor:  # values are not known
        return True
    sizes = batch_sizes.tolist()
    return sum(sizes) == rows and sizes[-1] > 0 and sizes == sorted(sizes, reverse=True)


def _batch(call: Call) -> int:
    if call.batch_sizes is None:
        return call.input.shape[1 - call.time_axis]
    known = not torch.compiler.is_compiling() and type(call.batch_sizes) is Tensor
    return call.hx.shape[1] if call.hx is not None and not known else int(call.batch_sizes[0])


def _cast(call: Call) -> Call:
    if not autocasts(call.input):
        return call
    device = call.input.device.type
    dtypes = {autocast_dtype(t, device) for t in call.params}
    return call._replace(
        input=autocast(call.input, device),
        hx=autocast(call.hx, device),
        params=cast_all(call.params, *dtypes) if len(dtypes) == 1 else [autocast(t, device) for t in call.params],
    )


def run(nonlinearity: str, call: Call) -> tuple[Tensor, Tensor]:
    """(output, h_n) of the call, by kernels where they run and else by torch's own function."""
    # torch.compile would unroll torch's own function over all time steps, and vmap has no rule for it.
    ours = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if not isinstance(call.input, Tensor) or (not ours and kernel_path(call.input).name == ATEN):
        return _run_aten(nonlinearity, call)
    call = _cast(call)
    if _refused(call):
        return _run_aten(nonlinearity, call)
    batch = _batch(call)
    offsets = None if call.batch_sizes is None else offsets_of(call.batch_sizes, call.input.device)
    x, states, directions, last = call.input, [], call.directions, None
    for layer in range(call.num_layers):
        x, last = _layer(nonlinearity, call, layer, x, offsets, batch)
        if last is not None:
            states.append(last)
        else:
            states += [_final(x, d, directions, offsets, batch) for d in range(directions)]
        if layer < call.num_layers - 1:
            x = F.dropout(x, call.dropout, call.train)
    # A view of the outputs is no state of its own: whoever wrote into one would change the other.
    h_n = last if last is not None and len(states) == 1 else torch.cat(states)
    return x.transpose(0, 1) if call.batch_first else x, h_n


def _run_aten(nonlinearity: str, call: Call) -> tuple[Tensor, Tensor]:
    hx = call.hx
    if hx is None:
        hidden = call.params[0].shape[0]
        hx = call.input.new_zeros(call.num_layers * call.directions, _batch(call), hidden)
    settings = (call.params, call.has_biases, call.num_layers, call.dropout, call.train, call.bidirectional)
    if call.batch_sizes is None:
        return TORCH[nonlinearity](call.input, hx, *settings, call.batch_first)
    return TORCH[nonlinearity](call.input, call.batch_sizes, hx, *settings)


def _layer(
    nonlinearity: str, call: Call, layer: int, x: Tensor, offsets: Tensor | None, batch: int
) -> tuple[Tensor, Tensor | None]:
    """Outputs (T, B, D H), or packed (rows, D H), of one layer, and last states where the kernel wrote them."""
    w_ih, w_hh, *biases = _parameters(call, layer, 0)
    recurrent, biases = (w_hh,), [(b,) for b in biases]
    if call.bidirectional:
        back_ih, back_hh, *back_biases = _parameters(call, layer, 1)
        w_ih, recurrent = torch.cat([w_ih, back_ih]), (w_hh, back_hh)
        biases = [(b, back) for (b,), back in zip(biases, back_biases, strict=True)]
    projected = F.linear(x, w_ih)
    if layer == 0 and call.batch_first:
        projected = projected.transpose(0, 1)
    start = layer * call.directions
    hx = None if call.hx is None else call.hx[start : start + call.directions]
    return ops.outputs(projected, biases, recurrent, hx, offsets, batch, nonlinearity)


def _final(y: Tensor, direction: int, directions: int, offsets: Tensor | None, batch: int) -> Tensor:
    """Each sequence's last output on the walk of this direction, (1, B, H), from a layer's outputs."""
    if offsets is None:
        y = y[-1:] if direction == 0 else y[:1]
    else:
        y = y[first_rows(offsets, y, batch, forward=direction == 1)].unsqueeze(0)
    return y if directions == 1 else y.chunk(2, -1)[direction]


def _planner(input: Tensor, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None) -> Path:
    call = _bind(input, arguments, keywords or {})
    if _refused(_cast(call)):
        return REFUSED
    path = kernel_path(call.input)
    if path.name == ATEN:
        return path
    regime = ops.regime(call.input, _batch(call), call.params[1].shape[0], call.directions)
    return Path(path.name, f"{path.reason}; {regime}")


@explained_by(_planner)
def rnn_tanh(input: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Vanilla RNN with tanh over whole sequences, as `torch.rnn_tanh`, in both of its forms:

        rnn_tanh(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        rnn_tanh(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh) (Elman 1990; Goodfellow, Bengio and Courville 2016, equations
    10.8 and 10.9). Reference: `kernels/rnn/reference.py`.

    Shapes: input (T, B, I) or with batch_first (B, T, I), packed data (rows, I) with batch_sizes (T,) on the CPU;
    hx and the second result (layers D, B, H); params for each layer and direction W_ih (H, I or D H), W_hh (H, H)
    and, with has_biases, b_ih (H,), b_hh (H,); first result (T, B, D H), (B, T, D H) or (rows, D H).

    The same values run after run, gradients of any order, in training or not, with any T. The products with x follow
    torch's switch for matrix products (`torch.backends.cuda.matmul`), the recurrence that for RNNs
    (`torch.backends.cudnn.rnn`).

    Errors: torch's own.
    """
    return run("tanh", _bind(input, arguments, keywords))


@explained_by(_planner)
def rnn_relu(input: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Vanilla RNN with ReLU, as `torch.rnn_relu`: `rnn_tanh` with max(0, z) in place of tanh z."""
    return run("relu", _bind(input, arguments, keywords))


def _cell_planner(input: Tensor, *_: Any, **__: Any) -> Path:
    return Path(ATEN, "one step is two matrix products and a pointwise kernel: torch's own, there is no loop to fuse")


@explained_by(_cell_planner)
def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step, tanh(W_ih x + b_ih + W_hh h + b_hh): `torch.rnn_tanh_cell`. Shapes: input (B, I), hx (B, H)."""
    return torch.rnn_tanh_cell(input, hx, w_ih, w_hh, b_ih, b_hh)


@explained_by(_cell_planner)
def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step with ReLU: `torch.rnn_relu_cell`. Shapes: input (B, I), hx (B, H)."""
    return torch.rnn_relu_cell(input, hx, w_ih, w_hh, b_ih, b_hh)
