"""The settings of a training run, saved as config.json beside its checkpoints."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from ..layers import Ops
from ..segmentation.unet import Padding
from .checkpoint import write_json

Optimizer = Literal["sgd", "adamw", "rmsprop"]
Schedule = Literal["constant", "cosine", "poly"]
ClassWeights = Literal["median-frequency", "none"]
CONFIG_NAME = "config.json"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the loop needs for any network. All of it takes part in exact resume."""

    steps: int = 2000
    batch_size: int = 1
    """Of each process; there is one unless torchrun starts more."""
    optimizer: Optimizer = "sgd"
    """"sgd" has the paper's momentum (U-Net 0.99, SegNet 0.9), "rmsprop" char-rnn's alpha of 0.95, "adamw" torch's
    defaults."""
    lr: float = 1e-3
    schedule: Schedule = "constant"
    """"cosine" and "poly" fall from lr to zero over `steps`; "poly" is DeepLab v2's and PSPNet's
    lr (1 - step / steps)^0.9."""
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
        _check_choice("optimizer", self.optimizer, get_args(Optimizer))
        _check_choice("schedule", self.schedule, get_args(Schedule))
        _check_choice("precision", self.precision, ("fp32", "bf16", "fp16"))

    @property
    def momentum(self) -> float:
        """Of "sgd"."""
        return 0.99

    @property
    def largest_gradient(self) -> float:
        """Every element of the gradient is clamped to plus or minus this."""
        return math.inf

    def learning_rate(self, step: int) -> float:
        """The rate of the step after `step` steps: a function of settings and step alone, so resuming needs no
        more."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "poly":
            return self.lr * (1 - step / self.steps) ** 0.9
        return self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The settings of the run in `folder`; ValueError if there is none or if they are another
        version's."""
        values = _read_values(folder)
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{folder / CONFIG_NAME} is not readable as {cls.__name__}: {error}") from error

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


@dataclass(frozen=True, kw_only=True)
class SceneConfig(TrainingConfig):
    """A network for scenes, and its data; the defaults are those of SegNet's training files.

    Together with the weights it is all that prediction needs.
    """

    data: str
    """The data set's folder."""
    dataset: str = "auto"
    """Its name in models/data/sets.py; "auto": found out from the folder."""
    split: str = "train"
    """What to train on."""
    network: str = "segnet"
    """A name in models/segmentation/networks.py."""
    width: int = 64
    """Channels of the first stage."""
    scale: int = 1
    """Divides the height and the width of the images."""
    crop: int = 0
    """Height and width of a random window of the scaled image to train on; 0: whole images."""
    class_weights: ClassWeights = "median-frequency"
    """SegNet's, or "none" as FCN has it."""
    auxiliary: float = 1.0
    """Factor of the auxiliary losses, for networks that have some, beside the papers' weights; 0: none."""
    batch_size: int = 4
    steps: int = 40_000
    every: int = 1000
    ops: Ops = "fused"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from red, green and blue in [0, 1] ..."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """... and what the rest is divided by. These are ImageNet's, as torchvision's weights want them."""
    classes: tuple[str, ...] = ()
    """The classes' names in order ..."""
    colours: tuple[tuple[int, int, int], ...] = ()
    """... and their colours, if the data set has any. Filled in from the data, as `dataset` is."""

    def __post_init__(self):
        super().__post_init__()
        if self.crop < 0:
            raise ValueError(f"crop={self.crop}: must be positive, or 0 for whole images")
        if self.auxiliary < 0:
            raise ValueError(f"auxiliary={self.auxiliary}: must be positive, or 0 for no auxiliary losses")
        _check_choice("class_weights", self.class_weights, get_args(ClassWeights))

    @property
    def momentum(self) -> float:
        return 0.9


@dataclass(frozen=True, kw_only=True)
class CharRNNConfig(TrainingConfig):
    """A character model and its text; the defaults are those of char-rnn's train.lua."""

    text: str | None = None
    """A file in UTF-8; None: the source of Python's own library."""
    layers: int = 2
    width: int = 128
    embedding: int = 0
    """Length of the learnt vector that stands for a character; 0: one-hot."""
    dropout: float = 0.0
    unroll: int = 50
    """Characters through which the gradient flows back (truncated BPTT); the state is carried further."""
    validation: float = 0.05
    """Share of the text that is held out to choose the best network ..."""
    test: float = 0.0
    """... and share that is left for the very end."""
    batch_size: int = 50
    optimizer: Optimizer = "rmsprop"
    lr: float = 2e-3
    decay: float = 0.97
    """Factor of the learning rate after each epoch, from `decay_after` epochs on."""
    decay_after: int = 10
    clip: float = 5.0
    """Largest value of an element of the gradient, 0: any. Of the loss summed over time, as char-rnn sums it."""
    every: int = 1000
    ops: Ops = "fused"
    vocabulary: str = ""
    """The text's characters in order."""
    epoch: int = 0
    """Steps in which the training text is read once."""
    digest: str = ""
    """SHA-256 of the text: a run goes on with the text that it began with, or not at all."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay}: must be above 0 and at most 1")
        for name in ("decay_after", "unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.clip < 0:
            raise ValueError(f"clip={self.clip}: must be positive, or 0 for no clipping")

    @property
    def largest_gradient(self) -> float:
        # The loss is an average over the time steps.
        return self.clip / self.unroll if self.clip else math.inf

    def learning_rate(self, step: int) -> float:
        epochs = step // self.epoch
        return super().learning_rate(step) * self.decay ** max(0, epochs - self.decay_after + 1)


def read_config(folder: Path) -> SegmentationConfig | SceneConfig:
    """The settings of the run in `folder`, of whatever network that segments; ValueError if there is none."""
    values = _read_values(folder)
    if "vocabulary" in values:
        raise ValueError(f"{folder} holds a network that writes text: use backstride sample")
    return (SceneConfig if "network" in values else SegmentationConfig).read(folder)


def _read_values(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no training run: it has no {CONFIG_NAME}")
    try:
        return {name: _tuples(value) for name, value in json.loads(path.read_text()).items()}
    except (AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable as settings: {error}") from error


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose {' or '.join(map(repr, choices))}")


def _tuples(value: Any) -> Any:
    """JSON knows lists only."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
