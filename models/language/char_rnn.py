"""The character-level language model of Karpathy's char-rnn (github.com/karpathy/char-rnn), with the vanilla RNN."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Ops, rnn


class CharRNN(nn.Module):
    """Predicts each next character: indices [T, N], hidden -> logits [T, N, vocabulary], hidden.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh) in each of `layers` layers of `width` units, and logits
    y_t = W_hy h_t + b_y from the last. x_t is the character's one-hot vector, or with `embedding` > 0 a learnt
    vector of that length. The state `hidden` is [layers, N, width]; None stands for zeros, and what comes back
    goes on where the text was left. Dropout follows every layer. All parameters start uniform in ±0.08. As
    published: 2 layers of 128 units, one-hot input, which for 65 characters makes 66,369 parameters.

    bias: False leaves out b_ih, b_hh and b_y.
    ops: "fused" computes the recurrence with backstride.fused_ops, "torch" with torch.nn.

    ValueError for sizes below 1 and for indices that are not [T, N].
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        layers: int = 2,
        width: int = 128,
        embedding: int = 0,
        dropout: float = 0.0,
        bias: bool = True,
        ops: Ops = "fused",
    ):
        super().__init__()
        for name, value in {"vocabulary": vocabulary, "layers": layers, "width": width}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if embedding < 0:
            raise ValueError(f"embedding={embedding}: must be a vector's length, or 0 for one-hot input")
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(vocabulary, embedding) if embedding else None
        # torch.nn.RNN's own dropout stands between its layers; with one layer there is none, and it would warn.
        self.rnn = rnn(
            embedding or vocabulary, width, layers, bias=bias, dropout=dropout if layers > 1 else 0.0, ops=ops
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, vocabulary, bias=bias)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.08, 0.08)

    def forward(self, indices: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if indices.dim() != 2 or indices.is_floating_point():
            raise ValueError(f"expected indices of characters [T, N], got {indices.dtype} {list(indices.shape)}")
        if self.embedding is None:
            x = F.one_hot(indices, self.vocabulary).to(self.classifier.weight.dtype)
        else:
            x = self.embedding(indices)
        output, last = self.rnn(x, hidden)
        return self.classifier(self.dropout(output)), last
