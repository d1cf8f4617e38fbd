"""The recurrence with the configurations that its planner chooses for real layers, as cases to compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from backstride.kernels.rnn import launch
from backstride.kernels.rnn.config import RnnConfig, choose_config
from backstride.kernels.rnn.exchange import exchange_probe_kernel
from backstride.kernels.runtime import Device

from .cross_compile import DTYPES, POINTER, Case, Target

# name, batch, hidden size, directions, packed
LAYERS = [
    ("char-rnn 128", 50, 128, 1, False),
    ("char-rnn 64, both directions, packed", 32, 64, 2, True),
    ("KernelBench 256", 8, 256, 1, False),
    ("word language model 200", 20, 200, 1, False),
    ("512", 64, 512, 1, False),
    ("512, both directions, packed", 16, 512, 2, True),
    ("1000", 50, 1000, 1, False),
    ("1024", 64, 1024, 1, False),
    ("DeepBench 1760", 32, 1760, 1, False),
    ("DeepBench 2560", 64, 2560, 1, False),
]


def _case(
    name: str, config: RnnConfig, dtype: str, hidden: int, directions: int, packed: bool, effect: str, cuda: bool
) -> Case:
    x = torch.empty(4, 4, directions, hidden, dtype=DTYPES[dtype], device="meta")
    backward = effect not in ("tanh", "relu")
    constants = launch.constants_of(x, effect, backward, dtype == "tf32", config, cuda) | {
        "PACKED": packed,
        "HAS_BIAS": not backward,
        "HAS_FIRST": not backward,
        "HAS_FACTOR": effect == "tanh" and dtype == "bf16",
        "HAS_LAST": effect == "tanh" and dtype != "bf16",
    }
    kernel = launch.KERNELS[config.regime]
    absent = {
        "b_ih_ptr": backward,
        "b_hh_ptr": backward,
        "gate_ptr": not backward,
        "first_ptr": backward,
        "offsets_ptr": not packed,
        "factor_ptr": not constants["HAS_FACTOR"],
        "last_ptr": not constants["HAS_LAST"],
        "state_ptr": constants["PRECISION"] != "tf32",
    }
    constants |= {pointer: None for pointer, missing in absent.items() if missing and pointer in kernel.arg_names}
    pointers = {"offsets_ptr": "*i64", "counter_ptr": "*i32"}
    signature = {
        argument: pointers.get(argument, POINTER[dtype]) if argument.endswith("_ptr") else "i32"
        for argument in kernel.arg_names
        if argument not in constants
    }
    return Case(kernel, signature, constants, f"{name}, {config.regime}, {effect}", dtype)


def cases(target: Target) -> Iterator[Case]:
    """Every layer, forward and backward."""
    device = Device(132, target.shared_memory)
    for dtype, torch_dtype in DTYPES.items():
        for name, batch, hidden, directions, packed in LAYERS:
            config = choose_config(batch, hidden, directions, torch_dtype.itemsize, dtype != "fp32", device)
            # 16-bit types store the factor, fp32 takes it from the output.
            for effect in ("tanh", "factor" if dtype == "bf16" else "tanh_derivative"):
                yield _case(name, config, dtype, hidden, directions, packed, effect, target.backend == "cuda")
            if name == "char-rnn 128":
                for effect in ("relu", "relu_derivative"):
                    yield _case(name, config, dtype, hidden, directions, packed, effect, target.backend == "cuda")
    for method in ("assembly", "atomic", "flags"):
        if target.backend == "cuda" or method != "assembly":
            pointers = {"counter_ptr": "*i32", "flags_ptr": "*i32", "ROUNDS": "i32"}
            constants = {"METHOD": method, "GROUP": 64, "num_warps": 4, "num_stages": 1}
            yield Case(exchange_probe_kernel, pointers, constants, f"exchange, {method}", "bf16")
