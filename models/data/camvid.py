"""CamVid, the driving scenes that SegNet was trained on, as its authors distribute them."""

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .folder import IGNORE, find_pairs, read_picture

Split = Literal["train", "val", "test"]

CLASSES = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
"""The eleven classes in the order of their numbers, each with the colour that CamVid shows it in."""
VOID = 11


class CamVid(Dataset[tuple[Tensor, Tensor]]):
    """One split of CamVid (Brostow, Fauqueur, Cipolla 2009) with the eleven classes of Badrinarayanan et al. 2017.

    root: the folder with train/, trainannot/, val/, valannot/, test/ and testannot/; an image and its mask have one
        stem. Masks hold 0 ... 10, and 11 where nothing counts ("void").
    scale: divides height and width: images by averaging scale x scale pixels, masks by taking one of them.

    An item is (image float32 [3, H, W] in [0, 1], mask int64 [H, W] with the classes, and 255 for void). Raises
    ValueError that names the file and what was found in it.
    """

    def __init__(self, root: str | Path, split: Split, scale: int = 1):
        if split not in get_args(Split):
            raise ValueError(f"split={split!r} is unknown: choose train, val or test")
        if scale < 1:
            raise ValueError(f"scale={scale}: must be at least 1")
        folders = [Path(root) / split, Path(root) / f"{split}annot"]
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(
                    f"{folder} is not a folder: give the folder of CamVid that holds train, trainannot, val, valannot, "
                    f"test and testannot"
                )
        pairs = find_pairs(folders[0], folders[1])
        self.names = tuple(image.stem for image, _ in pairs)
        self._items = [_load(image, mask, scale) for image, mask in pairs]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self._items[index]
        return image.float() / 255, mask.long()


def _load(image_path: Path, mask_path: Path, scale: int) -> tuple[Tensor, Tensor]:
    """Both as bytes: a split at full size takes up to 250 MB."""
    image, mask = read_picture(image_path), read_picture(mask_path)
    if image.ndim != 3 or image.shape[2] != 3 or mask.shape != image.shape[:2]:
        raise ValueError(
            f"{image_path} must be RGB and {mask_path} a mask of its size, but their shapes are {image.shape} and "
            f"{mask.shape}"
        )
    if (largest := int(mask.max())) > VOID:
        raise ValueError(f"{mask_path} holds the value {largest}: classes are 0 ... {VOID - 1}, and {VOID} is void")
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
    if scale > 1:
        pixels = F.avg_pool2d(pixels.float(), scale).round().byte()
    height, width = pixels.shape[1:]
    mask = mask[scale // 2 :: scale, scale // 2 :: scale][:height, :width]
    return pixels, torch.from_numpy(np.where(mask == VOID, IGNORE, mask).astype(np.uint8))
