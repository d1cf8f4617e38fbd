"""What the data sets of scenes share: an RGB image and a mask with a class for each of its pixels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .folder import CACHE_LIMIT, IGNORE, check_headers, read_picture

Colour = tuple[int, int, int]
Pairs = Sequence[tuple[Path, Path]]


class SceneData(Dataset[tuple[Tensor, Tensor]]):
    """One split of a set of scenes.

    pairs: the files of each image and its mask; classes: the value in a mask file -> the class or, for pixels that
        don't count, IGNORE; names, colours: of the classes in order (no colours: any will do).
    scale: divides height and width: images by averaging scale x scale pixels, masks by taking one of them.

    An item is (image float32 [3, H, W] in [0, 1], mask int64 [H, W] with the classes and 255 where nothing counts);
    `mask(index)` is the mask alone, `sizes` holds (H, W) of each item. Every mask is read and checked at once; what
    takes at most 1 GiB stays in memory. ValueError that names the file and what was found in it.
    """

    title: ClassVar[str] = ""
    layout: ClassVar[str] = ""
    """What the set's folder holds."""

    def __init__(
        self,
        pairs: Pairs,
        classes: Mapping[int, int],
        names: Sequence[str],
        colours: Sequence[Colour] = (),
        scale: int = 1,
    ):
        if scale < 1:
            raise ValueError(f"scale={scale}: must be at least 1")
        self.names = tuple(image.stem for image, _ in pairs)
        self.classes, self.colours = tuple(names), tuple(colours)
        self._pairs, self._scale, self._values = pairs, scale, dict(classes)
        self._table = np.zeros(256, np.uint8)
        self._table[list(classes)] = list(classes.values())
        self.sizes: list[tuple[int, int]] = []
        for image, mask in pairs:
            width, height = check_headers(image, mask)
            self.sizes.append((height // scale, width // scale))
            if min(self.sizes[-1]) < 1:
                raise ValueError(f"{image} has {width} x {height} pixels: a scale of {scale} leaves nothing of it")
        fits = 4 * sum(height * width for height, width in self.sizes) <= CACHE_LIMIT
        # Read even if there is no room to keep them: a bad mask shall not end a run that has begun.
        self._masks = [mask for mask in map(self._read_mask, range(len(pairs))) if fits]
        self._images = [self._read_image(index) for index in range(len(pairs) if fits else 0)]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self._images[index] if self._images else self._read_image(index)
        return image.float() / 255, self.mask(index)

    def mask(self, index: int) -> Tensor:
        return (self._masks[index] if self._masks else self._read_mask(index)).long()

    @classmethod
    def is_in(cls, root: Path) -> bool:
        """Whether the folder `root` looks like this set."""
        raise NotImplementedError

    @classmethod
    def scored_split(cls, root: Path) -> str:
        """The split that final scores are of: "val" where nobody but its makers has the masks of "test"."""
        return "val"

    def _read_image(self, index: int) -> Tensor:
        """uint8 [3, H, W]"""
        pixels = read_picture(self._pairs[index][0])
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        image = torch.from_numpy(np.atleast_3d(pixels).copy()).permute(2, 0, 1).expand(3, -1, -1)
        return image if self._scale == 1 else F.avg_pool2d(image.float(), self._scale).round().byte()

    def _read_mask(self, index: int) -> Tensor:
        """uint8 [H, W]"""
        path = self._pairs[index][1]
        values = read_picture(path)
        if unknown := set(np.unique(values).tolist()) - self._values.keys():
            known = sorted(value for value, number in self._values.items() if number != IGNORE)
            void = sorted(value for value, number in self._values.items() if number == IGNORE)
            raise ValueError(
                f"{path} holds the value {min(unknown)}: in {self.title}, classes are {_shown(known)}, and "
                f"{_shown(void)} doesn't count"
            )
        height, width = self.sizes[index]
        mask = self._table[values.astype(np.int64)][self._scale // 2 :: self._scale, self._scale // 2 :: self._scale]
        return torch.from_numpy(mask[:height, :width].copy())


def _shown(values: Sequence[int]) -> str:
    """ "0 ... 10" of a gapless row, else "7, 8, 11" """
    if len(values) > 2 and values[-1] - values[0] == len(values) - 1:
        return f"{values[0]} ... {values[-1]}"
    return ", ".join(map(str, values))
