"""Made-up microscope pictures of touching cells, for machines that hold no data."""

import math

import numpy as np
import torch
from scipy import ndimage
from scipy.special import expit
from torch import Tensor
from torch.utils.data import Dataset

_SPACING = 34.0  # pixels between neighbouring cells' centres, on average
_BORDER = 1.3  # pixels from the middle of a border to where the cell begins


class TouchingCells(Dataset[tuple[Tensor, Tensor]]):
    """Textured blobs that touch, kept apart by thin dark borders, on noise under uneven light.

    An item is (image float32 [1, H, W] in [0, 1], mask int64 [H, W]) with class 1 for the inside of a cell
    and class 0 for the background and the borders; no two cells meet in the mask. Item i depends on
    (seed, i) and the size only.

    count: number of items; size: height and width in pixels, at least 16; seed: a number from 0.
    Raises ValueError for a count, size or seed out of range, IndexError for an index out of range.
    """

    num_classes = 2
    class_values = (0, 1)
    in_channels = 1

    def __init__(self, count: int, size: int | tuple[int, int] = 256, seed: int = 0):
        self.size = (size, size) if isinstance(size, int) else size
        if count < 1 or min(self.size) < 16 or seed < 0:
            raise ValueError(
                f"needs count ≥ 1, a size of at least 16 x 16 and seed ≥ 0, "
                f"but got count={count}, size={self.size}, seed={seed}"
            )
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -self.count <= index < self.count:
            raise IndexError(f"index {index} is out of range for {self.count} pictures")
        rng = np.random.default_rng((self.seed, index % self.count))
        depth, owner = _cells(self.size, rng)
        image = _picture(depth, owner, rng)
        mask = (depth > _BORDER).astype(np.int64)
        return torch.from_numpy(image[None]), torch.from_numpy(mask)


def _smooth_noise(size: tuple[int, int], scale: int, rng: np.random.Generator) -> np.ndarray:
    """Float32 noise of mean 0 and standard deviation about 1 that changes over about `scale` pixels."""
    coarse = rng.standard_normal([side // scale + 2 for side in size], dtype=np.float32)
    blocks = coarse.repeat(scale, axis=0).repeat(scale, axis=1)
    top, left = rng.integers(0, scale, 2)
    # The mean over a block's width interpolates linearly; 1.5 makes up for the contrast that this costs.
    return 1.5 * ndimage.uniform_filter(blocks[top : top + size[0], left : left + size[1]], scale)


def _centres(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Centres [n, 2] on a jittered hexagonal lattice, with gaps so that the cells form clusters."""
    rows, columns = (math.ceil(side / _SPACING) + 3 for side in size)
    row, column = np.mgrid[0:rows, 0:columns]
    lattice = np.stack((row - 1.0, column - 1.0 + row % 2 / 2), axis=-1).reshape(-1, 2)
    lattice += rng.uniform(0, 1, 2) + rng.normal(0, 0.16, lattice.shape)
    crowd = _smooth_noise((rows, columns), 3, rng).ravel() + 0.4 * rng.standard_normal(len(lattice))
    return lattice[crowd > np.quantile(crowd, 0.3)] * _SPACING


def _cells(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """depth: pixels to the nearest border or rim, negative outside; owner: number of the nearest cell.

    Each cell is a bent ellipse; where two overlap, the border runs where both are equally near.
    """
    centres = _centres(size, rng)
    bend_y, bend_x = (2.6 * _smooth_noise(size, 16, rng) for _ in size)
    reach = 1.3 * _SPACING  # beyond a cell's rim, so only depths that no longer matter change there
    nearest = np.full(size, reach, dtype=np.float32)
    second = np.full(size, reach, dtype=np.float32)
    owner = np.zeros(size, dtype=np.int32)
    for number, (y, x) in enumerate(centres):
        radius = _SPACING * rng.uniform(0.5, 0.68)
        stretch = rng.uniform(1.0, 1.35)
        angle = rng.uniform(0, math.pi)
        rows = slice(max(int(y - reach), 0), max(int(y + reach), 0))
        columns = slice(max(int(x - reach), 0), max(int(x + reach), 0))
        dy = np.arange(size[0], dtype=np.float32)[rows, None] - np.float32(y) + bend_y[rows, columns]
        dx = np.arange(size[1], dtype=np.float32)[None, columns] - np.float32(x) + bend_x[rows, columns]
        along = (np.float32(math.cos(angle)) * dx + np.float32(math.sin(angle)) * dy) / np.float32(stretch)
        across = np.float32(math.cos(angle)) * dy - np.float32(math.sin(angle)) * dx
        distance = np.hypot(along, across * np.float32(stretch**0.5)) - np.float32(radius)
        best = nearest[rows, columns]
        owner[rows, columns][distance < best] = number
        second[rows, columns] = np.minimum(second[rows, columns], np.maximum(best, distance))
        nearest[rows, columns] = np.minimum(best, distance)
    return np.minimum(-nearest, (second - nearest) / 2), owner


def _picture(depth: np.ndarray, owner: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Renders the geometry as float32 [H, W] in [0, 1]."""
    size = depth.shape
    brightness = rng.normal(0.62, 0.06, int(owner.max()) + 1).astype(np.float32)[owner]
    texture = 0.055 * _smooth_noise(size, 7, rng) + 0.045 * _smooth_noise(size, 3, rng)
    background = 0.42 + 0.03 * _smooth_noise(size, 20, rng)
    inside = expit(2.5 * (depth - _BORDER))
    rim = np.exp(-(((depth + 0.2) / 1.5) ** 2))
    image = background + inside * (brightness + texture - background) - 0.3 * rim
    y, x = (np.linspace(-1, 1, side, dtype=np.float32) for side in size)
    direction = rng.uniform(0, 2 * math.pi)
    light = 1 + 0.18 * (math.sin(direction) * y[:, None] + math.cos(direction) * x)
    noise = rng.standard_normal(size, dtype=np.float32)
    return np.clip(image * light + 0.045 * noise, 0, 1).astype(np.float32)
