"""torch.nn.RNN's own test inputs and complaints: ModuleInfo, gradcheck, packing, parametrised weights, torch.func."""

import copy
import itertools
import pickle
import re
import warnings

import backstride.fused_ops as fused
import pytest
import torch
from backstride.fused_ops import dispatch
from backstride.fused_ops.registration import cast_all
from backstride.fused_ops.rnn import ops
from backstride.kernels.runtime import INTERPRETED
from torch import nn
from torch.func import functional_call, grad, hessian, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.profiler import profile
from torch.testing._internal.common_modules import module_db

from .modes import run_python

fp64_kernels = pytest.mark.skipif(not INTERPRETED, reason="fp64 runs on the kernels only when they are interpreted")
settings = pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"nonlinearity": "relu", "bias": False, "bidirectional": True},
        {"nonlinearity": "relu", "num_layers": 3, "batch_first": True},
    ],
    ids=["plain", "two layers", "relu", "three layers"],
)


def pair(input_size, hidden_size, dtype=torch.float64, device="cpu", **keywords):
    """Ours and torch's, same weights."""
    torch.manual_seed(0)
    ours = fused.RNN(input_size, hidden_size, **keywords).to(device, dtype)
    theirs = nn.RNN(input_size, hidden_size, **keywords).to(device, dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def info_of(name):
    return next(m for m in module_db if m.module_cls is getattr(nn, name))


def entries(name, kind="module_inputs_func"):
    info = info_of(name)
    return list(getattr(info, kind)(info, device="cpu", dtype=torch.float64, requires_grad=True, training=True))


def leaves(*results):
    """Tensors of outputs, packed or not."""
    return [t.data if isinstance(t, PackedSequence) else t for t in results]


def test_numbers_of_inputs():
    assert (len(entries("RNN")), len(entries("RNNCell"))) == (32, 3)


def modules_of(name, entry):
    torch.manual_seed(0)
    arguments, keywords = entry.constructor_input.args, entry.constructor_input.kwargs
    theirs = getattr(nn, name)(*arguments, **keywords).double()
    ours = getattr(fused, name)(*arguments, **keywords).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
@pytest.mark.parametrize("name, index", [("RNN", i) for i in range(32)] + [("RNNCell", i) for i in range(3)])
def test_module_inputs(name, index):
    """Outputs, gradients, and the same gradients from a non-contiguous input and hidden state."""
    entry = entries(name)[index]
    ours, theirs = modules_of(name, entry)
    assert ours.extra_repr() == theirs.extra_repr()
    call = entry.forward_input
    results = [module(*call.args, **call.kwargs) for module in (ours, theirs)]
    results = [leaves(*r) if isinstance(r, tuple) else [r] for r in results]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    inputs = [t for t in call.args if isinstance(t, torch.Tensor)]
    gradients = [
        torch.autograd.grad(sum(y.square().sum() for y in r), [*inputs, *module.parameters()])
        for r, module in zip(results, (ours, theirs), strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    strided = [torch.stack([t, t], dim=-1).detach()[..., 0].requires_grad_() for t in inputs]
    assert not any(t.is_contiguous() for t in strided if t.numel() > 1)
    again = ours(*strided)
    again = leaves(*again) if isinstance(again, tuple) else [again]
    for a, b in zip(again, results[1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["RNN", "RNNCell"])
def test_module_errors(name):
    info = info_of(name)
    errors = list(
        info.module_error_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
    )
    assert errors
    for error in errors:
        entry = error.module_error_input
        arguments, keywords = entry.constructor_input.args, entry.constructor_input.kwargs
        with pytest.raises(error.error_type) as caught:
            module = getattr(fused, name)(*arguments, **keywords).double()
            module(*entry.forward_input.args, **entry.forward_input.kwargs)
        assert re.search(error.error_regex, str(caught.value))


@pytest.mark.parametrize(
    "arguments, keywords",
    [
        ((3, 5, 1, "sigmoid"), {}),
        ((3, 5), {"proj_size": 2}),
        ((3, 5), {"dropout": 2}),
        ((3, 5), {"dropout": True}),
        ((3, 5), {"bias": 1}),
        ((3, 5), {"batch_first": "yes"}),
        ((3.0, 5), {}),
        ((3, 0), {}),
        ((3, 5, 0), {}),
    ],
)
def test_constructor_errors_are_torchs(arguments, keywords):
    with pytest.raises(Exception) as expected:
        nn.RNN(*arguments, **keywords)
    with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
        fused.RNN(*arguments, **keywords)


@pytest.mark.parametrize(
    "input, hx",
    [
        ((4, 2, 3), (1, 2, 6)),
        ((4, 2, 3), (1, 3, 5)),
        ((4, 2, 3), (2, 2, 5)),
        ((4, 2, 3), (1, 5)),
        ((4, 3), (1, 1, 5)),
        ((4, 2, 7), None),
        ((2, 4, 2, 3), None),
        ((3,), None),
        ((0, 2, 3), None),
    ],
    ids=str,
)
def test_call_errors_are_torchs(input, hx):
    ours, theirs = pair(3, 5)
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in (input, hx) if shape is not None]
    with pytest.raises(Exception) as expected:
        theirs(*arguments)
    with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
        ours(*arguments)


# batch_sizes, and the batch of hx: more rows than there are, fewer, growing, no rows in a step, or another batch.
@pytest.mark.parametrize(
    ("sizes", "batch"),
    [
        ([2, 2, 2], 2),
        ([2, 2], 2),
        ([1, 2, 2], 2),
        ([2, 4, -1], 2),
        ([2, 2, 1], 3),
        ([2, 2, 1], 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_hx", [False, True])
def test_what_is_no_packed_batch_is_torchs(sizes, batch, with_hx):
    """A kernel would read and write where there are no rows."""
    ours, theirs = pair(3, 5)
    data, hx = torch.randn(5, 3, dtype=torch.float64), torch.randn(1, batch, 5, dtype=torch.float64)
    packed = PackedSequence(data, torch.tensor(sizes))
    results = []
    for module in (theirs, ours):
        try:
            y, h = module(packed, *[hx] * with_hx)
            results.append((y.data, h))
        except Exception as error:
            results.append((type(error), str(error)))
    if isinstance(results[0][0], torch.Tensor):
        torch.testing.assert_close(results[1], results[0])
    else:
        assert results[0] == results[1]


def test_a_packed_batch_without_steps_is_named():
    """torch's own would crash."""
    params = [torch.zeros(5, 3), torch.zeros(5, 5)]
    with pytest.raises(ValueError, match="batch_sizes is empty: a packed batch has at least one step"):
        fused.rnn_tanh(
            torch.zeros(0, 3),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(1, 0, 5),
            params,
            False,
            1,
            0.0,
            False,
            False,
        )


def test_wrong_dtype_is_named():
    ours, theirs = pair(3, 5, torch.float32)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError) as expected:
        theirs(x)
    with pytest.raises(ValueError, match=re.escape(str(expected.value))):
        ours(x)


@settings
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("lengths", [[4, 3, 1], [1, 4, 2, 4]], ids=["sorted", "unsorted"])
def test_packed(settings, with_hx, lengths):
    ours, theirs = pair(3, 5, **settings)
    sequences = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in lengths]
    directions = ours.num_layers * (1 + ours.bidirectional)
    hx = torch.randn(directions, len(lengths), 5, dtype=torch.float64, requires_grad=True) if with_hx else None
    results, gradients = [], []
    for module in (ours, theirs):
        packed, h_n = module(pack_sequence(sequences, enforce_sorted=False), hx)
        padded, sizes = pad_packed_sequence(packed)
        results.append((padded, sizes, h_n))
        inputs = [*sequences, *([hx] if with_hx else []), *module.parameters()]
        gradients.append(torch.autograd.grad(padded.square().sum() + h_n.sin().sum(), inputs))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*gradients)


def test_packed_as_padded_batch_first():
    ours, theirs = pair(3, 5, batch_first=True)
    x, lengths = torch.randn(3, 6, 3, dtype=torch.float64), [2, 6, 4]
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    (a, h), (b, k) = ours(packed), theirs(packed)
    torch.testing.assert_close((a.data, h), (b.data, k))
    assert torch.equal(a.batch_sizes, b.batch_sizes)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 2, 1]], ids=["dense", "packed"])
def test_last_states_without_gradients(lengths, layers, device):
    """Written by the kernel, which nothing else can tell: the same bits, and memory of their own."""
    ours, _ = pair(3, 5, torch.float32, device, num_layers=layers)
    sequences = [torch.randn(n, 3, device=device) for n in lengths]
    input = torch.stack(sequences, 1) if lengths[-1] == lengths[0] else pack_sequence(sequences)
    output, h_n = ours(input)
    with torch.no_grad():
        again = ours(input)
    assert torch.equal(h_n, again[1]) and torch.equal(*leaves(output, again[0]))
    leaves(again[0])[0].zero_()
    assert torch.equal(h_n, again[1])


@fp64_kernels
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("op", [fused.rnn_tanh, fused.rnn_relu])
def test_derivatives(op, bidirectional, packed, monkeypatch):
    """First and second, backward and forward mode, by every input and weight. The op differentiates as ever, but
    computes by ATEN, in a hundredth of the interpreter's time; test_rnn.py has the kernels'."""
    monkeypatch.setattr(ops, "kernel_path", lambda _: dispatch.ON_CPU)
    torch.manual_seed(0)
    module = fused.RNN(2, 3, bidirectional=bidirectional).double()
    hx = torch.randn(1 + bidirectional, 2, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(*((5,) if packed else (3, 2)), 2, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([2, 2, 1])

    def function(x, hx, *params):
        if packed:
            return op(x, sizes, hx, list(params), True, 1, 0.0, True, bidirectional)
        return op(x, hx, list(params), True, 1, 0.0, True, bidirectional, False)

    tensors = [x, hx, *module.parameters()]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_second_derivatives_in_16_bits(device):
    """The gradient penalty of a bf16 network, in whose backward the factor is stored."""
    ours, exact = pair(3, 8, torch.float64)
    ours.to(device, torch.bfloat16)
    x = torch.randn(4, 2, 3, dtype=torch.bfloat16)
    penalties = []
    for module, input in ((ours, x.to(device)), (exact, x.double())):
        input = input.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(module(input)[0].square().sum(), input, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), module.weight_hh_l0)[0].cpu().double())
    assert (penalties[0] - penalties[1]).norm() < 0.1 * penalties[1].norm()


def test_gradient_of_the_last_state_alone(device):
    ours, theirs = pair(3, 5, torch.float32, device, bidirectional=True)
    x = torch.randn(4, 2, 3, device=device)
    gradients = [torch.autograd.grad(m(x)[1].square().sum(), list(m.parameters())) for m in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("keywords", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("steps", [1, 4])
def test_gradients_have_memory_of_their_own(keywords, steps, device):
    """Both biases have the same gradient. Were it one memory, what is added to or scaled in place would be so twice."""
    ours, theirs = pair(3, 5, torch.float32, device, **keywords)
    x = torch.randn(steps, 2, 3, device=device)
    for _ in range(2):
        for module in (ours, theirs):
            module(x)[0].square().sum().backward()
    grads = [parameter.grad for parameter in ours.parameters()]
    assert len({grad.data_ptr() for grad in grads}) == len(grads)
    for mine, right in zip(grads, theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, right.grad, rtol=1e-3, atol=1e-4)
    for module in (ours, theirs):
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    torch.testing.assert_close(norm.item(), 1.0, rtol=1e-3, atol=0)


def test_backward_in_eval_mode(device):
    """cuDNN refuses it."""
    ours, _ = pair(3, 5, torch.float32, device, num_layers=2, dropout=0.5)
    ours.eval()
    ours(torch.randn(4, 2, 3, device=device))[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("p", [0.0, 0.276, 1.0])
def test_dropout(p, device):
    ours, theirs = pair(3, 5, torch.float32, device, num_layers=2, dropout=p)
    x = torch.randn(4, 2, 3, device=device)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-3, atol=1e-4)
    ours.train()
    torch.manual_seed(3)
    first = ours(x)
    torch.manual_seed(3)
    torch.testing.assert_close(first, ours(x), rtol=0, atol=0)
    assert torch.equal(first[0], ours(x)[0]) == (p in (0.0, 1.0))
    if p == 1.0:
        # The second layer sees zeros.
        torch.testing.assert_close(first, theirs.train()(x), rtol=1e-3, atol=1e-4)
    # Last states are those before dropout.
    torch.testing.assert_close(first[1][0], ours.eval()(x)[1][0])


def test_parametrised_replaced_and_tied_weights_count(device):
    """With torch.nn.RNN, a parametrisation leaves the flat weights as they were (pytorch issue 65688)."""
    ours, theirs = pair(4, 4, torch.float32, device)
    x = torch.randn(3, 2, 4, device=device)
    nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    before = ours(x)[0]
    with torch.no_grad():
        ours.parametrizations.weight_hh_l0.original0.mul_(2)
    assert not torch.allclose(before, ours(x)[0])
    ours(x)[0].sum().backward()
    assert ours.parametrizations.weight_hh_l0.original1.grad is not None
    tied, reference = pair(4, 4, torch.float32, device)
    tied.weight_ih_l0 = tied.weight_hh_l0
    reference.weight_ih_l0 = reference.weight_hh_l0
    torch.testing.assert_close(tied(x), reference(x), rtol=1e-3, atol=1e-4)


def test_copies_pickles_and_no_warnings(device):
    ours, theirs = pair(3, 5, torch.float32, device, num_layers=2, bidirectional=True)
    x = torch.randn(4, 2, 3, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.double().float()):
            torch.testing.assert_close(module(x), theirs(x), rtol=1e-3, atol=1e-4)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert all(p.abs().max() <= 5**-0.5 for p in fused.RNN(3, 5).parameters())


def test_weights_are_cast_in_one_launch_and_their_gradients_back(device):
    """With derivatives of every order and kind."""
    tensors = [torch.randn(*n, dtype=torch.float64, device=device, requires_grad=True) for n in ((3, 4), (2,), (2,))]
    frozen = [*tensors[:2], tensors[2].detach()]
    for given in (tensors, frozen):
        with profile() as profiler:
            results = cast_all(given, torch.float32)
        names = {event.key: event.count for event in profiler.key_averages()}
        assert names["aten::_foreach_copy_"] == 1 and "aten::to" not in names
        for result, tensor in zip(results, given, strict=True):
            assert torch.equal(result, tensor.float()) and result.requires_grad == tensor.requires_grad
    (gradient,) = torch.autograd.grad(sum((r**3).sum() for r in cast_all(tensors, torch.float32)), tensors[:1])
    torch.testing.assert_close(gradient, (3 * tensors[0] ** 2).float().double())
    assert gradient.dtype == torch.float64

    def cubes(*tensors):
        return [t.double() ** 3 for t in cast_all(tensors, torch.float32)]

    inner = torch.autograd.grad(sum(y.sum() for y in cubes(*tensors)), tensors, create_graph=True)
    outer = torch.autograd.grad(sum(g.sum() for g in inner), tensors)
    for second, tensor in zip(outer, tensors, strict=True):
        torch.testing.assert_close(second, 6 * tensor, rtol=1e-5, atol=1e-5)
    each = [t.detach()[:2] for t in tensors]
    torch.testing.assert_close(vmap(cubes)(*each), [t**3 for t in each], rtol=1e-5, atol=1e-5)
    assert cast_all(tensors, torch.float64) is tensors
    mixed = cast_all([tensors[0], tensors[1].float()], torch.float32)
    assert [t.dtype for t in mixed] == [torch.float32] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, device):
    """In the dtype that was asked for: cuDNN's RNN takes fp16 for both."""
    ours, _ = pair(3, 5, torch.float32, device, num_layers=2)
    x = torch.randn(4, 2, 3, device=device)
    with torch.autocast(device, dtype):
        output, h_n = ours(x, torch.randn(2, 2, 5, device=device))
    assert output.dtype == h_n.dtype == dtype
    output.sum().backward()
    assert ours.weight_hh_l0.grad is not None and ours.weight_hh_l0.grad.dtype == torch.float32


def test_per_sample_gradients_ensembles_and_hessians(device):
    module = fused.RNN(2, 3, bidirectional=True).to(device)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss(params, x):
        return functional_call(module, params, (x,))[0].square().sum()

    x = torch.randn(5, 4, 2, device=device)
    together = vmap(grad(loss), (None, 0))(params, x)
    for i in range(5):
        alone = grad(loss)(params, x[i])
        for name in params:
            torch.testing.assert_close(together[name][i], alone[name])
    members = [fused.RNN(2, 3).to(device) for _ in range(3)]
    stacked, _ = stack_module_state(members)
    outputs = vmap(lambda p: functional_call(members[0], p, (x[0],))[0])(stacked)
    torch.testing.assert_close(outputs, torch.stack([m(x[0])[0] for m in members]))

    def scalar(x):
        return module(x)[0].sum(0).tanh().sum()

    expected = torch.autograd.functional.hessian(scalar, x[0])
    torch.testing.assert_close(hessian(scalar)(x[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("effect", ["tanh", "relu_derivative", "tanh_derivative", "factor"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, effect, form):
    def tensor(*shape):
        return torch.randn(*shape, requires_grad=requires_grad)

    rows = (3, 2) if form == "dense" else (5,)
    offsets = None if form == "dense" else torch.tensor([0, 2, 4, 5])
    gate = tensor(*rows, 2, 4) if effect != "tanh" else None
    biases = (tensor(2, 4), tensor(2, 4))
    arguments = (tensor(*rows, 2, 4), *biases, gate, tensor(2, 2, 4), tensor(2, 4, 4), offsets, 2, effect, True, False)
    torch.library.opcheck(torch.ops.backstride.rnn_scan.default, arguments, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_functions_take_torchs_arguments(nonlinearity, device):
    """Dense and packed, by position and by keyword."""
    ours, _ = pair(3, 5, torch.float32, device, nonlinearity=nonlinearity)
    function, reference = getattr(fused, f"rnn_{nonlinearity}"), getattr(torch, f"rnn_{nonlinearity}")
    params, hx = list(ours.parameters()), torch.randn(1, 2, 5, device=device)
    dense = {
        "hx": hx,
        "params": params,
        "has_biases": True,
        "num_layers": 1,
        "dropout": 0.0,
        "train": False,
        "bidirectional": False,
    }
    x = torch.randn(2, 4, 3, device=device)
    expected = reference(x, *dense.values(), True)
    torch.testing.assert_close(function(x, *dense.values(), True), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(function(x, **dense, batch_first=True), expected, rtol=1e-3, atol=1e-4)
    data, sizes = torch.randn(3, 3, device=device), torch.tensor([2, 1])
    expected = reference(data, sizes, *dense.values())
    torch.testing.assert_close(function(data, sizes, *dense.values()), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(function(data, batch_sizes=sizes, **dense), expected, rtol=1e-3, atol=1e-4)
    cell, cell_reference = getattr(fused, f"rnn_{nonlinearity}_cell"), getattr(torch, f"rnn_{nonlinearity}_cell")
    arguments = (x[0, :2], hx[0], *params)
    torch.testing.assert_close(cell(*arguments), cell_reference(*arguments), rtol=1e-3, atol=1e-4)


def test_hidden_state_carried_over_chunks(device):
    """Truncated backpropagation: chunk after chunk gives the outputs of the whole sequence."""
    ours, _ = pair(3, 5, torch.float32, device, num_layers=2)
    x = torch.randn(9, 2, 3, device=device)
    whole, last = ours(x)
    h, parts = None, []
    for chunk in x.split(4):
        part, h = ours(chunk, h)
        parts.append(part)
        h = h.detach()
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h, last, rtol=1e-4, atol=1e-5)


@settings
def test_unbatched(settings):
    ours, theirs = pair(3, 5, **settings)
    x = torch.randn(4, 3, dtype=torch.float64)
    hx = torch.randn(ours.num_layers * (1 + ours.bidirectional), 5, dtype=torch.float64)
    for arguments in ((x,), (x, hx)):
        torch.testing.assert_close(ours(*arguments), theirs(*arguments))


@pytest.mark.parametrize("interpreted", ["0", "1"], ids=["aten", "kernels"])
def test_torch_compile_without_graph_breaks(interpreted):
    run_python("-m", "tests.rnn_compiled", interpreted=interpreted)


def test_training_steps_are_torchs(device):
    """Losses of twenty steps from the same weights."""
    losses = []
    for module in pair(3, 8, torch.float32, device):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        history = []
        for _ in range(20):
            x = torch.randn(5, 4, 3).to(device)
            loss = (module(x)[0].mean(-1) - x.mean(-1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


def test_all_combinations_of_settings():
    """Against torch in fp64: nonlinearity x bias x order x directions x layers x hidden state."""
    for nonlinearity, bias, batch_first, bidirectional, layers, with_hx in itertools.product(
        ("tanh", "relu"), (True, False), (True, False), (True, False), (1, 2), (True, False)
    ):
        keywords = {"nonlinearity": nonlinearity, "bias": bias, "batch_first": batch_first}
        ours, theirs = pair(3, 4, bidirectional=bidirectional, num_layers=layers, **keywords)
        x = torch.randn(2, 3, 3, dtype=torch.float64)
        states = layers * (1 + bidirectional), 2 if batch_first else 3, 4
        arguments = (x, torch.randn(*states, dtype=torch.float64)) if with_hx else (x,)
        torch.testing.assert_close(ours(*arguments), theirs(*arguments))
