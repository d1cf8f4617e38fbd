"""The convolution kernels with the configurations that their planner chooses for real layers, as cases to compile."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from backstride.kernels.conv import epilogue, launch
from backstride.kernels.conv.plan import Geometry, Plan
from backstride.kernels.conv.plan_forward import is_better_flat
from backstride.kernels.conv.pyramid import plan_pyramid
from backstride.kernels.conv.runs import plan_runs
from backstride.kernels.conv.tile import CHANNEL_STRIDES
from backstride.kernels.conv.transpose import LONGEST, transpose_kernel
from backstride.kernels.conv.weight_grad import reduce_splits_kernel
from backstride.kernels.runtime import Device, Layout
from backstride.kernels.tf32 import BLOCK, round_kernel

from .cross_compile import DTYPES, POINTER, Case, Target

# name, layouts, axes, batch, channels in, channels out, size in, kernel, stride, padding, dilation, groups. Channels in
# and out are X's: `apply_transposed` runs the same layer backward.
LAYERS = [
    ("U-Net 3x3 128-64", "both", 2, 16, 128, 64, 512, 3, 1, 1, 1, 1),
    ("U-Net first 1-64", "both", 2, 1, 1, 64, 572, 3, 1, 0, 1, 1),
    ("U-Net up 2x2 1024-512", "both", 2, 1, 512, 1024, 56, 2, 2, 0, 1, 1),
    ("U-Net up 2x2 128-64", "both", 2, 16, 64, 128, 512, 2, 2, 0, 1, 1),
    ("CycleGAN up 3x3 s2", "both", 2, 8, 128, 256, 128, 3, 2, 1, 1, 1),
    ("ResNet 3x3 d2, 65 wide", "contiguous", 2, 8, 256, 256, 65, 3, 1, 2, 2, 1),
    ("ASPP 3x3 d12", "channels_last", 2, 8, 2048, 256, 33, 3, 1, 12, 12, 1),
    # In IEEE fp32 odd channels spill 8 bytes of a thread on two targets.
    ("DeepLabv2 d24 2048-21", "channels_last, not fp32", 2, 8, 2048, 21, 41, 3, 1, 24, 24, 1),
    ("DCGAN up 4x4 s2", "contiguous", 2, 64, 64, 128, 64, 4, 2, 1, 1, 1),
    ("FCN up 16x16 s8, 21 classes", "both", 2, 16, 21, 21, 568, 16, 8, 0, 1, 1),
    ("ResNeXt 3x3 g32", "channels_last", 2, 8, 256, 256, 33, 3, 1, 1, 1, 32),
    ("HiFi-GAN up k16 s8", "contiguous", 1, 16, 256, 512, 256, 16, 8, 4, 1, 1),
    ("nnU-Net 3-D 3x3x3", "both", 3, 2, 64, 32, 128, 3, 1, 1, 1, 1),
]
# The ASPP of DeepLabv3 at output stride 16, all branches in one launch.
PYRAMID = "ASPP 1x1, d6, d12, d18"
LAYOUTS = ("channels_last", "contiguous")


def dense_layout(shape: tuple[int, ...], channels_last: bool) -> Layout:
    """Layout of a dense tensor (N, C, *size), channels innermost or not."""
    batch, channels, *size = shape
    strides, step = [], channels if channels_last else 1
    for length in reversed(size):
        strides.append(step)
        step *= length
    channel_stride = 1 if channels_last else step
    batch_stride = step if channels_last else step * channels
    return Layout(shape, (batch_stride, channel_stride, *reversed(strides)))


def plans(dtype: str, channels_last: bool, device: Device) -> Iterator[tuple[str, Plan]]:
    """(layer, launch) of all three kernels over all layers."""
    torch_dtype, tf32 = DTYPES[dtype], dtype == "tf32"
    for name, layouts, axes, batch, c_in, c_out, size, kernel, stride, padding, dilation, groups in LAYERS:
        wanted, _, without = layouts.partition(", not ")
        if dtype == without or wanted not in ("both", "channels_last" if channels_last else "contiguous"):
            continue
        out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        geometry = Geometry((stride,) * axes, (padding,) * axes, (dilation,) * axes, groups)
        x = dense_layout((batch, c_in, *[size] * axes), channels_last)
        y = dense_layout((batch, c_out, *[out] * axes), channels_last)
        weight = (c_out, c_in // groups, *[kernel] * axes)
        yield name, launch.plan_apply(x, weight, y, geometry, torch_dtype, tf32, device)
        if not is_better_flat(weight, geometry):  # else it is planned as a convolution, like the forward
            yield name, launch.plan_apply_transposed(y, weight, x, geometry, torch_dtype, tf32, device)
        yield name, launch.plan_weight_grad(x, weight, channels_last, y, geometry, torch_dtype, tf32, device)


def pyramid_plan(dtype: str, channels_last: bool, device: Device) -> Plan:
    x, y = (dense_layout((8, channels, 33, 33), channels_last) for channels in (2048, 1024))
    weights = ((256, 2048, 1, 1), *[(256, 2048, 3, 3)] * 3)
    plan = plan_pyramid(x, weights, y, ((1, 1), (6, 6), (12, 12), (18, 18)), DTYPES[dtype], dtype == "tf32", device)
    assert plan is not None
    return plan


def runs_plan(dtype: str, channels_last: bool, weight_grad: bool, device: Device) -> Plan | None:
    """The gradients of FCN-8s' last layer; None where they are not summed over runs."""
    wide, narrow = (dense_layout((16, 21, size, size), channels_last) for size in (568, 70))
    geometry = Geometry((8, 8), (0, 0), (1, 1), 1)
    return plan_runs(wide, (21, 21, 16, 16), narrow, geometry, DTYPES[dtype], dtype == "tf32", device, weight_grad)


def launch_signature(
    plan: Plan, pointer: str, units: Sequence[str] = CHANNEL_STRIDES
) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of the run-time arguments, and those that a launch would fix: which of the strides `units` are 1."""
    names = [name for name in plan.kernel.arg_names if name not in plan.constants]
    scalars = [name for name in names if not name.endswith("_ptr") and name not in EPILOGUE]
    values = dict(zip(scalars, plan.sizes, strict=True))
    signature = {name: "i32" if abs(value) < 2**31 else "i64" for name, value in values.items()}
    signature |= {name: "*i32" if name == "table_ptr" else pointer for name in names if name.endswith("_ptr")}
    unit = {name: 1 for name in units if values[name] == 1}
    return signature, unit


EPILOGUE = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "RELU": True, "STORES": True, "SUMS": True}
# Of the passes around a library's products: 64 channels in both layouts, and odd sizes, which are read one by one.
IMAGES = [("16x64x512x512", (16, 64, 512, 512)), ("16x21x65x65", (16, 21, 65, 65))]


def flags_of(plan: Plan) -> dict[str, bool]:
    """What a launch gives beside the plan's constants, all of it on."""
    return {name: value for name, value in EPILOGUE.items() if name in plan.kernel.arg_names}


def cases(target: Target) -> Iterator[Case]:
    """Every launch of the layers, the passes around a library's products, the copies and the reduction."""
    for dtype in DTYPES:
        for layout in LAYOUTS:
            device = Device(132, target.shared_memory, 16 if target.backend == "hip" else 8)
            pyramid = PYRAMID, pyramid_plan(dtype, layout == "channels_last", device)
            for name, plan in [*plans(dtype, layout == "channels_last", device), pyramid]:
                signature, unit = launch_signature(plan, POINTER[dtype])
                way = ", transposed" if plan.constants.get("TRANSPOSED") else ""
                constants = plan.constants | flags_of(plan) | unit
                yield Case(plan.kernel, signature, constants, f"{name}{way}, {layout}", dtype)
    for dtype, layout, gradient in itertools.product(DTYPES, LAYOUTS, (False, True)):
        plan = runs_plan(dtype, layout == "channels_last", gradient, Device(132, target.shared_memory))
        if plan is not None:
            signature, _ = launch_signature(plan, POINTER[dtype], ())
            yield Case(plan.kernel, signature, plan.constants, f"FCN up 16x16 s8, 21 classes, {layout}", dtype)
    for dtype in ("bf16", "fp32"):
        for (name, shape), layout in itertools.product(IMAGES, LAYOUTS):
            y = dense_layout(shape, layout == "channels_last")
            for plan in (
                epilogue.plan_epilogue(y, DTYPES[dtype]),
                epilogue.plan_epilogue_grad(y, y, y, DTYPES[dtype], Device(132, target.shared_memory)),
            ):
                signature, _ = launch_signature(plan, POINTER[dtype], ())
                signature |= {"partial_ptr": "*fp32"} if "partial_ptr" in signature else {}
                constants = plan.constants | flags_of(plan) | {"num_stages": 3}
                yield Case(plan.kernel, signature, constants, f"{name}, {layout}", dtype)
    for flat in (True, False):
        yield Case(
            round_kernel,
            {"x_ptr": "*fp32", "y_ptr": "*fp32", **dict.fromkeys(round_kernel.arg_names[2:8], "i32")},
            {"FLAT": flat, "BLOCK": BLOCK, "num_warps": 4, "num_stages": 3},
            "any" if flat else "permuted",
            "tf32",
        )
    yield Case(
        transpose_kernel,
        {"x_ptr": "*bf16", "y_ptr": "*bf16", **dict.fromkeys(transpose_kernel.arg_names[2:8], "i32")},
        {"X_VEC": 16, "Y_VEC": 16, "BLOCK_R": LONGEST, "BLOCK_C": LONGEST, "num_warps": 4, "num_stages": 3},
        "rows and columns in sixteens",
        "bf16",
    )
    yield Case(
        reduce_splits_kernel,
        {"partial_ptr": "*fp32", "w_ptr": "*bf16", "NUMEL": "i32", "SPLITS": "i32"},
        {"BLOCK": launch.REDUCE_BLOCK, "num_warps": 4, "num_stages": 3},
        "any",
        "bf16",
    )
