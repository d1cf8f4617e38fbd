"""The training loop, for any network: batches in, checkpoints, curves and pictures out."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from ..layers import synchronised
from ..visual import loss_curve
from . import distributed
from .checkpoint import (
    History,
    load_checkpoint,
    load_weights,
    process_state,
    read_metadata,
    save_checkpoint,
    save_weights,
    write_json,
)
from .config import TrainingConfig
from .report import Report
from .task import Batch, Task, seed_everything

LAST, BEST = "last.safetensors", "best.safetensors"

T = TypeVar("T")


def train(
    task: Task[Any], config: TrainingConfig, folder: Path, *, resume: bool = False, console: Console | None = None
) -> History:
    """Trains `task.network`, on the device where it is, for `config.steps` steps and returns the history.

    Every `config.every` steps and at the end it validates and writes into `folder`: last.safetensors (all
    that a resumed run needs), best.safetensors (the weights with the best score), history.json, loss.png
    and samples/step-*; config.json is there from the start. With `resume`, a run that was killed at any
    moment goes on from its last checkpoint, on the CPU with bitwise the same losses as one that never
    stopped.

    Where torchrun has started several processes that have joined (see distributed.py), each computes its part of the
    batch, DistributedDataParallel averages the gradients, and process 0 alone prints and writes: to rounding the losses
    are those of one process with the whole batch. Batch normalisation sees the whole batch on GPUs (SyncBatchNorm),
    but only the process's own part of it on CPUs, where PyTorch has no such layer; there, process 0's running
    statistics are the network's. (After a resume PyTorch may add the gradients of
    more than two processes in another order.)

    ValueError if `folder` already holds a run and `resume` is not given, or if the run there has other
    settings or another number of processes; FloatingPointError if the loss becomes infinite or NaN.
    """
    device = next(task.network.parameters()).device
    main, processes = distributed.rank() == 0, distributed.size()
    if processes > 1 and device.type == "cuda":
        task.network = synchronised(task.network)
    network = task.network
    optimizer = make_optimizer(network, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    step, history = 0, History()
    if resume:
        _check_processes(folder, processes)
        config.check_same(folder)
        if (folder / LAST).exists():
            step, history, state = load_checkpoint(folder / LAST, network, optimizer, scaler, distributed.rank())
            task.load_state(state)
    else:
        if (folder / LAST).exists():
            done = read_metadata(folder / LAST)["step"]
            raise ValueError(f"{folder} already holds a run ({done} steps done): resume it, or name another folder")
        if main:
            config.write(folder)
    if step == 0 and not main:
        seed_everything(config.seed + distributed.rank())  # or dropout would be the same in all of them

    compute: nn.Module = _Loss(task)
    if processes > 1:
        compute = nn.parallel.DistributedDataParallel(compute, [device] if device.type == "cuda" else None)
    console = (console or Console()) if main else Console(quiet=True)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    with Report(config.steps, step, task.counted, task.counted_per_step, console) as report:
        for batch in prefetch(task.batch, range(step, config.steps)):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(step)
            network.train()
            optimizer.zero_grad()
            batch = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = compute(batch)
            if processes > 1:
                # DistributedDataParallel takes the mean over processes, and each loss is a mean over its own pixels.
                mass = task.mass(batch)
                loss = loss * (mass * processes / distributed.total(mass).clamp_min(torch.finfo(mass.dtype).tiny))
            scaler.scale(loss).backward()
            if config.largest_gradient < math.inf:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_value_(network.parameters(), config.largest_gradient)
            scaler.step(optimizer)
            scaler.update()
            step += 1
            value = distributed.total(loss).item() / processes
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss is {value} at step {step}: try a lower learning rate than {config.lr}"
                )
            history.setdefault("train", []).append((step, value))
            report.step(step, value)

            checkpoint = step % config.every == 0 or step == config.steps
            if checkpoint:
                network.eval()
                distributed.align_buffers(network)
                metrics = task.validate()
                for name, metric in metrics.items():
                    history.setdefault(name, []).append((step, metric))
                report.validation(step, metrics)
                scores = [score for _, score in history[task.score]]
                if main and metrics[task.score] == (max(scores) if task.higher_is_better else min(scores)):
                    save_weights(network, folder / BEST, {"step": step, "metrics": metrics})
            if main and (checkpoint or step in task.draw_at):
                network.eval()
                report.sample(step, task.draw(folder / "samples" / f"step-{step:06d}{task.sample_suffix}"))
            if checkpoint:
                states = distributed.gather(process_state(task.state()))
                if main:
                    write_json(history, folder / "history.json")
                    curves = {name: history[name] for name in ("train", "validation")}
                    loss_curve(curves, folder / "loss.png", ylabel=f"cross-entropy (nats per {task.per})")
                    # Last of all: a run that is killed before this does the rest of the checkpoint again.
                    save_checkpoint(folder / LAST, network, optimizer, scaler, step, history, states)
    return history


class _Loss(nn.Module):
    """The task's loss as a module, because DistributedDataParallel has to see the network's forward pass."""

    def __init__(self, task: Task[Any]):
        super().__init__()
        self.network, self.task = task.network, task

    def forward(self, batch: Batch) -> Tensor:
        return self.task.loss(batch)


def _check_processes(folder: Path, processes: int) -> None:
    """ValueError if the run in `folder` has another number of them: each has its own part of the data, and its own
    random numbers."""
    if (folder / LAST).exists() and (before := len(read_metadata(folder / LAST)["processes"])) != processes:
        raise ValueError(
            f"the run in {folder} was trained by {before} processes, and these are {processes}: resume it with "
            + (f"torchrun --nproc-per-node {before}" if before > 1 else "one process, without torchrun")
        )


def load_trained(network: nn.Module, folder: Path) -> None:
    """Loads the best weights of the run in `folder` and puts the network into evaluation mode.

    ValueError if the run has saved no checkpoint yet.
    """
    for path in (folder / BEST, folder / LAST):
        if path.is_file():
            load_weights(network, path)
            network.eval()
            return
    raise ValueError(f"the run in {folder} has not saved a checkpoint yet: wait for it, or resume it")


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), config.lr, momentum=config.momentum)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(network.parameters(), config.lr, alpha=0.95)
    return torch.optim.AdamW(network.parameters(), config.lr)


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
