from torch import Tensor


def border_weight_map(
    mask: Tensor, num_classes: int, w0: float = 10.0, sigma: float = 5.0, ignore_index: int = 255
) -> Tensor:
    """mask int64 [H, W] -> float32 [H, W]"""
    raise NotImplementedError


def weighted_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = 255
) -> Tensor:
    """logits [N, C, H, W], target int64 [N, H, W], weight float [N, H, W] -> scalar float32"""
    raise NotImplementedError
