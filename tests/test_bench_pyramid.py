"""The benchmark of ASPP: its work by hand, and that every gradient is checked."""

import dataclasses

import pytest
import torch
from backstride.bench import bench_pyramid
from backstride.bench.case import GateError, error_of, gate
from backstride.bench.plot import family
from backstride.bench.report import Environment, failed_row
from backstride.bench.timing import ASSUMED

PYRAMID = bench_pyramid.Pyramid("pyramid", 2, 3, 5, (3, 4), (1, 2), bias=True)


def test_work_by_hand():
    """1x1: 12 pixels. d = 1: taps that meet rows, 2 + 3 + 2, and columns, 2 + 3 + 3 + 2. d = 2: 2 + 1 + 2 and 4 x 2."""
    case = bench_pyramid.case(PYRAMID, "forward", torch.float32)
    assert case.flop == 2 * 2 * 3 * 5 * (12 + 7 * 10 + 5 * 8)
    numbers = 2 * 3 * 12 + (1 + 9 + 9) * 3 * 5 + 2 * 15 * 12
    assert case.bytes == 4 * numbers
    assert case.shapes == ((2, 3, 3, 4), (5, 3, 1, 1), (5, 3, 3, 3), (5, 3, 3, 3), (5,), (5,), (5,))
    training = bench_pyramid.case(PYRAMID, "forward and backward", torch.float32)
    assert (training.flop, training.bytes) == (3 * case.flop, 2 * case.bytes)
    assert training.shapes[-1] == (2, 15, 3, 4)


def test_every_gradient_is_checked():
    case = bench_pyramid.case(PYRAMID, "forward and backward", torch.float32)
    gradients = case.ours(*case.inputs("cpu"))
    assert [g.shape for g in gradients] == [torch.Size(shape) for shape in case.shapes[:-1]]
    for wrong in range(len(gradients)):
        off = tuple(1.001 * g if i == wrong else g for i, g in enumerate(gradients))
        with pytest.raises(GateError, match="against fp64"):
            gate(dataclasses.replace(case, ours=lambda *_, off=off: off), "cpu")
    gate(dataclasses.replace(case, ours=lambda *_: gradients), "cpu")
    with pytest.raises(ValueError, match="longer"):
        error_of(gradients[:-1], gradients, None)


def test_has_pictures_of_its_own():
    case = bench_pyramid.case(PYRAMID, "forward", torch.float32)
    row = failed_row(case, "off", ASSUMED, Environment("a GPU", "1.2", "2.13", "3.7", "abc"))
    assert family(row) == "pyramid"
