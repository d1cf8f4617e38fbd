"""Convolution in 1-D, 2-D and 3-D where every channel c is convolved by itself, A times (the channel multiplier).

    apply             y[n, c A + a, o] = sum_r        x[n, c, s o - p + d r]  w[c A + a, r]
    apply_transposed  x[n, c, i]       = sum_{a, r}   y[n, c A + a, o]        w[c A + a, r]   over s o - p + d r = i
    weight_grad       w[c A + a, r]    = sum_{n, o}   y[n, c A + a, o]        x[n, c, s o - p + d r]

Groups of B = two or four channels, and A = one, two or four made of each, are the same with sums over the pairs (a, b):
what stands for a channel in the kernels is then a group. With a few operations for every byte all this is bound by
bandwidth: plain multiply-adds in fp32, no matrix product. The definition in plain PyTorch is that of `kernels.conv`.
"""

from .launch import apply, apply_transposed, takes, weight_grad

__all__ = ["apply", "apply_transposed", "takes", "weight_grad"]
