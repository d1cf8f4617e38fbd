"""What the training loop needs to know of a network and its data."""

import random
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

Batch = tuple[Tensor, ...]
Network = TypeVar("Network", bound=nn.Module)


class Task(ABC, Generic[Network]):
    """A network, its batches, its loss and how it is judged and shown."""

    network: Network

    score = "validation"
    """The validation metric that marks the best network."""
    higher_is_better = False
    per = "item"
    """What the loss is an average over."""
    counted = "items"
    """What the progress bar counts per second ..."""
    counted_per_step = 1
    """... and how many of them one step takes, in all processes together."""
    sample_suffix = ".txt"
    """Of the files that `draw` writes."""
    draw_at: Collection[int] = ()
    """Steps after which `draw` is called, besides those with a validation."""

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The CPU tensors of a step, this process's part of them: a pure function of the seed, `step` and the process's
        number. Called from several threads."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The scalar loss, an average, of a batch that is on the network's device."""

    def mass(self, batch: Batch) -> Tensor:
        """What `loss` divides its sum by, up to a constant: how much the batch weighs beside other processes' ones."""
        return torch.ones((), device=batch[0].device)

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Metrics on held-out data, among them `score` and, for the loss curve, "validation"; the same in all
        processes, which call it together."""

    @abstractmethod
    def draw(self, path: Path) -> str:
        """Writes a file that shows what the network does now; returns what the console should show of it. Only process
        0 calls it."""

    def state(self) -> dict[str, Tensor]:
        """What steps hand on to the next ones besides weights and optimiser; it goes into the checkpoint."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make_generator(seed: int, *key: int) -> Generator:
    """A generator for one purpose, independent of those with other keys."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)
    return Generator().manual_seed(int(state[0]))
