"""The up-convolution behind a skip that lies in its place already, against the one that copies it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from backstride import fused_ops
from backstride.bench import bench_conv, tune
from backstride.bench.case import GateError, Variant, gate, variants

LAYER = bench_conv.Layer("up", 2, 3, 5, (3, 4), 2, 2, transposed=True, skip=4, in_place=True)


def case():
    return bench_conv.case(LAYER, "forward", torch.float32)


def test_work_by_hand():
    """The skip, 2x4x6x8, is neither read nor written; copied it is both."""
    copied = bench_conv.case(dataclasses.replace(LAYER, in_place=False), "forward", torch.float32)
    assert case().bytes == 4 * (2 * 3 * 12 + 3 * 5 * 4 + 2 * 5 * 48) == copied.bytes - 4 * 2 * (2 * 4 * 48)
    assert case().flop == copied.flop
    assert (case().op, copied.op) == ("conv_transpose2d", "conv_transpose2d_concat")
    assert case().regime != copied.regime


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_only_the_up_convolution_is_timed(monkeypatch, layout):
    """After the first call, which makes the tensor that holds the skip."""
    calls = variants(case(), "cpu", compiled=False)
    right = calls[Variant("torch", layout)]()
    first = calls[Variant("ours", layout)]()
    monkeypatch.setattr(torch, "cat", lambda *a, **k: pytest.fail("copied"))
    second = calls[Variant("ours", layout)]()
    assert second is first
    assert second.stride() == right.stride()
    torch.testing.assert_close(second, right)


def forgetful(x, weight, bias, *, out, **options):
    """Leaves out the last row."""
    out[:, :, :-1] = F.conv_transpose2d(x, weight, bias, **options)[:, :, :-1]


def test_what_is_not_written_is_found(monkeypatch):
    assert set(gate(case(), "cpu")) == set(variants(case(), "cpu", compiled=False))
    monkeypatch.setattr(fused_ops, "conv_transpose2d", forgetful)
    with pytest.raises(GateError, match="inf"):
        gate(case(), "cpu")


def test_what_a_candidate_does_not_write_is_found():
    """Although an earlier call with the right choice wrote it."""
    this = case()
    inputs = this.inputs("cpu")
    this.ours(*inputs)
    assert {row.verdict for row in tune.tune(this, "cpu", "contiguous", None)} == {"right"}
    this.ours.up = lambda *a, out, **k: None
    (row, *_) = tune.tune(this, "cpu", "contiguous", None)
    assert row.verdict.startswith("GateError")
