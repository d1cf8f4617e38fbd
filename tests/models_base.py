"""What the tests of every segmentation network check; test_unet.py shows how to inherit it."""

import copy
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from backstride.fused_ops import dispatch
from backstride.models.training.checkpoint import load_weights, save_weights
from torch import Tensor, nn


def without_interpreter() -> dict[str, str]:
    """Environment for a process in which CPU tensors take the fast path."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def fuse_only(network: nn.Module, *prefixes: str) -> nn.Module:
    """Leaves to torch all layers but those whose names begin so: interpreting a whole trunk takes minutes."""
    for name, module in list(network.named_modules()):
        if name.startswith(prefixes):
            continue
        if hasattr(module, "ops"):
            module.ops = "torch"  # pyright: ignore
        elif isinstance(module, nn.MaxPool2d):
            network.set_submodule(name, nn.MaxPool2d(module.kernel_size, module.stride, module.padding))
    return network


class NetworkTests:
    """Subclass as `class TestX(NetworkTests)` and set the class variables.

    Without a GPU ops="fused" is tested twice: a few steps on the interpreted kernels, which are slow, so that `tiny`
    should be the smallest network that has every kind of layer; and with the fixture `aten` as on a user's machine
    without a GPU: sizes, ten training steps, compilation.
    """

    network: ClassVar[type[nn.Module]]
    parameters: ClassVar[dict[tuple[int, int], int]]
    """(in_channels, num_classes) -> number of parameters of the published network"""
    published: ClassVar[dict[str, Any]] = {}
    """keyword arguments of the network that `parameters` and `layer_table` describe"""
    published_input: ClassVar[tuple[int, ...]]
    layer_table: ClassVar[list[tuple[str, tuple[int, ...]]]]
    """modules of the published network in the order of their calls, with the shape of their output"""
    tiny: ClassVar[dict[str, Any]]
    """keyword arguments of the constructor"""
    tiny_sizes: ClassVar[dict[tuple[int, int], tuple[int, int]]]
    """height and width that the tiny network takes -> those of its output; the smallest first"""
    too_large: ClassVar[tuple[str, ...]] = ()
    """layers of the tiny network that take the interpreter minutes: there torch computes them"""
    batch_size: ClassVar[int] = 1
    interpreted_steps: ClassVar[int] = 2
    """training steps on the interpreted kernels"""
    compiled_sizes: ClassVar[int] = 1
    learning_rate: ClassVar[float] = 0.02

    @pytest.fixture
    def aten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """CPU tensors take the way that they take without TRITON_INTERPRET."""
        monkeypatch.setattr(dispatch, "INTERPRETED", False)
        torch._dynamo.reset()

    def build(self, ops: str = "fused", **kwargs: Any) -> nn.Module:
        """The tiny network; where its weights start at zero, which would hide what is below, they don't here."""
        torch.manual_seed(0)
        network = self.network(1, 2, ops=ops, **(self.tiny | kwargs))
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=1.0 if parameter.dim() > 1 else 0.1)
        return network

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """A fused and a torch network with the same fp64 weights."""
        fused, torch_ = self.build("fused").double(), self.build("torch").double()
        torch_.load_state_dict(fused.state_dict())
        return fused, torch_

    def interpretable_pair(self) -> tuple[nn.Module, nn.Module]:
        fused, torch_ = self.pair()
        for name in self.too_large:
            fused.get_submodule(name).ops = "torch"
        return fused, torch_

    def sample(self, dtype: torch.dtype = torch.float64) -> Tensor:
        generator, size = torch.Generator().manual_seed(1), next(iter(self.tiny_sizes))
        return torch.randn(self.batch_size, 1, *size, generator=generator, dtype=torch.float64).to(dtype)

    def test_parameter_count(self):
        for channels, count in self.parameters.items():
            with torch.device("meta"):
                network = self.network(*channels, **self.published)
            assert sum(parameter.numel() for parameter in network.parameters()) == count

    def test_layer_table(self):
        seen: list[tuple[str, tuple[int, ...]]] = []
        with torch.device("meta"):
            network = self.network(self.published_input[1], 2, ops="torch", **self.published).eval()
            names = {module: name for name, module in network.named_modules()}
            wanted = {name for name, _ in self.layer_table}
            for module, name in names.items():
                if name in wanted:
                    module.register_forward_hook(
                        lambda module, _, output: seen.append((names[module], tuple(output.shape)))
                    )
            network(torch.empty(self.published_input))
        assert seen == self.layer_table

    def test_any_size(self, aten: None):
        fused, torch_ = (network.eval() for network in self.pair())
        for size, output_size in self.tiny_sizes.items():
            x = torch.randn(2, 1, *size, dtype=torch.float64)
            output = fused(x)
            assert output.shape == (2, 2, *output_size)
            torch.testing.assert_close(output, torch_(x), rtol=1e-10, atol=1e-10)

    def test_unknown_ops(self):
        with pytest.raises(ValueError, match=r'ops=\'cudnn\' .*"fused" .* "torch"'):
            self.build("cudnn")

    def test_one_state_dict_for_both_ops(self):
        fused, torch_ = self.build("fused"), self.build("torch")
        fused.load_state_dict(torch_.state_dict(), strict=True)
        torch_.load_state_dict(fused.state_dict(), strict=True)

    def test_same_outputs_and_gradients_on_the_kernels(self):
        results = []
        for network in self.interpretable_pair():
            x = self.sample().requires_grad_()
            output = network.eval()(x)
            output.square().sum().backward()
            learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
            results.append([output, x.grad, *(parameter.grad for parameter in learnt)])
        for ours, theirs in zip(*results, strict=True):
            assert theirs.abs().max() > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * theirs.abs().max().item())

    def test_same_losses_over_training_steps_on_the_kernels(self):
        fused, torch_ = (self._train(network, self.interpreted_steps) for network in self.interpretable_pair())
        assert fused == pytest.approx(torch_, rel=1e-9)

    def test_same_losses_over_ten_training_steps(self, aten: None):
        fused, torch_ = (self._train(network, 10) for network in self.pair())
        assert fused[-1] < 0.9 * fused[0]
        assert fused == pytest.approx(torch_, rel=1e-9)

    def test_compiles_without_graph_breaks(self, aten: None):
        """Forward and backward. The second size makes sizes dynamic, which takes long to compile."""
        network = self.build().double().eval()
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
        for size in list(self.tiny_sizes)[: self.compiled_sizes]:
            x = torch.randn(1, 1, *size, dtype=torch.float64)
            outputs = [f(x) for f in (network, compiled)]
            torch.testing.assert_close(*outputs)
            torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), learnt) for y in outputs))

    def target(self) -> Tensor:
        """The class of each column of the smallest output."""
        return torch.arange(next(iter(self.tiny_sizes.values()))[1]) % 2

    def _train(self, network: nn.Module, steps: int) -> list[float]:
        optimizer = torch.optim.SGD(network.parameters(), self.learning_rate, momentum=0.9)
        x = self.sample()
        losses = []
        for _ in range(steps):
            logits = network.train()(x)
            loss = F.cross_entropy(logits, self.target().expand(len(logits), *logits.shape[2:]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def test_save_and_load(self, tmp_path: Path):
        network, other = self.build("torch"), self.build("torch")
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        save_weights(network, tmp_path / "weights.safetensors", {"step": 3})
        assert load_weights(other, tmp_path / "weights.safetensors") == {"step": 3}
        x = self.sample(torch.float32)
        assert torch.equal(network.eval()(x), other.eval()(x))

    def test_copies_are_independent(self):
        network = self.build("torch").eval()
        twin, x = copy.deepcopy(network), self.sample(torch.float32)
        before = network(x)
        for parameter in twin.parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(network(x), before) and not torch.equal(twin(x), before)
