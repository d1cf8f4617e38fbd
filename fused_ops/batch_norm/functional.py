"""Batch normalisation as in torch.nn.functional, with what follows it in a network: a residual and ReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import ATEN, BY_AUTOGRAD, GPU_DTYPES, REFUSED, Path, explained_by, is_short, kernel_path
from ..epilogue import check_residual, finish, is_relu
from ..registration import is_followed, wants_gradient
from . import ops

OTHERS = Path(ATEN, "torch.compile fuses torch's own with what is around it, and torch.func has to see into it")


def _fits(vector: Tensor | None, channels: int, like: Tensor) -> bool:
    """Whether a parameter or statistic is one that torch would take, and lies as the kernels read it."""
    if vector is None:
        return True
    known = vector.dtype == like.dtype or (vector.dtype == torch.float32 and like.dtype in GPU_DTYPES)
    return known and vector.shape == (channels,) and vector.is_contiguous() and vector.device == like.device


def _path(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    residual: Tensor | None,
    input_bias: Tensor | None,
) -> Path:
    path = kernel_path(input)
    if path.name == ATEN:
        return path
    if not is_followed((input, running_mean, running_var, weight, bias, residual, input_bias)):
        return OTHERS
    shape = input.shape
    if len(shape) < 2 or input.numel() == 0 or (running_mean is None) != (running_var is None):
        return REFUSED
    channels = shape[1]
    for vector in (running_mean, running_var, weight, bias):
        if not _fits(vector, channels, input):
            return REFUSED
    if input.numel() == channels if training else running_mean is None:
        return REFUSED  # one value has no variance; and without statistics there is nothing to normalise by
    if not eps > 0:
        return REFUSED
    # As if the input passed by once, not eight times: torch's own is slow where the host waits for it, too (17 MB in
    # bf16 take it 0.36 ms on an H200, bench/results/batch_norm_relu_nvidia-h200.csv).
    if is_short(input.numel(), input, weight, bias, residual, input_bias):
        return BY_AUTOGRAD
    return path


def _planner(
    input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, input_bias
) -> Path:
    return _path(input, running_mean, running_var, weight, bias, training, eps, residual, input_bias)


def _check_input_bias(input_bias: Tensor, input: Tensor) -> None:
    """Raises ValueError unless it has one value for each channel: others might be broadcast."""
    if input.dim() > 1 and input_bias.shape != input.shape[1:2]:
        raise ValueError(
            f"input_bias must have one value for each of the input's {input.shape[1]} channels, got a tensor of shape "
            f"{tuple(input_bias.shape)}; pass the bias of the layer before as it is"
        )


def _add(input: Tensor, input_bias: Tensor) -> Tensor:
    return input + input_bias.to(input.dtype).view(-1, *[1] * (input.dim() - 2))


@explained_by(_planner)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    input_bias: Tensor | None = None,
) -> Tensor:
    """Batch normalisation, as `torch.nn.functional.batch_norm`, with an epilogue (Ioffe and Szegedy 2015, arXiv
    1502.03167, algorithm 1).

    y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), mean and var over all axes but the channels';
    reference: ``relu(F.batch_norm(input + input_bias, running_mean, running_var, weight, bias, ...) + residual)``, the
    additions along the channels.

    Shapes: input, residual and output (N, C, *size), all others (C,). The output lies in memory as the input does.

    Args:
        running_mean, running_var: what normalises without `training`; with it they become
            (1 - momentum) running + momentum batch's, the variance with one degree of freedom less.
        training: normalise by the batch's own mean and variance.
        activation: None or "relu".
        residual: tensor of the input's shape and dtype, added before the activation.
        input_bias: the bias of a layer that left it out. The mean takes it away again, so kernels never add it: in
            training it goes into running_mean alone, and its gradient is zero, where without them it is so but for
            rounding.

    Errors: torch's own for torch's arguments; ValueError or TypeError for a wrong activation, residual or input_bias.
    """
    relu = is_relu(activation)
    if input_bias is not None:
        _check_input_bias(input_bias, input)
    if residual is not None:  # before statistics go on
        check_residual(residual, input.shape, input.dtype, input.device)
    if _path(input, running_mean, running_var, weight, bias, training, eps, residual, input_bias).name == ATEN:
        input = input if input_bias is None else _add(input, input_bias)
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return finish(y, relu, residual)
    # An int would be another type to the kernel, and what was compiled for one would be launched with the other.
    momentum, eps = float(momentum), float(eps)
    if input_bias is not None and not training:
        if wants_gradient((input_bias,)):
            input = _add(input, input_bias)
        else:
            assert running_mean is not None, "what normalises without training"
            running_mean = running_mean - input_bias.to(running_mean.dtype)
        input_bias = None
    settings = training, momentum, eps, relu
    y = ops.batch_norm(input, running_mean, running_var, weight, bias, residual, input_bias, *settings)
    if input_bias is not None and running_mean is not None:
        running_mean.add_(input_bias.detach(), alpha=momentum)
    return y
