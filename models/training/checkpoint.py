"""Checkpoints: one safetensors file that holds everything a run needs to go on exactly where it stopped."""

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

ProcessState = tuple[dict[str, Tensor], dict[str, Any]]
"""What `process_state` gives: tensors, and what JSON can hold."""
History = dict[str, list[tuple[int, float]]]
"""Curve name ("train", "validation", a metric) -> (number of steps done, value) pairs."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes `path` when the block ends well, and vanishes
    otherwise.

    A reader, or a run that is killed at any moment, sees the old file or the new one, never a part of one.
    What a killed run leaves behind has a fixed name, so that the resumed run overwrites it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(value: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def save_weights(network: nn.Module, path: Path, metadata: dict[str, Any]) -> None:
    """The network's state_dict under its own names; `metadata` goes into the file's header as JSON."""
    with atomic_path(path) as temporary:
        save_file(_portable(network.state_dict()), temporary, {"backstride": json.dumps(metadata)})


def load_weights(network: nn.Module, path: Path) -> dict[str, Any]:
    """Loads what `save_weights` or `save_checkpoint` wrote (strictly) and returns the header's metadata.

    ValueError if the file is damaged or holds another network's weights.
    """
    tensors, metadata = _read(path)
    if "optimizer" in metadata:
        tensors = _section(tensors, "network.")
    _load_network(network, tensors, path)
    return metadata


def process_state(state: Mapping[str, Tensor]) -> ProcessState:
    """What this process alone knows: the task's own `state`, and that of the random number generators of torch (CPU and
    every GPU), numpy and Python."""
    tensors = {f"state.{name}": tensor.detach().cpu() for name, tensor in state.items()}
    tensors["rng.torch"] = torch.get_rng_state()
    for index, cuda_state in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []):
        tensors[f"rng.cuda.{index}"] = cuda_state
    kind, keys, *rest = np.random.get_state(legacy=True)
    return tensors, {"numpy_rng": [kind, np.asarray(keys).tolist(), *rest], "python_rng": random.getstate()}


def save_checkpoint(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    step: int,
    history: History,
    processes: Sequence[ProcessState],
) -> None:
    """Everything that decides how a run goes on after `step` steps, in one atomic write.

    That is the weights, the optimiser's tensors, the loss scaler, the history, and every process's `process_state`. The
    batches and the learning rate are functions of the step alone, so the step is the loader's position and the
    schedule's state. What is fixed by the settings (the optimiser's hyper-parameters) is not stored twice: it stands in
    the run's config.json.
    """
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in entries.items()}
    for number, (own, _) in enumerate(processes):
        tensors |= {f"process.{number}.{name}": tensor for name, tensor in own.items()}
    metadata = {
        "step": step,
        "optimizer": type(optimizer).__name__,
        "scaler": scaler.state_dict(),
        "history": history,
        "processes": [generators for _, generators in processes],
    }
    with atomic_path(path) as temporary:
        save_file(_portable(tensors), temporary, {"backstride": json.dumps(metadata)})


def load_checkpoint(
    path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, process: int = 0
) -> tuple[int, History, dict[str, Tensor]]:
    """Restores what `save_checkpoint` stored, the random number generators of the process of that number included.

    Returns (step, history, the task's state).
    """
    tensors, metadata = _read(path)
    _load_network(network, _section(tensors, "network."), path)
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _section(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        optimizer_state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": optimizer.state_dict()["param_groups"]})
    scaler.load_state_dict(metadata["scaler"])
    own, generators = _section(tensors, f"process.{process}."), metadata["processes"][process]
    torch.set_rng_state(own["rng.torch"])
    cuda_states = _section(own, "rng.cuda.")
    if torch.cuda.is_available() and len(cuda_states) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([cuda_states[str(index)] for index in range(len(cuda_states))])
    kind, keys, *rest = generators["numpy_rng"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = generators["python_rng"]
    random.setstate((version, tuple(words), gauss))
    history = {name: [(step, value) for step, value in curve] for name, curve in metadata["history"].items()}
    return metadata["step"], history, _section(own, "state.")


def read_metadata(path: Path) -> dict[str, Any]:
    """The header of a file that `save_weights` or `save_checkpoint` wrote, without its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["backstride"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of backstride ({error}): train again") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    metadata = read_metadata(path)
    with safe_open(path, framework="pt") as file:
        # Cloned, because in the file they are not aligned as torch aligns its own: the linear algebra library would sum
        # in another order, and a resumed run would not be bitwise the same.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata  # noqa: SIM118


def _section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _portable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _load_network(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} holds the weights of another network: {error}") from error
