"""The training loop, for any network: batches in, checkpoints, curves and pictures out."""

import math
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from ..visual import loss_curve
from .checkpoint import History, load_checkpoint, read_metadata, save_checkpoint, save_weights, write_json
from .config import TrainingConfig
from .report import Report

LAST, BEST = "last.safetensors", "best.safetensors"

T = TypeVar("T")
Batch = tuple[Tensor, ...]


class Task(Protocol):
    """What the loop needs to know of a network and its data."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def score(self) -> str:
        """The validation metric whose highest value marks the best network."""
        ...

    def batch(self, step: int) -> Batch:
        """The CPU tensors of a step: a pure function of the seed and `step`. Called from several threads."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """The scalar loss of a batch that is on the network's device."""
        ...

    def validate(self) -> dict[str, float]:
        """Metrics on held-out data, among them `score` and, for the loss curve, "validation"."""
        ...

    def draw(self, path: Path) -> None:
        """Writes a PNG that shows what the network does now."""
        ...


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def train(
    task: Task, config: TrainingConfig, folder: Path, *, resume: bool = False, console: Console | None = None
) -> History:
    """Trains `task.network`, on the device where it is, for `config.steps` steps and returns the history.

    Every `config.every` steps and at the end it validates and writes into `folder`: last.safetensors (all
    that a resumed run needs), best.safetensors (the weights with the highest score), history.json, loss.png
    and samples/step-*.png; config.json is there from the start. With `resume`, a run that was killed at any
    moment goes on from its last checkpoint, on the CPU with bitwise the same losses as one that never
    stopped.

    ValueError if `folder` already holds a run and `resume` is not given, or if the run there has other
    settings; FloatingPointError if the loss becomes infinite or NaN.
    """
    network = task.network
    device = next(network.parameters()).device
    optimizer = make_optimizer(network, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    step, history = 0, History()
    if resume:
        config.check_same(folder)
        if (folder / LAST).exists():
            step, history = load_checkpoint(folder / LAST, network, optimizer, scaler)
    else:
        if (folder / LAST).exists():
            done = read_metadata(folder / LAST)["step"]
            raise ValueError(f"{folder} already holds a run ({done} steps done): resume it, or name another folder")
        config.write(folder)

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    with Report(config.steps, step, config.batch_size, console or Console()) as report:
        for batch in prefetch(task.batch, range(step, config.steps)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            network.train()
            optimizer.zero_grad()
            batch = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = task.loss(batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            step += 1
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss is {value} at step {step}: try a lower learning rate than {config.lr}"
                )
            history.setdefault("train", []).append((step, value))
            report.step(step, value)

            if step % config.every == 0 or step == config.steps:
                network.eval()
                metrics = task.validate()
                for name, metric in metrics.items():
                    history.setdefault(name, []).append((step, metric))
                report.validation(step, metrics)
                if metrics[task.score] >= max(metric for _, metric in history[task.score]):
                    save_weights(network, folder / BEST, {"step": step, "metrics": metrics})
                task.draw(folder / "samples" / f"step-{step:06d}.png")
                write_json(history, folder / "history.json")
                loss_curve({name: history[name] for name in ("train", "validation")}, folder / "loss.png")
                # Last of all: a run that is killed before this does the rest of the checkpoint again.
                save_checkpoint(folder / LAST, network, optimizer, scaler, step, history)
    return history


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), config.lr, momentum=0.99)
    return torch.optim.AdamW(network.parameters(), config.lr)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of the step after `step` steps: a function of these two alone, so resuming needs no more."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * (1 + math.cos(math.pi * step / config.steps)) / 2


def prefetch(make: Callable[[int], T], steps: range) -> Iterator[T]:
    """make(step) for each step in order, computed ahead in threads."""
    workers = max(1, (os.cpu_count() or 1) // 2)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[T]] = deque()
        for step in steps:
            pending.append(pool.submit(make, step))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
