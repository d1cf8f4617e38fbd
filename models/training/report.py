"""What a training run shows while it runs."""

import math
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Report:
    """A progress bar with the loss and the speed, or plain lines where the output is no terminal.

    One step takes `per_step` of what `counted` names.
    """

    def __init__(self, steps: int, done: int, counted: str, per_step: int, console: Console):
        self.steps, self.counted, self.per_step, self.console = steps, counted, per_step, console
        self.line_every = max(1, steps // 20)
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.bar = self.progress.add_task("", total=steps, completed=done, loss=math.nan, speed="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def step(self, step: int, loss: float) -> None:
        rate = (self.progress.tasks[self.bar].speed or math.nan) * self.per_step
        speed = "" if math.isnan(rate) else f"{rate:,.{2 if rate < 100 else 0}f} {self.counted}/s"
        self.progress.update(self.bar, completed=step, loss=loss, speed=speed)
        if not self.console.is_terminal and step % self.line_every == 0:
            self.console.print(f"step {step}/{self.steps}  loss {loss:.4f}  {speed}".rstrip(), highlight=False)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.console.print(f"step {step}: {values}", highlight=False, soft_wrap=True)

    def sample(self, step: int, text: str) -> None:
        if text:
            self.console.print(f"[bold]step {step}:[/]")
            self.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
