"""The recurrence's kernels against their definition, and the RNN against fp64 oracles: dtypes, packing, extremes."""

import itertools
import os
import subprocess
import sys

import backstride.fused_ops as fused
import pytest
import torch
from backstride.fused_ops.rnn import ops
from backstride.fused_ops.rnn.rows import pairs_of_steps, previous_rows
from backstride.kernels.rnn import Packing, launch, reference, scan
from backstride.kernels.rnn.config import RESIDENT, SHARDED, STEPWISE, RnnConfig, choose_config
from backstride.kernels.rnn.exchange import exchange_probe_kernel
from backstride.kernels.runtime import H200, INTERPRETED, Device
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from .modes import KERNELS_ON_CPU, kernels_run
from .oracle import assert_as_exact_as, to_fp64, to_tf32

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REGIMES = [RESIDENT, SHARDED, STEPWISE]
EFFECTS = ["tanh", "relu", "tanh_derivative", "relu_derivative", "factor"]


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch):
    """Each way to run the recurrence, whatever the sizes. Interpreted programs run one after another: one shard."""

    def choose(batch, hidden, directions, itemsize, tensor_cores, device):
        block = max(16, 1 << (hidden - 1).bit_length())
        if request.param == RESIDENT:
            return RnnConfig(RESIDENT, 16, block, block, 4, 1)
        if request.param == SHARDED:
            return RnnConfig(SHARDED, 16, block if INTERPRETED else 16, 16, 4, 1)
        return RnnConfig(STEPWISE, 16, 16, 16, 4, 1)

    launch._plan.cache_clear()  # of the other ways
    monkeypatch.setattr(launch, "choose_config", choose)
    yield request.param
    launch._plan.cache_clear()


def random(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def scan_inputs(effect, packed, with_first, dtype, device, batch=3, hidden=19):
    """Arguments of `scan` up to the packing: 4 steps, both directions."""
    sizes = [batch, batch, max(batch - 1, 1), 1]
    packing = Packing(torch.tensor([0, *itertools.accumulate(sizes)], device=device), batch) if packed else None
    rows = (sum(sizes),) if packed else (len(sizes), batch)
    x = random(*rows, 2, hidden, dtype=dtype, device=device)
    gate = random(*rows, 2, hidden, dtype=dtype, device=device, seed=1) if effect not in ("tanh", "relu") else None
    first = random(2, batch, hidden, dtype=dtype, device=device, seed=2) if with_first else None
    matrix = (random(2, hidden, hidden, device=device, seed=3) / hidden**0.5).to(dtype)
    return x, gate, first, matrix.transpose(1, 2), packing


def last_of(y, packing, backward):
    """Each sequence's y at the end of its walk, (2, batch, H); y (T, batch, 2, H) or packed."""
    if packing is None:
        ends = [y[-1], y[0]]
    else:
        starts = packing.offsets[:-1]
        lengths = [int((packing.offsets.diff() > b).sum()) for b in range(packing.batch)]
        ends = [torch.stack([y[starts[n - 1] + b] for b, n in enumerate(lengths)]), y[: packing.batch]]
    if backward:
        ends.reverse()
    return torch.stack([ends[0][:, 0], ends[1][:, 1]])


def fp64(tensor):
    return None if tensor is None else tensor.cpu().double()


@kernels_run
@pytest.mark.timeout(120)
@pytest.mark.smoke
@pytest.mark.parametrize("effect", EFFECTS)
def test_scan(regime, effect, device):
    """Every element is written, and is the definition's."""
    dtype = torch.float64 if INTERPRETED and device == "cpu" else torch.float32
    combinations = list(itertools.product([False, True], repeat=3))
    for backward, packed, with_first in combinations if effect == "tanh" else combinations[::3]:
        x, gate, first, matrix, packing = scan_inputs(effect, packed, with_first, dtype, device)
        y, factor = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
        last = x.new_full((2, 3, x.shape[-1]), torch.nan) if with_first else None
        biases = [random(2, x.shape[-1], dtype=dtype, device=device, seed=seed) for seed in (4, 5)] * with_first
        stored = factor if effect == "tanh" else None
        scan(x, gate, first, matrix, packing, y, stored, effect, biases=biases, last=last, backward=backward)
        on_cpu = None if packing is None else Packing(packing.offsets.cpu(), packing.batch)
        biased = sum(map(fp64, biases), start=fp64(x))
        exact = reference.scan(biased, fp64(gate), fp64(first), fp64(matrix), on_cpu, effect, backward=backward)
        torch.testing.assert_close(y.cpu(), exact.to(dtype), rtol=1e-5, atol=1e-5)
        if effect == "tanh":
            torch.testing.assert_close(factor.cpu(), (1 - exact**2).to(dtype), rtol=1e-5, atol=1e-5)
        if last is not None:
            assert torch.equal(last, last_of(y, packing, backward))


@kernels_run
@pytest.mark.timeout(120)
def test_several_tiles_of_the_batch(regime, device):
    x, gate, first, matrix, _ = scan_inputs("tanh", False, True, torch.float32, device, batch=37, hidden=16)
    y = torch.full_like(x, torch.nan)
    scan(x, gate, first, matrix, None, y, None, "tanh")
    exact = reference.scan(fp64(x), None, fp64(first), fp64(matrix), None, "tanh")
    torch.testing.assert_close(y.cpu().double(), exact, rtol=1e-4, atol=1e-5)


@kernels_run
@pytest.mark.timeout(120)
@pytest.mark.smoke
def test_operands_in_tf32_are_rounded(regime, device):
    """Tensor cores cut off what they don't take: every product would be too small, and every step add to it."""
    x, _, first, matrix, _ = scan_inputs("tanh", False, True, torch.float32, device)
    y = torch.full_like(x, torch.nan)
    scan(x, None, first, matrix, None, y, None, "tanh", tf32=True)
    before = y[:-1, :, 0]  # direction 0 walks from the first step to the last
    exact = torch.tanh(fp64(x[1:, :, 0]) + fp64(to_tf32(before.contiguous())) @ fp64(to_tf32(matrix.contiguous())[0]))
    torch.testing.assert_close(y[1:, :, 0].cpu().double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("effect", ["tanh", "relu"])
@pytest.mark.parametrize("packed", [False, True])
def test_definition_of_the_backward(effect, packed):
    """Backpropagation through time is the scan the other way round: by autograd through the definition."""
    x, _, first, matrix, packing = scan_inputs(effect, packed, True, torch.float64, "cpu")
    x.requires_grad_()
    y = reference.scan(x, None, first, matrix, packing, effect)
    grad = random(*y.shape, seed=9)
    (expected,) = torch.autograd.grad(y, x, grad)
    by_hand = reference.scan(grad, y, None, matrix.transpose(1, 2), packing, f"{effect}_derivative", backward=True)
    torch.testing.assert_close(by_hand, expected)


@pytest.mark.skipif(not INTERPRETED, reason="fp64 runs on the kernels only when they are interpreted")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_derivatives(regime, bidirectional):
    """First and second, through each way to run the recurrence."""
    torch.manual_seed(0)
    module = fused.RNN(2, 3, bidirectional=bidirectional).double()
    x, hx = random(3, 2, 2).requires_grad_(), random(1 + bidirectional, 2, 3, seed=1).requires_grad_()

    def function(x, hx, *params):
        return fused.rnn_tanh(x, hx, list(params), True, 1, 0.0, True, bidirectional, False)

    tensors = [x, hx, *module.parameters()]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def as_torch(module, **keywords):
    """torch.nn.RNN with the same weights."""
    twin = nn.RNN(module.input_size, module.hidden_size, module.num_layers, **keywords)
    twin.to(next(module.parameters()))
    twin.load_state_dict(module.state_dict())
    return twin


def without_rounding(module, *inputs):
    """Give the module weights, and the inputs values, with which few steps are exact in 16 bits: a unit whose sign
    rounding decides has another gradient than the oracle's, whoever computes it."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *inputs):
            tensor.copy_(torch.randint(-2, 3, tensor.shape) / 2)
        for weight in (module.weight_hh_l0, module.weight_hh_l0_reverse):
            weight.copy_(torch.eye(len(weight))[torch.randperm(len(weight))] * weight.sign())


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, nonlinearity, device):
    """Outputs, last states and all gradients as exact as torch's own, measured against fp64."""
    torch.manual_seed(0)
    ours = fused.RNN(6, 20, nonlinearity=nonlinearity, bidirectional=True)
    x, h = random(5, 3, 6), random(2, 3, 20, seed=1)
    if nonlinearity == "relu":
        without_rounding(ours, x, h)
    ours.to(device, dtype)
    theirs = as_torch(ours, nonlinearity=nonlinearity, bidirectional=True)
    exact = as_torch(ours.cpu().double(), nonlinearity=nonlinearity, bidirectional=True)
    ours.to(device, dtype)
    x, h = x.to(device, dtype).requires_grad_(), h.to(device, dtype).requires_grad_()
    every = []
    for module, inputs in ((ours, (x, h)), (theirs, (x, h)), (exact, to_fp64(x, h))):
        output, h_n = module(*inputs)
        seed = [random(*t.shape, dtype=t.dtype, device=t.device, seed=5) for t in (output, h_n)]
        grads = torch.autograd.grad((output, h_n), [*inputs, *module.parameters()], seed)
        every.append([output, h_n, *grads])
    for a, b, c in zip(*every, strict=True):
        assert_as_exact_as(a, b, c, 4 * torch.ones_like(c))


@kernels_run
def test_saturated_units_keep_their_gradient(device):
    """bf16 rounds h to 1 far out, where 1 - h^2 is 0: the stored factor keeps the gradient that torch's own loses.

    Relative error of the weights' gradients on the CPU, 512 steps with z around 4: ours 0.026, torch's own 0.46.
    """
    ours = fused.RNN(2, 16).to(device, torch.bfloat16)
    with torch.no_grad():
        ours.bias_ih_l0.fill_(6.0)
    theirs, exact = as_torch(ours), as_torch(ours.cpu().double())
    ours.to(device, torch.bfloat16)
    x = random(24, 3, 2, dtype=torch.bfloat16, device=device)
    grads = []
    for module, input in ((ours, x), (theirs.to(device), x), (exact, x.cpu().double())):
        module.zero_grad()
        module(input)[0].sum().backward()
        grads.append(module.weight_hh_l0.grad.cpu().double())
    error = [((g - grads[2]).norm() / grads[2].norm()).item() for g in grads[:2]]
    assert error[0] < 0.05 < 0.9 < error[1], error


@kernels_run
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the branch that is not taken
def test_tanh_everywhere(device):
    """Within 4 ulp of torch, from the subnormal to the infinite; NaN stays NaN."""
    z = torch.cat([torch.logspace(-40, 38, 800), torch.linspace(0.5, 0.8, 300), torch.tensor([0.0, torch.inf])])
    z = torch.cat([z, -z, torch.tensor([torch.nan])]).to(device)
    x = z.view(1, -1, 1)
    params = [torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device)]
    y, _ = fused.rnn_tanh(x, torch.zeros(1, z.numel(), 1, device=device), params, False, 1, 0.0, False, False, False)
    exact = torch.tanh(z.double().cpu())
    y = y.flatten().cpu()
    assert y.isnan().tolist() == exact.isnan().tolist()
    good = ~exact.isnan()
    torch.testing.assert_close(y[good].double(), exact[good], rtol=4 * 2.0**-23, atol=1e-44)


@kernels_run
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tanh_of_every_number_in_16_bits(dtype, device):
    """Half a unit in the last place is the rounding's."""
    z = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).to(device).view(1, 256, 1, 256)
    y, factor = torch.full_like(z, torch.nan), torch.full_like(z, torch.nan)
    scan(z, None, None, torch.zeros(1, 256, 256, dtype=dtype, device=device), None, y, factor, "tanh")
    exact = torch.tanh(z.double()).cpu()
    y = y.double().cpu()
    assert torch.equal(y.isnan(), exact.isnan())
    info = torch.finfo(dtype)
    unit = info.eps * 2.0 ** torch.floor(torch.log2(exact.abs().clamp(min=info.tiny)))
    # Triton's interpreter rounds to bf16 towards zero.
    most = 1.13 if INTERPRETED and dtype == torch.bfloat16 and device == "cpu" else 0.63
    normal = exact.abs() >= info.tiny
    assert ((y - exact).abs() / unit)[normal].max() <= most
    assert y[~normal].nan_to_num().abs().max() <= info.tiny  # a subnormal number, or 0
    # 1 - tanh^2 of what is not rounded yet, so that it is right where tanh is all but 1.
    slope = 1 - exact**2
    assert ((factor.double().cpu() - slope).abs() / slope.clamp(min=1e-3)).nan_to_num().max() <= 2 * info.eps


def test_nan_and_infinity_go_where_torch_lets_them(device):
    ours = fused.RNN(2, 5, nonlinearity="relu").to(device)
    theirs = as_torch(ours, nonlinearity="relu")
    x = random(4, 3, 2, dtype=torch.float32, device=device)
    x[1, 0, 0], x[2, 1, 1] = torch.nan, torch.inf
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], equal_nan=True)


def test_runs_are_bitwise_equal(device):
    ours = fused.RNN(4, 24, bidirectional=True).to(device)
    x = random(6, 5, 4, dtype=torch.float32, device=device)
    grads = [torch.autograd.grad(ours(x)[0].square().sum(), list(ours.parameters())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@kernels_run
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_the_same_bits_without_gradients(dtype, device):
    """Without them the kernel is called past the dispatcher, on the parameters as they lie."""
    torch.manual_seed(0)
    ours = fused.RNN(4, 24).to(device, dtype)
    x, h = random(5, 3, 4, dtype=dtype, device=device), random(1, 3, 24, dtype=dtype, device=device)
    for arguments in ((x,), (x, h)):
        with torch.no_grad():
            alone = ours(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(alone, ours(*arguments), strict=True))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_one_step_and_empty_batch(bidirectional, device):
    ours = fused.RNN(3, 5, 2, bidirectional=bidirectional).to(device)
    theirs = as_torch(ours, bidirectional=bidirectional)
    x = random(1, 2, 3, dtype=torch.float32, device=device)
    torch.testing.assert_close(ours(x), theirs(x))
    directions = 2 if bidirectional else 1
    empty = torch.randn(4, 0, 3, device=device, requires_grad=True)
    output, h_n = ours(empty)
    assert output.shape == (4, 0, 5 * directions) and h_n.shape == (2 * directions, 0, 5)
    output.sum().backward()
    assert empty.grad is not None and empty.grad.shape == empty.shape
    assert ours.weight_hh_l0.grad is not None and not ours.weight_hh_l0.grad.any()
    with pytest.raises(RuntimeError, match="sequence length"):
        ours(torch.randn(0, 2, 3, device=device))


def test_strided_input_past_31_bits():
    """Steps 2^30 elements apart. In a process of its own: a miss segfaults."""
    code = """
import torch
from backstride.kernels.rnn import scan
S = 2**30
x = torch.empty(2 * S + 24, dtype=torch.float16).as_strided((3, 2, 1, 4), (S, 4, 4, 1))
x.copy_(torch.randn(3, 2, 1, 4))
y = torch.empty(3, 2, 1, 4, dtype=torch.float16)
scan(x, None, None, torch.zeros(1, 4, 4, dtype=torch.float16), None, y, None, "relu")
torch.testing.assert_close(y, x.relu())
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@kernels_run
@pytest.mark.timeout(60)
@pytest.mark.parametrize("method", ["atomic", "flags"])
def test_exchange_of_one_program_with_itself(method, device):
    """The counter counts every round, and nothing waits for ever. (A GPU takes many programs: the probe.)"""
    counter, flags = (torch.zeros(64, dtype=torch.int32, device=device) for _ in range(2))
    exchange_probe_kernel[(1,)](counter, flags, 5, METHOD=method, GROUP=1)
    assert (counter[0].item(), flags[0].item()) == ((5, 0) if method == "atomic" else (0, 5))


A100_SLICE = Device(multiprocessors=14, shared_memory=163 * 1024)


@pytest.mark.parametrize("device", [H200, A100_SLICE], ids=["H200", "slice"])
def test_sharded_programs_fit_the_device_at_once(device):
    """More programs than multiprocessors would wait for ever for those that never start."""
    seen = set()
    for batch, hidden, directions, itemsize, tensor_cores in itertools.product(
        (1, 3, 16, 50, 64, 128, 300, 4096),
        (1, 17, 128, 256, 300, 512, 1024, 1536, 2048, 4096),
        (1, 2),
        (2, 4),
        (True, False),
    ):
        config = choose_config(batch, hidden, directions, itemsize, tensor_cores, device)
        seen.add(config.regime)
        if config.regime == RESIDENT:
            assert config.block_n >= hidden
        if config.regime == SHARDED:
            programs = -(-batch // config.block_b) * -(-hidden // config.block_n) * directions
            assert programs <= device.multiprocessors
    assert seen == ({RESIDENT, SHARDED, STEPWISE} if device is H200 else {RESIDENT, STEPWISE} | (seen & {SHARDED}))


@pytest.mark.skipif(not INTERPRETED, reason="one program after the other is the interpreter's way")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_interpreted_programs_wait_for_none(dtype):
    """A layer whose columns a GPU's programs share would hang."""
    for batch, hidden in itertools.product((1, 16, 300), (257, 1024, 4096)):
        assert launch.choose(batch, hidden, 2, torch.empty(0, dtype=dtype), False).regime != SHARDED
    assert fused.RNN(2, 257, dtype=dtype)(torch.zeros(2, 1, 2, dtype=dtype))[0].shape == (2, 1, 257)


@pytest.mark.parametrize("hidden", [2, 16, 17])
def test_an_overflow_stays_infinite(hidden, device):
    """Units that only fill a tile up have weights of 0: times infinity that is NaN, and no business of the others."""
    x = torch.ones(6, 1, 1, device=device)
    w_ih, w_hh = torch.ones(hidden, 1, device=device), torch.full((hidden, hidden), 1e20, device=device)
    y, _ = fused.rnn_relu(x, torch.zeros(1, 1, hidden, device=device), [w_ih, w_hh], False, 1, 0.0, False, False, False)
    expected, _ = torch.rnn_relu(
        x.cpu(), torch.zeros(1, 1, hidden), [w_ih.cpu(), w_hh.cpu()], False, 1, 0.0, False, False, False
    )
    assert expected[-1].isinf().all()
    torch.testing.assert_close(y.cpu(), expected)


def test_explain_names_the_regime():
    ours = fused.RNN(3, 5)
    x, h = torch.randn(4, 2, 3), torch.zeros(1, 2, 5)
    path = fused.explain(fused.rnn_tanh, x, h, list(ours.parameters()), True, 1, 0.0, True, False, False)
    assert path.name == ("interpreted kernel" if KERNELS_ON_CPU else "aten")
    if KERNELS_ON_CPU:
        assert path.reason.endswith("resident")
    wrong = fused.explain(fused.rnn_relu, x, h[..., :3], list(ours.parameters()), True, 1, 0.0, True, False, False)
    assert wrong.name == "aten" and "refuses" in wrong.reason


@pytest.mark.parametrize("rows", [0, 7, 8, 35])
def test_a_weight_gradient_summed_in_parts(monkeypatch, rows):
    monkeypatch.setattr(ops, "LEAST_ROWS", 4)
    a, b = (random(rows, 3, dtype=torch.float32, seed=seed) for seed in range(2))
    torch.testing.assert_close(ops._sum_over_rows(a, b), a.T @ b)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_pairs_of_steps_are_rows_and_the_ones_before_them(packed, backward):
    y, v, _, _, packing = scan_inputs("factor", packed, False, torch.float64, "cpu")
    offsets = packing.offsets if packing else None
    previous = previous_rows(y, offsets, backward)
    expected = torch.einsum("rdi,rdj->dij", previous.flatten(0, -3), v.flatten(0, -3))
    for d, (a, b) in enumerate(pairs_of_steps(y, v, offsets, backward)):
        torch.testing.assert_close(a.T @ b, expected[d])
        assert packed or a.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def gradient_scales(module, x):
    """What the terms of each parameter's gradient by the sum of output and h_n add up to without their signs."""
    scales = []
    for d in range(2 if module.bidirectional else 1):
        w_ih, w_hh, b_ih, b_hh = module.all_weights[d]
        rows = x if d == 0 else x.flip(0)
        h = x.new_zeros(x.shape[1], module.hidden_size)
        before, sums, states = [], [], []
        for row in rows:
            before.append(h.detach())
            sums.append(row @ w_ih.T + b_ih + h @ w_hh.T + b_hh)
            h = sums[-1].tanh()
            states.append(h)
        gradients = torch.stack(torch.autograd.grad(torch.stack(states).sum() + h.sum(), sums)).abs().flatten(0, 1)
        bias = gradients.sum(0)
        scales += [gradients.T @ rows.abs().flatten(0, 1), gradients.T @ torch.cat(before).abs(), bias, bias]
    return scales


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch, hidden, bidirectional",
    [
        (3, 100, True),
        (8, 256, False),
        (16, 384, False),
        (64, 512, True),
        (50, 1000, False),
        (64, 1024, False),
        (7, 1536, False),
        (40, 1760, False),
    ],
)
def test_sizes_of_every_regime(batch, hidden, bidirectional, dtype):
    torch.manual_seed(0)
    ours = fused.RNN(32, hidden, bidirectional=bidirectional).to("cuda", dtype)
    theirs = as_torch(ours, bidirectional=bidirectional)
    exact = as_torch(ours.cpu().double(), bidirectional=bidirectional).to("cuda")
    ours.to("cuda", dtype)
    x = random(40, batch, 32, dtype=dtype, device="cuda")
    every = []
    for module, input in ((ours, x), (theirs, x), (exact, x.double())):
        output, h_n = module(input)
        grads = torch.autograd.grad(output.sum() + h_n.sum(), list(module.parameters()))
        every.append([output, h_n, *grads])
    every.append([each.abs() for each in every[-1][:2]] + gradient_scales(exact, x.double()))
    for a, b, c, scale in zip(*every, strict=True):
        assert_as_exact_as(a, b, c.cpu(), scale.cpu())


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_packed_sequences_on_the_gpu():
    ours = fused.RNN(8, 512, bidirectional=True).to("cuda")
    theirs = as_torch(ours, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 8, device="cuda") for n in (3, 40, 17, 40, 1)], enforce_sorted=False)
    a, b = ours(packed), theirs(packed)
    torch.testing.assert_close(a[0].data, b[0].data, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(a[1], b[1], rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("hidden", [64, 512])
def test_more_than_65535_steps(hidden):
    """Where cuDNN gives up."""
    ours = fused.RNN(4, hidden).to("cuda")
    x = torch.randn(70_000, 2, 4, device="cuda")
    with torch.no_grad():
        output, h_n = ours(x)
        tail, _ = ours(x[-100:], ours(x[:-100])[1])
    torch.testing.assert_close(output[-100:], tail)
    torch.testing.assert_close(h_n[0], output[-1])


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("hidden", [64, 512, 4096])
def test_cuda_graph_and_second_stream(hidden):
    ours = fused.RNN(16, hidden).to("cuda", torch.bfloat16)
    x = torch.randn(20, 8, 16, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = ours(x)[0]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ours(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ours(x)[0]
        graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_a_grid_that_does_not_fit_is_refused(monkeypatch):
    """An error from the driver, where a launch without it would hang."""
    monkeypatch.setattr(launch, "choose_config", lambda *_: RnnConfig(SHARDED, 16, 16, 64, 4, 1))
    x = torch.zeros(2, 16 * 2000, 1, 512, device="cuda", dtype=torch.bfloat16)
    matrix = torch.zeros(1, 512, 512, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="(?i)cooperative|too large|launch"):
        scan(x, None, None, matrix, None, torch.empty_like(x), None, "tanh")


@pytest.mark.gpu
def test_new_lengths_and_batches_compile_nothing():
    ours = fused.RNN(16, 64).to("cuda", torch.bfloat16)
    ours(torch.randn(5, 4, 16, device="cuda", dtype=torch.bfloat16))
    cache = launch.rnn_resident_kernel.device_caches[torch.cuda.current_device()][0]
    cached = len(cache)
    for steps, batch in ((1, 1), (6, 4), (7, 16), (33, 31)):
        ours(torch.randn(steps, batch, 16, device="cuda", dtype=torch.bfloat16))
    assert len(cache) == cached
