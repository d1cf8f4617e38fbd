"""Drop-in operators: functions as in torch.nn.functional, modules as in torch.nn, on Triton kernels."""

from .conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose2d_concat,
    conv_transpose3d,
)
from .dispatch import Path, explain, public_ops
from .rnn import RNN, RNNCell, rnn_relu, rnn_relu_cell, rnn_tanh, rnn_tanh_cell

__all__ = [
    "RNN",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Path",
    "RNNCell",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose2d_concat",
    "conv_transpose3d",
    "explain",
    "public_ops",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
]
