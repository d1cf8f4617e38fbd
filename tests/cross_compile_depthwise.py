"""The depthwise kernels with the configurations that their planner chooses for real layers, as cases to compile."""

from __future__ import annotations

from collections.abc import Iterator

from backstride.kernels.conv.plan import Geometry, Plan
from backstride.kernels.depthwise import launch
from backstride.kernels.depthwise.tile import UNIT_STRIDES
from backstride.kernels.runtime import Device

from .cross_compile import DTYPES, POINTER, Case, Target
from .cross_compile_conv import LAYOUTS, dense_layout, flags_of, launch_signature

ALL = ("apply", "transposed", "weight_grad")
# At stride 1, X^T is X with its taps turned around.
ONE_WAY = ("apply", "weight_grad")
# name, kernels, layouts, dtype, axes, batch, groups, channels of a group (out, in), size in, kernel, stride, padding,
# dilation. The size is that of X's input: X^T runs the same layer the other way, and makes that size.
LAYERS = [
    ("Xception 3x3 d2", ONE_WAY, "both", "bf16", 2, 8, 728, (1, 1), 64, 3, 1, 2, 2),
    ("ConvNeXt 7x7", ONE_WAY, "channels_last", "bf16", 2, 8, 192, (1, 1), 56, 7, 1, 3, 1),
    ("bilinear 4x4 s2", ALL, "both", "bf16", 2, 16, 256, (1, 1), 128, 4, 2, 1, 1),
    ("bilinear 4x4 s2", ("apply", "transposed"), "contiguous", "fp32", 2, 16, 256, (1, 1), 128, 4, 2, 1, 1),
    ("FCN up 16x16 s8, 21 classes", ("transposed",), "contiguous", "bf16", 2, 16, 21, (1, 1), 568, 16, 8, 0, 1),
    ("short convolution k4", ONE_WAY, "contiguous", "bf16", 1, 1, 12288, (1, 1), 16384, 4, 1, 3, 1),
    ("multiplier 2, 3x3, 33 wide", ALL, "contiguous", "bf16", 2, 8, 32, (2, 1), 33, 3, 1, 1, 1),
    ("3-D 3x3x3", ("apply",), "contiguous", "bf16", 3, 2, 64, (1, 1), 32, 3, 1, 1, 1),
    ("long convolution k128", ALL, "contiguous", "bf16", 1, 4, 768, (1, 1), 4096, 128, 1, 127, 1),
    ("3x3, groups of 2", ALL, "both", "bf16", 2, 16, 64, (2, 2), 56, 3, 1, 1, 1),
    ("3x3, groups of 4", ALL, "both", "bf16", 2, 16, 32, (4, 4), 56, 3, 1, 1, 1),
    ("3x3, groups of 4", ALL, "channels_last", "fp32", 2, 16, 32, (4, 4), 56, 3, 1, 1, 1),
    ("3x3 s2, groups of 4 to 2", ALL, "both", "bf16", 2, 16, 32, (2, 4), 56, 3, 2, 1, 1),
    ("1-D k5, groups of 4", ALL, "both", "bf16", 1, 16, 32, (4, 4), 4096, 5, 1, 4, 1),
]


def plans(dtype: str, channels_last: bool, device: Device) -> Iterator[tuple[str, Plan]]:
    """(layer and direction, launch) of all layers."""
    for (
        name,
        kernels,
        layouts,
        layer_dtype,
        axes,
        batch,
        groups,
        (a, b),
        size,
        kernel,
        stride,
        padding,
        dilation,
    ) in LAYERS:
        if layouts not in ("both", "channels_last" if channels_last else "contiguous") or dtype != layer_dtype:
            continue
        causal = axes == 1  # padding in front alone
        out = (size + (1 if causal else 2) * padding - dilation * (kernel - 1) - 1) // stride + 1
        geometry = Geometry((stride,) * axes, (padding,) * axes, (dilation,) * axes, groups)
        x = dense_layout((batch, groups * b, *[size] * axes), channels_last)
        y = dense_layout((batch, groups * a, *[out] * axes), channels_last)
        weight = (groups * a, b, *[kernel] * axes)
        if "apply" in kernels:
            yield name, launch.plan_apply(x, weight, y, geometry, DTYPES[dtype], False)
        if "transposed" in kernels:
            yield f"{name}, transposed", launch.plan_apply(y, weight, x, geometry, DTYPES[dtype], True)
        if "weight_grad" in kernels:
            yield name, launch.plan_weight_grad(x, weight, channels_last, y, geometry, DTYPES[dtype], device)


def cases(target: Target) -> Iterator[Case]:
    """Every launch of the layers."""
    for dtype in ("bf16", "fp32"):
        for layout in LAYOUTS:
            for name, plan in plans(dtype, layout == "channels_last", Device(132, target.shared_memory)):
                signature, unit = launch_signature(plan, POINTER[dtype], UNIT_STRIDES)
                if plan.kernel is launch.depthwise_apply_kernel and plan.constants["CHANNELS_LAST"]:
                    signature["w_ptr"] = POINTER["fp32"]  # as it is packed
                epilogue = flags_of(plan)
                constants = plan.constants | epilogue | unit | {"ASSEMBLY": target.backend == "cuda"}
                yield Case(plan.kernel, signature, constants, f"{name}, {layout}", dtype)
