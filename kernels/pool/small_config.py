"""Launch configurations of the pooling kernels for small windows: data, and a pure function that chooses.

None was timed on a GPU yet. Instructions were counted, as compiled for sm_90: a 3x3 window with stride 2 takes 45 of
them, and a pixel of the way back 13, where lanes of one row and a loop over the taps took 144 and 94.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from .config import INTERPRETED, INTERPRETED_LANES, LANE_BYTES, THREADS

SMALL = 9  # taps along H and W, or along D, of a window that `small` is for: the compiler takes their cube
SMALL_STRIDE = 4
MOST_ROWS = 4  # of a lane: more share little more


@dataclass(frozen=True)
class SmallConfig:
    """Rows and columns of a lane, its channels where they come last, lanes of one program, and warps that run them."""

    v: int
    u: int
    channels: int
    lanes: int
    num_warps: int


@lru_cache(maxsize=4096)
def choose_config(
    size: tuple[int, int], channels: int, itemsize: int, steps: tuple[int, int], rows: int
) -> SmallConfig:
    """For a result of this height and width; `channels` is 0 where they don't come last. Of the way back `steps` are
    the windows' strides, of which a lane holds a multiple, else 1. At most so many `rows`, if a stride has not more."""
    (height, width), whole = size, LANE_BYTES // itemsize
    lanes = INTERPRETED_LANES if INTERPRETED else THREADS
    most = max(rows // steps[0], 1) if height > 1 else 1
    v = steps[0] * max(gcd(-(-height // steps[0]), most), min(2, most))
    if channels:
        return SmallConfig(v, steps[1], gcd(whole, channels), lanes, THREADS // 32)
    # A row that ends within a lane is written column by column: better than lanes of few columns.
    u = gcd(whole, width) if gcd(whole, width) * 2 >= whole else whole
    return SmallConfig(v, steps[1] * max(u // steps[1], 1), 1, lanes, THREADS // 32)
