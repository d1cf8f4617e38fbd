"""Pascal VOC's segmentation task, as its VOCdevkit lays it out, with or without the masks of SBD."""

from pathlib import Path

from .folder import IGNORE
from .scenes import Colour, SceneData

NAMES = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")


def colour(number: int) -> Colour:
    """The colour of a class in the devkit: bit j of red, green and blue, counted from the top, is bit 3 j, 3 j + 1 and
    3 j + 2 of its number."""
    red, green, blue = (
        sum((number >> (3 * place + channel) & 1) << (7 - place) for place in range(8)) for channel in range(3)
    )
    return red, green, blue


CLASSES = {name: colour(number) for number, name in enumerate(NAMES)}


class PascalVOC(SceneData):
    """The images of one list of Pascal VOC (Everingham et al. 2010): background and 20 classes.

    root: a folder that holds JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/, or one that holds such a
        folder as VOC2012/ or VOCdevkit/VOC2012/ (of several years, the last).
    split: the name of a list in ImageSets/Segmentation: train, val or any other there, such as train_aug for the masks
        of SBD (Hariharan et al. 2011) in SegmentationClassAug/. A line is an image's name, or the path of an image and
        that of its mask, counted from the root.
    scale, items and errors as in `SceneData`. Masks hold 0 ... 20, and 255 where nothing counts; a palette's indices
        count, not its colours.
    """

    title = "Pascal VOC"
    layout = "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/, perhaps in VOCdevkit/VOC2012/"

    def __init__(self, root: str | Path, split: str = "train", scale: int = 1):
        folder = _find(Path(root))
        if folder is None:
            raise ValueError(
                f"{root} holds no Pascal VOC: give the folder with JPEGImages, SegmentationClass and ImageSets (of the "
                f"VOCtrainval archive), or the VOCdevkit around it"
            )
        pairs = [_pair(folder, line) for line in _read_list(folder, split)]
        values = {number: number for number in range(len(CLASSES))} | {IGNORE: IGNORE}
        super().__init__(pairs, values, list(CLASSES), list(CLASSES.values()), scale)

    @classmethod
    def is_in(cls, root: Path) -> bool:
        return _find(root) is not None


def _find(root: Path) -> Path | None:
    inner = [path for parent in (root, root / "VOCdevkit") for path in sorted(parent.glob("VOC2*"), reverse=True)]
    return next((path for path in (root, *inner) if (path / "JPEGImages").is_dir()), None)


def _read_list(folder: Path, split: str) -> list[str]:
    lists = folder / "ImageSets" / "Segmentation"
    path = lists / f"{split.removesuffix('.txt')}.txt"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in lists.glob("*.txt"))) or "none"
        raise ValueError(f"{path} does not exist: name a list that is there ({there}), or put it there")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} names no image: give a list with an image's name on each line")
    return lines


def _pair(folder: Path, line: str) -> tuple[Path, Path]:
    names = line.split()
    if len(names) == 2:
        image, mask = (folder / name.lstrip("/") for name in names)
    else:
        image = folder / "JPEGImages" / f"{names[0]}.jpg"
        masks = [folder / place / f"{names[0]}.png" for place in MASK_FOLDERS]
        mask = next((path for path in masks if path.is_file()), masks[0])
    for path in (image, mask):
        if not path.is_file():
            raise ValueError(
                f"{path} is missing, but a list in {folder / 'ImageSets' / 'Segmentation'} names {names[0]}: unpack "
                f"the archive again, SBD's masks into {MASK_FOLDERS[1]}, or take the line out"
            )
    return image, mask
