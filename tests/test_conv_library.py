"""Dense convolutions, whose products are cuDNN's on a GPU: what is chosen, and the passes that stand around them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from backstride import fused_ops as fused
from backstride.fused_ops.conv import aten, functional, ops
from backstride.kernels import conv as kernels
from backstride.kernels.conv import Geometry
from backstride.kernels.conv.access import layout_of
from backstride.kernels.runtime import H200, INTERPRETED, Device
from backstride.kernels.tf32 import round_to_tf32
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


def geometry(axes: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> Geometry:
    return Geometry((stride,) * axes, (1,) * axes, (dilation,) * axes, groups)


@pytest.mark.parametrize(
    ("kernel", "settings", "transposed", "dense"),
    [
        ((3, 3), {}, False, True),
        ((3, 3), {"stride": 2}, False, True),
        ((3, 3), {}, True, True),
        ((3, 3), {"stride": 2}, True, False),
        ((3, 3), {"dilation": 2}, False, False),
        ((1, 1), {"dilation": 2}, False, True),
        ((3, 3), {"groups": 2}, False, False),
    ],
)
def test_products_without_gaps_zeros_and_groups_are_dense(kernel, settings, transposed, dense, library):
    x = torch.empty(1, 64, 8, 8, dtype=torch.bfloat16)
    assert aten.is_better(x, kernel, geometry(2, **settings), transposed) is dense


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
    assert fused.explain(fused.conv2d, x, weight, dilation=2, padding=2) != functional.LIBRARY
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
def test_nan_passes_relu(library):
    x = torch.ones(1, 16, 8, 8, dtype=torch.bfloat16, device="cuda").to(memory_format=torch.channels_last)
    x[0, 0, 3, 3] = torch.nan
    y = fused.conv2d(x, torch.ones(16, 16, 1, 1, dtype=torch.bfloat16, device="cuda"), activation="relu")
    assert y.isnan().sum() == 16


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


def test_weight_gradient_of_the_library_for_asymmetric_padding(library, device):
    """A kernel of two taps with "same" padding, whose zeros stand behind only."""
    x, y = random_tensors(15, (1, 16, 6, 6), (1, 3, 6, 6), device="cpu")
    ours = ops.conv_weight_grad(x, y, (2, 2), (1, 1), (0, 0), (1, 1), 1)
    w = torch.zeros(3, 16, 2, 2, dtype=torch.float64, requires_grad=True)
    (theirs,) = torch.autograd.grad(F.conv2d(x, w, padding="same"), w, y)
    torch.testing.assert_close(ours, theirs)
