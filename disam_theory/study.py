"""Blocks of (suite, arms, seeds) -> traces on disk, every run once -> paired measurements.

A study lives in a folder: ``traces/SUITE/HELD-OUT/ARM/seedN.jsonl`` and, where asked for, the weights at some steps
as ``weights/SUITE/HELD-OUT/ARM/seedN-stepT.pt`` (a state dict under ``state_dict``, and the trace's header). A run
that is complete there is not repeated, so an interrupted study goes on where it stopped; as stacked runs do not
depend on their company, the numbers are the same.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from disam_theory.algorithms import Settings
from disam_theory.domains import Split, Suite, load_suite
from disam_theory.errors import ComputationError
from disam_theory.files import write_atomically
from disam_theory.losses import Params
from disam_theory.provenance import provenance
from disam_theory.traces import Trace, TraceWriter, finished, read_trace
from disam_theory.training import Run, train

STACK = 128  # runs advanced together at most: beyond, the working set leaves the cache and nothing is gained


@dataclass(frozen=True)
class Block:
    """Every arm on every held-out domain of a suite, for ``seeds`` seeds; arms of one block are stacked together."""

    suite: str
    arms: tuple[Settings, ...]
    seeds: int
    snapshot_steps: tuple[int, ...] = ()  # steps after which weights are kept
    snapshot_seeds: int = 0  # for so many seeds


@dataclass(frozen=True)
class Record:
    """One run of a study."""

    suite: str
    held_out: str
    seed: int
    settings: Settings
    folder: Path

    @property
    def path(self) -> Path:
        """Where its trace is."""
        return self.folder / "traces" / self._place.with_suffix(".jsonl")

    def weights_path(self, step: int) -> Path:
        """Where its weights at ``step`` are, if they were kept."""
        return self.folder / "weights" / self._place.parent / f"seed{self.seed}-step{step}.pt"

    @property
    def _place(self) -> Path:
        return Path(self.suite) / self.held_out / self.settings.name / f"seed{self.seed}"

    @cached_property
    def trace(self) -> Trace:
        """The recorded steps.

        Raises:
            ComputationError: the run diverged, so that there is nothing to compare.
        """
        trace = read_trace(self.path)
        if trace.end == "diverged":
            raise ComputationError(f"{self.path}: the run diverged; lower the learning rate or rho of this arm")
        return trace

    def weights(self, step: int) -> Params:
        """The weights at ``step``."""
        return dict(torch.load(self.weights_path(step), weights_only=True)["state_dict"])


class Study:
    """The runs of some blocks, made when first asked for."""

    def __init__(
        self,
        folder: Path,
        blocks: Sequence[Block],
        model: Callable[[], nn.Module],
        *,
        evaluate_every: int = 10,
        device: torch.device | str = "cpu",
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self.folder, self.blocks, self.model = folder, tuple(blocks), model
        self.evaluate_every, self.device, self.progress = evaluate_every, device, progress
        self._suites: dict[tuple[str, int], Suite] = {}
        self._splits: dict[tuple[str, str, int], Split] = {}

    @property
    def suites(self) -> list[str]:
        """The names of the suites, each once."""
        return list(dict.fromkeys(block.suite for block in self.blocks))

    def suite(self, name: str, seed: int) -> Suite:
        """The suite as seed ``seed`` draws it."""
        key = (name, seed)
        if key not in self._suites:
            self._suites[key] = load_suite(name, rng=seed)
        return self._suites[key]

    def split(self, record: Record) -> Split:
        """The split that a run trains and tests on."""
        key = (record.suite, record.held_out, record.seed)
        if key not in self._splits:
            self._splits[key] = self.suite(record.suite, record.seed).split(record.held_out, rng=record.seed)
        return self._splits[key]

    def records(self, suite: str, **settings: object) -> list[Record]:
        """The runs on ``suite`` whose settings have the given values, by seed and held-out domain."""
        chosen = [
            record
            for block in self.blocks
            for record in self._block_records(block)
            if record.suite == suite and all(getattr(record.settings, k) == v for k, v in settings.items())
        ]
        if not chosen:
            raise ComputationError(f"the study has no runs on {suite!r} with {settings}; add an arm with them")
        return sorted(chosen, key=lambda record: (record.seed, record.held_out))

    def measure(self, records: Sequence[Record], statistic: Callable[[Trace], float]) -> np.ndarray:
        """``statistic`` of each run, (S, H): a row a seed, a column a held-out domain; each held-out has each seed."""
        seeds = sorted({record.seed for record in records})
        values = np.array([statistic(record.trace) for record in records])
        return values.reshape(len(seeds), -1)

    def run(self) -> None:
        """Make every run that is not there yet."""
        for block in self.blocks:
            pending = [r for r in self._block_records(block) if not self._made(block, r)]
            for stack in self._stacks(pending):
                self._train(block, stack)

    def _made(self, block: Block, record: Record) -> bool:
        kept = record.seed < block.snapshot_seeds
        weights = all(record.weights_path(step).exists() for step in block.snapshot_steps) if kept else True
        return weights and finished(record.path, self._header(record))

    def _block_records(self, block: Block) -> Iterator[Record]:
        for seed in range(block.seeds):
            for domain in self.suite(block.suite, seed).domains:
                for settings in block.arms:
                    yield Record(block.suite, domain.name, seed, settings, self.folder)

    def _stacks(self, records: list[Record]) -> Iterator[list[Record]]:
        """Runs that may be stacked: up to :data:`STACK`, and of one size where the batch is all the data."""
        groups: dict[tuple[str, int], list[Record]] = {}
        for record in records:
            full = record.settings.sampling == "full"
            size = sum(len(d) for d in self.split(record).sources) if full else 0
            groups.setdefault((record.settings.sampling, size), []).append(record)
        for group in groups.values():
            for start in range(0, len(group), STACK):
                yield group[start : start + STACK]

    def _train(self, block: Block, stack: list[Record]) -> None:
        runs = [Run(record.settings, self.split(record), record.seed) for record in stack]
        what = f"{len(stack)} runs on {block.suite}"
        total = runs[0].settings.steps
        writers = [TraceWriter(record.path, self._header(record)) for record in stack]
        results = train(
            self.model,
            runs,
            writers=writers,
            evaluate_every=self.evaluate_every,
            snapshot_steps=block.snapshot_steps if any(r.seed < block.snapshot_seeds for r in stack) else (),
            device=self.device,
            progress=lambda step: self.progress(what, step + 1, total),
        )
        for record, result in zip(stack, results, strict=True):
            if record.seed < block.snapshot_seeds:
                for step, params in result.snapshots.items():
                    _save(record.weights_path(step), params, self._header(record))

    def _header(self, record: Record) -> dict[str, object]:
        split = self.split(record)
        settings = {
            **record.settings.header(),
            "suite": record.suite,
            "held_out": record.held_out,
            "seed": record.seed,
            "model": f"{self.model.__module__}:{self.model.__qualname__}",
            "evaluate_every": self.evaluate_every,
        }
        return {
            "domains": [domain.name for domain in split.sources],
            "sizes": [len(domain) for domain in split.sources],
            "settings": settings,
            "provenance": provenance(rng=record.seed, device=str(self.device), dtype="float32"),
        }


def _save(path: Path, params: Params, header: dict[str, object]) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": {name: p.cpu() for name, p in params.items()}, **header}, buffer)
    write_atomically(path, buffer.getvalue())
