"""The settings of a training run, saved as config.json beside its checkpoints."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from ..layers import Ops
from ..segmentation.unet import Padding
from .checkpoint import write_json

CONFIG_NAME = "config.json"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the loop needs for any network. All of it takes part in exact resume."""

    steps: int = 2000
    batch_size: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """"sgd" has the U-Net paper's momentum of 0.99; "adamw" torch's defaults."""
    lr: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    """"cosine" falls from lr to zero over `steps`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast's type; fp16 scales the loss."""
    every: int = 200
    """Steps between two validations, sample pictures and checkpoints."""
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr}: must be positive")
        _check_choice("optimizer", self.optimizer, ("sgd", "adamw"))
        _check_choice("schedule", self.schedule, ("constant", "cosine"))
        _check_choice("precision", self.precision, ("fp32", "bf16", "fp16"))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The settings of the run in `folder`; ValueError if there is none or if they are another
        version's."""
        path = folder / CONFIG_NAME
        if not path.is_file():
            raise ValueError(f"{folder} holds no training run: it has no {CONFIG_NAME}")
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            for name, value in values.items():
                values[name] = tuple(value) if isinstance(value, list) else value
            return cls(**values)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not readable as {cls.__name__}: {error}") from error

    def write(self, folder: Path) -> None:
        write_json(asdict(self), folder / CONFIG_NAME)

    def check_same(self, folder: Path) -> None:
        """ValueError naming every setting that differs from those of the run in `folder`."""
        earlier = self.read(folder)
        differences = [
            f"{field.name} is {getattr(self, field.name)!r} now, but was {getattr(earlier, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(earlier, field.name)
        ]
        if differences:
            raise ValueError(
                f"the run in {folder} can only be resumed with its own settings: {'; '.join(differences)}. "
                "Use the earlier ones, or start a new run in another folder"
            )


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(TrainingConfig):
    """U-Net and its data; the defaults are the paper's where it gives a number."""

    data: str | None = None
    """A folder of images and masks (see models/data/folder.py); None: generated touching cells."""
    validation: tuple[int, ...] = ()
    """Indices of the images that are held out, in the folder's order."""
    tile: int = 572
    """Input height and width of a training crop, and of a tile in prediction."""
    width: int = 64
    depth: int = 4
    padding: Padding = "valid"
    dropout: float = 0.5
    ops: Ops = "fused"
    elastic: float = 10.0
    """Standard deviation in pixels of the elastic deformation; 0: none."""
    border_weight: float = 10.0
    """w0 of the border weight map."""
    border_sigma: float = 5.0
    """sigma of the border weight map, in pixels."""
    in_channels: int = 1
    num_classes: int = 2


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose {' or '.join(map(repr, choices))}")
