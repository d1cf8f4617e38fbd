"""CamVid, the driving scenes that SegNet was trained on, as its authors distribute them."""

from pathlib import Path
from typing import Literal, get_args

from .folder import IGNORE, find_pairs
from .scenes import SceneData

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


class CamVid(SceneData):
    """One split of CamVid (Brostow, Fauqueur, Cipolla 2009) with the eleven classes of Badrinarayanan et al. 2017.

    root: the folder with train/, trainannot/, val/, valannot/, test/ and testannot/; an image and its mask have one
        stem. Masks hold 0 ... 10, and 11 where nothing counts ("void").
    scale, items and errors as in `SceneData`.
    """

    title = "CamVid"
    layout = "train/ and trainannot/, and the same for val and test"

    def __init__(self, root: str | Path, split: Split, scale: int = 1):
        if split not in get_args(Split):
            raise ValueError(f"split={split!r} is unknown: choose train, val or test")
        folders = [Path(root) / split, Path(root) / f"{split}annot"]
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(
                    f"{folder} is not a folder: give the folder of CamVid that holds train, trainannot, val, valannot, "
                    f"test and testannot"
                )
        values = {number: number for number in range(VOID)} | {VOID: IGNORE}
        super().__init__(find_pairs(*folders), values, list(CLASSES), list(CLASSES.values()), scale)

    @classmethod
    def is_in(cls, root: Path) -> bool:
        return (root / "train").is_dir() and (root / "trainannot").is_dir()

    @classmethod
    def scored_split(cls, root: Path) -> str:
        return "test"
