"""The commands of the language models: `backstride train char-rnn` and `backstride sample`."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.table import Table

from ..layers import Ops
from ..options import DeviceOption, ResumeOption, console, find_device, given_settings
from ..training import distributed
from ..training.checkpoint import write_json
from ..training.config import CharRNNConfig, Optimizer, Schedule
from ..training.language import CharRNNTask, evaluate, load_network, open_text
from ..training.train import train
from .sampling import sample

DEFAULT = CharRNNConfig()
EPOCHS = 50
CONTEXT = 10
"""Chunks before the held-out text that are read first for the losses "with context"."""


def train_char_rnn(
    context: typer.Context,
    text: Annotated[
        Path | None, typer.Option(help="Any text in UTF-8. Without it: the source of Python's own library.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, curves and samples.")] = Path("runs/char-rnn"),
    resume: ResumeOption = False,
    epochs: Annotated[
        int | None, typer.Option(help=f"How often to read the training text; default: {EPOCHS}.", min=1)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, instead of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Places in the text read in parallel.")] = DEFAULT.batch_size,
    unroll: Annotated[
        int, typer.Option(help="Characters per step; the gradient flows back through so many, the state goes on.")
    ] = DEFAULT.unroll,
    layers: Annotated[int, typer.Option(help="Recurrent layers.")] = DEFAULT.layers,
    width: Annotated[int, typer.Option(help="Units in each layer.")] = DEFAULT.width,
    embedding: Annotated[
        int, typer.Option(help="Length of the learnt vector that stands for a character; 0: one-hot.")
    ] = DEFAULT.embedding,
    dropout: Annotated[float, typer.Option(help="After each layer.")] = DEFAULT.dropout,
    optimizer: Annotated[Optimizer, typer.Option(help="rmsprop has char-rnn's alpha of 0.95.")] = DEFAULT.optimizer,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = DEFAULT.lr,
    schedule: Annotated[
        Schedule, typer.Option(help="cosine, poly (to the power of 0.9): the rate falls to zero over the run.")
    ] = DEFAULT.schedule,
    decay: Annotated[float, typer.Option(help="Factor of the rate after each epoch.")] = DEFAULT.decay,
    decay_after: Annotated[int, typer.Option(help="Epochs before the first --decay.")] = DEFAULT.decay_after,
    clip: Annotated[
        float, typer.Option(help="Largest element of the gradient (of the loss summed over time); 0: any.")
    ] = DEFAULT.clip,
    validation: Annotated[
        float, typer.Option(help="Share of the text that chooses the best network.")
    ] = DEFAULT.validation,
    test: Annotated[float, typer.Option(help="Share of the text that judges it in the end.")] = DEFAULT.test,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="bf16 and fp16: mixed precision.")
    ] = DEFAULT.precision,
    every: Annotated[int, typer.Option(help="Steps between validations, with sample and checkpoint.")] = DEFAULT.every,
    seed: Annotated[int, typer.Option(help="Decides weights, dropout and samples.")] = DEFAULT.seed,
    ops: Annotated[Ops, typer.Option(help="Who computes: backstride.fused_ops or torch.nn.")] = DEFAULT.ops,
    device: DeviceOption = "auto",
) -> None:
    """Train a vanilla RNN to write text, character by character; the defaults are Karpathy's char-rnn.

    Writes best.safetensors, last.safetensors, config.json, history.json, metrics.json, loss.png and samples/
    (also after 100, 300, 500 and 2000 steps) into --out. The final losses start from a zero state, as char-rnn's
    do, and "with context" from the state that the text just before leaves. A run that was stopped goes on with
    --resume, to the same losses as if it had not been.
    """
    given = given_settings(context, CharRNNConfig)
    if text is not None:
        given["text"] = str(text)
    if epochs is not None and steps is not None:
        raise ValueError("--epochs and --steps both say how long to train: give one of them")
    if epochs is None and steps is None and not resume:
        epochs = EPOCHS
    config = replace(CharRNNConfig.read(out) if resume else DEFAULT, **given)
    where = distributed.join(find_device(device))
    streams, config = open_text(config, epochs)
    task = CharRNNTask(config, streams, where)
    count = sum(parameter.numel() for parameter in task.network.parameters())
    console.print(
        f"{count:,} parameters, {len(config.vocabulary)} different characters, {config.epoch} steps in an epoch",
        highlight=False,
    )
    train(task, config, out, resume=resume, console=console)
    if distributed.rank() > 0:
        return

    network, _ = load_network(out)
    network.to(task.device)
    metrics = {}
    for name, chunks in {"validation": streams.validation, "test": streams.test}.items():
        if chunks:
            metrics[name] = _losses(evaluate(network, streams, chunks))
            metrics[f"{name} with context"] = _losses(evaluate(network, streams, chunks, CONTEXT))
    write_json(metrics, out / "metrics.json")
    table = Table("best network", *metrics["validation"])
    for name, losses in metrics.items():
        table.add_row(name, *(f"{value:.4f}" for value in losses.values()))
    console.print(table)
    console.print(
        f"The best network and all samples are in {out}. Use it: backstride sample --checkpoint {out}",
        highlight=False,
    )


def _losses(nats: float) -> dict[str, float]:
    return {"nats per character": nats, "bits per character": nats / math.log(2)}


def sample_text(
    checkpoint: Annotated[Path, typer.Option(help="Folder of a training run.")],
    length: Annotated[int, typer.Option(help="Characters to write.")] = 1000,
    prime: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    temperature: Annotated[
        float, typer.Option(help="Below 1 more cautious, above 1 bolder; 0: always the likeliest character.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Choose among so many likeliest characters; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest that together have this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same text for the same seed; default: a new one.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show each character as soon as it is chosen.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Write text with a trained char-rnn."""
    network, config = load_network(checkpoint)
    network.to(find_device(device))
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    characters = sample(
        network,
        config.vocabulary,
        length,
        generator,
        prime=prime,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    if not stream:
        characters = iter(["".join(characters)])
    # Not through rich, which would wrap the lines.
    written = prime
    for part in characters:
        sys.stdout.write(written + part)
        sys.stdout.flush()
        written = ""
    sys.stdout.write("\n")
