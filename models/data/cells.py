from torch import Tensor
from torch.utils.data import Dataset


class TouchingCells(Dataset[tuple[Tensor, Tensor]]):
    num_classes = 2
    class_values = (0, 1)
    in_channels = 1

    def __init__(self, count: int, size: int | tuple[int, int] = 256, seed: int = 0):
        raise NotImplementedError
