from itertools import product
from pathlib import Path

import pytest
import torch
from backstride.models.recurrent.bptt import (
    Weights,
    backward,
    by_autograd,
    by_differences,
    forward,
    loss,
    show_bptt,
    truncation_error,
)
from PIL import Image
from rich.console import Console
from torch import Tensor

STEPS = [1, 2, 3, 10, 100]
RECURRENT = [0.0, 0.5, 1.0, -1.2]


def scalars(*values: float) -> Weights:
    return Weights(*torch.tensor(values, dtype=torch.float64))


def sequence(steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(steps)
    x, target = torch.randn(2, steps, generator=generator, dtype=torch.float64)
    return x, target.tanh()


def stacked(weights: Weights) -> Tensor:
    return torch.stack([weights.u, weights.w, weights.v])


def test_forward_by_hand():
    a = forward(scalars(0.5, -2.0, 3.0), torch.tensor([1.0, 2.0], dtype=torch.float64))
    z = [0.5, 1.0 - 2 * torch.tanh(torch.tensor(0.5, dtype=torch.float64)).item()]
    assert a.z.tolist() == pytest.approx(z)
    assert a.h.tolist() == pytest.approx([0.0, *torch.tensor(z, dtype=torch.float64).tanh().tolist()])
    assert torch.equal(a.r, 3 * a.h[1:]) and torch.equal(a.y, a.r.tanh())
    assert loss(a.y, a.y - 0.5).item() == pytest.approx(0.25)


@pytest.mark.parametrize(("steps", "w"), list(product(STEPS, RECURRENT)))
def test_the_equations_are_autograd(steps, w):
    weights, (x, target) = scalars(0.8, w, 1.3), sequence(steps)
    bars = backward(weights, x, target, forward(weights, x))
    torch.testing.assert_close(stacked(bars), stacked(by_autograd(weights, x, target)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("steps", "w"), list(product(STEPS, RECURRENT)))
def test_the_equations_are_finite_differences(steps, w):
    weights, (x, target) = scalars(0.8, w, 1.3), sequence(steps)
    bars = backward(weights, x, target, forward(weights, x))
    torch.testing.assert_close(stacked(bars), stacked(by_differences(weights, x, target)), rtol=1e-9, atol=1e-10)


def test_many_sequences_are_each_their_own():
    weights = scalars(0.8, 0.9, 1.3)
    x, target = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = stacked(backward(weights, x, target, forward(weights, x)))
    for n in range(3):
        alone = backward(weights, x[:, n], target[:, n], forward(weights, x[:, n]))
        torch.testing.assert_close(together[:, n], stacked(alone), rtol=1e-13, atol=0)


def chunked_by_autograd(weights: Weights, x: Tensor, target: Tensor, chunk: int) -> Tensor:
    """Truncated BPTT as it is done with torch: whole BPTT in each chunk, the state carried and detached."""
    leaves = [weight.detach().requires_grad_() for weight in (weights.u, weights.w, weights.v)]
    u, w, v = leaves
    total, h = torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for inputs, targets in zip(x.split(chunk), target.split(chunk), strict=True):
        error = torch.zeros((), dtype=torch.float64)
        for x_t, target_t in zip(inputs, targets, strict=True):
            h = torch.tanh(u * x_t + w * h)
            error = error + (torch.tanh(v * h) - target_t).square() / 2
        total += torch.stack(torch.autograd.grad(error, leaves, materialize_grads=True))
        h = h.detach()
    return total


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 19, 20, 50])
def test_truncated_is_whole_inside_each_chunk(chunk):
    weights, (x, target) = scalars(0.8, 0.95, 1.3), sequence(20)
    activations = forward(weights, x)
    truncated = stacked(backward(weights, x, target, activations, chunk))
    torch.testing.assert_close(truncated, chunked_by_autograd(weights, x, target, chunk), rtol=1e-12, atol=0)
    whole = stacked(backward(weights, x, target, activations))
    assert torch.equal(truncated, whole) == (chunk >= 20)
    # Truncation cuts the way through the states; the output's weight doesn't feel it.
    assert truncated[2] == whole[2]


def test_wrong_chunk():
    weights, (x, target) = scalars(0.8, 0.95, 1.3), sequence(3)
    with pytest.raises(ValueError, match="chunk=0: must be at least one time step"):
        backward(weights, x, target, forward(weights, x), chunk=0)


def test_truncation_error_falls_with_the_chunk_length_and_grows_with_memory():
    chunks = [1, 2, 4, 8, 16, 32, 64]
    forgetful, mindful = (truncation_error(w, chunks, steps=64, sequences=20) for w in (0.7, 0.98))
    for errors in (forgetful, mindful):
        assert errors == sorted(errors, reverse=True)
        assert errors[-2] > 0 and errors[-1] == 0
    assert all(more > less for more, less in zip(mindful[:-1], forgetful[:-1], strict=True))


def test_bptt_is_shown(tmp_path: Path, capsys):
    path = tmp_path / "new" / "bptt.png"
    show_bptt(path, Console(width=120))
    rows = [line.split("│")[2:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) == 3
    for equations, autograd, differences, _ in rows:
        assert float(equations) == pytest.approx(float(autograd), rel=1e-8)
        assert float(equations) == pytest.approx(float(differences), rel=1e-8)
    assert rows[1][0] != rows[1][3]
    assert Image.open(path).size == (960, 540)
