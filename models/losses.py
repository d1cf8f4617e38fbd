"""Pixel-wise cross-entropy, the weights that balance classes, and U-Net's that push touching cells apart."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.measure import label
from torch import Tensor

# A border term below this is lost in float32 beside a class weight of about 1, so it is not computed.
_NEGLIGIBLE = 1e-7


def class_weights(masks: Iterable[Tensor], num_classes: int, ignore_index: int = 255) -> Tensor:
    """Weights that give every class that occurs in `masks` the same say: w_c = n / (k n_c).

    n is the number of pixels that are not ignored, n_c those of class c, k the number of classes that
    occur; the mean weight of a pixel is 1. A class that does not occur has the weight 0.

    Returns float32 [num_classes]. Raises ValueError for a mask with values outside 0 … num_classes - 1.
    """
    counts = sum(
        (_counts(mask, num_classes, ignore_index) for mask in masks), torch.zeros(num_classes, dtype=torch.int64)
    )
    occurring = counts > 0
    weights = counts.sum() / (occurring.sum() * counts).clamp_min(1)
    return torch.where(occurring, weights, 0.0).float()


def median_frequency_weights(masks: Iterable[Tensor], num_classes: int, ignore_index: int = 255) -> Tensor:
    """SegNet's class weights (Badrinarayanan et al. 2017, after Eigen, Fergus 2015): w_c = median(f) / f_c.

    f_c is the number of pixels of class c, divided by that of all pixels (ignored ones included) of the masks in which
    c occurs; the median is over the classes that occur. A class that does not occur has the weight 0.

    Returns float32 [num_classes]. Raises ValueError for a mask with values outside 0 … num_classes - 1.
    """
    counts, pixels = torch.zeros(2, num_classes, dtype=torch.float64)
    for mask in masks:
        here = _counts(mask, num_classes, ignore_index)
        counts += here
        pixels += (here > 0) * mask.numel()
    frequencies = counts / pixels
    return (frequencies.nanmedian() / frequencies).nan_to_num().float()


def _counts(mask: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    valid = mask[mask != ignore_index]
    if valid.numel() and not 0 <= int(valid.min()) <= int(valid.max()) < num_classes:
        raise ValueError(
            f"mask values must lie in 0 … {num_classes - 1} (or be {ignore_index}, ignored), "
            f"but they range from {int(valid.min())} to {int(valid.max())}"
        )
    return torch.bincount(valid.cpu(), minlength=num_classes)


def border_weight_map(
    mask: Tensor,
    num_classes: int,
    w0: float = 10.0,
    sigma: float = 5.0,
    ignore_index: int = 255,
    weights: Tensor | None = None,
) -> Tensor:
    """Ronneberger et al. 2015, eq. 2: w(x) = w_c(x) + w0 exp(-(d1(x) + d2(x))² / 2σ²).

    d1 and d2 are the distances in pixels to the nearest and the second nearest cell. A cell is a
    4-connected component of a class other than 0. The paper leaves open what holds inside a cell; here, as
    in its figure 3d, the border term is added on background pixels only. With fewer than two cells
    there is no border term. w_c comes from `weights` (see `class_weights`; the paper means the frequencies
    of the whole training set), or from this mask alone when that is None. Ignored pixels weigh 0.

    mask: integers [H, W]; returns float32 [H, W] on the mask's device.
    Raises ValueError for a mask of another shape or with values outside 0 … num_classes - 1.
    """
    if mask.ndim != 2:
        raise ValueError(f"mask must be [H, W], but its shape is {list(mask.shape)}")
    if weights is None:
        weights = class_weights([mask], num_classes, ignore_index)
    elif weights.shape != (num_classes,):
        raise ValueError(f"weights must have the shape [{num_classes}], not {list(weights.shape)}")

    ids = mask.cpu().numpy()
    ignored = ids == ignore_index
    balance = weights.cpu().numpy()[np.where(ignored, 0, ids)]
    cells = np.asarray(label(np.where(ignored, 0, ids), background=0, connectivity=1))
    border = _border_term(cells, w0, sigma)
    border[(ids != 0) | ignored] = 0
    return torch.from_numpy(np.where(ignored, 0, balance + border).astype(np.float32)).to(mask.device)


def _border_term(cells: np.ndarray, w0: float, sigma: float) -> np.ndarray:
    """w0 exp(-(d1 + d2)² / 2σ²) for every pixel, from an image of cell numbers (0 = background).

    Beyond `reach` the term is negligible, so each distance transform is confined to the cell's
    bounding box widened by that much.
    """
    reach = math.ceil(sigma * math.sqrt(2 * math.log(max(w0 / _NEGLIGIBLE, 1.0))))
    nearest = np.full(cells.shape, np.inf)
    second = np.full(cells.shape, np.inf)
    for number, (rows, columns) in enumerate(ndimage.find_objects(cells), start=1):
        wide = (
            slice(max(rows.start - reach, 0), rows.stop + reach),
            slice(max(columns.start - reach, 0), columns.stop + reach),
        )
        distance = np.asarray(ndimage.distance_transform_edt(cells[wide] != number))
        second[wide] = np.minimum(second[wide], np.maximum(nearest[wide], distance))
        nearest[wide] = np.minimum(nearest[wide], distance)
    return w0 * np.exp(-((nearest + second) ** 2) / (2 * sigma**2))


def weighted_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = 255
) -> Tensor:
    """Weighted mean of the pixel-wise softmax cross-entropy: Σ w(x) · -log p_target(x) / Σ w(x), in nats.

    The sums run over the pixels whose target is not `ignore_index`; where there is none, the loss is 0.
    (Ronneberger et al. 2015, eq. 1, is the sum alone; the mean keeps the learning rate independent of the
    tile's size.) Half-precision logits are reduced in float32.

    logits: [N, C, H, W]; target: int64 [N, H, W]; weight: [N, H, W] or None for 1 everywhere.
    Returns a scalar, float32 (float64 for float64 logits). Raises ValueError for shapes that do not fit.
    """
    if logits.ndim != 4 or target.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"logits [N, C, H, W] and target [N, H, W] must agree, "
            f"but their shapes are {list(logits.shape)} and {list(target.shape)}"
        )
    if weight is not None and weight.shape != target.shape:
        raise ValueError(
            f"weight must have the target's shape {list(target.shape)}, but its shape is {list(weight.shape)}"
        )
    if logits.dtype != torch.float64:
        logits = logits.float()
    counted = (target != ignore_index).to(logits.dtype)
    if weight is not None:
        counted = counted * weight
    losses = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    return (losses * counted).sum() / counted.sum().clamp_min(torch.finfo(logits.dtype).tiny)


def auxiliary_cross_entropy(
    logits: Sequence[Tensor], shares: Sequence[float], target: Tensor, weight: Tensor, ignore_index: int = 255
) -> Tensor:
    """Sum of share_i times the `weighted_cross_entropy` of logits_i: PSPNet's deep supervision (Zhao et al. 2017,
    section 3.3), ICNet's cascade label guidance (Zhao et al. 2018, section 3.4).

    logits: [N, C, h, w] each; where h, w are less than the target's H, W, the pixels that they stand for are taken: the
        corners, and the nearest ones to an even grid between them. target: int64 [N, H, W]; weight: [N, H, W].
    """
    losses = []
    for scores, share in zip(logits, shares, strict=True):
        rows, columns = (
            torch.linspace(0, large - 1, small, device=target.device).round().long()
            for large, small in zip(target.shape[1:], scores.shape[2:], strict=True)
        )
        labels, weights = (part.index_select(1, rows).index_select(2, columns) for part in (target, weight))
        losses.append(share * weighted_cross_entropy(scores, labels, weights, ignore_index))
    return torch.stack(losses).sum()
