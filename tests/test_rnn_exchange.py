"""Several programs of the sharded recurrence at once: each interpreted in a process of its own, on shared memory."""

import multiprocessing
import sys
import time

import pytest
import torch
from backstride.kernels.rnn import Packing, launch, reference, scan
from backstride.kernels.rnn.config import SHARDED, RnnConfig
from backstride.kernels.runtime import INTERPRETED, Plan
from triton.runtime import interpreter

LIMIT = 60  # seconds for all programs of a launch

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="programs are interpreted in processes of their own"),
    pytest.mark.skipif(
        sys.platform == "darwin" or "fork" not in multiprocessing.get_all_start_methods(),
        reason="interpreted programs are started by fork, which isn't safe here",
    ),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def interpret_one(plan: Plan, program: tuple[int, int, int], pointers: tuple[torch.Tensor | None, ...]) -> None:
    """Run this program of the plan's grid, in the process that calls."""
    torch.set_num_threads(1)
    builder = interpreter.interpreter_builder
    set_grid_idx, set_grid_dim, atomic = builder.set_grid_idx, builder.set_grid_dim, builder.create_atomic_rmw

    def slow_atomic(*arguments):
        # The first shard is late in every step: who does not wait for it reads what is not there yet.
        time.sleep(0.03 if program[1] == 0 else 0.001)
        return atomic(*arguments)

    builder.set_grid_idx = lambda *_: set_grid_idx(*program)
    builder.set_grid_dim = lambda *_: set_grid_dim(*plan.grid)
    builder.create_atomic_rmw = slow_atomic
    plan.kernel[(1,)](*pointers, *plan.sizes, **plan.constants)


def launch_at_once(plan: Plan, *pointers: torch.Tensor | None) -> None:
    """`Plan.launch` with every program in a process of its own."""
    for pointer in pointers:
        if pointer is not None:
            pointer.share_memory_()
    tiles, shards, directions = plan.grid
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=interpret_one, args=(plan, (b, n, d), pointers), daemon=True)
        for b in range(tiles)
        for n in range(shards)
        for d in range(directions)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert not any(process.is_alive() for process in processes), "a program waits for ever"
        assert not any(process.exitcode for process in processes), "a program failed"
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture
def grids(monkeypatch):
    """The grids of the launches, of programs that run at once with tiles of 16 x 16."""
    seen = []

    def launched(plan, *pointers):
        seen.append(plan.grid)
        launch_at_once(plan, *pointers)

    launch._plan.cache_clear()
    monkeypatch.setattr(launch, "choose_config", lambda *_: RnnConfig(SHARDED, 16, 16, 16, 2, 1))
    monkeypatch.setattr(Plan, "launch", launched)
    yield seen
    launch._plan.cache_clear()


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    "effect, backward, sizes, directions, hidden, grid, dtype, in_registers",
    [
        ("tanh", False, [3, 3, 3, 3], 1, 37, (1, 3, 1), torch.float16, True),
        ("tanh", False, [18, 18, 17, 2, 1], 2, 19, (2, 2, 2), torch.float64, True),
        ("relu_derivative", True, [18, 18, 18], 1, 80, (2, 5, 1), torch.bfloat16, False),
        ("factor", True, [3, 2, 2, 1], 2, 37, (1, 3, 2), torch.float32, False),
    ],
    ids=["dense", "packed", "backward, dense", "backward, packed"],
)
def test_programs_that_wait_for_each_other(
    grids, monkeypatch, effect, backward, sizes, directions, hidden, grid, dtype, in_registers
):
    """Every element is written, and is the definition's, rounded at every step."""
    torch.manual_seed(0)
    monkeypatch.setattr(launch, "columns_in_registers", lambda *_: in_registers)
    batch = sizes[0]
    packing, rows = None, (len(sizes), batch)
    if len(set(sizes)) > 1:
        packing = Packing(torch.tensor([0, *torch.tensor(sizes).cumsum(0)]), batch)
        rows = (sum(sizes),)
    x = torch.randn(*rows, directions, hidden).to(dtype)
    gate = torch.randn_like(x) if backward else None
    first = None if backward else torch.randn(directions, batch, hidden).to(dtype)
    biases = [] if backward else [torch.randn(directions, hidden).to(dtype) for _ in range(2)]
    matrix = (torch.randn(directions, hidden, hidden) / hidden**0.5).to(dtype)
    y = torch.full_like(x, torch.nan)
    factor = torch.full_like(x, torch.nan) if effect == "tanh" else None
    last = x.new_full((directions, batch, hidden), torch.nan) if packing is None else None
    scan(x, gate, first, matrix, packing, y, factor, effect, biases=biases, last=last, backward=backward)
    assert grids == [grid]
    inputs = [None if t is None else t.double() for t in (x, gate, first, matrix)]
    inputs[0] = sum((b.double() for b in biases), start=inputs[0])
    exact = reference.scan(*inputs, packing, effect, backward=backward)
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-7)
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
    if last is not None:
        assert torch.equal(last[0], y[0 if backward else -1, :, 0])
    if factor is not None:
        torch.testing.assert_close(factor.double(), 1 - exact**2, rtol=tolerance, atol=tolerance)
