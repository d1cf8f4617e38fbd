"""Convolution modules: torch.nn's own, computed by this package's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import functional


class _Activated:
    """Adds the keyword `activation` (None or "relu") to a torch.nn convolution, applied in the kernel's epilogue."""

    activation: str | None
    _function: Callable[..., Tensor]

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if activation not in (None, "relu"):
            raise ValueError(f'activation must be None or "relu", got {activation!r}')
        self.activation = activation

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[misc]
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


class _Conv(_Activated):
    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return self._function(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, activation=self.activation
        )


class _ConvTranspose(_Activated):
    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            len(self.kernel_size),
            self.dilation,
        )
        return self._function(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
            activation=self.activation,
        )


class Conv1d(_Conv, nn.Conv1d):
    """`torch.nn.Conv1d` on this package's kernels; the keyword activation="relu" is computed in the same pass."""

    _function = staticmethod(functional.conv1d)


class Conv2d(_Conv, nn.Conv2d):
    """`torch.nn.Conv2d` on this package's kernels; the keyword activation="relu" is computed in the same pass."""

    _function = staticmethod(functional.conv2d)


class Conv3d(_Conv, nn.Conv3d):
    """`torch.nn.Conv3d` on this package's kernels; the keyword activation="relu" is computed in the same pass."""

    _function = staticmethod(functional.conv3d)


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` on this package's kernels, with the keyword activation="relu"."""

    _function = staticmethod(functional.conv_transpose1d)


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on this package's kernels, with the keyword activation="relu"."""

    _function = staticmethod(functional.conv_transpose2d)


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` on this package's kernels, with the keyword activation="relu"."""

    _function = staticmethod(functional.conv_transpose3d)
