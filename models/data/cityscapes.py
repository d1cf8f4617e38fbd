"""Cityscapes, as its archives leftImg8bit and gtFine unpack."""

from pathlib import Path
from typing import Literal, get_args

from .folder import IGNORE
from .scenes import SceneData

Split = Literal["train", "val"]

CLASSES = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
"""The 19 classes that are scored, in the order of their trainIds, each with the colour that Cityscapes shows it in."""
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Their ids in the labelIds files, which have 0 ... 33, and 255 for the id -1 (licence plates)."""
SUFFIXES = ("labelTrainIds", "labelIds")


class Cityscapes(SceneData):
    """One split of the finely annotated images of Cityscapes (Cordts et al. 2016), 19 classes.

    root: the folder with leftImg8bit/ and gtFine/, each with train/ and val/ and in them a folder for each city. Masks
        are the *_gtFine_labelIds.png of the archive, or *_gtFine_labelTrainIds.png where they have been made.
    scale, items and errors as in `SceneData`. (The test split's masks are not public, so it can't be scored here.)
    """

    title = "Cityscapes"
    layout = "leftImg8bit/ and gtFine/"

    def __init__(self, root: str | Path, split: Split, scale: int = 1):
        if split not in get_args(Split):
            raise ValueError(f"split={split!r} is unknown: choose train or val (the masks of test are not public)")
        images, masks = Path(root) / "leftImg8bit" / split, Path(root) / "gtFine" / split
        for folder in (images, masks):
            if not folder.is_dir():
                raise ValueError(
                    f"{folder} is not a folder: give the folder into which leftImg8bit_trainvaltest.zip and "
                    f"gtFine_trainvaltest.zip of Cityscapes are unpacked"
                )
        files = sorted(images.glob("*/*_leftImg8bit.png"))
        if not files:
            raise ValueError(f"{images} holds no CITY/*_leftImg8bit.png: unpack leftImg8bit_trainvaltest.zip again")
        kind = next((suffix for suffix in SUFFIXES if _mask(files[0], masks, suffix).is_file()), SUFFIXES[1])
        pairs = [(file, _mask(file, masks, kind)) for file in files]
        for image, mask in pairs:
            if not mask.is_file():
                raise ValueError(
                    f"{image} has no {mask}: unpack gtFine_trainvaltest.zip again, or make the {kind} of all images"
                )
        if kind == "labelIds":
            values = dict.fromkeys((*range(34), 255), IGNORE) | {id_: number for number, id_ in enumerate(LABEL_IDS)}
        else:
            values = {number: number for number in range(len(CLASSES))} | {255: IGNORE}
        super().__init__(pairs, values, list(CLASSES), list(CLASSES.values()), scale)

    @classmethod
    def is_in(cls, root: Path) -> bool:
        return (root / "leftImg8bit").is_dir() or (root / "gtFine").is_dir()


def _mask(image: Path, masks: Path, kind: str) -> Path:
    return masks / image.parent.name / f"{image.name.removesuffix('_leftImg8bit.png')}_gtFine_{kind}.png"
