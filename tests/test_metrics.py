import itertools
import math

import numpy as np
import pytest
import torch
from backstride.models.data.cells import TouchingCells
from backstride.models.data.folder import FolderSegmentation
from backstride.models.metrics import ConfusionMatrix, pixel_error, v_info, v_rand, v_scores
from scipy import ndimage


def counted(counts):
    """A ConfusionMatrix that has seen counts[i][j] pixels of true class i predicted as j."""
    scores = ConfusionMatrix(len(counts))
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            scores.update(torch.full((count,), j), torch.full((count,), i))
    return scores


def test_scores_by_hand():
    scores = counted([[6, 2], [1, 3]])
    assert scores.counts.tolist() == [[6, 2], [1, 3]]
    assert scores.pixel_accuracy() == pytest.approx(9 / 12)
    assert scores.mean_accuracy() == pytest.approx((6 / 8 + 3 / 4) / 2)
    assert scores.iou().tolist() == pytest.approx([6 / 9, 3 / 6])
    assert scores.mean_iou() == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert scores.frequency_weighted_iou() == pytest.approx((8 * 6 / 9 + 4 * 3 / 6) / 12)
    assert scores.dice().tolist() == pytest.approx([12 / 15, 6 / 9])
    assert scores.mean_dice() == pytest.approx((12 / 15 + 6 / 9) / 2)


def test_scores_are_those_of_pixel_sets():
    draw = torch.Generator().manual_seed(0)
    pred, target = torch.randint(0, 3, (2, 3, 20, 30), generator=draw)
    target[0, :7] = 255
    scores = ConfusionMatrix(3)
    for p, t in zip(pred, target, strict=True):
        scores.update(p, t)
    kept = [(int(p), int(t)) for p, t in zip(pred.flatten(), target.flatten(), strict=True) if t != 255]
    predicted = [{n for n, (p, _) in enumerate(kept) if p == c} for c in range(3)]
    true = [{n for n, (_, t) in enumerate(kept) if t == c} for c in range(3)]
    assert scores.pixel_accuracy() == pytest.approx(sum(p == t for p, t in kept) / len(kept))
    iou = [len(predicted[c] & true[c]) / len(predicted[c] | true[c]) for c in range(3)]
    assert scores.iou().tolist() == pytest.approx(iou)
    dice = [2 * len(predicted[c] & true[c]) / (len(predicted[c]) + len(true[c])) for c in range(3)]
    assert scores.dice().tolist() == pytest.approx(dice)


def test_an_absent_class_is_left_out_and_a_false_one_counts_as_zero():
    absent = counted([[4, 0, 0], [1, 5, 0], [0, 0, 0]])
    assert math.isnan(absent.iou()[2]) and math.isnan(absent.dice()[2])
    assert absent.mean_iou() == pytest.approx((4 / 5 + 5 / 6) / 2)
    assert absent.mean_accuracy() == pytest.approx((1 + 5 / 6) / 2)
    false = counted([[4, 0, 1], [1, 5, 0], [0, 0, 0]])
    assert false.iou()[2] == 0
    assert false.mean_iou() == pytest.approx((4 / 6 + 5 / 6 + 0) / 3)
    # The class is not in the truth, so it has no accuracy and no frequency.
    assert false.mean_accuracy() == pytest.approx((4 / 5 + 5 / 6) / 2)
    assert false.frequency_weighted_iou() == pytest.approx((5 * 4 / 6 + 6 * 5 / 6) / 11)


def test_confusion_matrix_errors():
    scores = ConfusionMatrix(2)
    target = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match="argmax"):
        scores.update(torch.zeros(2, 3), target)
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[3, 2\]"):
        scores.update(target, target.T)
    with pytest.raises(ValueError, match=r"pred must hold classes 0 … 1, but ranges from 2 to 2"):
        scores.update(target + 2, target)
    with pytest.raises(ValueError, match=r"target must hold classes 0 … 1, but ranges from -1 to -1"):
        scores.update(target, target - 1)
    assert scores.counts.sum() == 0


def rows(*lines):
    """A picture from strings: # is 1, anything else 0."""
    return torch.tensor([[int(sign == "#") for sign in line] for line in lines])


TWO_CELLS = rows("###.####", "###.####")
MERGED = rows("########", "########")


def test_merged_cells_by_hand():
    # 6 and 8 pixels of truth in one segment: s = (1), t = (6/14, 8/14), p = t.
    t = (6**2 + 8**2) / 14**2
    assert v_rand(MERGED.float(), TWO_CELLS) == pytest.approx(t / (0.5 + t / 2))
    # The mutual information with a single segment is 0.
    assert v_info(MERGED.float(), TWO_CELLS) == pytest.approx(0, abs=1e-12)


def test_a_split_cell_by_hand():
    # One cell of 16 pixels, cut by a line: 6 and 8 pixels and, on the line, 2 segments of one pixel.
    shares = np.array([6, 8, 1, 1]) / 16
    s = (shares**2).sum()
    assert v_rand(TWO_CELLS.float(), MERGED) == pytest.approx(s / (s / 2 + 0.5))
    assert v_info(TWO_CELLS.float(), MERGED) == pytest.approx(0, abs=1e-12)


def test_a_split_and_a_merger_by_hand():
    truth = rows("####.####.####")
    proposal = rows("##.#.#########")
    # Truth pixels of cell 1: 2 in segment A, 1 on a line, 1 in segment B; cells 2 and 3 lie in segment C.
    p = np.array([2, 1, 1, 4, 4]) / 12
    s = np.array([2, 1, 1, 8]) / 12
    t = np.array([4, 4, 4]) / 12
    expected = (p**2).sum() / ((s**2).sum() / 2 + (t**2).sum() / 2)
    assert v_rand(proposal.float(), truth) == pytest.approx(expected)

    def entropy(q):
        return -(q * np.log(q)).sum()

    expected = (entropy(s) + entropy(t) - entropy(p)) / (entropy(s) / 2 + entropy(t) / 2)
    assert v_info(proposal.float(), truth) == pytest.approx(expected)


def pairs_by_hand(proposal, truth):
    """V_rand of two labellings as probabilities that two pixels, drawn with replacement, belong together."""
    pixels = list(zip(proposal, truth, strict=True))
    both = same_s = same_t = 0
    for (a, (s1, t1)), (b, (s2, t2)) in itertools.product(enumerate(pixels), repeat=2):
        together_s = a == b or (s1 == s2 != 0)
        same_s += together_s
        same_t += t1 == t2
        both += together_s and t1 == t2
    return both / (same_s / 2 + same_t / 2)


def info_by_hand(proposal, truth):
    """V_info from the definition I = Σ p log(p / (s t)) over dictionaries of shares."""
    segments = [(s or -1 - n, t) for n, (s, t) in enumerate(zip(proposal, truth, strict=True))]
    joint, s, t = {}, {}, {}
    for pair in segments:
        joint[pair] = joint.get(pair, 0) + 1 / len(segments)
        s[pair[0]] = s.get(pair[0], 0) + 1 / len(segments)
        t[pair[1]] = t.get(pair[1], 0) + 1 / len(segments)
    information = sum(share * math.log(share / (s[a] * t[b])) for (a, b), share in joint.items())
    entropies = [-sum(share * math.log(share) for share in shares.values()) for shares in (s, t)]
    return information / (sum(entropies) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_scores_against_counting_pairs(seed):
    draw = np.random.default_rng(seed)
    truth = ndimage.gaussian_filter(draw.standard_normal((16, 18)), 1.2) > -0.1
    proposal = ndimage.gaussian_filter(draw.standard_normal((16, 18)), 1.2) > -0.2
    # Thinning leaves a proposal alone whose borders are thin already, so its components are the segments.
    proposal = _thin(proposal)
    cells = ndimage.label(truth)[0][truth].tolist()
    segments = ndimage.label(proposal)[0][truth].tolist()
    rand, info = v_scores(torch.from_numpy(proposal).float(), torch.from_numpy(truth))
    assert rand == pytest.approx(pairs_by_hand(segments, cells))
    assert info == pytest.approx(info_by_hand(segments, cells))


def _thin(mask):
    """Adds background pixels that touch at most one component, until each touches at least two."""
    mask = mask.copy()
    changed = True
    while changed:
        changed = False
        for y, x in np.argwhere(~mask):
            components = np.pad(ndimage.label(mask)[0], 1)
            around = {
                components[y, x + 1],
                components[y + 2, x + 1],
                components[y + 1, x],
                components[y + 1, x + 2],
            }
            if len(around - {0}) == 1:
                mask[y, x] = changed = True
    return mask


def truth_of_cells(seed=0):
    return TouchingCells(1, 96, seed=seed)[0][1]


def test_a_perfect_prediction_scores_one():
    truth = truth_of_cells()
    assert v_scores(truth.float(), truth) == pytest.approx((1, 1), abs=1e-12)
    assert pixel_error(truth.float(), truth) == 0


def test_thicker_borders_cost_nothing_after_thinning():
    truth = truth_of_cells()
    cells, count = ndimage.label(truth)
    shrunk = ndimage.binary_erosion(truth)
    # Only where erosion neither splits nor deletes a cell must the scores stay.
    kept = [n for n in range(1, count + 1) if ndimage.label(shrunk & (cells == n))[1] == 1]
    truth = np.isin(cells, kept)
    rand, info = v_scores(torch.from_numpy(truth & shrunk).float(), torch.from_numpy(truth))
    assert rand > 0.97 and info > 0.97
    assert pixel_error(torch.from_numpy(truth & shrunk).float(), torch.from_numpy(truth)) > 0.03


def test_a_single_pixel_hole_costs_more_than_thick_borders():
    truth = rows(*["#########.#########"] * 9)
    proposal = truth.clone()
    proposal[4, 9] = 1
    assert v_rand(proposal.float(), truth) < 0.7
    assert pixel_error(proposal.float(), truth) == pytest.approx(1 / truth.numel())


def test_mirroring_and_transposing_change_nothing():
    draw = np.random.default_rng(3)
    truth = truth_of_cells(1)
    noisy = torch.from_numpy(_thin(ndimage.gaussian_filter(draw.standard_normal((24, 24)), 1.5) > -0.1)).float()
    truth = truth[:24, :24]
    scores = v_scores(noisy, truth)
    # The components get other numbers then; with borders of one pixel no tie is left to the watershed.
    assert v_scores(noisy.flip(0), truth.flip(0)) == pytest.approx(scores)
    assert v_scores(noisy.T, truth.T) == pytest.approx(scores)


def test_merging_and_splitting_lower_both_scores():
    truth = truth_of_cells()
    merged = truth.clone()
    merged[:, 48:51] = 1
    split = truth.clone()
    split[48] = 0
    for worse in (merged, split):
        rand, info = v_scores(worse.float(), truth)
        assert rand < 0.999 and info < 0.999
    both = merged.clone()
    both[:, 20] = 0
    assert v_rand(both.float(), truth) < v_rand(merged.float(), truth)
    assert v_info(both.float(), truth) < v_info(merged.float(), truth)


def test_the_best_threshold_counts():
    truth = rows("####.####", "####.####")
    # The border is seen as less likely inside, but only a threshold from 0.6 on parts the cells.
    probability = torch.where(truth == 1, 0.85, 0.6)
    assert v_scores(probability, truth) == (1, 1)
    assert v_rand(torch.where(truth == 1, 0.85, 0.81), truth) < 1
    assert pixel_error(probability, truth) == 0


def test_the_last_threshold_lets_only_a_probability_of_1_through():
    truth = rows("####.####", "####.####")
    assert v_scores(torch.where(truth == 1, 1.0, 0.95), truth) == (1, 1)


def test_cells_of_the_truth_that_meet_at_a_corner_are_two():
    truth = rows("###...", "###...", "...###", "...###")
    merged = torch.ones(4, 6)
    # Two cells of 6 pixels in one segment.
    assert v_rand(merged, truth) == pytest.approx(0.5 / (0.5 + 0.5 / 2))


def test_a_stack_has_one_threshold_for_all_its_slices():
    truth = rows("####.####", "####.####")
    low, high = torch.where(truth == 1, 0.35, 0.25), torch.where(truth == 1, 0.85, 0.75)
    stack, labels = torch.stack((low, high)), torch.stack((truth, truth))
    # Alone each scores 1, together one of them is wrong at any threshold.
    assert v_rand(low, truth) == v_rand(high, truth) == 1
    merged = v_rand(torch.ones_like(low), truth)
    assert v_rand(stack, labels) == pytest.approx((1 + merged) / 2)


def test_one_segment_for_one_cell_is_perfect_and_nothing_inside_is_one_segment():
    everything = torch.ones(4, 5)
    assert v_scores(everything, everything.long()) == (1, 1)
    assert v_scores(torch.zeros(2, 8), TWO_CELLS) == v_scores(torch.ones(2, 8), TWO_CELLS)


def test_isbi_score_errors():
    truth = TWO_CELLS
    with pytest.raises(ValueError, match=r"\[2, 8\] and \[2, 7\]"):
        v_rand(truth.float(), truth[:, 1:])
    with pytest.raises(ValueError, match="from 0 to 1, but is torch.int64"):
        v_rand(truth, truth)
    with pytest.raises(ValueError, match="from 0 to 255: apply softmax, or divide bytes by 255"):
        v_info(255 * truth.float(), truth)
    with pytest.raises(ValueError, match="from nan to nan"):
        v_info(truth * torch.nan, truth)
    with pytest.raises(ValueError, match="range from 0 to 255"):
        v_info(truth.float(), 255 * truth)
    with pytest.raises(ValueError, match="slice 1 of labels has no pixel inside"):
        pixel_error(torch.zeros(2, 2, 8), torch.stack((truth, 0 * truth)))


def test_isbi_2012_masks_score_one_against_themselves(data_dir):
    _, truth = FolderSegmentation(data_dir / "isbi2012" / "train", indices=[25])[0]
    assert v_scores(truth.float(), truth) == pytest.approx((1, 1), abs=1e-12)
    smooth = torch.from_numpy(ndimage.gaussian_filter(truth.numpy().astype(np.float32), 1.0)).clamp(0, 1)
    rand, info = v_scores(smooth, truth)
    assert 0.9 < rand < 1 and 0.9 < info < 1
