"""Augmentation of one image [C, H, W] and its mask [H, W], reproducible from an explicit generator."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def _check_pair(image: Tensor, mask: Tensor) -> None:
    if image.ndim != 3 or mask.shape != image.shape[1:]:
        raise ValueError(
            f"expected an image [C, H, W] and a mask [H, W] of the same size, "
            f"but their shapes are {list(image.shape)} and {list(mask.shape)}"
        )


def _mirrored_indices(size: int, before: int, after: int) -> Tensor:
    """… 2 1 | 0 1 2 … n-1 | n-2 n-3 …, reflected as often as it takes"""
    if size == 1:
        return torch.zeros(before + 1 + after, dtype=torch.int64)
    period = 2 * (size - 1)
    position = torch.arange(-before, size + after) % period
    return torch.minimum(position, period - position)


def mirror_pad(image: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """Extends the last two dimensions by reflection about the border pixels, which are not repeated.

    Equal to `torch.nn.functional.pad(mode="reflect")` where that is defined, but any pad is allowed, also
    one larger than the image (then the reflection repeats), and any dtype and number of dimensions.

    image: [..., H, W]; pads: (left, right, top, bottom) in pixels, torch's order.
    Raises ValueError for negative pads or an empty image.
    """
    left, right, top, bottom = pads
    if min(pads) < 0:
        raise ValueError(f"pads must not be negative, but they are {pads}")
    if image.ndim < 2 or 0 in image.shape[-2:]:
        raise ValueError(f"an image of shape {list(image.shape)} has no pixels to mirror")
    rows = _mirrored_indices(image.shape[-2], top, bottom).to(image.device)
    columns = _mirrored_indices(image.shape[-1], left, right).to(image.device)
    return image.index_select(-2, rows).index_select(-1, columns)


def elastic_deformation(
    image: Tensor, mask: Tensor, generator: Generator, grid: int = 3, sigma: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Smooth random deformation as in Ronneberger et al. 2015, section 3.1.

    Displacement vectors are drawn from N(0, sigma pixels) on a coarse `grid` × `grid` that spans the image;
    bicubic interpolation gives each pixel's displacement. The image is sampled bilinearly, the mask at the
    nearest pixel, both with mirrored borders.

    image: float [C, H, W]; mask: integers [H, W]; generator: a CPU generator.
    Returns both with their shapes and dtypes unchanged.
    """
    _check_pair(image, mask)
    if not image.is_floating_point():
        raise TypeError(f"the image must be floating point, not {image.dtype}: divide it by 255 first")
    if grid < 2:
        raise ValueError(f"the grid needs at least 2 points a side to span the image, not {grid}")
    height, width = mask.shape
    coarse = sigma * torch.randn(1, 2, grid, grid, generator=generator)
    dy, dx = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0].to(image)
    y = torch.arange(height).to(image)[:, None] + dy
    x = torch.arange(width).to(image) + dx
    # grid_sample wants -1 … 1 between the centres of the outermost pixels.
    where = torch.stack((2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1), dim=-1)[None]

    def sample(values: Tensor, mode: str) -> Tensor:
        return F.grid_sample(values[None], where, mode=mode, padding_mode="reflection", align_corners=True)[0]

    return sample(image, "bilinear"), sample(mask[None].to(image), "nearest")[0].to(mask.dtype)


def random_flip_rotate(image: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """One of the eight symmetries of the square, each equally likely; a quarter turn swaps H and W."""
    _check_pair(image, mask)
    turns = int(torch.randint(4, (), generator=generator))
    flip = bool(torch.randint(2, (), generator=generator))
    image, mask = torch.rot90(image, turns, (-2, -1)), torch.rot90(mask, turns, (-2, -1))
    return (image.flip(-1), mask.flip(-1)) if flip else (image, mask)


def random_crop(
    image: Tensor, mask: Tensor, size: int | tuple[int, int], generator: Generator
) -> tuple[Tensor, Tensor]:
    """A window of `size` (height and width in pixels) at a random place.

    An image smaller than the window is first extended by mirroring, alike on both sides.
    """
    _check_pair(image, mask)
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"the crop's size must be positive, but it is {(height, width)}")
    missing_y, missing_x = max(height - mask.shape[0], 0), max(width - mask.shape[1], 0)
    pads = (missing_x // 2, missing_x - missing_x // 2, missing_y // 2, missing_y - missing_y // 2)
    image, mask = mirror_pad(image, pads), mirror_pad(mask, pads)
    top = int(torch.randint(mask.shape[0] - height + 1, (), generator=generator))
    left = int(torch.randint(mask.shape[1] - width + 1, (), generator=generator))
    window = (..., slice(top, top + height), slice(left, left + width))
    return image[window], mask[window]
