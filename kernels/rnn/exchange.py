"""How programs that run at once tell each other that a step is done, and a probe of what that costs.

Which way `sharded` takes is decided here, by `ASSEMBLY`: the counter is polled in assembly on NVIDIA, by atomics
elsewhere. Neither was timed yet; `python -m backstride.bench probe` does it.
"""

import triton
import triton.language as tl

COUNTER_LINE = 32  # int32 values between two groups' counters: 128 bytes, so that no two share a cache line

# All threads wait for themselves, each with an acquiring load of its own: then every thread sees what was released
# before the counter reached the target, and no barrier follows. Triton's scalar loop would add one to every poll.
WAIT = tl.constexpr(
    """
    {
        .reg .pred waiting;
        .reg .s32 count;
    poll:
        ld.acquire.gpu.global.s32 count, [$1];
        setp.lt.s32 waiting, count, $2;
        @waiting bra poll;
        mov.s32 $0, count;
    }
    """
)


@triton.jit
def signal(counter_ptr):
    """Tell the group that this program's part of y_t is in memory."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target, ASSEMBLY: tl.constexpr):
    """Until `target` signals have come."""
    if ASSEMBLY:
        tl.inline_asm_elementwise(
            WAIT,
            "=r,l,r",
            [counter_ptr.to(tl.int64, bitcast=True), target],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
            pass


@triton.jit(do_not_specialize=["ROUNDS"])
def exchange_probe_kernel(
    counter_ptr,
    flags_ptr,
    ROUNDS,
    METHOD: tl.constexpr,
    GROUP: tl.constexpr,
):
    """ROUNDS times: every one of GROUP programs signals, and waits for all. `counter_ptr` and `flags_ptr` hold zeros.

    METHOD "assembly" or "atomic": one counter, as `wait`; "flags": every program has a flag and reads all others'.
    """
    pid = tl.program_id(0)
    for step in tl.range(1, ROUNDS + 1, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        if METHOD == "flags":
            tl.debug_barrier()
            tl.atomic_xchg(flags_ptr + pid, step, sem="release", scope="gpu")
            offs = flags_ptr + tl.arange(0, GROUP)
            while tl.min(tl.load(offs, volatile=True), axis=0) < step:
                pass
        else:
            signal(counter_ptr)
            wait(counter_ptr, step * GROUP, METHOD == "assembly")
