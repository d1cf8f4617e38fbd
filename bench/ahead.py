"""Compile kernels in several processes before their cases are timed: a GPU would wait for one process at a time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import torch

from .case import OURS, Case, variants
from .report import CaseKey, key_of

PROCESSES = 8  # each has its own context and tensors on the GPU
CASES_AT_ONCE = 32  # what a run then has no time for was compiled for nothing

AllCases = Callable[[], list[Case]]


class Ahead:
    """Processes that run our side of cases once. What Triton compiles there it keeps on disk, for all processes.

    `all_cases` can be pickled, as cases can not: a process makes its own and is told which one to run.
    """

    def __init__(self, all_cases: AllCases, device: str) -> None:
        self.all_cases, self.device = all_cases, device
        spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pool = ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), spawn)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def compile(self, cases: Sequence[Case]) -> list[Future[None]]:
        """Run the cases, and return when all are done. A case that fails here will fail again, and then be reported."""
        futures = [self.pool.submit(_run_ours, self.all_cases, key_of(case), self.device) for case in cases]
        for future in futures:
            future.exception()
        return futures


def _run_ours(all_cases: AllCases, key: CaseKey, device: str) -> None:
    (case,) = (each for each in all_cases() if key_of(each) == key)
    try:
        for variant, call in variants(case, device, compiled=False).items():
            if variant.name == OURS:
                call()
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()  # the next case's process may need it
