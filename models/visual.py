from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor


def save_image(picture: Image.Image, path: str | Path) -> None:
    """Writes the PNG atomically."""
    raise NotImplementedError


def class_map(mask: Tensor) -> Image.Image:
    """[H, W] -> palette picture whose pixel values are the class ids"""
    raise NotImplementedError


def overlay(image: Tensor, mask: Tensor, names: Sequence[str] | None = None) -> Image.Image:
    """image float [C, H, W] in [0, 1], mask [H, W] -> RGB picture, with a legend when names are given"""
    raise NotImplementedError


def probability_map(probability: Tensor) -> Image.Image:
    """[H, W] in [0, 1] -> grey picture"""
    raise NotImplementedError


def loss_curve(history: Mapping[str, Sequence[tuple[float, float]]], path: str | Path) -> None:
    """history: curve name ("train", "validation") -> (step, loss) pairs"""
    raise NotImplementedError


def sample_sheet(
    rows: Sequence[Sequence[Tensor]],
    path: str | Path,
    columns: Sequence[str] = ("image", "truth", "before", "after"),
) -> None:
    """Each row: an image [C, H, W], then masks [H, W], one for each further column."""
    raise NotImplementedError
