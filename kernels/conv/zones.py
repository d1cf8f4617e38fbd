"""Validity zones: the output pixels sorted by which taps reach the input at all.

With a large dilation most taps of a border pixel fall on padding. Along one axis, the output pixels that the same taps
reach form runs, and the taps of a run are consecutive; so the output falls into boxes, at most nine for a 3x3 kernel on
a map that its taps don't outgrow, each with an exact set of taps. A launch over the boxes, their pixels counted through
the whole batch, multiplies no padding. `tile_taps` counts what that saves against what the boxes' last, partly filled
tiles cost. A residue phase of X^T is a run with a step, so X^T has zones as X has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

# Below this share of the tile-taps of plain tiles, zones are worth their look-up. Not measured on a GPU yet.
WORTH = 0.9
# More zones than this (many taps that outgrow the map, or many phases) take plain tiles.
MOST_ROWS = 256
COLUMNS = 32  # of the table: five of the zone, then eight for each axis


class Run(NamedTuple):
    """Output pixels start + step q of one axis, q < length, that sum x[first + stride q + hop j] w[tap + tap_step j]
    over j < taps."""

    start: int
    step: int
    length: int
    first: int
    stride: int
    hop: int
    tap: int
    tap_step: int
    taps: int


WHOLE = Run(0, 1, 1, 0, 1, 1, 0, 1, 1)  # an axis that isn't there


class Zone(NamedTuple):
    """A box of output pixels and its taps: one run for each of three axes."""

    runs: tuple[Run, Run, Run]

    @property
    def pixels(self) -> int:
        return math.prod(run.length for run in self.runs)

    @property
    def taps(self) -> int:
        return math.prod(run.taps for run in self.runs)


def _split(run: Run, size: int) -> Iterator[Run]:
    """The parts of a run, of taps that may miss an input of `size`, in which the same taps hit it."""
    hits = []
    for j in range(run.taps):
        offset = run.first + run.hop * j
        low, high = (max(-(offset // run.stride), 0), min(-((offset - size) // run.stride), run.length))
        hits.append((low, high) if low < high else (0, 0))
    ends = sorted({0, run.length, *itertools.chain.from_iterable(hits)})
    for low, high in itertools.pairwise(ends):
        taps = [j for j, (first, last) in enumerate(hits) if first <= low < last]
        first_tap = taps[0] if taps else 0
        yield run._replace(
            start=run.start + run.step * low,
            length=high - low,
            first=run.first + run.stride * low + run.hop * first_tap,
            tap=run.tap + run.tap_step * first_tap,
            taps=len(taps),
        )


def _axis_runs(
    kernel: int, stride: int, padding: int, dilation: int, size: int, out: int, transposed: bool
) -> list[Run]:
    """All runs of one axis, from `size` input pixels to `out` output pixels of X, or with `transposed` of X^T."""
    if not transposed:
        return list(_split(Run(0, 1, out, -padding, stride, dilation, 0, 1, kernel), size))
    runs = []
    step = stride // math.gcd(stride, dilation)
    for residue in range(min(stride, out)):
        taps = [r for r in range(kernel) if (residue + padding - dilation * r) % stride == 0]
        tap = taps[0] if taps else 0
        first = (residue + padding - dilation * tap) // stride
        length = -(-(out - residue) // stride)
        hop = -(dilation * step // stride)
        runs += _split(Run(residue, stride, length, first, 1, hop, tap, step, len(taps)), size)
    return runs


@lru_cache(maxsize=1024)
def find_zones(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    out: Sequence[int],
    transposed: bool,
) -> tuple[Zone, ...] | None:
    """The zones of X, or of X^T, from an input of `size` to an output of size `out`; those with the most taps first.

    None where they are more than a launch looks up.
    """
    axes = [_axis_runs(*axis, transposed) for axis in zip(kernel, stride, padding, dilation, size, out, strict=True)]
    if math.prod(len(runs) for runs in axes) > MOST_ROWS:
        return None
    absent = [[WHOLE]] * (3 - len(axes))
    zones = [Zone(runs) for runs in itertools.product(*absent, *axes)]
    return tuple(sorted(zones, key=lambda zone: -zone.taps))


def tile_taps(zones: Sequence[Zone], batch: int, block_m: int) -> int:
    """Products of a tile of `block_m` pixels with one tap that a launch over zones computes, partial tiles in full."""
    return sum(zone.taps * -(-batch * zone.pixels // block_m) for zone in zones)


def plain_tile_taps(
    kernel: Sequence[int], stride: Sequence[int], out: Sequence[int], transposed: bool, batch: int, block_m: int
) -> int:
    """The same of plain tiles, where every pixel meets every tap, or every tap of its residue phase."""
    positions = [-(-o // s) for o, s in zip(out, stride, strict=True)] if transposed else out
    return math.prod(kernel) * -(-batch * math.prod(positions) // block_m)


def meetings(narrow: int, wide: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Pairs of a pixel n < narrow and a tap r of one axis for which the wide side has pixel stride n + dilation r -
    padding. The others meet padding."""
    pairs = 0
    for tap in range(kernel):
        before = padding - dilation * tap  # wide pixels before that which this tap of n = 0 meets
        first, end = (-(-pixel // stride) for pixel in (before, before + wide))
        pairs += max(min(end, narrow) - max(first, 0), 0)
    return pairs


def met_share(
    zones: Sequence[Zone],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out: Sequence[int],
    transposed: bool,
) -> float:
    """Share of all pairs of output pixel and tap, of X^T its phase's, whose input pixel exists; 1 of none."""
    if transposed:
        pairs = math.prod(
            sum((i + p - d * r) % s == 0 for i in range(size) for r in range(k))
            for k, s, p, d, size in zip(kernel, stride, padding, dilation, out, strict=True)
        )
    else:
        pairs = math.prod(kernel) * math.prod(out)
    return sum(zone.pixels * zone.taps for zone in zones) / pairs if pairs else 1.0


class Branch(NamedTuple):
    """One convolution of a launch. Channels are those of one group; `channel` and `weight` say where in the output,
    and at which element of the packed weights, it begins."""

    zones: tuple[Zone, ...]
    kernel: tuple[int, ...]
    channels: int  # of the output
    columns: int  # of the weight, its second axis
    channel: int
    weight: int


@dataclass(frozen=True, eq=False)
class Table:
    """What a launch over zones looks up, and the number of its programs. Equal to itself only: quick to hash."""

    rows: tuple[tuple[int, ...], ...]
    programs: int


def make_table(
    branches: Sequence[Branch], batch: int, groups: int, block_m: int, block_n: int, out_vec: int, w_vec: int
) -> Table:
    """The zones of all branches, those with the most taps first, each with the first program that works on it.

    Channels are counted in units of `out_vec`, elements of the weight in units of `w_vec`.
    """
    every = [(zone, branch) for branch in branches for zone in branch.zones]
    rows, programs = [], 0
    for zone, branch in sorted(every, key=lambda pair: -pair[0].taps):
        kernel = (1,) * (3 - len(branch.kernel)) + branch.kernel
        hops = [math.prod(kernel[axis + 1 :]) * branch.columns for axis in range(3)]
        first = branch.weight + sum(run.tap * hop for run, hop in zip(zone.runs, hops, strict=True))
        row = [programs, branch.channel // out_vec, branch.channels // out_vec, first // w_vec]
        row.append(math.prod(kernel) * branch.columns // w_vec)
        for run, hop in zip(zone.runs, hops, strict=True):
            row += [run.start, run.step, run.length, run.first, run.stride, run.hop, run.taps]
            row.append(run.tap_step * hop // w_vec)
        rows.append((*row, *[0] * (COLUMNS - len(row))))
        programs += -(-batch * zone.pixels // block_m) * groups * -(-branch.channels // block_n)
    height = max(16, 1 << (len(rows) - 1).bit_length())
    nowhere = (2**31 - 1, *[0] * (COLUMNS - 1))
    return Table((*rows, *[nowhere] * (height - len(rows))), programs)


@lru_cache(maxsize=1024)
def on_device(table: Table, device: torch.device) -> torch.Tensor:
    """The rows as the kernel reads them. Copied once, so a CUDA graph may hold launches that ran before."""
    return torch.tensor(table.rows, dtype=torch.int32, device=device)
