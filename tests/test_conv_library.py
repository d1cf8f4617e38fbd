"""Dense convolutions, whose products are cuDNN's on a GPU: what is chosen, and the passes that stand around them."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backstride import fused_ops as fused
from backstride.fused_ops import dispatch
from backstride.fused_ops.conv import aten, functional, ops
from backstride.fused_ops.pool import functional as pool_functional
from backstride.fused_ops.pool import ops as pool_ops
from backstride.kernels import conv as kernels
from backstride.kernels.conv import Geometry, launch
from backstride.kernels.runtime import H200, INTERPRETED, Device, layout_of
from backstride.kernels.tf32 import round_contiguous, round_to_tf32, three_axes
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import profile

from .modes import kernels_run
from .oracle import assert_as_exact_as, both_layouts, check_forward_and_gradients, random_tensors

pytestmark = kernels_run

SHAPES = [(2, 5, 7, 9), (1, 64, 16, 16), (3, 130, 4, 4), (2, 3, 50), (1, 8, 3, 4, 5), (4, 7, 1, 1), (2, 1, 33, 17)]
DTYPES = [torch.float32, torch.bfloat16]


def launches(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """The names of these functions of the kernels, as they are called."""
    called: list[str] = []

    def spy(name: str):
        function = getattr(kernels, name)

        def call(*arguments, **keywords):
            called.append(name)
            return function(*arguments, **keywords)

        monkeypatch.setattr(kernels, name, call)

    for name in names:
        spy(name)
    return called


def geometry(axes: int, stride: int = 1, padding: int = 1, dilation: int = 1, groups: int = 1) -> Geometry:
    return Geometry((stride,) * axes, (padding,) * axes, (dilation,) * axes, groups)


@pytest.mark.parametrize(
    ("kernel", "settings", "transposed", "better"),
    [
        ((3, 3), {}, False, True),
        ((3, 3), {"stride": 2}, False, True),
        ((3, 3), {}, True, True),
        ((3, 3), {"stride": 2}, True, False),
        ((1, 1), {"dilation": 2}, False, True),
        # For d = 6 less than a quarter of the taps lies outside of the 33x33 pixels, for d = 12 almost half.
        ((3, 3), {"dilation": 6, "padding": 6}, False, True),
        ((3, 3), {"dilation": 6, "padding": 6}, True, True),
        ((3, 3), {"dilation": 12, "padding": 12}, False, False),
        ((3, 3), {"dilation": 12, "padding": 12}, True, False),
        # None lies outside, but cuDNN has no kernel for Hopper.
        ((7, 7), {"dilation": 4, "padding": 0}, False, False),
    ],
)
def test_which_products_are_the_librarys(kernel, settings, transposed, better, library):
    x = torch.empty(1, 64, 33, 33, dtype=torch.bfloat16)
    assert aten.is_better(x, kernel, geometry(2, **settings), transposed) is better


def test_weight_gradients_of_odd_channels_are_the_librarys(library):
    far = geometry(2, dilation=24, padding=24)
    for channels, y_channels, better in ((64, 64, False), (64, 21, True), (21, 64, True), (12, 20, False)):
        x = torch.empty(1, channels, 41, 41)
        assert aten.is_better(x, (3, 3), far, y_channels=y_channels) is better
        assert not aten.is_better(x, (3, 3), far)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "forward", "weight_grad"),
    [(1, False, False), (4, None, None), (8, True, True), (16, False, True), (32, False, True), (64, False, False)],
)
def test_which_groups_are_the_librarys(channels, forward, weight_grad, form, library):
    """None: where their channels are innermost."""
    x = torch.empty(1, 2 * channels, 8, 8).to(memory_format=form)
    for settings in ({}, {"stride": 2}, {"dilation": 2}):
        shape = geometry(2, groups=2, **settings)
        usual = not settings
        innermost = form == torch.channels_last and channels > 1
        expected = [usual and (innermost if each is None else each) for each in (forward, forward, weight_grad)]
        assert aten.is_better_forward(False, x, (3, 3), shape) is expected[0]
        assert aten.is_better_forward(True, x, (3, 3), shape) is expected[1]
        assert aten.is_better(x, (3, 3), shape, y_channels=2 * channels) is expected[2]


@given(
    st.lists(
        st.tuples(*(st.integers(*limits) for limits in ((1, 12), (1, 4), (1, 3), (0, 4), (1, 4)))),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_share_of_taps_in_the_padding(axes, transposed):
    met = 1.0
    for size, kernel, stride, padding, dilation in axes:
        span = dilation * (kernel - 1) + 1
        wide = (size - 1) * stride + span - 2 * padding if transposed else size
        narrow = size if transposed else (size + 2 * padding - span) // stride + 1
        assume(wide > 0 and narrow > 0)
        pairs = itertools.product(range(narrow), range(kernel))
        met *= sum(0 <= stride * o + dilation * r - padding < wide for o, r in pairs) / (narrow * kernel)
    assert aten.skipped_share(*zip(*axes, strict=True), int(transposed)) == pytest.approx(1 - met)


def test_along_one_axis_only_products_of_32_bits_are_the_librarys(library):
    for dtype, dense in ((torch.float32, True), (torch.bfloat16, False)):
        assert aten.is_better(torch.empty(1, 64, 8, dtype=dtype), (3,), geometry(1)) is dense
        assert aten.is_better(torch.empty(1, 64, 8), (3,), geometry(1), dtype=dtype) is dense


def test_few_channels_are_convolved_here(library):
    for channels, better in ((3, False), (16, True)):
        assert aten.is_better_forward(False, torch.empty(1, channels, 8, 8), (3, 3), geometry(2)) is better


def test_explain_says_that_the_products_are_the_librarys(library):
    x, weight = torch.empty(1, 16, 8, 8), torch.empty(16, 16, 3, 3)
    assert fused.explain(fused.conv2d, x, weight) == functional.LIBRARY
    assert fused.explain(fused.conv2d, x, weight, dilation=3, padding=3) != functional.LIBRARY
    assert fused.explain(fused.conv2d, x, weight, out=torch.empty(1, 16, 6, 6)) != functional.LIBRARY


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(("bias", "residual", "relu"), [*itertools.product([True, False], repeat=3)])
def test_forward_and_gradients(library, monkeypatch, bias, residual, relu, staged, device):
    if staged:
        monkeypatch.setattr(aten, "is_better_channels_last", lambda *_: True)
    called = launches(monkeypatch, "apply", "apply_transposed", "weight_grad", "add_epilogue", "from_channels_last")
    x, w, b, r = random_tensors(0, (2, 16, 7, 9), (5, 16, 3, 3), (5,), (2, 5, 4, 5), dtype=torch.float32, device=device)
    for x_, w_, r_ in both_layouts(x, w, r):
        tensors = [t.requires_grad_() for t in (x_, w_, *([b] if bias else []), *([r_] if residual else []))]

        def split(tensors):
            x, w, *rest = tensors
            return x, w, rest.pop(0) if bias else None, rest.pop(0) if residual else None

        def ours(*tensors):
            x, w, b, r = split(tensors)
            return fused.conv2d(x, w, b, 2, 1, activation="relu" if relu else None, residual=r)

        def theirs(*tensors):
            x, w, b, r = split(tensors)
            y = F.conv2d(x, w, b, 2, 1)
            y = y if r is None else y + r
            return y.relu() if relu else y

        y, expected = check_forward_and_gradients(ours, theirs, tensors)
        assert y.stride() == expected.stride()
    # Nothing is launched around a product alone; the op's own input gradient, of a stride, is no dense product.
    expected = {"add_epilogue", *(["from_channels_last"] if staged else [])} if residual or relu else set()
    assert set(called) == expected | ({"apply_transposed"} if residual else set())


def cudnn_relu(loses_nan: bool):
    """In the place of cuDNN's kernel, on any device."""

    def relu(x, weight, bias, geometry):
        y = F.conv2d(x, weight, bias, *geometry).relu()
        return y.nan_to_num() if loses_nan else y

    return relu


@pytest.fixture
def cudnn(library, monkeypatch):
    monkeypatch.setattr(aten, "has_cudnn_relu", lambda _: True)
    monkeypatch.setattr(aten, "_keeps_nan", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(aten, "_cudnn_relu", cudnn_relu(loses_nan=False))


def test_cudnns_relu_is_used_once_it_is_known_to_keep_nan(cudnn, monkeypatch):
    called = launches(monkeypatch, "add_epilogue")
    x, w, b = random_tensors(16, (1, 16, 6, 6), (8, 16, 3, 3), (8,), dtype=torch.float32)
    expected = F.conv2d(x, w, b, padding=1).relu()
    for calls in (1, 2, 2, 2):
        torch.testing.assert_close(fused.conv2d(x, w, b, padding=1, activation="relu"), expected)
        assert len(called) == calls
    fused.conv2d(x[:, :, 1:], w, b, padding=1, activation="relu")
    assert len(called) == 3  # another layer
    fused.conv2d(x, w, b, padding=1, activation="relu", residual=expected)
    assert len(called) == 4  # cuDNN's epilogue has no residual in front of the ReLU here


def test_nothing_is_tried_while_a_graph_is_captured(cudnn, monkeypatch):
    """The answer would have to be waited for."""
    called = launches(monkeypatch, "add_epilogue")
    x, w = random_tensors(16, (1, 16, 6, 6), (8, 16, 3, 3), dtype=torch.float32)
    for capturing, calls in ((True, 4), (False, 4), (True, 4)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        for _ in range(4):
            fused.conv2d(x, w, activation="relu")
        assert len(called) == calls


def test_cudnns_relu_that_loses_nan_is_not_used(cudnn, monkeypatch):
    monkeypatch.setattr(aten, "_cudnn_relu", cudnn_relu(loses_nan=True))
    x, w = random_tensors(17, (1, 16, 6, 6), (8, 16, 1, 1), dtype=torch.float32)
    x[0, 3, 2, 2] = torch.nan
    for _ in range(5):
        assert fused.conv2d(x, w, activation="relu").isnan().sum() == 8


def test_layers_that_never_come_again_are_forgotten(cudnn, monkeypatch):
    monkeypatch.setattr(aten, "MOST_LAYERS", 3)
    (w,) = random_tensors(18, (8, 16, 1, 1), dtype=torch.float32)
    for size in range(1, 9):
        fused.conv2d(torch.ones(1, 16, size, size), w, activation="relu")
        assert 0 < len(aten._keeps_nan) <= 3


def test_cudnn_without_a_kernel_for_a_layer(cudnn, monkeypatch):
    def refuse(*_):
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr(aten, "_cudnn_relu", refuse)
    x, w = random_tensors(18, (1, 16, 6, 6), (8, 16, 1, 1), dtype=torch.float32)
    for _ in range(4):
        torch.testing.assert_close(fused.conv2d(x, w, activation="relu"), F.conv2d(x, w).relu())


@pytest.mark.parametrize("case", ["stride", "asymmetric", "misaligned", "3-D"])
def test_what_cudnns_relu_is_asked_for(case, cudnn, monkeypatch):
    called = launches(monkeypatch, "add_epilogue")
    axes = 3 if case == "3-D" else 2
    x, w = random_tensors(19, (1, 16, *[6] * axes), (8, 16, *[2] * axes), dtype=torch.float32)
    settings: dict = {"stride": 2} if case == "stride" else {"padding": "same"} if case == "asymmetric" else {}
    if case == "misaligned":
        x = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    conv, theirs = (fused.conv3d, F.conv3d) if axes == 3 else (fused.conv2d, F.conv2d)
    for _ in range(4):
        torch.testing.assert_close(conv(x, w, activation="relu", **settings), theirs(x, w, **settings).relu())
    assert len(called) == (2 if case == "stride" else 4)


def test_a_deterministic_run_has_no_cudnn_relu(monkeypatch):
    class OnGPU:
        is_cuda = True

    x: Any = OnGPU()
    assert aten.has_cudnn_relu(x)
    torch.use_deterministic_algorithms(True)
    try:
        assert not aten.has_cudnn_relu(x)
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_through_little_data_are_torchs(library, monkeypatch):
    """And through more the kernels', with the same results."""
    called = launches(monkeypatch, "add_epilogue", "apply_transposed", "epilogue_grad")
    pools, real_pool = [], pool_ops.max_pool
    monkeypatch.setattr(pool_ops, "max_pool", lambda *a: pools.append(a) or real_pool(*a))
    x, skip, w, up, b = random_tensors(
        20, (1, 16, 4, 4), (1, 3, 8, 8), (16, 16, 3, 3), (16, 5, 2, 2), (5,), dtype=torch.float32
    )
    for tensor in (x, skip, w, up, b):
        tensor.requires_grad_()

    def results():
        y = fused.conv2d(x, w, padding=1, activation="relu")
        return y, fused.max_pool2d(y, 2), fused.conv_transpose2d_concat(y, skip, up, b, 2, activation="relu")

    def gradients(results):
        return torch.autograd.grad(sum(y.square().sum() for y in results), (x, skip, w, up, b))

    with_kernels = results()
    expected = gradients(with_kernels)
    assert {"add_epilogue", "apply_transposed", "epilogue_grad"} <= set(called) and len(pools) == 1
    called.clear()
    for module in (functional, pool_functional):
        monkeypatch.setattr(module, "is_short", lambda numbers, *tensors: True)
    assert (
        fused.explain(fused.max_pool2d, x, 2)
        == fused.explain(fused.conv_transpose2d_concat, x, skip, up, b, 2)
        == dispatch.BY_AUTOGRAD
    )
    by_torch = results()
    torch.testing.assert_close(by_torch, with_kernels)
    torch.testing.assert_close(gradients(by_torch), expected, rtol=1e-4, atol=1e-3)
    assert not called and len(pools) == 1


def test_what_is_little_data(monkeypatch):
    monkeypatch.setattr(dispatch, "SHORT", 100)

    class OnGPU:
        dtype, is_cuda, requires_grad = torch.bfloat16, True, True

    x: Any = OnGPU()
    assert dispatch.is_short(50, x) and not dispatch.is_short(51, x)
    assert not dispatch.is_short(50, torch.empty(1, requires_grad=True))
    with torch.no_grad():
        assert not dispatch.is_short(50, x)
    x.requires_grad = False
    assert not dispatch.is_short(50, x, None, torch.empty(1))
    assert dispatch.is_short(50, x, torch.empty(1, requires_grad=True))


def test_same_padding_of_an_even_kernel(library, device):
    tensors = random_tensors(1, (1, 16, 6, 6), (3, 16, 2, 2), dtype=torch.float32, device=device)
    check_forward_and_gradients(
        lambda x, w: fused.conv2d(x, w, padding="same"),
        lambda x, w: F.conv2d(x, w, padding="same"),
        [t.requires_grad_() for t in tensors],
    )


def test_derivatives_of_any_order_and_kind(library):
    x, w, b = (t.requires_grad_() for t in random_tensors(2, (1, 16, 2, 2), (1, 16, 2, 2), (1,)))

    def conv(x, w, b):
        return fused.conv2d(x, w, b, padding=1, activation="relu")

    assert torch.autograd.gradcheck(conv, (x, w, b), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(conv, (x, w, b), fast_mode=True)
    batch = torch.stack([x.detach(), 2 * x.detach()])
    each = torch.stack([conv(x, w, b) for x in batch])
    torch.testing.assert_close(torch.vmap(conv, (0, None, None))(batch, w, b), each)


def test_compiles_without_a_graph_break(library):
    x, w, b = (t.requires_grad_() for t in random_tensors(3, (1, 16, 4, 4), (2, 16, 3, 3), (2,), dtype=torch.float32))

    def loss(x, w, b):
        return fused.conv2d(x, w, b, padding=1, activation="relu").square().sum()

    expected = torch.autograd.grad(loss(x, w, b), (x, w, b))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, w, b), (x, w, b)), expected)


def test_autocast_casts_before_it_chooses(monkeypatch, device):
    """A network's second layer meets a bf16 input and a weight in fp32."""
    called = launches(monkeypatch, "apply", "apply_transposed")
    x, skip, w, b = random_tensors(
        4, (1, 8, 4, 4), (1, 3, 8, 8), (8, 8, 2, 2), (8,), dtype=torch.float32, device=device
    )
    low = x.bfloat16()
    with torch.autocast(device, torch.bfloat16):
        assert fused.explain(fused.conv2d, low, w, b).name != "aten"
        results = [
            fused.conv2d(low, w, b),
            fused.conv_transpose2d(low, w, b, 2),
            fused.conv_transpose2d_concat(low, skip, w, b, 2),
        ]
    assert called == ["apply", "apply_transposed", "apply_transposed"]
    assert all(y.dtype == torch.bfloat16 for y in results)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_autocast_casts_once(activation, library, device):
    """What goes to torch's own convolution is cast by it."""
    x, w, b = random_tensors(5, (1, 16, 4, 4), (4, 16, 3, 3), (4,), dtype=torch.float32, device=device)
    with profile() as profiler, torch.autocast(device, torch.bfloat16):
        fused.conv2d(x, w, b, activation=activation)
    assert sum(event.count for event in profiler.key_averages() if event.key == "aten::_to_copy") == 3


def test_autocast_around_a_backward_leaves_its_dtype(library, device):
    x, w = random_tensors(5, (1, 16, 4, 4), (4, 16, 3, 3), dtype=torch.float32, device=device)
    y = fused.conv2d(x.requires_grad_(), w.requires_grad_(), padding=1)
    exact = torch.autograd.grad(y.sum(), (x, w), retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        gradients = torch.autograd.grad(y.sum(), (x, w))
    for gradient, expected in zip(gradients, exact, strict=True):
        assert torch.equal(gradient, expected)


def formats(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    (tensor,) = random_tensors(seed, shape, dtype=dtype, device=device)
    return [each for (each,) in both_layouts(tensor)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [False, True])
def test_epilogue(shape, dtype, relu, device):
    axes = [1] * (len(shape) - 2)
    (bias,) = random_tensors(6, (shape[1],), dtype=dtype, device=device)
    for product, residual in zip(formats(shape, dtype, device, 7), formats(shape, dtype, device, 8), strict=True):
        for b, r in itertools.product((None, bias), (None, residual)):
            y = product.clone()
            kernels.add_epilogue(y, b, r, relu=relu)
            exact = product.double()
            exact = exact if b is None else exact + b.double().view(-1, *axes)
            exact = exact if r is None else exact + r.double()
            exact = (exact.relu() if relu else exact).cpu()
            assert_as_exact_as(y, exact.to(dtype), exact, exact.abs())
            assert y.stride() == product.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_through_the_epilogue(shape, dtype, device):
    """In one pass over tensors that are slices too, into memory full of NaN."""
    wide = (shape[0], 2 * shape[1], *shape[2:])
    for grads, y in zip(formats(wide, dtype, device, 9), formats(shape, dtype, device, 10), strict=True):
        for grad in (grads[:, shape[1] :], torch.empty_like(y).copy_(grads[:, : shape[1]])):
            before = torch.full_like(y, torch.nan)
            if kernels.channels_are_lanes(*map(layout_of, (grad, y, before))) is None:
                assert shape[1] == 1  # one channel of two, channels_last: nothing lies side by side
                continue
            sums = kernels.epilogue_grad(grad, y, before, sums=True)
            assert sums is not None
            expected = torch.ops.aten.threshold_backward(grad, y, 0)
            assert torch.equal(before, expected)
            axes = [0, *range(2, grad.dim())]
            exact = expected.double().sum(axes).cpu()
            assert_as_exact_as(sums, expected.sum(axes), exact, expected.abs().double().sum(axes).cpu())
            assert kernels.epilogue_grad(grad, y, before, sums=False) is None
            assert torch.equal(before, expected)
            sums = kernels.epilogue_grad(grad, None, None, sums=True)
            exact = grad.double().sum(axes).cpu()
            assert sums is not None
            assert_as_exact_as(sums, grad.sum(axes), exact, grad.abs().double().sum(axes).cpu())
            before.fill_(torch.nan)
            again = kernels.epilogue_grad(grad, None, before, sums=True)
            assert again is not None and torch.equal(again, sums) and torch.equal(before, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_copy_into_a_slice(shape, dtype, device, monkeypatch):
    monkeypatch.setattr(kernels.epilogue, "LITTLE", 0)
    wide = (shape[0], 3 * shape[1], *shape[2:])
    part = slice(shape[1], 2 * shape[1])
    for x, y in itertools.product(formats(shape, dtype, device, 22), formats(wide, dtype, device, 23)):
        expected = y.clone()
        expected[:, part] = x
        kernels.copy(x, y[:, part])
        assert torch.equal(y, expected)


def test_gradient_of_a_concatenation_is_made_dense_once(library, monkeypatch, device):
    """Where cuDNN computes both gradients, which reads no slices."""
    seen, real = [], aten.weight_grad
    monkeypatch.setattr(aten, "weight_grad", lambda x, *rest: seen.append(x) or real(x, *rest))
    tensors = random_tensors(24, (2, 16, 3, 3), (2, 3, 6, 6), (16, 16, 2, 2), (16,), dtype=torch.float32, device=device)
    for x, skip in both_layouts(*tensors[:2]):
        x, skip, w, b = (t.requires_grad_() for t in (x, skip, *tensors[2:]))
        for relu in (False, True):
            y = fused.conv_transpose2d_concat(x, skip, w, b, 2, activation="relu" if relu else None)
            up = F.conv_transpose2d(x, w, b, 2)
            expected = torch.cat([skip, up.relu() if relu else up], 1)
            torch.testing.assert_close(y, expected)
            grad = torch.randn_like(y)
            ours = torch.autograd.grad(y, (x, skip, w, b), grad)
            torch.testing.assert_close(ours, torch.autograd.grad(expected, (x, skip, w, b), grad))
            innermost = y.is_contiguous(memory_format=torch.channels_last)
            assert not innermost or seen[-1].is_contiguous(memory_format=torch.channels_last)
    assert len(seen) == 4


def test_nan_passes_the_epilogue_and_its_gradient(device):
    y = torch.tensor([torch.nan, -1.0, 2.0], device=device).view(1, 3, 1, 1)
    kernels.add_epilogue(y, torch.ones(3, device=device), None, relu=True)
    assert y.flatten().isnan().tolist() == [True, False, False]
    before = torch.empty_like(y)
    kernels.epilogue_grad(torch.ones_like(y), y, before, sums=False)
    assert before.flatten().tolist() == [1.0, 0.0, 1.0]


def test_gradient_goes_one_way_with_kernels_and_another_under_a_second_derivative(monkeypatch, device):
    called = launches(monkeypatch, "epilogue_grad")
    dtype = torch.float64 if INTERPRETED and device == "cpu" else torch.float32
    tensors = random_tensors(11, (1, 4, 5, 5), (4, 4, 3, 3), (4,), dtype=dtype, device=device)
    x, w, b = (t.requires_grad_() for t in tensors)
    y = fused.conv2d(x, w, b, activation="relu")
    first = torch.autograd.grad(y.square().sum(), (x, w, b), create_graph=True)
    assert not called
    again = torch.autograd.grad(fused.conv2d(x, w, b, activation="relu").square().sum(), (x, w, b))
    assert called == ["epilogue_grad"]
    torch.testing.assert_close(first, again)


def test_a_bias_that_is_not_contiguous(library, device):
    """Behind the library's products, too."""
    x, w, b = random_tensors(12, (2, 16, 5, 5), (4, 16, 3, 3), (8,), dtype=torch.float32, device=device)
    y = fused.conv2d(x, w, b[::2], activation="relu")
    torch.testing.assert_close(y, F.conv2d(x, w, b[::2]).relu(), rtol=1e-3, atol=1e-3)
    assert fused.explain(fused.conv2d, x, w, b[::2]) is functional.LIBRARY


def test_expanded_gradient(device):
    x, w, b = random_tensors(12, (2, 4, 5, 5), (4, 4, 3, 3), (4,), dtype=torch.float32, device=device)
    grads = [torch.autograd.grad(f(x, w, b.requires_grad_(), padding=1).sum(), b)[0] for f in (fused.conv2d, F.conv2d)]
    torch.testing.assert_close(*grads)


def test_many_partial_sums_are_added_in_order(monkeypatch, device):
    """More blocks of pixels than programs: runs are bitwise equal, and nothing is left out."""
    monkeypatch.setattr(kernels.epilogue, "device_of", lambda _: Device(1, H200.shared_memory))
    grad = torch.ones(3, 2, 101, 103, device=device)
    sums = [kernels.epilogue_grad(grad, None, None, sums=True) for _ in range(2)]
    assert all(torch.equal(s, torch.full((2,), 3 * 101 * 103.0, device=device)) for s in sums if s is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_staging_of_channels_first_tensors(library, monkeypatch, dtype):
    called = launches(monkeypatch, "apply", "add_epilogue", "from_channels_last")
    x, w, b = random_tensors(13, (2, 64, 33, 31), (64, 64, 3, 3), (64,), dtype=dtype, device="cuda")
    for x_, w_ in both_layouts(x, w):
        y = fused.conv2d(x_, w_, b, padding=1, activation="relu")
        exact = F.conv2d(x.double(), w.double(), b.double(), padding=1).relu().cpu()
        scale = F.conv2d(x.double().abs(), w.double().abs(), b.double().abs(), padding=1).cpu()
        assert_as_exact_as(y, F.conv2d(x_, w_, b, padding=1).relu(), exact, scale)
    assert called == ["from_channels_last", "add_epilogue", "add_epilogue"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16, 16, 8, 1), (2, 256, 64, 20, 1), (2, 64, 128, 16, 3)])
def test_nan_passes_relu(shape, dtype, library):
    """From the first call on, and after cuDNN's epilogue was tried; in TF32 the one for 256 channels loses it."""
    batch, channels, out_channels, size, kernel = shape
    x, w = random_tensors(
        21, (batch, channels, size, size), (out_channels, channels, kernel, kernel), dtype=dtype, device="cuda"
    )
    x[0, 0, 3, 3] = torch.nan
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        for x_, w_ in both_layouts(x, w):
            exact = F.conv2d(x_.double(), w_.double(), padding=kernel // 2).relu()
            for _ in range(aten.SIGHTINGS + 2):
                y = fused.conv2d(x_, w_, padding=kernel // 2, activation="relu")
                torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2 * channels**0.5, equal_nan=True)


@pytest.mark.gpu
def test_rounding_to_tf32_keeps_products_unbiased():
    """Cut off instead, every product would be too small by 7e-4 on average."""
    x, w = (t.abs() for t in random_tensors(14, (1, 256, 32, 32), (256, 64, 2, 2), dtype=torch.float32, device="cuda"))
    exact = F.conv_transpose2d(x.double(), w.double(), stride=2)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        y = fused.conv_transpose2d(x, w, stride=2)
        dilated = fused.conv2d(x, w[:, :, :1, :1].reshape(64, 256, 1, 1).expand(-1, -1, 3, 3), padding=2, dilation=2)
    assert abs((y.double() / exact - 1).mean().item()) < 2e-5
    exact = F.conv2d(
        x.double(), w[:, :, :1, :1].reshape(64, 256, 1, 1).expand(-1, -1, 3, 3).double(), padding=2, dilation=2
    )
    assert abs((dilated.double() / exact - 1).mean().item()) < 2e-5


def test_operands_are_rounded_to_tf32():
    x = torch.tensor([1 + 2**-11, 1 + 2**-11 - 2**-20, -1 - 3 * 2**-11, torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    x = torch.cat([x, torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)])
    y = round_to_tf32(x)
    expected = torch.tensor(
        [1 + 2**-10, 1.0, -1 - 2**-9, torch.inf, -torch.inf, torch.nan, 0.0, -0.0, torch.nan, torch.nan]
    )
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    wide = torch.randn(3, 4, 5, 6)[:, 1:, :, ::2]
    assert torch.equal(round_to_tf32(wide), round_to_tf32(wide.contiguous()))


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1), (2, 3, 1, 0), (3, 1, 0, 2)])
@pytest.mark.parametrize("shape", [(5, 3, 2, 4), (40, 30, 3, 1), (1, 7, 1, 1), (1, 1, 1, 1)])
def test_permuted_operands_are_rounded_in_one_pass(shape, axes, device):
    (x,) = random_tensors(25, shape, dtype=torch.float32, device=device)
    expected = round_to_tf32(x).permute(axes)
    for y in (round_contiguous(x.permute(axes)), launch.prepare_weight(x, axes, rounds=True)):
        assert y.is_contiguous() and torch.equal(y, expected)


def test_a_tensor_seen_with_three_axes():
    weight = torch.empty(5, 3, 2, 4)
    for axes, expected in (
        ((0, 2, 3, 1), (8, 3, 24, 1, 8)),
        ((2, 3, 1, 0), (3, 5, 1, 8, 24)),
        ((0, 1, 2, 3), (1, 120, 0, 0, 1)),
        ((3, 1, 0, 2), None),
    ):
        view = weight.permute(axes)
        assert three_axes(view.shape, view.stride()) == expected


def test_weight_gradient_of_the_library_for_asymmetric_padding(library, device):
    """A kernel of two taps with "same" padding, whose zeros stand behind only."""
    x, y = random_tensors(15, (1, 16, 6, 6), (1, 3, 6, 6), device="cpu")
    ours = ops.conv_weight_grad(x, y, (2, 2), (1, 1), (0, 0), (1, 1), 1)
    w = torch.zeros(3, 16, 2, 2, dtype=torch.float64, requires_grad=True)
    (theirs,) = torch.autograd.grad(F.conv2d(x, w, padding="same"), w, y)
    torch.testing.assert_close(ours, theirs)
