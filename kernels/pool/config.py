"""Launch configurations of the pooling kernels: data, and a pure function that chooses."""

from dataclasses import dataclass
from functools import lru_cache

from ..runtime import INTERPRETED

THREADS = 128
INTERPRETED_LANES = 4096  # the interpreter's time goes by programs, not by their size
LANE_BYTES = 16  # of the result: a load or store of a thread is at most that wide
PLANE_BLOCK = 1024  # elements of a plane that one program claims or fills
UNROLLED = 72  # elements that a lane goes over without a loop, at most
LOOP_BODY = 32  # and in a loop's body


@dataclass(frozen=True)
class PoolConfig:
    """Lanes of one program, warps that run them, and steps in a loop's body."""

    lanes: int
    num_warps: int
    unroll: int


@lru_cache(maxsize=4096)
def choose_config(steps: int, u: int) -> PoolConfig:
    """For lanes of `u` elements that go over `steps` taps or windows: a thread for each lane, or for two that have one
    step only, in which finding their place takes longest; and no loop where the steps are few."""
    most = steps if steps * u <= UNROLLED else max(1, LOOP_BODY // u)
    unroll = max(n for n in range(1, most + 1) if steps % n == 0)
    lanes = THREADS * (2 if steps == 1 else 1)
    return PoolConfig(INTERPRETED_LANES if INTERPRETED else lanes, THREADS // 32, unroll)
