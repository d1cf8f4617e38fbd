"""What the compiler's report says about speed: programs that run on a multiprocessor at once, and instructions issued
beside its products."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """What the programs on it share. A compute unit of CDNA3 has four SIMDs with registers of their own."""

    registers: int  # of 32 bits, for all threads
    register_unit: int  # a warp gets registers in multiples of this
    warp_size: int
    warps: int
    programs: int
    shared: int  # bytes
    reserved: int  # bytes of it that every program costs on top
    products: int  # multiply-adds of dense 16-bit matrices in a cycle


SCHEDULERS = 4  # of a multiprocessor: each issues one instruction in a cycle, of one of its warps


# CUDA C++ Programming Guide, table of technical specifications per compute capability; AMD Instinct MI300 ISA
# reference: 512 vector registers a lane of each of 4 SIMDs, 8 waves a SIMD. Products from the data sheets' dense bf16
# rates (A100 312, H100 989, B200 2250, MI300X 1307 TFLOP/s) over multiprocessors and boost clock.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(65536, 256, 32, 64, 32, 164 * 1024, 1024, 1024),
    "sm_90": Multiprocessor(65536, 256, 32, 64, 32, 228 * 1024, 1024, 2048),
    "sm_100": Multiprocessor(65536, 256, 32, 64, 32, 228 * 1024, 1024, 4096),
    "gfx942": Multiprocessor(4 * 512 * 64, 8 * 64, 64, 32, 16, 64 * 1024, 0, 1024),
}


def programs_per_multiprocessor(target: str, registers: int, shared: int, warps: int) -> int:
    """An estimate: the least of what registers, warps and shared memory leave room for. Barriers, and how the SIMDs of
    a compute unit share the warps, are left out."""
    unit = MULTIPROCESSORS[target]
    a_warp = -(-max(registers, 1) * unit.warp_size // unit.register_unit) * unit.register_unit
    by_registers = unit.registers // a_warp // warps
    by_shared = unit.shared // max(shared + unit.reserved, 1)
    return min(by_registers, unit.warps // warps, by_shared, unit.programs)


def programs_of(line: Mapping[str, str]) -> int:
    """The same for a row of the cross-compilation table."""
    return programs_per_multiprocessor(line["target"], int(line["registers"]), int(line["shared"]), _warps(line))


def _warps(line: Mapping[str, str]) -> int:
    found = re.search(r" w(\d+) ", line["tile"])
    if found is None:
        raise ValueError(f"no number of warps in the tile {line['tile']!r}")
    return int(found.group(1))


def issue_share(line: Mapping[str, str]) -> float | None:
    """Cycles in which a step of the main loop is issued, over the cycles of its products: above 1 the matrix units
    wait for instructions, whatever else is right. None where no tile says how many products a step has."""
    blocks = line["tile"].split()[0].split("x")
    if len(blocks) != 3 or not line["matrix_instruction"]:
        return None
    rate = MULTIPROCESSORS[line["target"]].products / (1 if line["dtype"] == "bf16" else 2)
    return int(line["loop"]) * _warps(line) / SCHEDULERS / (math.prod(map(int, blocks)) / rate)
