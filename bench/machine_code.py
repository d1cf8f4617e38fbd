"""What the assembler made: registers, spills, and the instructions of a kernel's main loop."""

from __future__ import annotations

import re
import subprocess
import tempfile

from triton import knobs

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


def about_binary(cubin: bytes, tool: str, option: str) -> str:
    """What this of NVIDIA's tools, which come with Triton, prints about a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, tool).path, option, file.name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes spilled by it, as the assembler wrote them into the binary."""
    report = about_binary(cubin, "cuobjdump", "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", report)
    if found is None:
        raise ValueError(f"no resource usage in: {report}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def disassembled(cubin: bytes) -> str:
    return about_binary(cubin, "nvdisasm", "-c")
