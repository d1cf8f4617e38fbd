"""How many frames of 1024 x 2048 pixels ICNet segments in a second, the question of its paper (arXiv 1704.08545)."""

import statistics
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..layers import Ops
from .icnet import ICNet

FRAME = (1024, 2048)
WARM_UP = 10


@dataclass(frozen=True)
class Speed:
    """Of one frame at a time, from logits to classes: milliseconds."""

    median: float
    slowest_tenth: float

    @property
    def frames_per_second(self) -> float:
        return 1000 / self.median


def build(ops: Ops, width: int) -> nn.Module:
    """ICNet for Cityscapes' 19 classes, ready to predict, with the same random weights for both `ops`: its speed
    doesn't depend on them."""
    torch.manual_seed(0)
    return ICNet(3, 19, width=width, ops=ops).eval()


@torch.inference_mode()
def measure(network: nn.Module, frame: Tensor, frames: int) -> Speed:
    """`frame` is [1, 3, H, W] on a GPU, where the network is. Each frame is waited for, as in a vehicle."""
    times = []
    for number in range(WARM_UP + frames):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        network(frame).argmax(1)
        end.record()
        end.synchronize()
        if number >= WARM_UP:
            times.append(start.elapsed_time(end))
    return Speed(statistics.median(times), statistics.quantiles(times, n=10)[-1])


@torch.inference_mode()
def difference(networks: dict[str, nn.Module], frame: Tensor) -> float:
    """The largest difference between the logits of the two networks, divided by the largest logit."""
    ours, theirs = (networks[ops](frame).float() for ops in ("fused", "torch"))
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def show_icnet(
    console: Console,
    device: torch.device,
    frames: int = 100,
    size: tuple[int, int] = FRAME,
    width: int = 32,
) -> None:
    """Prints frames per second with `ops="fused"` and `ops="torch"`, in fp32 (TF32 as torch's switches say), bf16 and
    fp16. Without a GPU it only checks on a frame of an eighth of the height and width that both agree, and says so."""
    if frames < 2:
        raise ValueError(f"frames={frames}: must be at least 2")
    on_gpu = device.type == "cuda"
    if not on_gpu:
        size = (size[0] // 8, size[1] // 8)
    networks = {ops: build(ops, width).to(device) for ops in ("fused", "torch")}
    frame = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    shown = f"{size[0]} x {size[1]}"
    if not on_gpu:
        console.print("[bold]No CUDA GPU here: no GPU was measured.[/]")
        console.print(
            f'Dry run on one frame of {shown} pixels: ops="fused" and ops="torch" differ by '
            f"{difference(networks, frame):.1e} of the largest logit. Nothing was timed.",
            highlight=False,
            soft_wrap=True,
        )
        return
    torch.backends.cudnn.benchmark = True  # torch at its best
    title = f"ICNet, frames of {shown} pixels, one at a time, {torch.cuda.get_device_name(device)}"
    table = Table("", "ops", "ms per frame", "slowest tenth from", "frames per second", "difference", title=title)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for network in networks.values():
            network.to(dtype)
        apart = difference(networks, frame.to(dtype))
        for ops, network in networks.items():
            speed = measure(network, frame.to(dtype), frames)
            name = str(dtype).removeprefix("torch.")
            numbers = (f"{speed.median:.2f}", f"{speed.slowest_tenth:.2f}", f"{speed.frames_per_second:.1f}")
            table.add_row(name, ops, *numbers, f"{apart:.1e}")
    console.print(table)
