"""`backstride doctor`: it covers every op, passes here, and notices an op that is wrong."""

import io
import os
import subprocess
import sys

import pytest
import torch
from backstride import fused_ops
from backstride.fused_ops import dispatch
from backstride.models import doctor
from rich.console import Console


def example(name: str) -> doctor.Example:
    return next(e for e in doctor.EXAMPLES if e.name == name)


def run(monkeypatch: pytest.MonkeyPatch, checks: list[doctor.Check]) -> tuple[int, str]:
    """Exit status and output of a doctor whose checks came out so."""
    monkeypatch.setattr(doctor, "run_checks", lambda: checks)
    monkeypatch.setattr(doctor, "run_interpreted_checks", list)
    stream = io.StringIO()
    status = doctor.run_doctor(Console(file=stream, width=100))
    return status, stream.getvalue()


def test_every_op_has_an_example():
    assert [e.name for e in doctor.EXAMPLES] == [op.__name__ for op in fused_ops.public_ops()]


def test_passes_on_a_cpu_and_shows_each_path():
    """The whole command without interpretation: ATen's path first, then the kernels in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", "from backstride.models.doctor import run_doctor; raise SystemExit(run_doctor())"],
        env={**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    here, interpreted = done.stdout.split("The kernels, interpreted on the CPU")
    for e in doctor.EXAMPLES:
        assert f" {e.name} " in here
        assert f" {e.name} " in interpreted
    rows = 2 * len(doctor.EXAMPLES)
    assert here.count(" aten ") == rows
    # Some are torch's own everywhere.
    torchs = 2 * len({"rnn_tanh_cell", "rnn_relu_cell", "unpool_nearest2d"} & {e.name for e in doctor.EXAMPLES})
    assert interpreted.count(" interpreted kernel ") == rows - torchs and interpreted.count(" aten ") == torchs > 0
    assert f"All {2 * rows} checks passed." in interpreted
    assert f"torch              {torch.__version__}" in here


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_passes_on_a_gpu():
    checks = doctor.run_checks()
    assert {check.path for check in checks} <= {"kernel", "aten"}
    assert [check.problem for check in checks if check.problem] == []


def test_checks_are_of_the_kernels_however_little_their_data(monkeypatch):
    monkeypatch.setattr(dispatch, "SHORT", 123)
    monkeypatch.setattr(doctor, "check", lambda *_: dispatch.SHORT)
    assert set(doctor.run_checks()) == {-1} and dispatch.SHORT == 123


def wrong_value(output):
    return output * 1.001


def wrong_gradient(output):
    return output + 0.01 * (output - output.detach())


def wrong_nan(output):
    return torch.where(output == output.max(), torch.nan, output)


def wrong_shape(output):
    return output[..., :-1]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (wrong_value, "output off by 1.0e-03"),
        (wrong_gradient, "gradients off by 1.0e-02"),
        (wrong_nan, "output off by nan"),
        (wrong_shape, "a result has shape (2, 7, 9) where ATen's has (2, 7, 10)"),
    ],
)
def test_notices_a_wrong_op(monkeypatch, spoil, problem):
    right = fused_ops.conv1d
    monkeypatch.setattr(fused_ops, "conv1d", lambda *args, **kwargs: spoil(right(*args, **kwargs)))
    monkeypatch.setattr(fused_ops, "explain", lambda op, *args, **kwargs: fused_ops.Path("aten", "a test"))
    check = doctor.check(example("conv1d"), torch.float32, torch.device("cpu"))
    assert check.problem is not None
    assert problem in check.problem
    status, shown = run(monkeypatch, [check])
    assert status == 1
    assert "FAIL" in shown
    assert problem in " ".join(shown.split())
    assert "1 of 1 checks failed" in shown


def test_an_op_that_raises_fails_alone(monkeypatch):
    def raising(*args, **kwargs):
        raise RuntimeError("out of [red]luck[/]")

    monkeypatch.setattr(fused_ops, "conv1d", raising)
    monkeypatch.setattr(fused_ops, "explain", lambda op, *args, **kwargs: fused_ops.Path("aten", "a test"))
    check = doctor.check(example("conv1d"), torch.float32, torch.device("cpu"))
    fine = doctor.check(example("conv_transpose1d"), torch.float32, torch.device("cpu"))
    status, shown = run(monkeypatch, [check, fine])
    assert status == 1
    assert "RuntimeError: out of [red]luck[/]" in shown
    assert "1 of 2 checks failed" in shown


def test_an_interpreter_that_dies_fails(monkeypatch):
    monkeypatch.setattr(doctor.sys, "executable", "/bin/false")
    (check,) = doctor.run_interpreted_checks()
    assert check.problem is not None
    assert check.problem.startswith("the process ended with status 1")
    status, _ = run(monkeypatch, [check])
    assert status == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limit_is_twice_aten_and_rounding(dtype):
    eps = torch.finfo(dtype).eps
    theirs = doctor.Errors(eps, eps)
    slack = eps + 10 * torch.finfo(torch.float32).eps

    def judge(factor: float) -> str | None:
        error = (2 * eps + slack) * factor
        return doctor._judge(doctor.Errors(error, error), theirs, dtype, longest_sum=100)

    assert judge(0.99) is None
    assert judge(1.01) is not None
