"""How the kernels run in a test session: on a GPU, interpreted, or compiled and emulated.

Triton decides whether it interprets when it is imported, so this has to come before any import of backstride.
"""

import os

import pytest
import torch

EMULATED = os.environ.get("BACKSTRIDE_EMULATE") == "1"
if EMULATED:
    os.environ["TRITON_INTERPRET"] = "0"
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

kernels_run = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" and not EMULATED and not torch.cuda.is_available(),
    reason="the kernels run on a GPU, interpreted or emulated",
)
