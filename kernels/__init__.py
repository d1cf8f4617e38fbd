"""Triton kernels and their launchers: no autograd, no allocation of results."""
