"""backstride kernels."""
