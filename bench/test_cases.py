"""`pytest bench`: single cases by pytest-benchmark, timed by CUDA events. `-k` chooses: "conv2d and forward and ours".

pytest bench -k "DCGAN and forward" --benchmark-group-by=param:case
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("times a CUDA GPU, and torch finds none here", allow_module_level=True)

from backstride.bench import run
from backstride.bench.case import Case, Variant, gate, variants

CASES = {str(case): case for case in run.all_cases(quick=False, tiny=False)}
VARIANTS = {
    " ".join(v): Variant(*v)
    for v in (("ours", "contiguous"), ("ours", "channels_last"), ("torch", "contiguous"), ("torch", "channels_last"))
}


class EventTimer:
    """Seconds on the GPU since the first call, by CUDA events: the difference of two is what ran between them."""

    def __init__(self) -> None:
        self.start: torch.cuda.Event | None = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.start is None:
            self.start = event
        return self.start.elapsed_time(event) / 1e3


@pytest.mark.benchmark(timer=EventTimer(), warmup=True)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_case(benchmark, case: Case, variant: Variant):
    calls = variants(case, "cuda", compiled=False)
    if variant not in calls:
        pytest.skip(f"no {variant.layout} for tensors of these dimensions")
    for each in case.checks or (case,):
        gate(each, "cuda")
    benchmark(calls[variant])
