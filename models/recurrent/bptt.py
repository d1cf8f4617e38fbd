"""Backpropagation through time on a recurrent network of one unit, equation by equation, whole and truncated.

The network and its equations are those of R. Grosse's lectures on recurrent networks (CSC321, University of Toronto):
one input, one hidden unit and one output, with the weights u, w and v.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..visual import save_figure

MEMORIES = (0.7, 0.9, 0.98, 1.1)
"""The recurrent weights w of the plot."""


@dataclass(frozen=True)
class Weights:
    """u: input to hidden, w: hidden to hidden, v: hidden to output. Each a scalar or one for each sequence [N]."""

    u: Tensor
    w: Tensor
    v: Tensor


@dataclass(frozen=True)
class Activations:
    """What the forward pass computes: [T] or [T, N]; h has one more entry in front, the state before the first step."""

    z: Tensor
    h: Tensor
    r: Tensor
    y: Tensor


def forward(weights: Weights, x: Tensor) -> Activations:
    """z_t = u x_t + w h_{t-1}, h_t = φ(z_t), r_t = v h_t, y_t = φ(r_t), with φ = tanh and h_0 = 0.

    x: one sequence [T] or N sequences [T, N], T at least 1.
    """
    h = [torch.zeros_like(x[0])]
    z = []
    for t in range(len(x)):
        z.append(weights.u * x[t] + weights.w * h[t])
        h.append(torch.tanh(z[t]))
    states = torch.stack(h)
    r = weights.v * states[1:]
    return Activations(torch.stack(z), states, r, torch.tanh(r))


def loss(y: Tensor, target: Tensor) -> Tensor:
    """L = Σ_t (y_t - target_t)² / 2, for each sequence."""
    return (y - target).square().sum(0) / 2


def backward(weights: Weights, x: Tensor, target: Tensor, a: Activations, chunk: int | None = None) -> Weights:
    """The derivatives of the loss by u, w and v. A bar over a name means the loss's derivative by it:

        ȳ_t = y_t - target_t
        r̄_t = ȳ_t φ'(r_t)
        h̄_t = v r̄_t + w z̄_{t+1}       with z̄_{T+1} = 0
        z̄_t = h̄_t φ'(z_t)
        ū   = Σ_t z̄_t x_t
        v̄   = Σ_t r̄_t h_t
        w̄   = Σ_t z̄_t h_{t-1}

    chunk: truncated BPTT. The time steps are cut into chunks of this length (the last may be shorter), and no
        derivative passes from a chunk to the one before, as if z̄ were 0 behind each chunk; the states h still do.
        None, or T and more: the whole sequence. ValueError if it is below 1.
    """
    steps = len(x)
    chunk = steps if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least one time step")
    y_bar = a.y - target
    r_bar = y_bar * slope(a.r)
    z_bar = torch.zeros_like(a.z)
    for t in reversed(range(steps)):
        h_bar = weights.v * r_bar[t]
        if (t + 1) % chunk != 0 and t + 1 < steps:
            h_bar = h_bar + weights.w * z_bar[t + 1]
        z_bar[t] = h_bar * slope(a.z[t])
    return Weights(u=(z_bar * x).sum(0), w=(z_bar * a.h[:-1]).sum(0), v=(r_bar * a.h[1:]).sum(0))


def slope(s: Tensor) -> Tensor:
    """φ'(s) for φ = tanh."""
    return 1 - torch.tanh(s).square()


def by_autograd(weights: Weights, x: Tensor, target: Tensor) -> Weights:
    """The same derivatives by torch's automatic differentiation."""
    leaves = [weight.detach().requires_grad_() for weight in (weights.u, weights.w, weights.v)]
    total = loss(forward(Weights(*leaves), x).y, target).sum()
    return Weights(*torch.autograd.grad(total, leaves))


def by_differences(weights: Weights, x: Tensor, target: Tensor, step: float = 2e-4) -> Weights:
    """The same derivatives by central differences of fourth order, (8 (L₊₁ - L₋₁) - (L₊₂ - L₋₂)) / (12 step)."""

    def derivative(loss_at: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
        near = loss_at(weight + step) - loss_at(weight - step)
        far = loss_at(weight + 2 * step) - loss_at(weight - 2 * step)
        return (8 * near - far) / (12 * step)

    u, w, v = weights.u, weights.w, weights.v
    return Weights(
        u=derivative(lambda moved: loss(forward(Weights(moved, w, v), x).y, target), u),
        w=derivative(lambda moved: loss(forward(Weights(u, moved, v), x).y, target), w),
        v=derivative(lambda moved: loss(forward(Weights(u, w, moved), x).y, target), v),
    )


def truncation_error(w: float, chunks: Sequence[int], steps: int = 128, sequences: int = 200) -> list[float]:
    """How far the truncated gradient is from the whole one, for each chunk length.

    The norm of the difference of (ū, w̄, v̄), relative to the norm of the whole gradient, as root mean squares over
    sequences of weak Gaussian noise (so that the recurrent weight, not saturation, decides how long the network
    remembers) for u = v = 1. The targets are what the network gives for u = 1, w = v = 1/2.
    """
    noise = torch.randn(steps, sequences, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = 0.05 * noise
    one = torch.tensor(1.0, dtype=torch.float64)
    target = forward(Weights(u=one, w=one / 2, v=one / 2), x).y
    weights = Weights(u=one, w=w * one, v=one)
    activations = forward(weights, x)

    def gradient(chunk: int) -> Tensor:
        bars = backward(weights, x, target, activations, chunk)
        return torch.stack([bars.u, bars.w, bars.v])

    whole = gradient(steps)
    return [((gradient(chunk) - whole).norm() / whole.norm()).item() for chunk in chunks]


def plot_truncation(path: Path, steps: int = 128) -> None:
    """Draws `truncation_error` against the chunk length into a PNG, one curve for each of MEMORIES."""
    chunks = [2**power for power in range(steps.bit_length()) if 2**power < steps]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for w in MEMORIES:
        axes.plot(chunks, truncation_error(w, chunks, steps), marker="o", markersize=4, linewidth=2, label=f"w = {w}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(chunks, map(str, chunks))
    axes.set(
        title=f"Truncated BPTT: error of the gradient over {steps} steps",
        xlabel=f"chunk length in time steps (at {steps} the error is 0)",
        ylabel="relative error of (ū, w̄, v̄)",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def show_bptt(path: Path, console: Console, steps: int = 50) -> None:
    """Prints the derivatives by the equations beside those of autograd and of differences; draws `path`."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, steps, generator=generator, dtype=torch.float64).tanh()
    weights = Weights(*torch.tensor([0.8, 0.95, 1.2], dtype=torch.float64))
    activations = forward(weights, x)
    columns = {
        "equations": backward(weights, x, target, activations),
        "autograd": by_autograd(weights, x, target),
        "differences": by_differences(weights, x, target),
        "chunks of 10": backward(weights, x, target, activations, chunk=10),
    }
    table = Table(f"T = {steps}", *columns)
    for name in ("u", "w", "v"):
        table.add_row(f"{name}̄", *(f"{getattr(bars, name).item():+.9f}" for bars in columns.values()))
    console.print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_truncation(path)
    console.print(f"The error of the truncated gradient against the chunk length: {path}", highlight=False)
