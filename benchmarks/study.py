"""The study's runs by one process and by two, their size on disk, and reading them. ``python benchmarks/study.py``.

Variants are taken in turn; printed are medians of wall and of processor time (which is that of all processes), bytes
of a trace, and the peak of resident memory. Reading is measured on as many traces as the full study has, each arm
measured twice, as its claims and figures do.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the study runs; two threads on busy cores are far slower
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from disam_theory.algorithms import Settings
from disam_theory.models import digits_mlp
from disam_theory.study import Block, Study
from disam_theory.sweep import Place
from disam_theory.traces import Trace, read_trace

STEPS, SEEDS, ARMS, REPEATS = 300, 4, 8, 3
READ = {"seeds": 20, "arms": 35}
SUITES = ("digits-rotated", "digits-corrupted", "digits-sources")
PROCESSES = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def part(folder: Path, record_every: int, *, seeds: int = SEEDS, arms: int = ARMS, steps: int = STEPS) -> Study:
    """``seeds`` x ``arms`` x 13 held-out domains."""
    common = {"lr": 0.1, "momentum": 0.9, "steps": steps, "batch_size": 96}
    settings = tuple(Settings("disam", rho=0.05, lam=(k + 1) / 100, **common) for k in range(arms))
    return Study(folder, [Block(suite, settings, seeds, record_every=record_every) for suite in SUITES], digits_mlp)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds; the latter of this process and of those that have ended under it."""

    def spent() -> float:
        used = [resource.getrusage(who) for who in PROCESSES]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    wall, processor = time.perf_counter(), spent()
    work()
    return time.perf_counter() - wall, spent() - processor


def train(record_every: int, processes: int) -> tuple[tuple[float, float], list[int]]:
    """The seconds that the runs take, and their traces' sizes in bytes."""
    from joblib.externals.loky import get_reusable_executor

    def work() -> None:
        study.run(Place(processes=processes))
        if processes > 1:
            get_reusable_executor().shutdown(wait=True)  # so that the processes' time is counted

    with tempfile.TemporaryDirectory() as folder:
        study = part(Path(folder), record_every)
        took = seconds(work)
        return took, [path.stat().st_size for path in Path(folder).rglob("*.jsonl")]


def training() -> None:
    """Each variant's medians."""
    variants = {(1, 1): [], (10, 1): [], (10, 2): []}  # (record_every, processes)
    for _ in range(REPEATS):
        for variant, found in variants.items():
            found.append(train(*variant))
    for (every, processes), found in variants.items():
        wall, processor = (statistics.median(took[k] for took, _ in found) for k in (0, 1))
        sizes = found[0][1]
        print(
            f"{len(sizes)} runs of {STEPS} steps, every {every} recorded, {processes} process(es): {wall:.1f} s wall, "
            f"{processor:.1f} s processor, {1e6 * processor / (len(sizes) * STEPS):.0f} us a run-step, "
            f"{sum(sizes) / len(sizes) / 1024:.1f} KiB a trace"
        )
    print(f"peak memory of a process that trains: {peak():.0f} MiB")


def peak() -> float:
    """Largest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def last_loss(trace: Trace) -> float:
    """What a check takes of each trace."""
    return float(trace.evaluations["unseen_loss"][-1])


def reading(record_every: int) -> None:
    """All traces of a study of the full size, each a copy of one run's."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as one:
        small = part(Path(one), record_every, seeds=1, arms=1, steps=300)
        small.run()
        texts = {suite: small.records(suite)[0].path.read_bytes() for suite in SUITES}
        study = part(Path(folder), record_every, seeds=READ["seeds"], arms=READ["arms"], steps=300)
        for suite in SUITES:
            for record in study.records(suite):
                record.path.parent.mkdir(parents=True, exist_ok=True)
                record.path.write_bytes(texts[suite])

        def measure() -> None:
            for suite in SUITES:
                for k in range(READ["arms"]):
                    study.measure(study.records(suite, lam=(k + 1) / 100), last_loss)

        paths = [record.path for suite in SUITES for record in study.records(suite)]
        before = peak()
        alone = seconds(lambda: [last_loss(read_trace(path)) for path in paths])[1]
        first, again = seconds(measure)[1], seconds(measure)[1]
        print(
            f"{len(paths)} traces, every {record_every} of 300 steps: {alone:.1f} s to read each, {first:.1f} s to "
            f"measure all, {again:.2f} s to measure all again; peak memory {before:.0f} -> {peak():.0f} MiB"
        )


if __name__ == "__main__":
    training()
    for every in (10, 1):
        reading(every)
