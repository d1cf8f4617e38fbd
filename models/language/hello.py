"""The lecture's four-letter example: a recurrent network of three units learns to spell "hello".

The example is from A. Karpathy, "The Unreasonable Effectiveness of Recurrent Neural Networks" (2015): the vocabulary
h, e, l, o; the training sequence "hello"; after the first "l" the network must answer differently than after the
second, so it has to remember.
"""

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..layers import Ops
from ..training.task import seed_everything
from .char_rnn import CharRNN
from .sampling import sample

VOCABULARY = "helo"
WORD = "hello"


def learn_hello(steps: int = 200, ops: Ops = "fused") -> tuple[CharRNN, list[float]]:
    """(the network with H = 3 and no biases, 33 weights, trained on the word; its loss in nats at each step)"""
    seed_everything(0)
    network = CharRNN(len(VOCABULARY), layers=1, width=3, bias=False, ops=ops)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    letters, targets = _letters(WORD[:-1]), _letters(WORD[1:])
    losses = []
    for _ in range(steps):
        logits, _ = network(letters[:, None])
        loss = F.cross_entropy(logits[:, 0], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return network.eval(), losses


def spell(network: CharRNN) -> str:
    """The four letters that the network finds likeliest after "h", each fed back as the next input."""
    return "".join(sample(network, VOCABULARY, 4, torch.Generator(), prime="h", temperature=0))


def show_hello(console: Console) -> None:
    """Prints the lecture's picture in numbers: for each letter the hidden layer and what it says comes next."""
    network, losses = learn_hello()
    console.print(
        f"A recurrent network with 3 hidden units and {sum(p.numel() for p in network.parameters())} weights, "
        f'trained on "{WORD}": the loss fell from {losses[0]:.3f} to {losses[-1]:.4f} nats in {len(losses)} steps.',
        highlight=False,
    )
    with torch.no_grad():
        states, _ = network.rnn(F.one_hot(_letters(WORD[:-1]), len(VOCABULARY))[:, None].float())
        chances = network.classifier(states).softmax(-1)
    table = Table("input", "hidden layer", *(f"p({letter})" for letter in VOCABULARY), "target")
    for letter, target, state, row in zip(WORD, WORD[1:], states[:, 0], chances[:, 0], strict=False):
        hidden = " ".join(f"{value:+.2f}" for value in state.tolist())
        table.add_row(letter, hidden, *(f"{chance:.3f}" for chance in row.tolist()), target)
    console.print(table)
    console.print(f'Sampled greedily from "h": "{spell(network)}"', highlight=False)


def _letters(text: str) -> Tensor:
    return torch.tensor([VOCABULARY.index(letter) for letter in text])
