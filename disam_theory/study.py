"""Blocks of (suite, arms, seeds) -> jobs, stacks of runs -> traces on disk, every run once -> paired measurements.

A study lives in a folder: ``traces/SUITE/HELD-OUT/ARM/seedN.jsonl`` and, where asked for, the weights at some steps
as ``weights/SUITE/HELD-OUT/ARM/seedN-stepT.pt`` (a state dict under ``state_dict``, and the trace's header). A run
that is complete there is not repeated, so an interrupted study goes on where it stopped; as stacked runs do not
depend on their company, the numbers are the same. :mod:`disam_theory.runs` has the single run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from disam_theory.algorithms import Settings
from disam_theory.domains import Split, Suite
from disam_theory.errors import ComputationError, UsageError
from disam_theory.provenance import provenance
from disam_theory.runs import Job, Record, Splits
from disam_theory.sweep import Place, advance
from disam_theory.traces import Trace

STACK = 128  # runs advanced together at most: beyond, the working set leaves the cache and nothing is gained


@dataclass(frozen=True)
class Block:
    """Every arm on every held-out domain of a suite, for ``seeds`` seeds; arms of one block are stacked together.

    ``record_every``: the traces hold every so many steps only, and the evaluated ones; what a step holds stays the
    same, its angle to the step before it included.
    """

    suite: str
    arms: tuple[Settings, ...]
    seeds: int
    snapshot_steps: tuple[int, ...] = ()  # steps after which weights are kept
    snapshot_seeds: int = 0  # for so many seeds
    record_every: int = 1

    def __post_init__(self) -> None:
        if self.record_every < 1:
            raise UsageError(f"record_every is {self.record_every}; give 1 for every step, or 10 for every tenth")


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
        self._splits = Splits()
        _check_apart(self.blocks)

    @property
    def suites(self) -> list[str]:
        """The names of the suites, each once."""
        return list(dict.fromkeys(block.suite for block in self.blocks))

    def suite(self, name: str, seed: int) -> Suite:
        """The suite as seed ``seed`` draws it."""
        return self._splits.suite(name, seed)

    def split(self, record: Record) -> Split:
        """The split that a run trains and tests on."""
        return self._splits.of(record)

    def records(self, suite: str, **settings: object) -> list[Record]:
        """The runs on ``suite`` whose settings have the given values, by seed and held-out domain.

        Of the average loss, unless an ``objective`` is named.
        """
        settings = {"objective": "average", **settings}
        chosen = [
            record
            for record in self._records.get(suite, ())
            if all(getattr(record.settings, k) == v for k, v in settings.items())
        ]
        if not chosen:
            raise ComputationError(f"the study has no runs on {suite!r} with {settings}; add an arm with them")
        return chosen

    def measure(self, records: Sequence[Record], statistic: Callable[[Trace], float]) -> np.ndarray:
        """``statistic`` of each run, (S, H): a row a seed, a column a held-out domain; each held-out has each seed.

        Raises:
            UsageError: the runs are of several arms, or one is missing.
        """
        places = {(record.seed, record.held_out) for record in records}
        seeds, held_out = ({place[k] for place in places} for k in (0, 1))
        if not len(records) == len(places) == len(seeds) * len(held_out):
            arms = sorted({record.settings.name for record in records})
            raise UsageError(
                f"{len(records)} runs of {', '.join(arms)} do not fill {len(seeds)} seeds x {len(held_out)} held-out "
                "domains once each; pick the runs of one arm"
            )
        ordered = sorted(records, key=lambda record: (record.seed, record.held_out))
        return np.array([statistic(record.trace) for record in ordered]).reshape(len(seeds), -1)

    def run(self, place: Place | None = None) -> None:
        """Make every run that is not there yet, here or at ``place``.

        Raises:
            ComputationError: runs are still missing at the end.
        """
        place = place or Place()
        jobs = self.jobs()
        total, done = sum(job.size for job in jobs), 0
        what = f"{sum(len(job.records) for job in jobs):,} runs"
        if place.here or (place.backend == "local" and len(jobs) == 1):
            for job in jobs:
                job(partial(self._stepped, what, done, len(job.records), total))
                done += job.size
            return
        self.progress(what, 0, total)
        for size in advance(jobs, place, self.folder / "jobs"):
            done += size
            self.progress(what, done, total)
        if lost := [record for job in jobs for record in job.pending()]:
            raise ComputationError(
                f"{len(lost)} runs, {lost[0].place} for one, are not in {self.folder} though their jobs have ended; "
                "the workers must share its file system"
            )

    def _stepped(self, what: str, before: int, runs: int, total: int, step: int) -> None:
        self.progress(what, before + (step + 1) * runs, total)

    def jobs(self) -> list[Job]:
        """The runs that are not there yet, in stacks."""
        return [
            replace(whole, records=tuple(stack)) for whole in self._wholes() for stack in self._stacks(whole.pending())
        ]

    def require(self) -> None:
        """Refuse to go on without a run.

        Raises:
            UsageError: a run is not there, is not complete, or has other settings.
        """
        lacking = [why for whole in self._wholes() for record in whole.records if (why := whole.lacks(record))]
        if lacking:
            runs = sum(len(records) for records in self._records.values())
            raise UsageError(
                f"{len(lacking):,} of {runs:,} runs cannot be read: {lacking[0]}; give the options that the "
                f"others were made with, or make these with --out {self.folder}"
            )

    @cached_property
    def _records(self) -> dict[str, list[Record]]:
        """The runs on each suite, by seed and held-out domain."""
        found: dict[str, list[Record]] = {}
        for block in self.blocks:
            found.setdefault(block.suite, []).extend(self._block_records(block))
        return {suite: sorted(records, key=lambda r: (r.seed, r.held_out)) for suite, records in found.items()}

    def _block_records(self, block: Block) -> Iterator[Record]:
        names = [domain.name for domain in self.suite(block.suite, 0).domains]  # a seed redraws the data, not these
        folder = self.folder.absolute()  # other processes may have another working directory
        for seed in range(block.seeds):
            for name in names:
                for settings in block.arms:
                    yield Record(block.suite, name, seed, settings, folder)

    def _wholes(self) -> Iterator[Job]:
        """All runs of each block, those that are there and those that are not."""
        for block in self.blocks:
            yield Job(
                tuple(self._block_records(block)),
                self.model,
                self.evaluate_every,
                str(self.device),
                provenance()["command"],
                block.snapshot_steps,
                block.snapshot_seeds,
                block.record_every,
            )

    def _stacks(self, records: list[Record]) -> Iterator[list[Record]]:
        """Runs that take the same passes: up to :data:`STACK`, and of one size where the batch is all the data."""
        groups: dict[tuple[object, ...], list[Record]] = {}
        for record in records:
            full = record.settings.sampling == "full"
            size = sum(len(d) for d in self.split(record).sources) if full else 0
            groups.setdefault((record.settings.sampling, size, *record.settings.passes), []).append(record)
        for group in groups.values():
            stacks = -(-len(group) // STACK)
            for k in range(stacks):  # of equal length, so that no process waits for a long one
                yield group[k * len(group) // stacks : (k + 1) * len(group) // stacks]


def _check_apart(blocks: Sequence[Block]) -> None:
    """Refuse two arms of one name on one suite: their runs would have one trace."""
    seen: dict[tuple[str, str], int] = {}
    for number, block in enumerate(blocks, 1):
        for settings in block.arms:
            arm = (block.suite, settings.name)
            if arm in seen:
                where = f"block {number} twice" if seen[arm] == number else f"blocks {seen[arm]} and {number}"
                raise UsageError(
                    f"two arms on {block.suite!r} have the name {settings.name!r}, in {where}, so that one's traces "
                    "would overwrite the other's; keep one, or change a setting that the name shows"
                )
            seen[arm] = number
