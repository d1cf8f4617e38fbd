"""The data sets of scenes by name, told apart by what their folders hold."""

import re
from pathlib import Path

from .camvid import CamVid
from .cityscapes import Cityscapes
from .folder import IGNORE, IMAGE_FOLDERS, MASK_FOLDERS, check_pairs, class_values, find_pairs, only_folder
from .scenes import Colour, SceneData
from .voc import PascalVOC

CLASSES_FILE = "classes.txt"


class SceneFolder(SceneData):
    """One split of any set whose images and masks lie in two folders, as `FolderSegmentation` reads them.

    root: a folder with image/ (or images/, imgs/) and label/ (labels/, mask/, masks/), of which the last tenth is
        "val", or with such a folder as train/, as val/ and perhaps as test/. The masks' values are 0 ... n - 1, and 255
        where nothing counts; if all masks together hold only 0 and 255, they are the classes 0 and 1. A file
        classes.txt in `root` may name the classes, one on each line, with a colour or not ("red car 200 30 30").
    scale, items and errors as in `SceneData`.
    """

    title = "the folder"
    layout = f"{IMAGE_FOLDERS[0]}/ and {MASK_FOLDERS[0]}/, or train/ and val/ with these"

    def __init__(self, root: str | Path, split: str, scale: int = 1):
        root = Path(root)
        splits = [name for name in ("train", "val", "test") if (root / name).is_dir()]
        pairs = {
            name: find_pairs(only_folder(root / name, IMAGE_FOLDERS), only_folder(root / name, MASK_FOLDERS))
            for name in splits or ["."]
        }
        if "val" not in pairs:
            every = pairs.pop("train" if splits else ".")
            held_out = max(1, len(every) // 10)
            if len(every) == held_out:
                raise ValueError(f"{root} holds one pair of image and mask: one is needed to train on, one to judge by")
            pairs |= {"train": every[:-held_out], "val": every[-held_out:]}
        if split not in pairs:
            raise ValueError(f"split={split!r}: {root} has {', '.join(sorted(pairs))}")
        first_with, _, _ = check_pairs([pair for part in pairs.values() for pair in part])
        names, colours = _read_classes(root / CLASSES_FILE)
        binary = set(first_with) == {0, IGNORE} and len(names) in (0, 2)
        if not names:
            names = [f"class {number}" for number in range(len(class_values(first_with)))]
        numbers = {0: 0, IGNORE: 1} if binary else {number: number for number in range(len(names))} | {IGNORE: IGNORE}
        super().__init__(pairs[split], numbers, names, colours, scale)

    @classmethod
    def is_in(cls, root: Path) -> bool:
        root = root / "train" if (root / "train").is_dir() else root
        there = {entry.name.lower() for entry in root.iterdir() if entry.is_dir()}
        return bool(there & set(IMAGE_FOLDERS)) and bool(there & set(MASK_FOLDERS))

    @classmethod
    def scored_split(cls, root: Path) -> str:
        return "test" if (root / "test").is_dir() else "val"


def _read_classes(path: Path) -> tuple[list[str], list[Colour]]:
    """The names of the classes and, if the file has them, their colours; nothing if there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names, colours = [], []
    for line in filter(None, map(str.strip, lines)):
        if match := re.fullmatch(r"(.+?)\s+(\d+)\s+(\d+)\s+(\d+)", line):
            names.append(match[1])
            colours.append((int(match[2]), int(match[3]), int(match[4])))
        else:
            names.append(line)
    if len(colours) not in (0, len(names)) or max((part for colour in colours for part in colour), default=0) > 255:
        raise ValueError(
            f"{path} must hold a class on each line, all with a colour (red green blue, each 0 to 255) or all without"
        )
    return names, colours


SETS: dict[str, type[SceneData]] = {
    "camvid": CamVid,
    "voc": PascalVOC,
    "cityscapes": Cityscapes,
    "folder": SceneFolder,
}


def detect(root: Path) -> str:
    """The name of the set that lies in `root`; ValueError that says what each would look like if it is none."""
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give the folder of a data set")
    for name, kind in SETS.items():
        if kind.is_in(root):
            return name
    there = ", ".join(entry.name for entry in sorted(root.iterdir())[:8]) or "nothing"
    wanted = "; ".join(f"{name}: {kind.layout}" for name, kind in SETS.items())
    raise ValueError(f"{root} holds no data set known here, but {there}. Known are {wanted}")


def open_split(name: str, root: Path, split: str, scale: int = 1) -> SceneData:
    """A split of the set of that name in `SETS`. All of them take (root, split, scale)."""
    return SETS[name](root, split, scale)  # pyright: ignore[reportCallIssue, reportArgumentType]
