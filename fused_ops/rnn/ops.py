"""Registration of the recurrence with PyTorch: schema, kernels, fake tensors, autograd, vmap.

    backstride::rnn_scan    y_t = e_t(x_t + b_ih + b_hh + y_{t-1} M), for both directions of time

Written with s_t = x_t + b_ih + b_hh + y_{t-1} M and g_t = e_t', the gradient by s is v_t = g_t (ybar_t + v_{t+1} M^T):
a scan the other way round, with the transposed matrix. From v follow all gradients as sums and products over all steps
at once: v by x, sum v_t by either bias and sum y_{t-1}^T v_t by M. This is backpropagation through time, and because it
is a scan again, gradients of any order run on the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...kernels.rnn import Packing, choose, reference
from ...kernels.rnn import scan as launch_scan
from ..dispatch import ATEN, kernel_path
from ..registration import Function, below_autograd, differentiable, goes_direct, uses_tf32
from .rows import first_rows, pairs_of_steps, previous_rows

library = torch.library.Library("backstride", "FRAGMENT")
library.define(
    "rnn_scan(Tensor x, Tensor? b_ih, Tensor? b_hh, Tensor? gate, Tensor? first, Tensor matrix, Tensor? offsets,"
    " SymInt batch, str effect, bool backward, bool with_factor) -> (Tensor, Tensor)"
)

rnn_scan = torch.ops.backstride.rnn_scan.default

MOST_PARTS, LEAST_ROWS = 8, 256  # of a gradient's sum in fp32
DERIVATIVES = {"tanh": "tanh_derivative", "relu": "relu_derivative"}


def _tf32(x: Tensor) -> bool:
    return uses_tf32(x, "rnn")


T = TypeVar("T", Tensor, Tensor | None)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _biased(x: Tensor, *biases: Tensor | None) -> Tensor:
    for bias in biases:
        x = x if bias is None else x + bias
    return x


def _wide(tensor: T) -> T:
    return tensor.float() if tensor is not None and tensor.dtype.itemsize == 2 else tensor


def regime(like: Tensor, batch: int, hidden: int, directions: int) -> str:
    """How the kernels would run a layer of this size: "resident", "sharded" or "stepwise"."""
    return choose(batch, hidden, directions, like, _tf32(like)).regime


def _scan(
    x: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gate: Tensor | None,
    first: Tensor | None,
    matrix: Tensor,
    offsets: Tensor | None,
    batch: int,
    effect: str,
    backward: bool,
    with_factor: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    factor = torch.empty_like(y) if with_factor else x.new_empty(0)
    if x.numel() == 0:
        return y, factor
    if kernel_path(x).name == ATEN:
        # As the kernels, 16-bit numbers are computed with in fp32.
        packing = None if offsets is None else Packing(offsets, batch)
        biased = _biased(_wide(x), _wide(b_ih), _wide(b_hh))
        exact = reference.scan(biased, _wide(gate), _wide(first), _wide(matrix), packing, effect, backward=backward)
        y.copy_(exact)
        if with_factor:
            factor.copy_(1 - exact * exact)
        return y, factor
    x = x if x.stride(-1) == 1 else x.contiguous()
    biases, gate, first = [b.contiguous() for b in (b_ih, b_hh) if b is not None], _contiguous(gate), _contiguous(first)
    packing = None if offsets is None else Packing(offsets, batch)
    stored = factor if with_factor else None
    launch_scan(x, gate, first, matrix, packing, y, stored, effect, biases=biases, backward=backward, tf32=_tf32(x))
    return y, factor


@torch.library.register_fake("backstride::rnn_scan", lib=library)
def _(x, b_ih, b_hh, gate, first, matrix, offsets, batch, effect, backward, with_factor):
    return x.new_empty(x.shape), x.new_empty(x.shape if with_factor else 0)


def _products(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows (..., D, H) times matrix (D, H, H), direction by direction."""
    directions, hidden = rows.shape[-2:]
    flat = rows.reshape(-1, directions, hidden).transpose(0, 1)
    return torch.bmm(flat, matrix).transpose(0, 1).reshape(rows.shape)


def _sum_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, of (rows, H) each.

    In fp32 the sum is taken in parts: over 2560 rows at H = 512 one sum's error was six times that of cuDNN, which adds
    step by step.
    """
    rows = a.shape[0]  # not len(), which fixes it in what torch.compile makes
    parts = min(MOST_PARTS, rows // LEAST_ROWS) if a.dtype == torch.float32 else 1
    if parts <= 1:
        return a.T @ b
    whole = rows - rows % parts
    a_parts, b_parts = (t[:whole].unflatten(0, (parts, -1)) for t in (a, b))
    product = torch.bmm(a_parts.transpose(1, 2), b_parts).sum(0)
    return product if whole == rows else torch.addmm(product, a[whole:].T, b[whole:])


def _start(s: Tensor, first: Tensor | None, offsets: Tensor | None, backward: bool) -> Tensor:
    """s with `first` added to the rows where a sequence starts."""
    if first is None:
        return s
    directions = []
    for d in range(s.shape[-2]):
        rows = s[..., d, :].flatten(0, -2)
        index = first_rows(offsets, s, first.shape[1], (d == 0) != backward)
        directions.append(rows.index_add(0, index, first[d].to(rows.dtype)).view(s[..., d, :].shape))
    return torch.stack(directions, dim=-2)


_below = below_autograd(rnn_scan, _scan)


class _Scan(Function):
    """`rnn_scan`, with its second output only where it is wanted: the factor, which has no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, b_ih, b_hh, gate, first, matrix, offsets, batch, effect, backward, with_factor):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, factor = _below(x, b_ih, b_hh, gate, first, matrix, offsets, batch, effect, backward, with_factor)
        return (y, factor) if with_factor else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, b_ih, b_hh, gate, first, matrix, offsets, batch, effect, backward, with_factor = inputs
        y, factor = output if with_factor else (output, None)
        if with_factor:
            ctx.mark_non_differentiable(factor)
        # The sum itself is wanted only for the gradient by the gate, in second derivatives.
        summed = (x, b_ih, b_hh) if gate is not None else (None, None, None)
        saved = (*summed, gate, first, matrix, offsets, y, factor)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.settings = batch, effect, backward

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, b_ih, b_hh, gate, first, matrix, offsets, y, factor = ctx.saved_tensors
        batch, effect, backward = ctx.settings
        needs_x, needs_b_ih, needs_b_hh, needs_gate, needs_first, needs_matrix, *_ = ctx.needs_input_grad
        derivative, slope = _derivative(effect, gate, y, factor)
        transposed = matrix.transpose(1, 2)
        v = scan(grads[0], (), slope, None, transposed, offsets, batch, derivative, not backward)
        grad_b_ih = grad_b_hh = grad_gate = grad_first = grad_matrix = None
        if needs_b_ih or needs_b_hh:
            grad_b_ih = grad_b_hh = v.flatten(0, -3).sum(0)
            if needs_b_ih and needs_b_hh:  # memory of its own: gradients are added to and scaled in place
                grad_b_hh = grad_b_ih.clone()
        if needs_first:
            grad_first = torch.stack(
                [
                    v[..., d, :].flatten(0, -2)[first_rows(offsets, v, batch, (d == 0) != backward)]
                    for d in range(v.shape[-2])
                ]
            )
        if needs_matrix:
            sums = [_sum_over_rows(*pair) for pair in pairs_of_steps(y, v, offsets, backward)]
            grad_matrix = torch.stack(sums) if len(sums) > 1 else sums[0].unsqueeze(0)
        if needs_gate:
            previous = previous_rows(y, offsets, backward)
            s = _start(_biased(x, b_ih, b_hh) + _products(previous, matrix), first, offsets, backward)
            total = grads[0] + _products(previous_rows(v, offsets, not backward), transposed)
            grad_gate = _by_gate(effect, gate, s * total)
        biases = grad_b_ih if needs_b_ih else None, grad_b_hh if needs_b_hh else None
        return v if needs_x else None, *biases, grad_gate, grad_first, grad_matrix, *[None] * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, b_ih, b_hh, gate, first, matrix, offsets, y, factor = ctx.saved_tensors
        batch, effect, backward = ctx.settings
        dx, db_ih, db_hh, dgate, dfirst, dmatrix, *_ = tangents
        derivative, slope = _derivative(effect, gate, y, factor)
        previous = previous_rows(y, offsets, backward)
        inner = _biased(torch.zeros_like(y) if dx is None else dx, db_ih, db_hh)
        if dmatrix is not None:
            inner = inner + _products(previous, dmatrix)
        outer = None
        if dgate is not None:
            s = _start(_biased(x, b_ih, b_hh) + _products(previous, matrix), first, offsets, backward)
            outer = _by_gate(effect, gate, s) * dgate
            inner = inner + _products(previous_rows(outer, offsets, backward), matrix)
        tangent = scan(inner, (), slope, dfirst, matrix, offsets, batch, derivative, backward)
        tangent = tangent if outer is None else tangent + outer
        return tangent if factor is None else (tangent, None)


def _derivative(effect: str, gate: Tensor | None, y: Tensor, factor: Tensor | None) -> tuple[str, Tensor | None]:
    """The effect that multiplies by the derivative of `effect`, and the gate that it takes."""
    if effect not in DERIVATIVES:
        return effect, gate
    if factor is None:
        return DERIVATIVES[effect], y
    if torch.is_grad_enabled():
        # The stored factor's value with the derivative of 1 - y^2: it is that, but rounded later.
        factor = factor + (1 - y * y) - (1 - y * y).detach()
    return "factor", factor


def _by_gate(effect: str, gate: Any, s: Tensor) -> Tensor:
    """Derivative of e(s) = g(gate) s by the gate."""
    if effect == "tanh_derivative":
        return -2 * gate * s
    return s if effect == "factor" else torch.zeros_like(s)


def _scan_autograd(x, b_ih, b_hh, gate, first, matrix, offsets, batch, effect, backward, with_factor):
    result = _Scan.apply(x, b_ih, b_hh, gate, first, matrix, offsets, batch, effect, backward, with_factor)
    return result if with_factor else (result, x.new_empty(0))


_enter = differentiable(library, "rnn_scan", _scan_autograd, _scan)


def scan(
    x: Tensor,
    biases: Sequence[Tensor],
    gate: Tensor | None,
    first: Tensor | None,
    matrix: Tensor,
    offsets: Tensor | None,
    batch: int,
    effect: str,
    backward: bool = False,
    with_factor: bool = False,
) -> Tensor:
    """The outputs of `rnn_scan`; two biases or none."""
    b_ih, b_hh = biases or (None, None)
    return _enter(x, b_ih, b_hh, gate, first, matrix, offsets, batch, effect, backward, with_factor)[0]


def outputs(
    projected: Tensor,
    biases: Sequence[Sequence[Tensor]],
    recurrent: Sequence[Tensor],
    hx: Tensor | None,
    offsets: Tensor | None,
    batch: int,
    effect: str,
) -> tuple[Tensor, Tensor | None]:
    """Outputs of a layer, (T, B, D H) or packed (rows, D H), from W_ih x of that shape and each direction's W_hh.

    biases: each direction's b_ih, then each one's b_hh; or none.
    hx: (D, B, H), the states before the first step, or None for zeros. The second result has each sequence's last
    output, (D, B, H), where the kernel wrote it.
    """
    if len(recurrent) == 1 and goes_direct((projected, recurrent[0], hx, *[b for b, *_ in biases])):
        # What the op does, without the views that only give its tensors an axis for directions.
        first = None if hx is None else torch.bmm(hx, recurrent[0].t().unsqueeze(0))
        y = torch.empty_like(projected, memory_format=torch.contiguous_format)
        last = y.new_empty(1, batch, y.shape[-1])
        if y.numel():
            launch_scan(
                projected,
                None,
                first,
                recurrent[0],
                None if offsets is None else Packing(offsets, batch),
                y,
                None,
                effect,
                biases=[b.contiguous() for (b,) in biases],
                last=last,
                transposed=True,
                tf32=_tf32(projected),
            )
        return y, last
    matrix = (torch.stack(list(recurrent)) if len(recurrent) > 1 else recurrent[0].unsqueeze(0)).transpose(1, 2)
    first = None if hx is None else torch.bmm(hx, matrix)
    x = projected.unflatten(-1, matrix.shape[:2])
    both = [torch.stack(list(b)) if len(b) > 1 else b[0].unsqueeze(0) for b in biases]
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x, matrix, *both))
    # 1 - h^2 of a 16-bit h is 0 for every unit beyond |z| = 3.5: the kernel stores it as it knows it, in fp32.
    with_factor = effect == "tanh" and x.dtype.itemsize == 2 and trained
    return scan(x, both, None, first, matrix, offsets, batch, effect, with_factor=with_factor).flatten(-2), None


def _scan_vmap(info, in_dims, x, b_ih, b_hh, gate, first, matrix, offsets, batch, effect, backward, with_factor):
    """One more batch axis joins the batch, unless the sequences are packed or every entry has its own parameters."""
    size = info.batch_size
    own_parameters = any(in_dims[i] is not None for i in (1, 2, 5))

    def at_front(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    if own_parameters or offsets is not None:
        tensors = zip((x, b_ih, b_hh, gate, first, matrix), in_dims, strict=False)
        entries = zip(*[[None] * size if t is None else at_front(t, dim) for t, dim in tensors], strict=True)
        every = [rnn_scan(*entry, offsets, batch, effect, backward, with_factor) for entry in entries]
        return tuple(torch.stack(parts) for parts in zip(*every, strict=True)), (0, 0)

    def joined(tensor: Tensor | None) -> Tensor | None:  # (V, outer, B, D, H) to (outer, V B, D, H)
        return None if tensor is None else tensor.transpose(0, 1).flatten(1, 2)

    # Of `first` it is (V, D, B, H) to (D, V B, H).
    x, gate, first = (joined(at_front(t, dim)) for t, dim in ((x, in_dims[0]), (gate, in_dims[3]), (first, in_dims[4])))
    y, factor = rnn_scan(x, b_ih, b_hh, gate, first, matrix, None, size * batch, effect, backward, with_factor)
    if with_factor:
        return (y.unflatten(1, (size, batch)), factor.unflatten(1, (size, batch))), (1, 1)
    return (y.unflatten(1, (size, batch)), factor.expand(size, 0)), (1, 0)


torch.library.register_vmap("backstride::rnn_scan", _scan_vmap, lib=library)
