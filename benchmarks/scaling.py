"""Cost against the number of samples and of eigenpairs, and the peak memory against the number of samples.

``python benchmarks/scaling.py --out benchmarks/scaling.png``; prints two Markdown tables, and plots them. Seconds are
medians; the memory is that of a fresh process above what it held before, in the mode that keeps no graph.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import domains, peak_added, trained

from disam_theory.domains import Domain
from disam_theory.losses import model_losses, parameters_of
from disam_theory.operators import Curvature
from disam_theory.spectrum import domain_spectra

SAMPLES, PAIRS = (64, 128, 256, 512), (1, 2, 4, 6, 8, 10)


def measure(model: nn.Module, data: list[Domain], k: int, mode: str = "kept", products: int = 300) -> tuple[int, float]:
    """Products, and seconds, of the five spectra."""
    start = time.perf_counter()
    curvature = Curvature(model_losses(model, data, chunk=16), parameters_of(model), mode=mode)
    spectra = domain_spectra(curvature, k, tol=1e-3, max_products=products)
    return sum(pairs.products for pairs in spectra.values()), time.perf_counter() - start


def peak(samples: int) -> float:
    """MiB that 5 products of each spectrum add to the peak of a fresh process."""
    command = [sys.executable, __file__, "--peak", str(samples)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Two tables and a plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", type=int)
    arguments = parser.parse_args()
    if arguments.peak:
        data, model = domains(arguments.peak), trained("cnn", domains(64))
        print(peak_added(lambda: measure(model, data, 1, "forward", 5)))
        return
    print("| samples | seconds a product of all the data | peak MiB, low-memory mode |\n|---|---|---|")
    model, costs = trained("cnn", domains(64)), []
    for samples in SAMPLES:
        runs = [measure(model, domains(samples), 1) for _ in range(arguments.repeats)]
        # five spectra: each domain's product costs its share of the data, so that two in five are of all the data
        costs.append(statistics.median(seconds / (0.4 * products) for products, seconds in runs))
        print(f"| {samples} | {costs[-1]:.3f} | {peak(samples):.0f} |", flush=True)
    print("\n| k | products of the five spectra | seconds |\n|---|---|---|")
    spent, times = [], []
    for k in PAIRS:
        runs = [measure(model, domains(64), k) for _ in range(arguments.repeats)]
        spent.append(runs[0][0])
        times.append(statistics.median(seconds for _, seconds in runs))
        print(f"| {k} | {spent[-1]} | {times[-1]:.1f} |", flush=True)
    if arguments.out:
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        left.plot(SAMPLES, costs, "o-")
        left.set(xlabel="samples", ylabel="seconds a product", xlim=(0, None), ylim=(0, None))
        right.plot(PAIRS, spent, "o-")
        right.set(xlabel="eigenpairs k", ylabel="products of five spectra", xlim=(0, None), ylim=(0, None))
        figure.savefig(arguments.out, dpi=120)


if __name__ == "__main__":
    main()
