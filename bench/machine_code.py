"""Loops in what the assembler made: how many instructions a step of a kernel takes beside its products."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

# A label, or an instruction with the label that it names, as nvdisasm and as AMD's assembler write them.
NVIDIA = re.compile(r"^(?P<label>\.L\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?P<instruction>[^;]*)", re.MULTILINE)
AMD = re.compile(r"^(?P<label>\.LBB\w+):|^\t(?P<instruction>[a-z][^\n;]*)", re.MULTILINE)
NAMED = re.compile(r"\.L\w+")
WAIT = 16  # a loop of fewer instructions waits for something


def longest_loop(code: str, syntax: re.Pattern[str]) -> list[str]:
    """The instructions of the longest loop that has no loop in it but waits; of none, none."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for found in syntax.finditer(code):
        if found["label"]:
            labels[found["label"]] = len(instructions)
            continue
        instructions.append(found["instruction"].strip())
        target = NAMED.search(found["instruction"])
        if target and len(instructions) - labels.get(target[0], len(instructions)) >= WAIT:
            loops.append((labels[target[0]], len(instructions)))
    innermost = [loop for loop in loops if not any(loop[0] <= a and b < loop[1] for a, b in loops)]
    start, end = max(innermost, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return instructions[start:end]


def about_binary(compiled: Any, tool: str, option: str) -> str:
    """What this of NVIDIA's tools prints about the binary of a kernel that Triton compiled."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [getattr(triton.knobs.nvidia, tool).path, option, file.name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def loop_length(compiled: Any) -> int:
    """Instructions in the longest innermost loop of a kernel that Triton compiled."""
    if "amdgcn" in compiled.asm:
        return len(longest_loop(compiled.asm["amdgcn"], AMD))
    return len(longest_loop(about_binary(compiled, "nvdisasm", "-c"), NVIDIA))
