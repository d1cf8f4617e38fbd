"""Sampling text from a character model, one character at a time."""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from .char_rnn import CharRNN


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution to sample from: logits [V] -> probabilities [V].

    softmax(logits / temperature), of which only the `top_k` likeliest characters (0: all) and of these only the
    likeliest that together reach the probability `top_p` remain (Holtzman et al. 2020, "The Curious Case of
    Neural Text Degeneration", section 3.1), scaled to the sum 1. Temperature 0 leaves the likeliest alone.
    """
    if temperature < 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature={temperature}: must be 0 (always the likeliest) or more")
    if top_k < 0:
        raise ValueError(f"top_k={top_k}: must be a number of characters, or 0 for all")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")
    logits = logits.double()
    if temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    # Subtracted first, so that no temperature makes the quotient overflow.
    chances, order = ((logits - logits.max()) / temperature).softmax(0).sort(descending=True, stable=True)
    if top_k:
        chances[top_k:] = 0
        chances /= chances.sum()
    chances[chances.cumsum(0) - chances >= top_p] = 0
    return torch.zeros_like(chances).scatter_(0, order, chances / chances.sum())


@torch.no_grad()
def sample(
    network: CharRNN,
    vocabulary: str,
    length: int,
    generator: Generator,
    *,
    prime: str = "",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[str]:
    """Yields `length` characters as the network goes on from `prime`, each fed back as its next input.

    Without `prime` it starts as after a line end, if the vocabulary has one, else after its first character. The
    network should be in evaluation mode. Options as in `probabilities`. ValueError for a character of `prime`
    that is not in `vocabulary`.
    """
    if unknown := sorted(set(prime) - set(vocabulary)):
        raise ValueError(f"the network has never seen {', '.join(map(repr, unknown))} of the prime text: leave it out")
    if length < 0:
        raise ValueError(f"length={length}: must be a number of characters")
    start = prime or ("\n" if "\n" in vocabulary else vocabulary[0])
    device = next(network.parameters()).device
    indices = torch.tensor([vocabulary.index(character) for character in start], device=device)
    hidden = None
    for _ in range(length):
        logits, hidden = network(indices[:, None], hidden)
        chances = probabilities(logits[-1, 0].cpu(), temperature, top_k, top_p)
        choice = torch.multinomial(chances, 1, generator=generator)
        yield vocabulary[int(choice)]
        indices = choice.to(device)
