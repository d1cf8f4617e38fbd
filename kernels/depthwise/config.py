"""Launch configurations of the depthwise kernels: data, and pure functions that choose.

No threshold here was measured on a GPU yet. They follow from sizes alone: whole cache lines for neighbouring lanes, and
accumulators, weights and columns that fit a thread's registers (see the cross-compilation table in bench/results).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..runtime import INTERPRETED

WARPS = 4
LANES = 32 * WARPS
INTERPRETED_LANES = 1024  # the interpreter's time goes by programs, not by their size
LANES_ACROSS = (2, 8, 32, 128)
LINE = 128  # bytes
REGISTERS = 128  # of a thread's 255, for accumulators, weights and columns
ACCUMULATORS = 64  # of a thread in the weight gradient
GRADIENT_PRODUCTS = 256  # multiply-adds of a thread in one step of the weight gradient
UNROLLED = 128  # multiply-adds of a thread in a loop's body
WIDEST_WINDOW = 32  # output columns of a lane
WINDOW_PRODUCTS = 256  # multiply-adds of a lane along W, for each pair of channels
GROUP_PRODUCTS = 512  # the same for all pairs
LARGEST_GROUP = 4  # channels: eight fill the narrowest matrix instruction
GROUP_TERMS = 256  # multiply-adds of a pixel of one group, at most: more are for matrix instructions, full or not
GROUP_WEIGHTS = 80  # of one row of taps, for a thread's registers


@dataclass(frozen=True)
class DepthwiseConfig:
    """Lanes of one program (rows x cols), the output columns u of a lane, and how it is compiled.

    With `window`, the taps along W are compiled in; `tap_rows` of them are one program's in the weight gradient, and
    `unroll` in a loop's body otherwise.
    """

    window: bool
    u: int
    rows: int
    cols: int
    tap_rows: int
    unroll: int
    num_warps: int
    num_stages: int


def _floor_power(value: int) -> int:
    return 1 << max(value, 1).bit_length() - 1


def _least_waste(size: int, blocks: Sequence[int]) -> int:
    """The block whose multiples cover `size` with the fewest lanes idle; the largest of equals."""
    return min(sorted(blocks, reverse=True), key=lambda block: -(-size // block) * block)


def columns_of_a_lane(
    channels_last: bool, transposed: bool, width: int, stride: int, x_vector: int, itemsize: int
) -> int:
    """Output columns u of a lane. In NCHW as many as one load takes, in channels_last four, so that neighbours share
    what they read; of X^T a multiple of the stride."""
    if channels_last:
        wanted = 4
    else:
        wanted = min(x_vector, max(1, 16 // itemsize // stride)) * stride if transposed else x_vector
    u = stride * max(1, wanted // stride) if transposed else wanted
    return u if transposed else min(u, _floor_power(width))


@lru_cache(maxsize=4096)
def choose_config(
    channels: int,
    width: int,
    kernel: tuple[int, int, int],
    u: int,
    stride: int,
    repeats: int,
    vector: int,
    channels_last: bool,
    itemsize: int,
    weight_grad: bool = False,
    group: tuple[int, int] = (1, 1),
) -> DepthwiseConfig:
    """Launch for `channels` of images `width` columns wide, each standing for a `group` (of x, of y).

    `u` is what `columns_of_a_lane` says, `stride` that of X^T (1 for X), `repeats` how often a lane goes over the
    kernel, `vector` how many channels one load takes.
    """
    group_x, group_y = group
    pairs = group_x * group_y
    tap_rows, taps = kernel[0] * kernel[1], kernel[2]
    while u > stride and u * -(-taps // stride) * pairs > GROUP_PRODUCTS:
        u //= 2
    products = u * -(-taps // stride)
    window = u <= WIDEST_WINDOW and products <= WINDOW_PRODUCTS and products * pairs <= GROUP_PRODUCTS
    if not window:
        u, taps, products = 1, 1, 1
    taps, products = taps * pairs, products * pairs
    lanes = INTERPRETED_LANES if INTERPRETED else LANES
    held = 1  # elements of a thread in one tensor
    if channels_last:
        if pairs == 1:
            held = vector
            while held > 1 and (taps + u + 2) * held > REGISTERS:
                held //= 2
            while weight_grad and held > 2 and tap_rows * taps * held > ACCUMULATORS:
                held //= 2
        elif not weight_grad and taps + 2 * (u * group_y + group_x) <= REGISTERS // 2:
            held = 2  # pixels, for which the weights are loaded once
        line = LINE // itemsize // group_x
        whole = 1 << (channels - 1).bit_length()
        cols = _least_waste(channels, [line // 2, line]) if whole > line // 2 else whole
    else:
        # Few choices, because every one is a compilation of its own; at least half a line in neighbouring lanes.
        across = -(-width // u)
        cols = _least_waste(across, [c for c in LANES_ACROSS if 2 * c * u * itemsize >= LINE or c >= across])
    rows = max(1, lanes * held // cols)
    fitting = max(1, min(ACCUMULATORS // (taps * held), GRADIENT_PRODUCTS // (products * held))) if pairs == 1 else 1
    grouped = -(-tap_rows // -(-tap_rows // fitting)) if window else 1
    steps, most = repeats * tap_rows, max(1, UNROLLED // (products * held))
    unroll = max(n for n in range(1, min(steps, most) + 1) if steps % n == 0)
    return DepthwiseConfig(window, u, rows, cols, grouped, unroll, WARPS, 1)
