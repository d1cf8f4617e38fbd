"""`backstride demo`: what the package does, shown in a few minutes on two CPU cores."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from .. import fused_ops
from .language.hello import show_hello
from .predict import predict_logits
from .training import language
from .training.config import CharRNNConfig, SegmentationConfig
from .training.segmentation import SegmentationTask, evaluate, load_network, open_data
from .training.train import BEST, LAST, train
from .visual import overlay, sample_sheet, save_picture

CONFIG = SegmentationConfig(
    width=12, depth=3, tile=220, batch_size=2, steps=300, every=100, optimizer="adamw", lr=3e-3, schedule="cosine"
)
TEXT_CONFIG = CharRNNConfig(steps=2000, every=2000)


def run_demo(
    out: Path, console: Console, config: SegmentationConfig = CONFIG, text_config: CharRNNConfig = TEXT_CONFIG
) -> None:
    """Trains a small U-Net on generated cells and a char-RNN on Python's own source, and says what it made in `out`.

    An earlier demo in `out` is overwritten.
    """
    started = time.perf_counter()
    for folder in (out, out / "char-rnn"):
        for name in (LAST, BEST):
            (folder / name).unlink(missing_ok=True)
    demo_unet(out, console, config)
    demo_char_rnn(out / "char-rnn", console, text_config)
    console.print(f"The demo took {time.perf_counter() - started:.0f} s.", highlight=False)


def demo_char_rnn(out: Path, console: Console, config: CharRNNConfig) -> None:
    """Trains a char-RNN; in the course of it, it prints what the network writes."""
    show_hello(console)
    streams, config = language.open_text(config)
    task = language.CharRNNTask(config, streams)
    count = sum(parameter.numel() for parameter in task.network.parameters())
    console.print(
        f"The same network, larger ({count:,} parameters), reads the source of Python's own library, {config.steps} "
        f"steps of {task.counted_per_step:,} characters. What it writes, at first and later:",
        highlight=False,
    )
    history = train(task, config, out, console=console)
    console.print(
        f"On unseen source it needs {history['bits_per_character'][-1][1]:.2f} bits per character. More of it: "
        f"backstride sample --checkpoint {out}",
        highlight=False,
    )


def demo_unet(out: Path, console: Console, config: SegmentationConfig) -> None:
    """Trains a small U-Net, and checks one layer in the interpreter."""
    training, validation, config = open_data(config)
    task = SegmentationTask(config, training, validation)
    count = sum(parameter.numel() for parameter in task.network.parameters())
    console.print(
        f"A U-Net with {count:,} parameters learns to separate touching cells, {config.steps} steps on "
        f"{len(training)} generated pictures, its layers computed by backstride.fused_ops.",
        highlight=False,
    )
    before = _segment(task, config)
    iou_before = task.validate()["mean_iou"]
    train(task, config, out, console=console)
    task.network, _ = load_network(out)
    after = _segment(task, config)
    metrics = evaluate(task.network, validation, config.tile)

    rows = [[*validation[index], before[index], after[index]] for index in range(len(validation))]
    sample_sheet(rows, out / "before-and-after.png")
    image, _ = validation[0]
    save_picture(overlay(image, before[0]), out / "overlay-before.png")
    save_picture(overlay(image, after[0]), out / "overlay-after.png")

    console.print("One layer through the interpreted Triton kernel ...")
    layer = compare_layer_in_a_process()

    numbers = Table("what was measured", "")
    numbers.add_row("mean IoU on unseen pictures, before training", f"{iou_before:.3f}")
    numbers.add_row("mean IoU on unseen pictures, after", f"[bold]{metrics['mean_iou']:.3f}[/]")
    numbers.add_row("V_rand / V_info after (1 is perfect)", f"{metrics['v_rand']:.3f} / {metrics['v_info']:.3f}")
    numbers.add_row(
        f"conv_transpose2d by the {layer['path']}: largest difference from torch", f"{layer['difference']:.1e}"
    )
    console.print(numbers)
    files = Table("what was made", "")
    for name, meaning in {
        "before-and-after.png": "unseen pictures: truth, before and after training",
        "overlay-before.png": "the first of them, segmented by the untrained network",
        "overlay-after.png": "the same, segmented by the trained network",
        "loss.png": "the loss curve",
        "samples": "what the network did in the course of training",
        BEST: "the trained weights; backstride predict uses them",
    }.items():
        files.add_row(str(out / name), meaning)
    console.print(files)


def _segment(task: SegmentationTask, config: SegmentationConfig) -> list[torch.Tensor]:
    """The class of every pixel of the held-out pictures."""
    task.network.eval()
    pictures = (task.validation[index][0] for index in range(len(task.validation)))
    return [predict_logits(task.network, picture, config.tile).argmax(0) for picture in pictures]


def compare_layer_in_a_process() -> dict[str, str | float]:
    """`compare_layer` where Triton interprets its kernels, which is decided when it is imported."""
    code = "from backstride.models.demo import compare_layer; compare_layer()"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"the interpreted kernel failed:\n{done.stderr}")
    return json.loads(done.stdout)


def compare_layer() -> None:
    """Prints as JSON which path an up-convolution of U-Net takes and by how much it differs from torch's at most."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 32, 14, 14), torch.randn(32, 16, 2, 2) / 32**0.5, torch.randn(16)
    ours = fused_ops.conv_transpose2d(x, weight, bias, stride=2)
    difference = (ours - F.conv_transpose2d(x, weight, bias, stride=2)).abs().max().item()
    path = fused_ops.explain(fused_ops.conv_transpose2d, x, weight, bias, stride=2)
    print(json.dumps({"path": path.name, "difference": difference}))
