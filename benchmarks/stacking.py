"""Time of one run-step, stacked against one run at a time, recording nothing. ``python benchmarks/stacking.py``.

Prints medians over repeats taken in turn, and their ratio; one thread, as the study runs.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from disam_theory.algorithms import Settings
from disam_theory.domains import load_suite
from disam_theory.models import digits_mlp
from disam_theory.training import Run, train

STEPS, RUNS, REPEATS = 60, 96, 5


def seconds_a_step(runs: list[Run]) -> float:
    """Seconds for one step of one run, over all ``runs`` trained together."""
    start = time.perf_counter()
    train(digits_mlp, runs)
    return (time.perf_counter() - start) / (STEPS * len(runs))


def main() -> None:
    torch.set_num_threads(1)
    suite = load_suite("digits-rotated")
    split = suite.split("rot75")
    runs = [Run(Settings("disam", steps=STEPS), split, seed) for seed in range(RUNS)]
    stacked, alone = [], []
    for _ in range(REPEATS):
        stacked.append(seconds_a_step(runs))
        alone.append(statistics.median(seconds_a_step([run]) for run in runs[:4]))
    a, b = statistics.median(alone), statistics.median(stacked)
    print(f"alone {1e6 * a:.0f} us, {RUNS} stacked {1e6 * b:.0f} us a run-step: ratio {a / b:.1f}")


if __name__ == "__main__":
    main()
