"""The task of training a character model, for the loop in train.py."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.text import TextStreams, encode, read_text
from ..language.char_rnn import CharRNN
from ..language.sampling import sample
from . import distributed
from .checkpoint import atomic_path
from .config import CharRNNConfig
from .task import Batch, Task, make_generator, seed_everything
from .train import load_trained

SAMPLE_LENGTH = 500


def build_network(config: CharRNNConfig) -> CharRNN:
    return CharRNN(
        len(config.vocabulary),
        layers=config.layers,
        width=config.width,
        embedding=config.embedding,
        dropout=config.dropout,
        ops=config.ops,
    )


def load_network(folder: Path) -> tuple[CharRNN, CharRNNConfig]:
    """The best network of a training run, ready to sample from, on the CPU.

    ValueError if `folder` holds no run, or one that has saved no checkpoint yet.
    """
    config = CharRNNConfig.read(folder)
    network = build_network(config)
    load_trained(network, folder)
    return network, config


def open_text(config: CharRNNConfig, epochs: int | None = None) -> tuple[TextStreams, CharRNNConfig]:
    """(the text in streams, the settings with what only the text can tell filled in).

    Each of several processes has streams of its own. With `epochs`, config.steps becomes as many steps as make so many
    epochs.
    """
    text = read_text(config.text)
    vocabulary, characters = encode(text)
    count = config.batch_size * distributed.size()
    streams = TextStreams(characters, count, config.unroll, config.validation, config.test)
    digest = hashlib.sha256(text.encode()).hexdigest()
    config = replace(config, vocabulary=vocabulary, epoch=len(streams.training), digest=digest)
    if epochs is not None:
        config = replace(config, steps=epochs * config.epoch)
    return streams, config


class CharRNNTask(Task[CharRNN]):
    """Teacher forcing over consecutive chunks of text, the hidden state carried from each to the next.

    Seeds the global random number generators with config.seed before it initialises the network. `config`
    must be the one that `open_text` returned with the streams.
    """

    per = "character"
    counted = "characters"
    draw_at = (100, 300, 500, 2000)

    def __init__(self, config: CharRNNConfig, streams: TextStreams, device: torch.device | str = "cpu"):
        self.config, self.streams, self.device = config, streams, device
        seed_everything(config.seed)
        self.network = build_network(config).to(device)
        self.hidden = torch.zeros(config.layers, config.batch_size, config.width, device=device)
        self.counted_per_step = config.batch_size * distributed.size() * config.unroll

    def batch(self, step: int) -> Batch:
        """(characters, the characters that follow them), each [unroll, N]"""
        characters, targets = self.streams[self.streams.training[step % len(self.streams.training)]]
        first = distributed.rank() * self.config.batch_size
        own = slice(first, first + self.config.batch_size)
        return characters[:, own], targets[:, own]

    def loss(self, batch: Batch) -> Tensor:
        loss, hidden = next_character_loss(self.network, batch, self.hidden)
        self.hidden = hidden.detach()  # truncated BPTT: the value goes on, the gradient ends here
        return loss

    def validate(self) -> dict[str, float]:
        nats = evaluate(self.network, self.streams, self.streams.validation)
        return {"validation": nats, "bits_per_character": nats / math.log(2)}

    def draw(self, path: Path) -> str:
        # A generator of its own: a drawing must not change how the training goes on.
        generator = make_generator(self.config.seed, 2)
        text = "".join(sample(self.network, self.config.vocabulary, SAMPLE_LENGTH, generator))
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
        return text

    def state(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.hidden = state["hidden"].to(self.device)


def next_character_loss(network: CharRNN, batch: Batch, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy in nats per character, the state after the batch)"""
    characters, targets = batch
    logits, last = network(characters, hidden)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), last


@torch.no_grad()
def evaluate(network: CharRNN, streams: TextStreams, chunks: range, context: int = 0) -> float:
    """Mean cross-entropy in nats per character over consecutive chunks.

    It starts from a zero state, as char-rnn does. With `context` it first reads so many of the chunks before, whose
    loss doesn't count: the text doesn't begin there, and a network that knows what went before does better at first.
    """
    device = next(network.parameters()).device
    hidden, total = None, 0.0
    for chunk in range(max(0, chunks.start - context), chunks.stop):
        characters, targets = (part.to(device) for part in streams[chunk])
        loss, hidden = next_character_loss(network, (characters, targets), hidden)
        if chunk in chunks:
            total += loss.item()
    return total / len(chunks)
