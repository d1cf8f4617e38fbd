"""What the benchmark's cases launch, compiled without a GPU."""

import csv
import os
import subprocess
import sys

import torch
import torch.nn.functional as F
from backstride.bench import binaries
from backstride.bench.case import layouts
from backstride.bench.uncomputed import Uncomputed
from torch import nn


def test_a_case_is_compiled_and_described(tmp_path):
    """In a process of its own, where Triton does not interpret."""
    path = tmp_path / "binaries.csv"
    command = ["-m", "backstride.bench", "compile", "--quick", "--op", "max_pool3d_with_offsets", "--out", str(path)]
    done = subprocess.run([sys.executable, *command], env=os.environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 cases compile" in done.stdout
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kernel"] for row in rows} == {"max_pool_small_kernel"}
    assert {row["layout"] for row in rows} == {"contiguous", "channels_last"}
    assert len({row["binary"] for row in rows}) == len(rows)
    for row in rows:
        assert 16 <= int(row["registers"]) <= 255 and int(row["spills"]) == 0 and int(row["programs"]) >= 1


def test_arguments_have_the_shapes_and_layout_of_a_case():
    for case in binaries.cases(quick=True):
        for layout in layouts(case):
            tensors = binaries.untouched(case, layout)
            assert [(tuple(t.shape), t.dtype) for t in tensors] == [(shape, case.dtype) for shape in case.shapes]
            if layout == "channels_last":
                assert all(t.dim() == 1 or t.stride(1) in (1, t.numel()) or t.shape[1] == 1 for t in tensors)


def row_of(case, spills=0, binary="a"):
    words = (case.op, case.name, case.shape, "bfloat16", case.direction, "contiguous")
    return binaries.Row(*words, "some_kernel", 4, 64, spills, 0, 100, 8, binary)


def test_what_fails_or_spills_is_named(monkeypatch, capsys, tmp_path):
    first, second = binaries.cases(quick=True)[:2]
    found = [(first, [row_of(first, spills=24)]), (second, "CompilationError: at 1:1")]
    monkeypatch.setattr(binaries, "compiled", lambda selected, quick: iter(found))
    path = tmp_path / "binaries.csv"
    assert not binaries.compiling_run([first, second], True, path)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"NOT COMPILED {second}: CompilationError: at 1:1" in shown
    assert "some_kernel spills 24 bytes of a thread" in shown and "1 of 2 cases compile" in shown
    assert len(path.read_text().splitlines()) == 2


def test_nothing_is_computed_but_shapes():
    """Of a network's step: results, gradients and their strides are as they would be."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.ConvTranspose2d(8, 2, 2, 2)
    network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 64, 80).to(memory_format=torch.channels_last)
    targets = torch.randint(2, (4, 128, 160))

    def step():
        logits = network(x)
        loss = F.cross_entropy(logits, targets)
        return logits, loss, *torch.autograd.grad(loss, list(network.parameters()))

    running_mean = network[1].running_mean.clone()
    with Uncomputed():
        uncomputed = step()
        three = torch.ones(2**16) * 3
    assert torch.equal(network[1].running_mean, running_mean)
    assert not torch.equal(three, torch.full((2**16,), 3.0))
    for ours, right in zip(uncomputed, step(), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (right.shape, right.stride(), right.dtype)


def test_sizes_that_follow_from_numbers_are_right():
    with Uncomputed():
        lengths = torch.linspace(7, 2, 5).long()
        batch_sizes = (lengths > torch.arange(7)[:, None]).sum(1)
        rows = torch.empty(int(batch_sizes.sum()), 3)
        assert F.one_hot(torch.arange(50) % 7, 7).shape == (50, 7)
    assert rows.shape == (int(lengths.sum()), 3)


def test_networks_are_compiled_too():
    assert {"conv2d", "rnn_tanh", "network"} < {case.op for case in binaries.cases(quick=True)}
