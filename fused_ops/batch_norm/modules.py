"""Batch normalisation modules: torch.nn's own, computed by this package's function."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .functional import batch_norm


class _BatchNorm:
    def forward(
        self: Any,
        input: Tensor,
        *,
        activation: str | None = None,
        residual: Tensor | None = None,
        input_bias: Tensor | None = None,
    ) -> Tensor:
        """As torch's, with `batch_norm`'s residual and activation behind it, and its input_bias before."""
        self._check_input_dim(input)
        own = self.running_mean is not None or self.running_var is not None
        updates = self.training and self.track_running_stats
        factor = self.momentum
        if updates and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if factor is None:  # the mean over all batches
                factor = 1.0 / float(self.num_batches_tracked)
        reads = not self.training or updates
        return batch_norm(
            input,
            self.running_mean if reads else None,
            self.running_var if reads else None,
            self.weight,
            self.bias,
            self.training or not own,
            0.0 if factor is None else factor,
            self.eps,
            activation=activation,
            residual=residual,
            input_bias=input_bias,
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on this package's kernels; `forward` takes what `batch_norm` takes besides."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on this package's kernels; `forward` takes what `batch_norm` takes besides."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on this package's kernels; `forward` takes what `batch_norm` takes besides."""
