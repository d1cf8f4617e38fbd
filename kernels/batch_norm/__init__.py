"""Batch normalisation with a residual and ReLU behind it, and its gradients.

    moments     mean and 1 / sqrt(var + eps) of each channel, and the running ones
    normalise   y = relu((x - mean) / sqrt(var + eps) weight + bias + residual)
    gradients   of normalise, through the moments too where they are the batch's

What is summed over all pixels of a channel is summed in parts by the programs of one launch, and these in a fixed order
by a second one. The pass that follows walks each part from its end, which the second level cache still holds.
"""

from .launch import gradients, is_walked, moments, normalise

__all__ = ["gradients", "is_walked", "moments", "normalise"]
