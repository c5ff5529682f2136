"""One Hessian product against one gradient, in each mode, and its peak memory. ``python benchmarks/products.py``.

Times are medians over products taken in turn with gradients. Memory is the peak of the process above what it held
before, each measurement in a process of its own.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import domains, trained

from disam_theory.losses import model_losses, parameters_of
from disam_theory.operators import Curvature, domain_gradients

SAMPLES, CHUNK, REPEATS = 64, 32, 9
WHAT = ("gradient", "kept", "kept, no memory", "forward")


def work(name: str, what: str) -> Callable[[], object]:
    """A function that makes one gradient or one product of the pooled loss."""
    data = domains(SAMPLES)
    model = trained(name, data, steps=3)
    losses, params = model_losses(model, data, chunk=CHUNK), parameters_of(model)
    if what == "gradient":
        return lambda: domain_gradients(losses, params)
    curvature = Curvature(
        losses, params, mode=what.split(",")[0], memory=0 if what.endswith("no memory") else 16 * 2**30
    )
    operator = curvature.operator(losses.shares)
    vector = torch.randn(curvature.size, generator=torch.Generator().manual_seed(0))
    return lambda: operator.matvec(vector)


def peak(name: str, what: str) -> float:
    """MiB that three calls add to the peak of a fresh process."""
    command = [sys.executable, __file__, "--peak", name, what]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def seconds(function: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """A Markdown table."""
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["--peak"]:
        function = work(*sys.argv[2:4])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(3):
            function()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {SAMPLES} samples, batches of {CHUNK}")
    print("| model | what | time over a gradient's, median | peak MiB above start |\n|---|---|---|---|")
    for name in ("cnn", "resnet", "vit"):
        functions = {what: work(name, what) for what in WHAT}
        times: dict[str, list[float]] = {what: [] for what in WHAT}
        for function in functions.values():
            function()
        for _ in range(REPEATS):
            for what, function in functions.items():
                times[what].append(seconds(function))
        for what in WHAT:
            ratio = statistics.median(a / b for a, b in zip(times[what], times["gradient"], strict=True))
            print(f"| {name} | {what} | {ratio:.2f} | {peak(name, what):.0f} |", flush=True)


if __name__ == "__main__":
    main()
