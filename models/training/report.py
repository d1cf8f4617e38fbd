"""What a training run shows while it runs."""

import math
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Report:
    """A progress bar with the loss and the images per second, or plain lines where the output is no
    terminal."""

    def __init__(self, steps: int, done: int, batch_size: int, console: Console):
        self.steps, self.batch_size, self.console = steps, batch_size, console
        self.line_every = max(1, steps // 20)
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.2f} img/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.bar = self.progress.add_task("", total=steps, completed=done, loss=math.nan, rate=math.nan)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def step(self, step: int, loss: float) -> None:
        rate = (self.progress.tasks[self.bar].speed or math.nan) * self.batch_size
        self.progress.update(self.bar, completed=step, loss=loss, rate=rate)
        if not self.console.is_terminal and step % self.line_every == 0:
            self.console.print(f"step {step}/{self.steps}  loss {loss:.4f}  {rate:.2f} img/s", highlight=False)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.console.print(f"step {step}: {values}", highlight=False, soft_wrap=True)
