"""The benchmark of batch normalisation: its work by hand, its parameters, and that every gradient is checked."""

import dataclasses

import pytest
import torch
from backstride.bench import bench_batch_norm
from backstride.bench.bench_batch_norm import DIRECTIONS, Layer, WithParameters
from backstride.bench.case import BASELINE, GateError, gate, layouts
from backstride.bench.plot import family
from backstride.bench.report import Environment, failed_row
from backstride.bench.timing import ASSUMED

LAYER = Layer("layer", 2, 3, (4, 5))
END = dataclasses.replace(LAYER, residual=True)
NUMBERS = 2 * 3 * 4 * 5


@pytest.mark.parametrize(
    ("layer", "reads", "writes"),
    [(LAYER, [2, 6], [1, 2]), (END, [3, 8], [1, 3]), (dataclasses.replace(END, training=False), [2], [1])],
    ids=["training", "residual", "evaluation"],
)
def test_work_by_hand(layer, reads, writes):
    """Training: x twice; y. Backward: grad and x twice; grad by x. Residual: itself, and y; its gradient."""
    for direction, *passes in zip(DIRECTIONS, reads, writes, strict=False):
        for dtype in (torch.float32, torch.bfloat16):
            case = bench_batch_norm.case(layer, direction, dtype)
            assert case.bytes == dtype.itemsize * sum(passes) * NUMBERS
            assert case.flop == 2 * passes[0] * NUMBERS


@pytest.mark.parametrize("size", [(), (6,), (4, 5), (3, 2, 4)], ids=len)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_passes_its_gate(size, dtype, direction):
    for layer in (LAYER, END):
        case = bench_batch_norm.case(dataclasses.replace(layer, batch=4, size=size), direction, dtype)
        errors = gate(case, "cpu")
        assert {variant.layout for variant in errors} == set(layouts(case))
        assert 0 < errors[BASELINE] < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_parameters_are_a_networks_under_autocast():
    """The same numbers in fp32 for 16 bits, and for all that is compared."""
    seen = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        call = WithParameters(lambda x, *tensors: seen.append(tensors) or x)
        call(torch.zeros(2, 3, 4, dtype=dtype))
        call(torch.zeros(2, 3, 4, dtype=dtype))
        assert all(first is second for first, second in zip(*seen[-2:], strict=True))
    assert [tensors[0].dtype for tensors in seen[::2]] == [torch.float32] * 3 + [torch.float64]
    for tensors in seen:
        assert all(torch.equal(vector.double(), right) for vector, right in zip(tensors, seen[-1], strict=True))
        assert tensors[1].min() > 0


def test_every_gradient_is_checked():
    case = bench_batch_norm.case(END, "forward and backward", torch.float32)
    gradients = case.ours(*case.inputs("cpu"))
    assert [g.shape for g in gradients] == [(2, 3, 4, 5), (3,), (3,), (2, 3, 4, 5)]
    for wrong in range(len(gradients)):
        off = tuple(1.001 * g if i == wrong else g for i, g in enumerate(gradients))
        with pytest.raises(GateError, match="against fp64"):
            gate(dataclasses.replace(case, ours=lambda *_, off=off: off), "cpu")
    gate(dataclasses.replace(case, ours=lambda *_: gradients), "cpu")


def test_has_pictures_of_its_own():
    case = bench_batch_norm.case(LAYER, "forward", torch.float32)
    row = failed_row(case, "off", ASSUMED, Environment("a GPU", "1.2", "2.13", "3.7", "abc"))
    assert family(row) == "normalisation"
