"""How the kernels run in a test session: on a GPU, interpreted, or compiled and emulated.

Triton decides whether it interprets when it is imported, so this has to come before any import of backstride.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EMULATED = os.environ.get("BACKSTRIDE_EMULATE") == "1"
if EMULATED:
    os.environ["TRITON_INTERPRET"] = "0"
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

KERNELS_ON_CPU = EMULATED or os.environ.get("TRITON_INTERPRET") == "1"

kernels_run = pytest.mark.skipif(
    not KERNELS_ON_CPU and not torch.cuda.is_available(),
    reason="the kernels run on a GPU, interpreted or emulated",
)


def run_python(*arguments: str, interpreted: str) -> None:
    """Python in a process of its own, without a GPU: whether Triton interprets is decided at import, and torch.compile
    patches what the interpreter has patched already."""
    environment = os.environ | {"TRITON_INTERPRET": interpreted, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
