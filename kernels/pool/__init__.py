"""Max-pooling that remembers where each maximum was, and the ways back.

    max_pool    y[o] = max_r x[s o - p + d r], and which tap r (an offset in the window) or pixel (an index) it was
    spread      x[i] = the y[o] whose maximum was at i: their sum (the gradient of max_pool), or the last of them
    pick        y[o] = x where the maximum of o was
    max_unpool  x[index[o]] = y[o] for any indices; where several o name one pixel, the last of them

`spread` looks, for every pixel, at the windows that reach it, and so writes each pixel once: nothing is zeroed before,
nothing depends on the order of threads. `max_unpool` knows no windows: the last o that claims a pixel is found first.
For small windows, `max_pool` and `spread` have kernels of their own.
"""

from .launch import Windows, max_pool, max_unpool, pick, spread

__all__ = ["Windows", "max_pool", "max_unpool", "pick", "spread"]
