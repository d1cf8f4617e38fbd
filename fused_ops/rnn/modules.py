"""Recurrent modules: torch.nn's own, computed by this package's functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .functional import Call, run


class RNN(nn.RNNBase):
    """`torch.nn.RNN` on this package's kernels: same arguments, parameters, state_dict and errors.

    It derives from torch.nn.RNNBase and not from torch.nn.RNN, which torch.compile refuses to trace. Weights are used
    where they are: none are copied into a flat buffer, so that parametrised, tied and replaced ones just work.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        **keywords: Any,
    ) -> None:
        if "proj_size" in keywords:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if keywords:
            raise TypeError(f"RNN got an unexpected keyword argument {next(iter(keywords))!r}")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.nonlinearity = nonlinearity

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read each weight where it is."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        own, name = self._parameters, self._flat_weights_names[0]
        weight: Any = own[name] if name in own else getattr(self, name)
        dtype = weight.dtype
        if input.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        expected = 3 if batch_sizes is None else 2
        if input.dim() != expected:
            raise RuntimeError(f"input must have {expected} dimensions, got {input.dim()}")
        if self.input_size != input.shape[-1]:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """input (T, B, I), (B, T, I) with batch_first, (T, I) or packed; hx (layers D, B, H) or (layers D, H) or None.

        Returns the last layer's outputs, in the input's form, and every layer's last state, in hx's form.
        """
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is not None:
                hx = self.permute_hidden(hx, sorted_indices)
            output, h_n = self._run(data, batch_sizes, hx)
            packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return packed, self.permute_hidden(h_n, unsorted_indices)
        if input.dim() not in (2, 3):
            raise ValueError(f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
        if hx is not None and hx.dim() != input.dim():
            kind = "unbatched" if input.dim() == 2 else "batched"
            raise RuntimeError(
                f"For {kind} {input.dim()}-D input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor"
            )
        if input.dim() == 3:
            return self._run(input, None, hx)
        axis = 0 if self.batch_first else 1
        output, h_n = self._run(input.unsqueeze(axis), None, None if hx is None else hx.unsqueeze(1))
        return output.squeeze(axis), h_n.squeeze(1)

    def _run(self, input: Tensor, batch_sizes: Tensor | None, hx: Tensor | None) -> tuple[Tensor, Tensor]:
        # `getattr` searches in many places before it comes to an ordinary parameter.
        own: dict[str, Any] = self._parameters
        params = [own[name] if name in own else getattr(self, name) for name in self._flat_weights_names]
        self.check_input(input, batch_sizes)
        if hx is not None:
            self.check_hidden_size(hx, self.get_expected_hidden_size(input, batch_sizes))
        call = Call(
            input,
            batch_sizes,
            hx,
            params,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first and batch_sizes is None,
        )
        return run(self.nonlinearity, call)


class RNNCell(nn.RNNCell):
    """`torch.nn.RNNCell`. One step has no loop to fuse, so torch's own function computes it."""
