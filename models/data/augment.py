from torch import Generator, Tensor


def mirror_pad(image: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """image [..., H, W]; pads as torch.nn.functional.pad's: (left, right, top, bottom)"""
    raise NotImplementedError


def elastic_deformation(
    image: Tensor, mask: Tensor, generator: Generator, grid: int = 3, sigma: float = 10.0
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def random_flip_rotate(image: Tensor, mask: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def random_crop(
    image: Tensor, mask: Tensor, size: int | tuple[int, int], generator: Generator
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
