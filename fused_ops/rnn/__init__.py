"""The vanilla RNN: functions and modules."""

from .functional import rnn_relu, rnn_relu_cell, rnn_tanh, rnn_tanh_cell
from .modules import RNN, RNNCell

__all__ = ["RNN", "RNNCell", "rnn_relu", "rnn_relu_cell", "rnn_tanh", "rnn_tanh_cell"]
