import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .modes import EMULATED  # before Triton

# isort: split
from backstride.fused_ops import dispatch
from backstride.fused_ops.conv import aten

from .interpretation import accelerate

accelerate()

# One worker per core already fills the machine; torch's own threads on top of that only fight.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def emulation() -> Iterator[None]:
    """With BACKSTRIDE_EMULATE=1, ops on CPU tensors run the PTX that the kernels compile to."""
    if not EMULATED:
        yield
        return
    from .ptx_launch import emulated

    with emulated():
        yield


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """fp32 is fp32 on a GPU: with TF32 allowed torch rounds to it in large layers only, and is no measure for ours."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def kernels_compute(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """On a GPU dense products are cuDNN's, and short passes with gradients torch's; the tests are of the kernels, but
    for those that ask for `library`, or set `SHORT` themselves."""
    monkeypatch.setattr(dispatch, "SHORT", -1)
    if "library" not in request.fixturenames:
        monkeypatch.setattr(aten, "is_at_hand", lambda _: False)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense products are the library's on every device, as they are on a GPU."""
    monkeypatch.setattr(aten, "is_at_hand", lambda _: True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets; skips the test where there is none."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    path = Path(os.environ.get("BACKSTRIDE_DATA", default))
    if not path.is_dir():
        pytest.skip("no data sets: BACKSTRIDE_DATA is not set and ../shared/data does not exist")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` or `emulated` skip with a reason where there is no GPU, or no emulator."""
    for item in items:
        if item.get_closest_marker("gpu") and (EMULATED or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a GPU that Triton supports"))
        if item.get_closest_marker("emulated") and not EMULATED:
            item.add_marker(pytest.mark.skip(reason="needs BACKSTRIDE_EMULATE=1"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every test with a device runs interpreted on the CPU, and on the GPU with `-m gpu`."""
    return request.param
