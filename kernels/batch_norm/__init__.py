"""Batch normalisation with a residual and ReLU behind it, and its gradients.

    forward     y = relu((x - mean) / sqrt(var + eps) weight + bias + residual), mean and var x's own or given
    backward    its gradients, through x's own mean and var, too

What is summed over all pixels of a channel is summed in parts by the programs of one launch, and these in a fixed order
by a second one. The pass that follows walks each part from its end, which the second level cache still holds.
"""

from .launch import backward, forward, plan_backward, plan_forward

__all__ = ["backward", "forward", "plan_backward", "plan_forward"]
