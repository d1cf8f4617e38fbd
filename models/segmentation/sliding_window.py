"""What turning dense layers into convolutions saves: Long, Shelhamer, Darrell 2015 (arXiv 1411.4038), section 3.1.

The naive way from a classifier to a segmentation cuts a window out around each place and classifies it; windows that
overlap compute the same features again and again. With `convolutionalize` one pass over the image gives the same
scores.
"""

from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .vgg import VGG16, convolutionalize

REDUCED = {"stages": ((4, 4), (8, 8)), "dense": 16, "window": 3}
IMAGES = ((224, 224), (320, 320), (512, 512), (512, 1024), (1024, 2048))


class Classifier(NamedTuple):
    """A classifier of square windows of an image, and what its dense layers do as convolutions."""

    network: VGG16
    convolutions: nn.Sequential
    window: int  # pixels
    step: int  # pixels from one window to the next: what the max-pools make of one pixel

    def windows(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of windows in an image."""
        return (height - self.window) // self.step + 1, (width - self.window) // self.step + 1

    def of_window(self, window: Tensor) -> Tensor:
        """[N, in_channels, window, window] -> scores [N, num_classes]"""
        return self.network.classifier(self.network.features(window))

    def in_one_pass(self, image: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> scores [N, num_classes, rows, columns] of its windows"""
        return self.convolutions(self.network.features(image))

    def window_by_window(self, image: Tensor) -> Tensor:
        """What `in_one_pass` gives, by classifying each window."""
        rows, columns = self.windows(*image.shape[2:])
        scores = [
            self.of_window(image[:, :, top : top + self.window, left : left + self.window])
            for top in range(0, rows * self.step, self.step)
            for left in range(0, columns * self.step, self.step)
        ]
        return torch.stack(scores, dim=-1).unflatten(-1, (rows, columns))


def reduced_classifier() -> Classifier:
    """VGG16's kind with two narrow stages, in fp64. Its convolutions pad nothing: the border of a window inside the
    image would see zeros, where one pass sees the image."""
    torch.manual_seed(0)
    network = VGG16(1, 3, **REDUCED).double().eval()
    for module in network.stages.modules():
        if isinstance(module, nn.Conv2d):
            module.padding = (0, 0)
    window = REDUCED["window"]
    for stage in reversed(REDUCED["stages"]):
        window = 2 * window + 2 * len(stage)
    return Classifier(network, _convolutions_of(network), window, 2 ** len(REDUCED["stages"]))


def vgg16() -> Classifier:
    """VGG16 without memory for its weights, to count with."""
    with torch.device("meta"):
        network = VGG16(ops="torch").eval()
        return Classifier(network, _convolutions_of(network), network.size, 32)


def _convolutions_of(network: VGG16) -> nn.Sequential:
    last = [module for module in network.stages.modules() if isinstance(module, nn.Conv2d)][-1]
    return convolutionalize(network.classifier, last.out_channels, network.ops).eval()


def multiply_adds(classifier: Classifier, height: int, width: int) -> tuple[int, int]:
    """(of one window, of one pass over an image), as many as the convolutions and dense layers need."""
    weight = next(classifier.network.parameters())
    counts = []
    for compute, size in ((classifier.of_window, 2 * [classifier.window]), (classifier.in_one_pass, [height, width])):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            compute(weight.new_empty(1, weight.shape[1], *size))
        counts.append(counter.get_total_flops() // 2)
    return counts[0], counts[1]


def show_sliding_window(console: Console) -> None:
    """Prints that one pass gives the scores of all windows, and how many multiply-adds it saves."""
    classifier = reduced_classifier()
    size = classifier.window
    console.print(
        f"A small classifier of windows of {size}x{size} pixels (convolutions, max-pools, three dense layers), and the "
        "same with its dense layers as convolutions, in fp64:",
        highlight=False,
    )
    table = Table("image", "windows", "largest score", "largest difference", title="One pass against window by window")
    for height, width in ((size, size), (40, 56)):
        image = torch.randn(1, 1, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            scores, wanted = classifier.in_one_pass(image), classifier.window_by_window(image)
        rows, columns = scores.shape[2:]
        difference = (scores - wanted).abs().max().item()
        table.add_row(f"{height}x{width}", f"{rows}x{columns}", f"{wanted.abs().max().item():.3f}", f"{difference:.1g}")
    console.print(table)

    network = vgg16()
    table = Table(title="Multiply-adds of VGG16")
    for name in ("image", "windows", "one by one", "one pass", "saved", "per pixel", "saved"):
        table.add_column(name, justify="right", no_wrap=True)
    for height, width in IMAGES:
        window, whole = multiply_adds(network, height, width)
        rows, columns = network.windows(height, width)
        one_by_one, each_pixel = rows * columns * window, height * width * window
        table.add_row(
            f"{height}x{width}",
            f"{rows}x{columns}",
            _readable(one_by_one),
            _readable(whole),
            f"{one_by_one / whole:.1f}x",
            _readable(each_pixel),
            f"{each_pixel / whole:,.0f}x",
        )
    console.print(table)
    console.print(
        "One by one: windows of 224x224 pixels, each 32 pixels from the next; one pass gives a score for each of them. "
        "Per pixel: a window around every pixel, the naive segmentation. VGG16 pads its convolutions, so at the border "
        "of a window the two see different things; the small classifier pads nothing.",
        highlight=False,
    )


def _readable(count: int) -> str:
    if count < 1e12:
        return f"{count / 1e9:.1f} G"
    return f"{count / 1e12:.1f} T" if count < 1e14 else f"{count / 1e12:,.0f} T"
