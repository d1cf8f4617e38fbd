"""The pooling kernels on real layers, as cases to compile; run as a module it prints how SegNet's store and load."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from backstride.kernels.pool import Windows, launch, pool
from backstride.kernels.pool.config import PLANE_BLOCK

from .cross_compile import TARGETS, Case, Compilation, Target

# name, image, windows
LAYERS = [
    ("SegNet 2x2", (4, 64, 360, 480), Windows((2, 2), (2, 2), (0, 0), (1, 1))),
    ("ResNet 3x3 s2", (16, 64, 256, 256), Windows((3, 3), (2, 2), (1, 1), (1, 1))),
    ("1-D 2 s2", (16, 64, 4096), Windows((2,), (2,), (0,), (1,))),
    ("V-Net 2x2x2", (2, 32, 64, 64, 64), Windows((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1))),
    ("V-Net 3x3x3 s2", (2, 32, 64, 64, 64), Windows((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))),
    ("SPP 13x13 s1", (8, 512, 13, 13), Windows((13, 13), (1, 1), (6, 6), (1, 1))),
]
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
POINTERS = {"x_ptr": "*bf16", "y_ptr": "*bf16"}


def _signature(kernel: Any, constants: dict[str, Any], index: str) -> dict[str, str]:
    pointers = POINTERS | {"index_ptr": index, "owner_ptr": "*i32"}
    return {name: pointers.get(name, "i32") for name in kernel.arg_names if name not in constants}


def cases(target: Target) -> Iterator[Case]:
    """Every layer in both layouts, with offsets and with indices; bf16, which fp32 differs from in its loads alone."""
    options = {"num_stages": 3}
    for name, shape, windows in LAYERS:
        for channels_last in (False, True):
            if channels_last and len(shape) == 3:
                continue
            memory_format = CHANNELS_LAST[len(shape)] if channels_last else torch.contiguous_format
            image = torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=memory_format)
            size = [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in zip(shape[2:], *windows, strict=True)]
            pooled = image.new_empty((*shape[:2], *size)).to(memory_format=memory_format)
            for offsets in (True, False):
                index = torch.empty(0, dtype=torch.uint8 if offsets else torch.int64, device="meta")
                for asked in (pool.max_pool_kernel, pool.spread_kernel, pool.pick_kernel):
                    kernel, constants, _ = launch.chosen(asked, windows, image, pooled, index, True)
                    constants |= options
                    if "ASSEMBLY" in constants:
                        constants["ASSEMBLY"] = target.backend == "cuda"
                    signature = _signature(kernel, constants, "*u8" if offsets else "*i64")
                    layout = "channels_last" if channels_last else "contiguous"
                    places = "offsets" if offsets else "indices"
                    yield Case(kernel, signature, constants, f"{name}, {layout}, {places}", "bf16")
    for kernel in (pool.claim_kernel, pool.fill_kernel):
        constants = {"INDEX": tl.int32, "BLOCK": PLANE_BLOCK, "num_warps": 4} | options
        yield Case(kernel, _signature(kernel, constants, "*i64"), constants, "any", "bf16")


def memory_instructions(target: str) -> dict[str, dict[str, list[str]]]:
    """Case by case, the instructions by which SegNet's kernels read and write global memory."""
    found = {}
    for case in cases(TARGETS[target]):
        if case.name.startswith("SegNet") and case.name.endswith("offsets"):
            assembly = Compilation(case, target).compile().asm
            text = assembly.get("ptx") or assembly["amdgcn"]
            found[f"{case.kernel.__name__}, {case.name}"] = {
                kind: sorted(set(re.findall(rf"(?:{short}\.global|global_{kind}_)\S*", text)))
                for kind, short in (("store", "st"), ("load", "ld"))
            }
    return found


if __name__ == "__main__":
    print(json.dumps(memory_instructions(sys.argv[1])))
