from torch import Tensor


class ConfusionMatrix:
    def __init__(self, num_classes: int, ignore_index: int = 255):
        raise NotImplementedError

    def update(self, pred: Tensor, target: Tensor) -> None:
        """pred, target: integer tensors of the same shape"""
        raise NotImplementedError

    def pixel_accuracy(self) -> float:
        raise NotImplementedError

    def mean_accuracy(self) -> float:
        raise NotImplementedError

    def iou(self) -> Tensor:
        """[C], NaN for a class that is neither in the truth nor predicted"""
        raise NotImplementedError

    def mean_iou(self) -> float:
        raise NotImplementedError

    def frequency_weighted_iou(self) -> float:
        raise NotImplementedError

    def dice(self) -> Tensor:
        """[C], NaN as in iou"""
        raise NotImplementedError

    def mean_dice(self) -> float:
        raise NotImplementedError


def v_rand(probability: Tensor, labels: Tensor) -> float:
    """probability [N, H, W] or [H, W] that a pixel is inside a cell; labels 1 inside, 0 membrane"""
    raise NotImplementedError


def v_info(probability: Tensor, labels: Tensor) -> float:
    raise NotImplementedError


def pixel_error(probability: Tensor, labels: Tensor) -> float:
    raise NotImplementedError
