"""A folder of images and masks as a data set for segmentation."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_FOLDERS = ("image", "images", "imgs")
MASK_FOLDERS = ("label", "labels", "mask", "masks")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
IGNORE = 255

_CHANNELS = {"L": 1, "I;16": 1, "RGB": 3}
_MASK_MODES = ("1", "L", "P", "I", "I;16")
CACHE_LIMIT = 2**30  # bytes


class FolderSegmentation(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of an image and a mask from two sub-folders of `root`, joined by file stem.

    Images (`image`, `images` or `imgs`) are PNG, JPEG, TIFF or BMP, all grey (8 or 16 bit) or all RGB.
    Masks (`label`, `labels`, `mask` or `masks`) have one channel; a palette's indices count, not its colours.
    Their values are the class numbers 0 … n - 1, and 255 for pixels to ignore. If the whole set holds only
    0 and 255, they are the classes 0 and 1 and nothing is ignored.

    An item is (image float32 [C, H, W] in [0, 1], mask int64 [H, W] with the classes and 255 for ignored
    pixels). Images may differ in size. `indices` picks items of the naturally sorted list (2 before 10);
    every mask of the folder is checked nevertheless, so that all parts of a set agree on the classes.

    num_classes: n; class_values: the mask files' value for each class; names: the items' file stems;
    in_channels: C. Raises ValueError that names the file, what was found in it and what to do.
    """

    def __init__(self, root: str | Path, indices: Sequence[int] | None = None):
        root = Path(root)
        pairs = find_pairs(only_folder(root, IMAGE_FOLDERS), only_folder(root, MASK_FOLDERS))
        first_with, self.in_channels, pixels = check_pairs(pairs)
        self.class_values = class_values(first_with)
        self.num_classes = len(self.class_values)
        for index in indices or ():
            if not 0 <= index < len(pairs):
                raise ValueError(f"index {index} is out of range: {root} holds {len(pairs)} pairs")
        self._pairs = pairs if indices is None else [pairs[index] for index in indices]
        self.names = tuple(image.stem for image, _ in self._pairs)
        fits = pixels * (self.in_channels + 1) <= CACHE_LIMIT
        self._cache = [self._load(*pair) for pair in self._pairs] if fits else None

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self._cache[index] if self._cache else self._load(*self._pairs[index])
        scale = np.iinfo(image.dtype).max
        pixels = np.atleast_3d(image).transpose(2, 0, 1).astype(np.float32) / scale
        return torch.from_numpy(pixels), torch.from_numpy(mask.astype(np.int64))

    def _load(self, image_path: Path, mask_path: Path) -> tuple[np.ndarray, np.ndarray]:
        mask = read_picture(mask_path)
        if self.class_values == (0, 255):
            mask = mask == 255
        return read_picture(image_path), mask.astype(np.uint8)


def only_folder(root: Path, names: tuple[str, ...]) -> Path:
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give the folder that holds the images and the masks")
    found = [entry for entry in sorted(root.iterdir()) if entry.is_dir() and entry.name.lower() in names]
    if len(found) == 1:
        return found[0]
    there = ", ".join(entry.name for entry in found or sorted(root.iterdir())[:8]) or "nothing"
    raise ValueError(f"{root} must hold exactly one folder named {', '.join(names)}, but holds {there}")


def _natural(stem: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", stem)]


def _files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in files:
            raise ValueError(f"{files[path.stem]} and {path.name} have the same stem: remove one of them")
        files[path.stem] = path
    if not files:
        raise ValueError(f"{folder} holds no picture ({', '.join(SUFFIXES)})")
    return files


def find_pairs(image_folder: Path, mask_folder: Path) -> list[tuple[Path, Path]]:
    images, masks = _files(image_folder), _files(mask_folder)
    for here, there, folder in ((images, masks, mask_folder), (masks, images, image_folder)):
        alone = sorted(here.keys() - there.keys(), key=_natural)
        if alone:
            raise ValueError(
                f"{here[alone[0]]} has no partner named {alone[0]}.* in {folder}"
                + (f" (nor have {len(alone) - 1} more files)" if len(alone) > 1 else "")
                + ": an image and its mask must have the same stem"
            )
    return [(images[stem], masks[stem]) for stem in sorted(images, key=_natural)]


def _open(path: Path) -> Image.Image:
    try:
        picture = Image.open(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}): save it again as PNG") from error
    pages = getattr(picture, "n_frames", 1)
    if pages > 1:
        picture.close()
        raise ValueError(f"{path} holds {pages} pages: save each page as a file of its own")
    return picture


def read_picture(path: Path) -> np.ndarray:
    with _open(path) as picture:
        try:
            return np.asarray(picture)
        except OSError as error:
            raise ValueError(f"{path} is damaged ({error}): save it again") from error


def check_pairs(pairs: list[tuple[Path, Path]]) -> tuple[dict[int, Path], int, int]:
    """Checks every mask and every image's header.

    Returns for each value in the masks the first file that holds it, the images' channels, and the number
    of pixels in all.
    """
    first_with: dict[int, Path] = {}
    first_path, first_mode = pairs[0][0], ""
    pixels = 0
    for image_path, mask_path in pairs:
        with _open(image_path) as image, _open(mask_path) as mask:
            first_mode = first_mode or image.mode
            _check_modes(image_path, image, mask_path, mask)
            if _CHANNELS[image.mode] != _CHANNELS[first_mode]:
                raise ValueError(
                    f"{image_path} has the mode {image.mode}, but {first_path} has {first_mode}: "
                    f"make all images grey or all RGB"
                )
        pixels += image.width * image.height
        for value in np.unique(read_picture(mask_path)).tolist():
            first_with.setdefault(int(value), mask_path)
    return first_with, _CHANNELS[first_mode], pixels


def check_headers(image_path: Path, mask_path: Path) -> tuple[int, int]:
    """Width and height of an image that has a fitting mask; ValueError if kind or size are wrong. Reads no pixels."""
    with _open(image_path) as image, _open(mask_path) as mask:
        _check_modes(image_path, image, mask_path, mask)
        return image.size


def _check_modes(image_path: Path, image: Image.Image, mask_path: Path, mask: Image.Image) -> None:
    if image.mode not in _CHANNELS:
        raise ValueError(
            f"{image_path} has the mode {image.mode}: convert it to grey (L) or to RGB without transparency"
        )
    if mask.mode not in _MASK_MODES:
        raise ValueError(
            f"{mask_path} is a colour picture (mode {mask.mode}), but a mask holds one class number for each "
            f"pixel: map each colour to its number 0, 1, 2, … and save it as a grey or palette PNG"
        )
    if mask.size != image.size:
        raise ValueError(
            f"{mask_path} is {mask.width} x {mask.height} pixels, but {image_path} is "
            f"{image.width} x {image.height}: scale the mask with nearest-neighbour sampling"
        )


def class_values(first_with: dict[int, Path]) -> tuple[int, ...]:
    """first_with: for each value found in the masks, the first file that holds it"""
    values = sorted(first_with)
    if len(values) == 1:
        raise ValueError(
            f"every pixel of every mask is {values[0]} (the first is {first_with[values[0]]}): "
            f"a set needs at least two classes"
        )
    if values == [0, IGNORE]:
        return (0, IGNORE)
    classes = [value for value in values if value != IGNORE]
    odd = [value for number, value in enumerate(classes) if value != number]
    if odd:
        shown = ", ".join(map(str, values[:12])) + (", …" if len(values) > 12 else "")
        raise ValueError(
            f"{first_with[odd[0]]} holds the value {odd[0]}; the masks hold {len(values)} values: {shown}. "
            f"They must be the class numbers 0, 1, 2, … without a gap and 255 for ignored pixels, or only 0 "
            f"and 255: renumber them. (Many odd values come from JPEG or from smooth scaling: threshold them)"
        )
    return tuple(classes)
