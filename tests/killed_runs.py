"""Trains in child processes that kill themselves at chosen moments, and resumes them. Run by test_training.py.

A script of its own, because it forks: it holds no other threads, and one import of torch serves all children.
"""

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from backstride.models.training import train as train_module
from backstride.models.training.checkpoint import write_json
from backstride.models.training.config import TrainingConfig
from backstride.models.training.task import Task, seed_everything
from backstride.models.training.train import train
from rich.console import Console
from torch import Tensor, nn

CONFIG = TrainingConfig(steps=10, every=4, optimizer="adamw", lr=0.01, schedule="cosine", seed=3)


class NoisyTask(Task[nn.Sequential]):
    """A regression of which every part is random (dropout by torch, noise by numpy and by Python), and whose loss
    depends on what the step before handed on."""

    score = "fit"
    higher_is_better = True
    counted = "img"
    draw_at = (3,)

    def __init__(self, config: TrainingConfig):
        seed_everything(config.seed)
        self.seed = config.seed
        self.network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 1, 1))
        self.carried = torch.zeros(())

    def batch(self, step: int) -> tuple[Tensor, ...]:
        return (torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(1000 * self.seed + step)),)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        noise = np.random.standard_normal() + random.gauss(0, 1)
        output = self.network(batch[0]).float() + self.carried
        self.carried = 0.5 * output.detach().mean()
        return (output - batch[0].mean() - 0.1 * noise).square().mean()

    def validate(self) -> dict[str, float]:
        with torch.no_grad():
            value = self.network(torch.ones(1, 1, 5, 5)).mean().item()
        return {"validation": value**2, "fit": -(value**2)}

    def draw(self, path: Path) -> str:
        path.parent.mkdir(exist_ok=True)
        path.write_text("picture")
        return "a *[bold]picture*"

    def state(self) -> dict[str, Tensor]:
        return {"carried": self.carried}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.carried = state["carried"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(folder: Path, *, resume: bool, moment: tuple[str, int] | None = None) -> int:
    """Trains in a forked child and returns the signal that ended it, 0 for none.

    moment: ("loss", n): the child dies in the middle of its n-th step; ("before", n), ("after", n): just before or
    after it puts its n-th file into place.
    """
    child = os.fork()
    if child == 0:
        _train_in_child(folder, resume, moment)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, f"the child failed with {os.WEXITSTATUS(status)}"
    return 0


def _train_in_child(folder: Path, resume: bool, moment: tuple[str, int] | None) -> None:
    task = NoisyTask(CONFIG)
    counts = {"loss": 0, "before": 0, "after": 0}
    replace, loss = os.replace, task.loss

    def reach(kind: str) -> None:
        counts[kind] += 1
        if moment == (kind, counts[kind]):
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly_replace(source, target):
        reach("before")
        replace(source, target)
        reach("after")

    def deadly_loss(batch):
        reach("loss")
        return loss(batch)

    os.replace = deadly_replace
    task.loss = deadly_loss
    code = 1
    try:
        train(task, CONFIG, folder, resume=resume, console=Console(quiet=True))
        code = 0
    finally:
        os._exit(code)


def main(folder: Path) -> None:
    # In this process, so that what torch imports at its first step is there for all children.
    # Drawing takes longer than all the rest.
    train_module.loss_curve = lambda curves, path, **_: write_json(curves, path)
    train(NoisyTask(CONFIG), CONFIG, folder / "whole", console=Console(quiet=True))
    expected = contents(folder / "whole")
    moments = [("loss", step) for step in (1, 3, 6, 10)]
    # The settings, then at each of three checkpoints: best (if it is), last, the history, the loss curve.
    moments += [(when, number) for number in range(1, 13) for when in ("before", "after")]
    killed = 0
    for number, moment in enumerate(moments):
        there = folder / str(number)
        if run(there, resume=False, moment=moment) == signal.SIGKILL:
            killed += 1
            # The resumed run is killed once more, in its second step, before it may finish.
            run(there, resume=(there / "config.json").exists(), moment=("loss", 2))
            assert run(there, resume=(there / "config.json").exists()) == 0
        got = contents(there)
        partial = [name for name in got if ".partial" in name or ".tmp" in name]
        assert {name: got[name] for name in got if name not in partial} == expected, f"killed {moment}"
    print(killed, len(moments))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
