"""The batch normalisation kernels on real layers, as cases to compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from backstride.kernels.batch_norm import launch
from backstride.kernels.runtime import H200, Plan, layout_of

from .cross_compile import DTYPES, POINTER, Case, Target

# name, image
LAYERS = [
    ("SegNet, 64 channels", (4, 64, 360, 480)),
    ("SegNet, 512 channels", (4, 512, 22, 30)),
    ("ResNet, odd size", (8, 256, 65, 65)),
    ("V-Net, 32 channels", (2, 32, 64, 64, 64)),
    ("odd channels", (4, 21, 90, 120)),
    ("dense, 1000 features", (4096, 1000)),
]
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
TENSORS = ("x_ptr", "y_ptr", "residual_ptr", "grad_ptr", "grad_x_ptr", "grad_residual_ptr")
RELU = {"EPS": 1e-5, "RELU": True}
AFFINE = {"HAS_WEIGHT": True, "HAS_BIAS": True}


def _case(plan: Plan, flags: dict[str, Any], name: str, dtype: str) -> Case:
    constants = plan.constants | flags | {"num_stages": 3}
    signature = {
        argument: POINTER[dtype] if argument in TENSORS else "*fp32" if argument.endswith("_ptr") else "i32"
        for argument in plan.kernel.arg_names
        if argument not in constants
    }
    if "momentum" in signature:
        signature["momentum"] = "fp32"
    return Case(plan.kernel, signature, constants, name, dtype)


def cases(target: Target) -> Iterator[Case]:
    """A training step of every layer, bf16 with parameters in fp32, in both layouts; of one also in fp32, with a
    residual, and with given statistics."""
    for name, shape in LAYERS:
        for channels_last in (False, True):
            if channels_last and len(shape) == 2:
                continue
            x = torch.empty(shape, device="meta")
            x = x.to(memory_format=CHANNELS_LAST[len(shape)]) if channels_last else x
            title = f"{name}, {'channels_last' if channels_last else 'contiguous'}"
            every = shape == LAYERS[0][1]
            for dtype in ("bf16", "fp32") if every else ("bf16",):
                yield from _step(x.to(DTYPES[dtype]), title, dtype, every)


def _step(x: torch.Tensor, title: str, dtype: str, every: bool) -> Iterator[Case]:
    layout = layout_of(x)
    forward = launch.forward_plans(layout, layout, x.dtype, H200)
    backward = launch.backward_plans(layout, layout, layout, x.dtype, H200)
    assert forward and backward
    (first, finish, plan), (sums, add, last) = forward, backward
    yield _case(first, {}, title, dtype)
    if dtype == "bf16":  # sums are in fp32, whatever was summed
        yield _case(finish, {"EPS": 1e-5, "HAS_RUNNING": True}, title, dtype)
        yield _case(add, {"EPS": 1e-5, "GIVEN": False} | AFFINE, title, dtype)
    for given, residual in ((False, False), (False, True), (True, False)) if every else ((False, False),):
        about = f"{title}{', residual' * residual}{', given statistics' * given}"
        flags = RELU | AFFINE | {"GIVEN": given}
        yield _case(plan, flags | {"HAS_RESIDUAL": residual}, about, dtype)
        flags |= {"HAS_Y": residual, "TO_RESIDUAL": residual}
        yield _case(sums, flags, about, dtype)
        # Behind a residual, what the sums' kernel wrote is the gradient.
        behind = {"HAS_Y": False, "TO_RESIDUAL": False, "TO_X": True, "RELU": not residual}
        yield _case(last, flags | behind, about, dtype)
