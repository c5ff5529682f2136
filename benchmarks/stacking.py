"""Time of one step of one DISAM run: stacked, alone, and in the released code's way. ``python benchmarks/stacking.py``.

The three are taken in turn, so that a busy machine slows them alike; printed are medians over the repeats, and the
median and range of the ratios within a repeat. Nothing is recorded; one thread, as the study runs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from disam_theory.algorithms import Settings
from disam_theory.domains import Split, load_suite
from disam_theory.models import digits_mlp
from disam_theory.training import Run, train

STEPS, RUNS, REPEATS = 60, 96, 7
RHO, LAM, LR, MOMENTUM, BATCH = 0.05, 0.1, 0.1, 0.9, 96


def stacked_seconds(runs: list[Run]) -> float:
    """Seconds for one step of one run, over all ``runs`` trained together."""
    start = time.perf_counter()
    train(digits_mlp, runs)
    return (time.perf_counter() - start) / (STEPS * len(runs))


def batches(split: Split, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches from the pooled sources."""
    inputs, labels = (torch.cat([getattr(d, part) for d in split.sources]) for part in ("inputs", "labels"))
    domains = torch.cat([torch.full((len(d),), i) for i, d in enumerate(split.sources)])
    order = torch.cat([torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)) for _ in range(9)])
    for step in range(STEPS):
        rows = order[step * BATCH : (step + 1) * BATCH]
        yield inputs[rows].float(), labels[rows], domains[rows]


def released_seconds(split: Split, seed: int) -> float:
    """Seconds for one step of one run as the released loop takes it, written anew from its description.

    A Python set of the batch's domain labels, as tensors, has a member for each sample, and the domain losses are
    computed once for each; two forward and two backward passes, and a step of momentum SGD.
    """
    torch.manual_seed(seed)
    model, criterion = digits_mlp(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    start = time.perf_counter()
    for inputs, labels, domains in batches(split, seed):
        outputs = model(inputs)
        losses = [criterion(outputs[domains == d], labels[domains == d]) for d in list(set(domains))]
        spread = torch.stack(losses)
        (criterion(outputs, labels) - LAM * ((spread - spread.mean()) ** 2).mean()).backward()
        with torch.no_grad():
            length = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            steps = [RHO * p.grad / (length + 1e-12) for p in model.parameters()]
            for p, up in zip(model.parameters(), steps, strict=True):
                p.add_(up)
        optimizer.zero_grad()
        criterion(model(inputs), labels).backward()
        with torch.no_grad():
            for p, up in zip(model.parameters(), steps, strict=True):
                p.sub_(up)
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - start) / STEPS


def main() -> None:
    torch.set_num_threads(1)
    split = load_suite("digits-rotated").split("rot75")
    settings = Settings("disam", rho=RHO, lam=LAM, lr=LR, momentum=MOMENTUM, batch_size=BATCH, steps=STEPS)
    runs = [Run(settings, split, seed) for seed in range(RUNS)]
    times: dict[str, list[float]] = {"stacked": [], "alone": [], "released": []}
    for repeat in range(REPEATS + 1):
        measured = {
            "released": released_seconds(split, repeat),
            "stacked": stacked_seconds(runs),
            "alone": stacked_seconds(runs[:1]),
        }
        for name, value in measured.items() if repeat else ():  # the first warms up
            times[name].append(value)
    for name, values in times.items():
        print(f"{name:8} {1e6 * statistics.median(values):6.0f} us a run-step")
    for name in ("alone", "released"):
        ratios = sorted(slow / fast for slow, fast in zip(times[name], times["stacked"], strict=True))
        print(f"{name} / {RUNS} stacked: {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")


if __name__ == "__main__":
    main()
