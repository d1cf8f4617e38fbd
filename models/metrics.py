"""Scores of a segmentation: per-pixel scores from a confusion matrix, and the ISBI-2012 scores.

The ISBI-2012 scores (Arganda-Carreras et al. 2015, "Crowdsourcing the creation of image segmentation
algorithms for connectomics", Frontiers in Neuroanatomy 9:142) compare segments, not pixels: a hole of one
pixel in a border that merges two cells costs much, a border that is a pixel too thick costs nothing.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from skimage.measure import label
from skimage.segmentation import watershed
from torch import Tensor

# The last threshold lets a probability of 1 through, as the organisers' sum of ten times 0.1 does.
_THRESHOLDS = [step / 10 for step in range(10)] + [math.nextafter(1, 0)]


class ConfusionMatrix:
    """Counts n_ij of pixels of true class i that were predicted as class j, and the scores made of them.

    The scores are those of Long, Shelhamer, Darrell 2015 (FCN), section 5, with t_i = Σ_j n_ij pixels of
    true class i and p_i = Σ_j n_ji pixels predicted as class i. A class for which a score is 0/0 is NaN in
    the per-class results and left out of the means. Pixels whose target is `ignore_index` count nowhere.
    `counts` is the matrix, int64 [C, C]; matrices of several processes may be summed.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Adds predicted and true classes, integers of one shape.

        Raises TypeError for probabilities, ValueError for differing shapes or classes out of range.
        """
        if pred.is_floating_point():
            raise TypeError(f"pred must hold class numbers, not {pred.dtype}: take argmax over the classes first")
        if pred.shape != target.shape:
            raise ValueError(
                f"pred and target must have one shape, but have {list(pred.shape)} and {list(target.shape)}"
            )
        valid = target != self.ignore_index
        pred, target = pred[valid].long().cpu(), target[valid].long().cpu()
        for name, classes in (("pred", pred), ("target", target)):
            if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_classes:
                raise ValueError(
                    f"{name} must hold classes 0 … {self.num_classes - 1}, "
                    f"but ranges from {int(classes.min())} to {int(classes.max())}"
                )
        pairs = torch.bincount(target * self.num_classes + pred, minlength=self.num_classes**2)
        self.counts += pairs.view(self.num_classes, self.num_classes)

    @property
    def _hits(self) -> Tensor:
        return self.counts.diag().double()

    @property
    def _true(self) -> Tensor:
        return self.counts.sum(1).double()

    @property
    def _predicted(self) -> Tensor:
        return self.counts.sum(0).double()

    def pixel_accuracy(self) -> float:
        """Σ_i n_ii / Σ_i t_i"""
        return (self._hits.sum() / self._true.sum()).item()

    def mean_accuracy(self) -> float:
        """mean over i of n_ii / t_i"""
        return (self._hits / self._true).nanmean().item()

    def iou(self) -> Tensor:
        """Per class, float64 [C]: n_ii / (t_i + p_i - n_ii)"""
        return self._hits / (self._true + self._predicted - self._hits)

    def mean_iou(self) -> float:
        """mean over i of the class's IoU"""
        return self.iou().nanmean().item()

    def frequency_weighted_iou(self) -> float:
        """Σ_i t_i IoU_i / Σ_i t_i"""
        return ((self._true * self.iou()).nansum() / self._true.sum()).item()

    def fcn_scores(self) -> dict[str, float]:
        """The four scores of the paper by name, each as documented above."""
        return {
            "pixel_accuracy": self.pixel_accuracy(),
            "mean_accuracy": self.mean_accuracy(),
            "mean_iou": self.mean_iou(),
            "frequency_weighted_iou": self.frequency_weighted_iou(),
        }

    def dice(self) -> Tensor:
        """Per class, float64 [C]: 2 n_ii / (t_i + p_i)"""
        return 2 * self._hits / (self._true + self._predicted)

    def mean_dice(self) -> float:
        """mean over i of the class's Dice"""
        return self.dice().nanmean().item()


def v_rand(probability: Tensor, labels: Tensor) -> float:
    """The ISBI-2012 foreground-restricted Rand score after border thinning, from 0 to 1.

    With p_ij the share of pixels in segment i of the proposal and j of the truth, s_i = Σ_j p_ij and
    t_j = Σ_i p_ij (Arganda-Carreras et al. 2015, α = 0.5):

        V_rand = Σ_ij p_ij² / (½ Σ_i s_i² + ½ Σ_j t_j²),

    the harmonic mean (F-score) of Σ p²/Σ t² (splitting lowers it) and Σ p²/Σ s² (merging lowers it).

    - Truth: the 4-connected components of label 1. Only pixels in them count ("foreground-restricted").
    - Proposal: at a threshold, the 4-connected components of probability > threshold, grown by a
      watershed until the borders between them are one pixel wide ("thinned").
    - The result is the maximum over the thresholds 0, 0.1, …, 0.9 and one just below 1. For a stack it is
      the maximum of the mean over the slices, one threshold for all.

    Where the definition leaves room, this follows the organisers' scorer (Fiji, Trainable Segmentation):
    p_ij includes pairs of a pixel with itself; a truth pixel on a border of the proposal is a segment of
    its own; a proposal without any pixel above the threshold is one segment. On ties the two watersheds
    may put a border one pixel apart.

    probability: floats in [0, 1] that a pixel is inside a cell, [H, W] or a stack [N, H, W];
    labels: 1 inside, 0 border, same shape. Raises ValueError for other shapes or values, or for a slice
    without a pixel inside.
    """
    return v_scores(probability, labels)[0]


def v_info(probability: Tensor, labels: Tensor) -> float:
    """The ISBI-2012 foreground-restricted information score after border thinning, from 0 to 1.

    With p_ij, s_i, t_j, segments and thresholds as in `v_rand`, H the entropy and I the mutual information
    (Arganda-Carreras et al. 2015, α = 0.5):

        V_info = I(S; T) / (½ H(S) + ½ H(T)),  I(S; T) = H(S) + H(T) - H(S, T),

    the harmonic mean of I/H(S) (splitting lowers it) and I/H(T) (merging lowers it). If both have
    one segment, which leaves 0/0, the score is 1: they agree.
    """
    return v_scores(probability, labels)[1]


def v_scores(probability: Tensor, labels: Tensor) -> tuple[float, float]:
    """(v_rand, v_info) in the time of one of them: the segments are the same."""
    scores = np.array([_scores_by_threshold(p, truth) for p, truth in _slices(probability, labels)])
    rand, info = scores.mean(axis=0).max(axis=0)
    return float(rand), float(info)


def pixel_error(probability: Tensor, labels: Tensor) -> float:
    """The ISBI-2012 pixel error: the share of pixels where (probability > threshold) differs from the label.

    The minimum over the thresholds of `v_rand`. Arguments and errors as in `v_rand`.
    """
    pixels = list(_slices(probability, labels))
    return min(float(np.mean([((p > threshold) != truth).mean() for p, truth in pixels])) for threshold in _THRESHOLDS)


def _slices(probability: Tensor, labels: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if probability.shape != labels.shape or probability.ndim not in (2, 3) or not probability.numel():
        raise ValueError(
            f"probability and labels must both be [H, W] or [N, H, W], "
            f"but have the shapes {list(probability.shape)} and {list(labels.shape)}"
        )
    if not probability.is_floating_point() or not 0 <= probability.min() <= probability.max() <= 1:
        raise ValueError(
            f"probability must hold floats from 0 to 1, but is {probability.dtype} "
            f"from {probability.min():.4g} to {probability.max():.4g}: apply softmax, or divide bytes by 255"
        )
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(
            f"labels must be 1 inside a cell and 0 on a border, but range from {labels.min()} to {labels.max()}"
        )
    probability, labels = (
        probability.reshape(-1, *probability.shape[-2:]),
        labels.reshape(-1, *labels.shape[-2:]),
    )
    for number, truth in enumerate(labels.bool()):
        if not truth.any():
            raise ValueError(f"slice {number} of labels has no pixel inside a cell, so that nothing can be scored")
        yield probability[number].double().cpu().numpy(), truth.cpu().numpy()


def _scores_by_threshold(probability: np.ndarray, truth: np.ndarray) -> list[tuple[float, float]]:
    cells = np.asarray(label(truth, connectivity=1))[truth]
    known: dict[int, tuple[float, float]] = {}
    scores = []
    for threshold in _THRESHOLDS:
        inside = probability > threshold
        size = int(inside.sum())
        # The set only shrinks as the threshold grows, so an equal size means the same set.
        if size not in known:
            known[size] = _pair_scores(_thinned_segments(inside)[truth], cells)
        scores.append(known[size])
    return scores


def _thinned_segments(inside: np.ndarray) -> np.ndarray:
    """Numbers the 4-connected components of `inside`, grown until one-pixel lines (0) part them."""
    if not inside.any():
        return np.ones(inside.shape, dtype=np.int64)
    components = np.asarray(label(inside, connectivity=1))
    return watershed(~inside, components, connectivity=1, watershed_line=True)


def _pair_scores(proposal: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """(V_rand, V_info) of two labellings of the same pixels; 0 in the proposal is a segment per pixel."""
    lines = proposal == 0
    proposal = proposal.copy()
    proposal[lines] = proposal.max() + 1 + np.arange(lines.sum())
    joint = _shares(proposal * (truth.max() + 1) + truth)
    s, t = _shares(proposal), _shares(truth)
    rand = (joint**2).sum() / ((s**2).sum() / 2 + (t**2).sum() / 2)
    entropies = _entropy(s) + _entropy(t)
    info = 2 * (entropies - _entropy(joint)) / entropies if entropies else 1.0
    return rand, info


def _shares(segments: np.ndarray) -> np.ndarray:
    counts = np.unique(segments, return_counts=True)[1]
    return counts / segments.size


def _entropy(shares: np.ndarray) -> float:
    return float(-(shares * np.log(shares)).sum())
