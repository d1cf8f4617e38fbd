import math

import numpy as np
import pytest
import torch
from backstride.models.data.cells import TouchingCells
from backstride.models.losses import border_weight_map, class_weights, weighted_cross_entropy
from scipy import ndimage


def random_case(dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(2, 4, 5, 6, generator=draw)).to(dtype)
    target = torch.randint(0, 4, (2, 5, 6), generator=draw)
    weight = torch.rand(2, 5, 6, generator=draw)
    return logits, target, weight


def by_hand(logits, target, weight, ignore_index=255):
    """Σ w (-log softmax) / Σ w, pixel by pixel in double precision."""
    total = norm = 0.0
    for n, y, x in np.ndindex(*target.shape):
        if target[n, y, x] != ignore_index:
            scores = [math.exp(float(value)) for value in logits[n, :, y, x]]
            total -= float(weight[n, y, x]) * math.log(scores[target[n, y, x]] / sum(scores))
            norm += float(weight[n, y, x])
    return total / norm


def test_weighted_cross_entropy_is_the_weighted_mean():
    logits, target, weight = random_case(torch.float64)
    loss = weighted_cross_entropy(logits, target, weight.double())
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(by_hand(logits, target, weight), rel=1e-12)


def test_without_weights_it_is_torchs_cross_entropy():
    logits, target, _ = random_case()
    torch.testing.assert_close(
        weighted_cross_entropy(logits, target), torch.nn.functional.cross_entropy(logits, target)
    )


def test_ignored_pixels_count_neither_in_the_sum_nor_in_the_norm():
    logits, target, weight = random_case()
    target[0, :3] = 255
    weight[0, :3] = 1e6
    loss = weighted_cross_entropy(logits.requires_grad_(), target, weight)
    assert loss.item() == pytest.approx(by_hand(logits.detach(), target, weight), rel=1e-6)
    loss.backward()
    assert (logits.grad[0, :, :3] == 0).all() and (logits.grad[0, :, 3:] != 0).any()


def test_another_ignore_index():
    logits, target, weight = random_case()
    loss = weighted_cross_entropy(logits, target, weight, ignore_index=2)
    assert loss.item() == pytest.approx(by_hand(logits, target, weight, ignore_index=2), rel=1e-6)


def test_a_batch_of_ignored_pixels_has_no_loss_and_no_gradient():
    logits, target, _ = random_case()
    loss = weighted_cross_entropy(logits.requires_grad_(), torch.full_like(target, 255))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_reduced_in_single_precision(dtype):
    logits, target, weight = random_case(dtype)
    loss = weighted_cross_entropy(logits, target, weight)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, weighted_cross_entropy(logits.float(), target, weight))


def test_loss_shape_errors():
    logits, target, weight = random_case()
    with pytest.raises(ValueError, match=r"\[2, 4, 5, 6\] and \[2, 5, 5\]"):
        weighted_cross_entropy(logits, target[..., 1:])
    with pytest.raises(ValueError, match=r"target's shape \[2, 5, 6\].* is \[2, 5, 5\]"):
        weighted_cross_entropy(logits, target, weight[..., 1:])


def test_class_weights_balance_the_classes_over_the_whole_set():
    masks = [torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 0, 3, 255]])]
    weights = class_weights(masks, 4)
    # 7 pixels, of which 5, 1, 0 and 1 of each class; three classes occur.
    torch.testing.assert_close(weights, torch.tensor([7 / 15, 7 / 3, 0.0, 7 / 3]))
    with pytest.raises(ValueError, match=r"0 … 2 .*range from 0 to 3"):
        class_weights(masks, 3)


def border_term_by_hand(mask, w0, sigma):
    """Equation 2 with exact distances to every cell, over the whole image."""
    cells, count = ndimage.label(mask)
    distances = np.sort([ndimage.distance_transform_edt(cells != number + 1) for number in range(count)], axis=0)
    return np.where(mask == 0, w0 * np.exp(-((distances[0] + distances[1]) ** 2) / (2 * sigma**2)), 0)


@pytest.mark.parametrize(("w0", "sigma"), [(10.0, 5.0), (3.0, 2.0), (100.0, 9.0)])
def test_border_weights_are_equation_2(w0, sigma):
    mask = TouchingCells(1, (150, 180), seed=5)[0][1]
    ones = torch.ones(2)
    weights = border_weight_map(mask, 2, w0, sigma, weights=ones)
    assert weights.dtype == torch.float32 and weights.shape == mask.shape
    expected = 1 + border_term_by_hand(mask.numpy(), w0, sigma)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)


def test_border_weight_between_two_cells_by_hand():
    mask = torch.zeros(9, 20, dtype=torch.int64)
    mask[:, :8] = mask[:, 12:] = 1
    weights = border_weight_map(mask, 2, w0=10.0, sigma=5.0)
    balance = {0: 180 / (2 * 36), 1: 180 / (2 * 144)}
    # Column 9 is 2 pixels from the left cell and 3 from the right one.
    assert weights[4, 9].item() == pytest.approx(balance[0] + 10 * math.exp(-(5**2) / 50))
    assert weights[4, 3].item() == pytest.approx(balance[1])


@pytest.mark.parametrize("cells", [0, 1])
def test_fewer_than_two_cells_have_no_border_term(cells):
    mask = torch.zeros(30, 30, dtype=torch.int64)
    mask[5 : 5 + 10 * cells, 5:9] = 1
    weights = border_weight_map(mask, 2, weights=torch.tensor([2.0, 3.0]))
    assert torch.equal(weights, torch.tensor([2.0, 3.0])[mask])


def test_cells_that_meet_at_a_corner_are_two():
    mask = torch.zeros(6, 6, dtype=torch.int64)
    mask[:3, :3] = mask[3:, 3:] = 1
    weights = border_weight_map(mask, 2, weights=torch.ones(2))
    assert weights[2, 3].item() == pytest.approx(1 + 10 * math.exp(-(2**2) / 50))


def test_touching_cells_of_different_classes_are_two():
    mask = torch.tensor([[0, 1, 1, 2, 2, 0]])
    weights = border_weight_map(mask, 3, weights=torch.ones(3))
    assert weights[0, 0].item() == pytest.approx(1 + 10 * math.exp(-(4**2) / 50))


def test_ignored_pixels_weigh_nothing_and_are_no_cell():
    mask = torch.zeros(12, 12, dtype=torch.int64)
    mask[:, :3] = 1
    mask[:, 6:9] = 255
    weights = border_weight_map(mask, 2)
    assert (weights[:, 6:9] == 0).all()
    assert weights[:, 4].unique().tolist() == pytest.approx([108 / (2 * 72)])


def test_weight_map_errors():
    mask = torch.zeros(4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[H, W\], but its shape is \[1, 4, 4\]"):
        border_weight_map(mask[None], 2)
    with pytest.raises(ValueError, match=r"0 … 1 .*range from 7 to 7"):
        border_weight_map(mask + 7, 2)
    with pytest.raises(ValueError, match=r"shape \[2\], not \[3\]"):
        border_weight_map(mask, 2, weights=torch.ones(3))
