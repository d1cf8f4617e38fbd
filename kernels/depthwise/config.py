"""Launch configurations of the depthwise kernels: data, and pure functions that choose.

No threshold here was measured on a GPU yet. They follow from sizes alone: whole cache lines for neighbouring lanes, and
accumulators, weights and columns that fit a thread's registers (see the cross-compilation table in bench/results).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..lanes import LaneAxis, chunks, lane_axis, positions
from ..runtime import INTERPRETED, Device

WARPS = 4
LANES = 32 * WARPS
INTERPRETED_LANES = 1024  # the interpreter's time goes by programs, not by their size
LANES_ACROSS = (2, 4, 8, 32, 128)
LINE = 128  # bytes
REGISTERS = 128  # of a thread's 255, for accumulators, weights and columns
UNROLLED = 2048  # conversions and multiply-adds of a thread in straight code, for the instruction cache
OPERATIONS = 700  # of a lane there, each for all that a thread holds: the compiler takes their cube, up to 20 seconds
LOAD = 5  # instructions: address, mask, zeros beside it
STORE = 4
LOOP = 24  # of a step
MOST_ROWS = 4  # of a lane, or strides of X^T: more share little more, and leave fewer programs
WIDEST_WINDOW = 32  # output columns of a lane
WINDOW_PRODUCTS = 256  # multiply-adds of a lane along W, for each pair of channels
GROUP_PRODUCTS = 512  # the same for all pairs
LARGEST_GROUP = 4  # channels: eight fill the narrowest matrix instruction
GROUP_TERMS = 256  # multiply-adds of a pixel of one group, at most: more are for matrix instructions, full or not
GROUP_WEIGHTS = 80  # of one row of taps, for a thread's registers


@dataclass(frozen=True)
class DepthwiseConfig:
    """Lanes of one program (rows x cols), the output rows v and columns u of a lane, and how it is compiled.

    With `window`, the taps along W are compiled in, and with `window_h` those along H: `tap_rows` of them are one
    program's in the weight gradient. With a spacing, a lane's outputs along that axis lie as far apart.
    """

    window: bool
    window_h: bool
    v: int
    u: int
    spacing_h: int
    spacing_w: int
    rows: int
    cols: int
    tap_rows: int
    num_warps: int
    num_stages: int


class Axis(NamedTuple):
    """What a lane goes along: `size` outputs, joined with what they read as `tile.LaneAxis` says."""

    size: int
    taps: int
    pad: int
    stride: int
    dilation: int
    transposed: bool

    @property
    def step(self) -> int:
        """Outputs of a lane are a multiple of it."""
        return self.stride if self.transposed else 1

    @property
    def spacings(self) -> tuple[int, ...]:
        """Outputs side by side (0), or so far apart that they share all that they read."""
        if self.transposed and self.stride > 1:
            return (0,)
        apart = self.dilation if self.transposed else self.dilation // math.gcd(self.stride, self.dilation)
        return (0, apart) if apart > 1 else (0,)

    def outputs(self, most: int) -> list[int]:
        """Of a lane."""
        counts = [self.step]
        while 2 * counts[-1] <= most:
            counts.append(2 * counts[-1])
        return counts

    def lane(self, outputs: int, spacing: int) -> LaneAxis:
        return lane_axis(outputs, self.pad, self.taps, self.stride, self.dilation, spacing, self.transposed)  # pyright: ignore[reportReturnType]

    def waste(self, outputs: int, spacing: int) -> float:
        """Outputs of all lanes for every one in the image; less than a quarter more is none, so that the choice is the
        same for images of other sizes."""
        apart = max(spacing, 1)
        lanes = -(-self.size // (outputs * apart)) * outputs * apart
        return lanes / self.size if 4 * lanes > 5 * self.size else 1.0


class Lane(NamedTuple):
    """A way to make v rows by u columns of `held` channels in a thread, with `tap_rows` rows of taps at a time."""

    window_h: bool
    v: int
    u: int
    spacing_h: int
    spacing_w: int
    held: int
    tap_rows: int


ONE_ROW = Axis(1, 1, 0, 1, 1, False)


def _floor_power(value: int) -> int:
    return 1 << max(value, 1).bit_length() - 1


def _least_waste(size: int, blocks: Sequence[int]) -> int:
    """The block whose multiples cover `size` with the fewest lanes idle; the largest of equals."""
    return min(sorted(blocks, reverse=True), key=lambda block: -(-size // block) * block)


def columns_of_a_lane(
    channels_last: bool, transposed: bool, width: int, stride: int, x_vector: int, itemsize: int
) -> int:
    """Output columns u of a lane, at most. In NCHW as many as one load takes, in channels_last four, so that neighbours
    share what they read; of X^T a multiple of the stride."""
    if channels_last:
        wanted = 4
    else:
        wanted = min(x_vector, max(1, 16 // itemsize // stride)) * stride if transposed else x_vector
    u = stride * max(1, wanted // stride) if transposed else wanted
    return u if transposed else min(u, _floor_power(width))


def _candidates(
    height: Axis, width: Axis, most_u: int, vector: int, channels_last: bool, weight_grad: bool, pairs: int
) -> Iterator[Lane]:
    """Lanes to choose from, of all that the kernels take; the first is always possible."""
    columns = [(u, spacing) for spacing in width.spacings for u in width.outputs(most_u)]
    held = [1 << i for i in range(vector.bit_length())]
    if not channels_last:
        columns = [(most_u, 0)]
    if not channels_last or pairs > 1:
        held = [1]
    for u, spacing_w in columns:
        for h in held:
            yield Lane(weight_grad, 1, u, 0, spacing_w, h, 1)
            for spacing_h in height.spacings:
                lanes = -(-height.size // (height.step * max(spacing_h, 1)))
                most_v = height.step * min(MOST_ROWS, _floor_power(lanes))
                for v in height.outputs(most_v):
                    parts = range(1, height.taps + 1) if weight_grad else (1,)
                    for tap_rows in {-(-height.taps // part) for part in parts}:
                        yield Lane(True, v, u, spacing_h, spacing_w, h, tap_rows)


def _instructions(
    lane: Lane,
    height: Axis,
    width: Axis,
    chunk: int,
    itemsize: int,
    channel_wise: bool,
    weight_grad: bool,
    group: tuple[int, int],
) -> tuple[float, float, float]:
    """Registers, conversions and multiply-adds in straight code, and all that a thread does for every output, in
    instructions: counted roughly, to tell lanes apart."""
    group_x, group_y = group
    pairs = group_x * group_y
    rows, steps = height._replace(taps=lane.tap_rows), -(-height.taps // lane.tap_rows)
    if not lane.window_h:
        rows, steps = ONE_ROW, -(-height.taps // height.step)
    rows_read = len(positions(rows.lane(lane.v, lane.spacing_h)))
    columns = width.lane(lane.u, lane.spacing_w)
    columns_read, chunks_read = len(positions(columns)), len(chunks(columns, chunk))
    outputs = lane.v * lane.u * group_y
    products = outputs * group_x * -(-rows.taps // rows.step) * -(-width.taps // width.step) * lane.held
    weights = rows.taps * width.taps * pairs
    each = (group_x, group_y) if channel_wise else (1, 1)  # loads or stores of a chunk of all channels of a group
    straight = products + rows_read * columns_read * group_x * lane.held
    work = straight + rows_read * chunks_read * each[0] * LOAD
    if weight_grad:
        kept = weights + outputs
        work += lane.v * lane.u / chunk * each[1] * LOAD + outputs * lane.held
    else:
        live = min(rows.taps, 1 + (lane.v if height.transposed else rows.stride * (lane.v - 1) + 1))  # one ahead
        kept = outputs + live * width.taps * pairs
        work += weights * LOAD / 2 + lane.v * lane.u / chunk * each[1] * STORE / steps + LOOP
    registers = (kept + columns_read * group_x * itemsize / 4) * lane.held
    waste = height.waste(lane.v, lane.spacing_h) * width.waste(lane.u, lane.spacing_w)
    return registers, straight, work * steps / outputs / lane.held * waste


@lru_cache(maxsize=4096)
def choose_config(
    channels: int,
    height: Axis,
    width: Axis,
    u: int,
    vector: int,
    channels_last: bool,
    itemsize: int,
    weight_grad: bool = False,
    group: tuple[int, int] = (1, 1),
) -> DepthwiseConfig:
    """Launch for images of `channels`, each standing for a `group` (of x, of y).

    `u` is what `columns_of_a_lane` says, `vector` how many channels, or in NCHW columns, one load takes.
    """
    pairs = group[0] * group[1]
    while u > width.step and u * -(-width.taps // width.step) * pairs > GROUP_PRODUCTS:
        u //= 2
    products = u * -(-width.taps // width.step)
    window = u <= WIDEST_WINDOW and products <= WINDOW_PRODUCTS and products * pairs <= GROUP_PRODUCTS
    lane = Lane(False, 1, 1, 0, 0, vector if channels_last and pairs == 1 else 1, 1)
    if window:
        chunk = 1 if channels_last else math.gcd(u // width.stride if width.transposed else u * width.stride, vector)
        counted = [
            (lane, _instructions(lane, height, width, chunk, itemsize, not channels_last, weight_grad, group))
            for lane in _candidates(height, width, u, vector, channels_last, weight_grad, pairs)
        ]
        fitting = [
            c for c in counted if c[1][0] <= REGISTERS and c[1][1] <= UNROLLED and c[1][1] <= OPERATIONS * c[0].held
        ]
        lane = min(fitting or counted[:1], key=lambda c: (round(c[1][2], 3), -c[0].u, c[1][0]))[0]
    lanes = INTERPRETED_LANES if INTERPRETED else LANES
    if channels_last:
        line = LINE // itemsize // group[0]
        whole = 1 << (channels - 1).bit_length()
        cols = _least_waste(channels, [line // 2, line]) if whole > line // 2 else whole
    else:
        # Few choices, because every one is a compilation of its own; at least half a line in neighbouring lanes.
        across = -(-width.size // lane.u)
        cols = _least_waste(across, [c for c in LANES_ACROSS if 2 * c * lane.u * itemsize >= LINE or c >= across])
    rows = max(1, lanes * lane.held // cols)
    return DepthwiseConfig(
        window, lane.window_h, lane.v, lane.u, lane.spacing_h, lane.spacing_w, rows, cols, lane.tap_rows, WARPS, 1
    )


def choose_splits(tiles: int, steps: int, elements: int, device: Device) -> int:
    """Into how many parts the weight gradient's sum over pixels is cut.

    About three waves of programs over the multiprocessors, at least eight steps a part (below that the partial
    results cost more than they spread), and at most 256 MiB of fp32 partial results.
    """
    splits = min(-(-3 * device.multiprocessors // tiles), steps // 8, (256 << 20) // (4 * elements))
    return max(splits, 1)
