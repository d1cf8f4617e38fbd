"""The recurrence of a vanilla RNN, forward and backward in time, in one op and three ways to run it.

Both the RNN and its backpropagation through time are the same walk over the steps of a sequence,

    y_t = e_t(x_t + b + y_{t-1} M),

forward with M = W_hh^T and e_t = tanh or ReLU (x_t is the input's projection, b the sum of both biases), backward, from
the last step to the first, with M = W_hh, b = 0 and e_t the multiplication by the derivative at step t (x_t is the
gradient of the output, y_t that of the pre-activation). So `scan` computes both, and the gradients of each are scans
again (Pascanu, Mikolov and Bengio 2013, arXiv 1211.5063, equations 2 and 5).

    resident   one program for a tile of the batch, with all of M on its multiprocessor
    sharded    M's columns spread over programs that run at once and hand their part of y_t to each other every step
    stepwise   one launch for each step
"""

from .launch import Packing, choose, scan

__all__ = ["Packing", "choose", "scan"]
