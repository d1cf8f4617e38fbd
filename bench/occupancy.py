"""How many programs run on one multiprocessor at once, from what the compiler reports."""

from __future__ import annotations

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


# CUDA C++ Programming Guide, table of technical specifications per compute capability; AMD Instinct MI300 ISA
# reference: 512 vector registers a lane of each of 4 SIMDs, 8 waves a SIMD.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(65536, 256, 32, 64, 32, 164 * 1024, 1024),
    "sm_90": Multiprocessor(65536, 256, 32, 64, 32, 228 * 1024, 1024),
    "sm_100": Multiprocessor(65536, 256, 32, 64, 32, 228 * 1024, 1024),
    "gfx942": Multiprocessor(4 * 512 * 64, 8 * 64, 64, 32, 16, 64 * 1024, 0),
}


def programs_per_multiprocessor(line: Mapping[str, str]) -> int:
    """An estimate from a row of the cross-compilation table: the least of what registers, warps and shared memory
    leave room for. Barriers, and how the SIMDs of a compute unit share the warps, are left out."""
    unit = MULTIPROCESSORS[line["target"]]
    found = re.search(r" w(\d+) ", line["tile"])
    if found is None:
        raise ValueError(f"no number of warps in the tile {line['tile']!r}")
    warps = int(found.group(1))
    a_warp = -(-max(int(line["registers"]), 1) * unit.warp_size // unit.register_unit) * unit.register_unit
    by_registers = unit.registers // a_warp // warps
    by_shared = unit.shared // max(int(line["shared"]) + unit.reserved, 1)
    return min(by_registers, unit.warps // warps, by_shared, unit.programs)
