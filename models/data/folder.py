from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset


class FolderSegmentation(Dataset[tuple[Tensor, Tensor]]):
    num_classes: int
    class_values: tuple[int, ...]
    names: tuple[str, ...]
    in_channels: int

    def __init__(self, root: str | Path, indices: Sequence[int] | None = None):
        raise NotImplementedError
