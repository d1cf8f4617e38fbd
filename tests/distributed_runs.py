"""Trains with two processes that gloo connects, and with one, and compares. Run by test_distributed.py.

A script of its own, because it forks: it holds no other threads, and one import of torch serves all children.
"""

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from backstride.models.data.text import TextStreams, encode
from backstride.models.training import distributed, segmentation
from backstride.models.training import train as train_module
from backstride.models.training.checkpoint import write_json
from backstride.models.training.config import CharRNNConfig, SegmentationConfig
from backstride.models.training.language import CharRNNTask
from backstride.models.training.segmentation import SegmentationTask
from backstride.models.training.train import train
from rich.console import Console
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.killed_runs import CONFIG, NoisyTask, contents

UNET = SegmentationConfig(
    width=2, depth=1, tile=30, dropout=0, elastic=2, ops="torch", steps=5, every=2, batch_size=2, lr=0.01, seed=7
)
TEXT = CharRNNConfig(
    layers=2, width=8, unroll=5, batch_size=3, steps=5, every=2, lr=0.01, validation=0.3, ops="torch", epoch=1
)
NOISY = replace(CONFIG, steps=6, every=2)


def in_processes(work: Callable[[], None], count: int = 2) -> None:
    """Runs `work` in so many forked processes, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= address | {"RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_RANK": str(number)}
                assert distributed.join(torch.device("cpu")).type == "cpu"
                if number > 0:
                    os.replace = None  # it must not write
                work()
                distributed.leave()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0, "a process failed"


class Blots:
    """Pictures of which one half is ignored, in one more than in the other, and classes that are not balanced: so equal
    batches have unequal weights."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        mask = (torch.rand(40, 40, generator=generator) > 0.8).long()
        image = mask[None] + 0.3 * torch.randn(1, 40, 40, generator=generator)
        mask[: 8 * index] = 255
        return image, mask


class NormalisedTask(NoisyTask):
    """With batch normalisation, and a dropout and noise in each process of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.network.insert(1, nn.BatchNorm2d(4))

    def batch(self, step: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1000 * step + distributed.rank())
        return (torch.randn(2, 1, 5, 5, generator=generator),)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        return super().loss(batch) + np.random.rand()

    def validate(self) -> dict[str, float]:
        metrics = super().validate()
        assert distributed.gather(metrics) == [metrics, metrics], "running statistics differ"
        return metrics


def train_unet(folder: Path, batch_size: int) -> None:
    config = replace(UNET, batch_size=batch_size)
    train(SegmentationTask(config, Blots(), Blots()), config, folder, console=Console())


def train_text(folder: Path, batch_size: int) -> None:
    config = replace(TEXT, batch_size=batch_size)
    vocabulary, characters = encode("the quick brown fox jumps over the lazy dog. " * 20)
    streams = TextStreams(characters, batch_size * distributed.size(), config.unroll, config.validation)
    config = replace(config, vocabulary=vocabulary)
    train(CharRNNTask(config, streams), config, folder, console=Console())


def train_noisy(folder: Path, *, stop: bool = False, resume: bool = False) -> None:
    task = NormalisedTask(NOISY)
    batch = task.batch

    def stopping(step: int) -> tuple[Tensor, ...]:
        if step == 5:
            raise InterruptedError
        return batch(step)

    if stop:
        task.batch = stopping
    try:
        train(task, NOISY, folder, resume=resume, console=Console())
    except InterruptedError:
        assert stop


def main(folder: Path) -> None:
    # Drawing takes longer than all the rest.
    train_module.loss_curve = lambda curves, path, **_: write_json(curves, path)
    segmentation.sample_sheet = lambda rows, path, *_, **__: path.write_text(str(len(rows)))
    differences = {}
    for name, run in {"unet": train_unet, "text": train_text}.items():
        one, two = folder / f"{name}-1", folder / f"{name}-2"
        size = 2 * (UNET if name == "unet" else TEXT).batch_size
        in_processes(lambda run=run, two=two, size=size: run(two, size // 2))
        in_processes(lambda run=run, one=one, size=size: run(one, size), 1)
        histories = [json.loads((path / "history.json").read_text()) for path in (one, two)]
        assert histories[0].keys() == histories[1].keys()
        values = [np.array([value for curve in h.values() for _, value in curve]) for h in histories]
        differences[name] = float(np.abs(values[0] / values[1] - 1).max())
        losses = [value for _, value in histories[0]["train"]]
        assert len(losses) == 5 and losses[-1] < losses[0]

    for name, how in {"whole": [{}], "parts": [{"stop": True}, {"resume": True}]}.items():
        for settings in how:
            in_processes(lambda name=name, settings=settings: train_noisy(folder / name, **settings))
    assert contents(folder / "whole") == contents(folder / "parts")
    print(json.dumps(differences))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
