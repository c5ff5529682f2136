"""Time of a DISAM step against a SAM step: ResNet-18 at batch 32, and over domains and widths.

``python benchmarks/step_cost.py [--pixels 64] [--rounds 31] [--device cpu] [--threads 1] [--quick]``

Steps of all algorithms take turns within a round; every ratio is the median over rounds of the ratio within a round,
with its 95 % interval of order statistics. SAM's closure knows no domains, so sorting the losses by domain counts as
DISAM's overhead. Wall-clock time. ``--quick`` leaves out the two sweeps.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from disam_theory.step_cost import (
    NAMES,
    Step,
    against,
    batch,
    in_turns,
    median_interval,
    residual_network,
    training_steps,
)

GOAL = 1.03  # DISAM's step over SAM's, ResNet-18 at batch 32
BATCH = 32


class BasicBlock(nn.Module):
    """ResNet's block of two convolutions (He et al. 2016), with a projection where the shape changes."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *(nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)),
            *(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)),
        )
        changes = stride > 1 or inside != out
        project = (nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.skip = nn.Sequential(*project) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """relu(path + skip)."""
        return torch.relu(self.path(x) + self.skip(x))


def resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 as torchvision has it: 11.2 million parameters."""
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    widths = ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1))
    widths += ((128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1))
    blocks = (BasicBlock(*width) for width in widths)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def report(what: str, model: nn.Module, M: int, arguments: argparse.Namespace) -> None:
    """Time a step of every algorithm and print a row."""
    device = torch.device(arguments.device)
    inputs, labels, domains = (values.to(device) for values in batch(BATCH, M, arguments.pixels))
    steps = training_steps(model.to(device), inputs, labels, domains, M, NAMES)
    if device.type == "cuda":
        steps = {name: _to_the_end(step) for name, step in steps.items()}
    seconds = in_turns(steps, arguments.rounds, time.perf_counter)
    middles = " ".join(f"{1e3 * median_interval(seconds[name]).median:9.1f}" for name in NAMES)
    found = against(seconds, "disam", "sam")
    ratio, extra = found["ratio"], found["difference"]
    by_hand = against(seconds, "disam", "plain-sam")["ratio"]
    print(
        f"{what:<28} {middles}   {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})   {1e3 * extra.median:+.2f} "
        f"({1e3 * extra.low:+.2f} to {1e3 * extra.high:+.2f})   {by_hand.median:.3f}",
        flush=True,
    )


def _to_the_end(step: Step) -> Step:
    def timed() -> None:
        step()
        torch.cuda.synchronize()

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of a DISAM step against a SAM step.")
    parser.add_argument("--pixels", type=int, default=64, help="side of the images (default 64)")
    parser.add_argument("--rounds", type=int, default=31, help="steps of each algorithm (default 31)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 with 3 domains only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    names = " ".join(f"{name:>9}" for name in NAMES)
    print(f"{'batch ' + str(BATCH):<28} {names} ms   DISAM / SAM (goal at most {GOAL})   ms more   DISAM / SAM by hand")
    report("ResNet-18, 3 domains", resnet18(), 3, arguments)
    if not arguments.quick:
        for M in (2, 4, 8, 16):
            report(f"residual network, {M} domains", residual_network(16), M, arguments)
        for width in (8, 16, 32, 64):
            model = residual_network(width)
            size = sum(p.numel() for p in model.parameters())
            report(f"{size:,} parameters, 3 domains", model, 3, arguments)


if __name__ == "__main__":
    main()
